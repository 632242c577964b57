"""Two networks, exported for real and timed side by side on every runtime that is here. Shapes: N images a call."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from cspdeploy.check.latency import LatencySettings, measure_latency, noise_warning
from cspdeploy.check.machine import MachineWatch
from cspdeploy.core.catalog import EAGER, INPUT_NAME
from cspdeploy.core.datasets import FASHION_MNIST, FASHION_MNIST_FOLDER, open_dataset
from cspdeploy.core.env import num_usable_cpus, package_version
from cspdeploy.core.errors import InputError, RuntimeUnavailableError
from cspdeploy.core.model_folder import CALIBRATION_FILE, WEIGHTS_FILE, read_calibration, write_calibration, write_spec
from cspdeploy.core.sizes import size_of
from cspdeploy.core.types import Artifact, Manifest, Timing
from cspdeploy.nets.weights import write_safetensors
from cspdeploy.pipeline.images import real_images
from cspdeploy.pipeline.recipe import ExportRequest, export_bundle
from cspdeploy.pipeline.sides import Side
from cspdeploy.pipeline.weights import make_untrained
from cspdeploy.runtimes import all_runtimes, require_runtime
from cspdeploy.runtimes.base import Runtime, Session, SessionRequest

__all__ = ["LatencyRow", "Prepared", "find_images", "judge_pair", "prepare_side", "time_pair"]

Progress = Callable[[str, int, int], None]
NUM_IMAGES = 64  # the export takes half of them to prove itself on, and half to find the ranges of FP16
PAIR_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyRow:
    """Both sides on one runtime at one batch, measured in turns. Ratios are B over A: below 1, B is faster.

    Attributes:
        engine: its name, version, device and threads.
        ratio: the median over the rounds of the interleaved run; near that of the medians, free of the machine's drift.
        ratio_low: with `ratio_high` its bootstrap 95 % interval.
        verdict: of B. "not-measured" for the reason in `reason`.
    """

    runtime: str
    artifact: str
    precision: str
    batch: int
    engine: str
    verdict: Literal["faster", "slower", "indistinguishable", "not-measured"]
    reason: str = ""
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    a: Timing | None = None
    b: Timing | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A side, exported: its bundle, and the weights of the eager network."""

    manifest: Manifest
    folder: Path
    weights: Path

    def artifacts(self) -> dict[str, Artifact]:
        """By kind, of the bundle's first size."""
        return {artifact.kind: artifact for artifact in self.manifest.artifacts if size_of(artifact.kind) is None}


# --- export ---


def find_images(sides: tuple[Side, Side], calibration: Path | None) -> npt.NDArray[np.uint8] | None:
    """Real images for sides that bring none: the folder given, a side's own, Fashion-MNIST. None where none is needed.

    Raises:
        InputError: they are needed, and there are none.
    """
    if all(side.kind == "bundle" or (_holds(side, WEIGHTS_FILE) and _holds(side, CALIBRATION_FILE)) for side in sides):
        return None
    if calibration is not None:
        return real_images(sides[0].spec, None, calibration)[0][:NUM_IMAGES]
    for side in sides:
        if side.folder is not None and _holds(side, CALIBRATION_FILE):
            return read_calibration(side.folder / CALIBRATION_FILE)[:NUM_IMAGES]
    if FASHION_MNIST_FOLDER.is_dir():
        stored = open_dataset(FASHION_MNIST, split="test").stored
        return None if stored is None else stored[:NUM_IMAGES]
    raise InputError(
        "no real images to export the networks with",
        fix=f"give --calib DIR, or --no-latency, or apt-get install dataset-{FASHION_MNIST}",
    )


def _holds(side: Side, file: str) -> bool:
    return side.kind == "model" and side.folder is not None and (side.folder / file).is_file()


def prepare_side(
    side: Side, *, size_px: tuple[int, int], images: npt.NDArray[np.uint8] | None, calibration: Path | None,
    work: Path, progress: Progress,
) -> Prepared:  # fmt: skip
    """Export a side at that size, with a free batch and with FP16. A bundle is taken as it is.

    Networks without weights here get random ones: in FP32 the time does not depend on the values, in FP16
    they decide which nodes stay in FP32.

    Args:
        images: of `find_images`, for a side that has none.
        calibration: folder of images that takes the place of a model's own.

    Raises:
        InputError: it cannot be exported, or it is a bundle of another size.
    """
    if side.manifest is not None and side.folder is not None:
        if side.size_px != size_px:
            own, asked = ("x".join(map(str, size)) for size in (side.size_px, size_px))
            raise InputError(
                f"{side.given}: is exported for {own} px, cannot be timed at {asked} px",
                fix=f"--size {own}, --no-latency, or name the network instead of the bundle",
            )
        weights = _whole_folder(side, work, None) / WEIGHTS_FILE
        return Prepared(manifest=side.manifest, folder=side.folder, weights=weights)
    folder = side.folder
    if folder is None or not (_holds(side, WEIGHTS_FILE) and _holds(side, CALIBRATION_FILE)):
        folder = _whole_folder(side, work, images)
    request = ExportRequest(
        model=str(folder.resolve()), models=work, output=work / "exported", calibration=calibration, size_px=size_px,
        fp16=True, dynamic_batch=True,
    )  # fmt: skip
    report = export_bundle(request, progress=lambda what, done, total: progress(f"{side.given}: {what}", done, total))
    return Prepared(manifest=report.manifest, folder=Path(report.folder), weights=folder / WEIGHTS_FILE)


def _whole_folder(side: Side, work: Path, images: npt.NDArray[np.uint8] | None) -> Path:
    """A model folder below `work` with the side's weights, or random ones, and with those images."""
    folder = work / "models" / side.spec.name
    folder.mkdir(parents=True)
    spec = side.spec
    if side.folder is not None and _holds(side, WEIGHTS_FILE):
        shutil.copy(side.folder / WEIGHTS_FILE, folder)
    else:
        spec, model = make_untrained(spec)
        write_safetensors(folder / WEIGHTS_FILE, model, dtype=torch.float32)
    write_spec(folder, spec)
    if images is not None:
        write_calibration(folder / CALIBRATION_FILE, images)
    return folder


# --- timing ---


def time_pair(
    a: Prepared, b: Prepared, *, runtimes: tuple[str, ...], batches: tuple[int, ...], settings: LatencySettings,
    progress: Progress,
) -> tuple[list[LatencyRow], list[str]]:  # fmt: skip
    """Time both on each runtime and at each batch, in turns. Gives the rows, and warnings of noise.

    Args:
        runtimes: names; empty for all that are here.

    Raises:
        InputError: unknown runtime.
        RuntimeUnavailableError: a runtime that was asked for is missing, or did not take the work.
    """
    wanted = [require_runtime(name) for name in runtimes] or [
        runtime for runtime in all_runtimes().values() if runtime.missing() is None
    ]
    jobs = [(runtime, kind) for runtime in wanted if runtime.timed for kind in _common_kinds(a, b, runtime)]
    if not jobs:
        raise InputError("nothing to time: no runtime here reads what both sides have", fix="cspdeploy doctor")
    rows: list[LatencyRow] = []
    warnings: list[str] = []
    for i, (runtime, kind) in enumerate(jobs):
        pair = _Pair(a, b, runtime, kind, asked=bool(runtimes))
        for batch in batches:
            progress(f"{kind} on {runtime.name}, batch {batch}", i, len(jobs))
            watch = MachineWatch()
            row = pair.measure(batch, settings)
            rows.append(row)
            if row.a and row.b and (warning := noise_warning({"A": row.a, "B": row.b}, watch.findings())):
                warnings.append(f"{kind} on {runtime.name}, batch {batch}: {warning}")
    return rows, warnings


def _common_kinds(a: Prepared, b: Prepared, runtime: Runtime) -> list[str]:
    """What the runtime reads of both, in the precision that the file says.

    A runtime that has a remark on a precision does not compute in it, and its time says nothing of it.
    """
    if runtime.reads(format_=EAGER, precision="fp32"):
        return [EAGER]
    ours, theirs = a.artifacts(), b.artifacts()
    return [
        kind
        for kind, artifact in ours.items()
        if kind in theirs
        and artifact.frontend is None  # their input is another one
        and runtime.reads(format_=artifact.format, precision=artifact.precision)
        and artifact.precision not in runtime.notes
    ]


class _Pair:
    """Both sides of one kind on one runtime. Sessions stay open for all batches."""

    def __init__(self, a: Prepared, b: Prepared, runtime: Runtime, kind: str, *, asked: bool) -> None:
        self._sides, self._runtime, self._kind = {"A": a, "B": b}, runtime, kind
        self._sessions: dict[str, Session] = {}
        self._problem = ""
        precision = "fp32" if kind == EAGER else a.artifacts()[kind].precision
        self._base = LatencyRow(
            runtime=runtime.name, artifact=kind, precision=precision, batch=1, engine=_describe_engine(runtime),
            verdict="not-measured",
        )  # fmt: skip
        try:
            self._sessions = {name: runtime.open(self._request(side)) for name, side in self._sides.items()}
        except RuntimeUnavailableError as error:
            if asked:
                raise
            self._problem = error.message
        except Exception as error:  # an engine may raise anything; the others must still be timed
            self._problem = _first_line(error)

    def _request(self, side: Prepared) -> SessionRequest:
        spec = side.manifest.spec
        if self._kind == EAGER:
            return SessionRequest(path=side.weights, outputs=spec.outputs, spec=spec)
        return SessionRequest(path=side.folder / side.artifacts()[self._kind].file, outputs=spec.outputs)

    def measure(self, batch: int, settings: LatencySettings) -> LatencyRow:
        row = dataclasses.replace(self._base, batch=batch)
        problem = self._problem or self._fixed_batch(batch)
        if problem:
            return dataclasses.replace(row, reason=problem)
        try:
            calls = {name: self._bind(name, batch) for name in self._sessions}
            found = measure_latency(calls, settings)
        except Exception as error:  # out of memory, an operator that the device lacks
            return dataclasses.replace(row, reason=_first_line(error))
        return judge_pair(row, found["A"], found["B"])

    def _fixed_batch(self, batch: int) -> str:
        if self._kind == EAGER:
            return ""
        for name, side in self._sides.items():
            fixed = side.artifacts()[self._kind].inputs[0].shape[0]
            if isinstance(fixed, int) and fixed != batch:
                return f"{name} is exported for a batch of {fixed}"
        return ""

    def _bind(self, name: str, batch: int) -> Callable[[], None]:
        preprocess = self._sides[name].manifest.spec.preprocess
        shape = (batch, 3, preprocess.height_px, preprocess.width_px)
        x_NCHW = np.random.default_rng(PAIR_SEED).standard_normal(shape, np.float32)  # as normalised pixels are
        return self._sessions[name].bind({INPUT_NAME: x_NCHW})


def judge_pair(row: LatencyRow, a: Timing, b: Timing) -> LatencyRow:
    """The row with both timings. `b.verdict` and `b.ratio` are against A, as speed; the row's ratios are of times."""
    verdict = "indistinguishable" if b.verdict == "reference" else b.verdict
    return dataclasses.replace(
        row, verdict=verdict, ratio=1 / b.ratio, ratio_low=1 / b.ratio_high, ratio_high=1 / b.ratio_low, a=a, b=b
    )


def _describe_engine(runtime: Runtime) -> str:
    """Engine, version, device and threads: what a latency holds for."""
    is_ort = runtime.name.startswith("ort")
    packages = ("onnxruntime", "onnxruntime-gpu") if is_ort else ("torch",)
    version = next((f"{name} {found}" for name in packages if (found := package_version(name))), runtime.name)
    if runtime.device == "cuda":
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CUDA device"
        return f"{version}, {device}, without TF32"
    threads = f"its default threads on {num_usable_cpus()} CPUs" if is_ort else f"{torch.get_num_threads()} threads"
    return f"{version}, {threads}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
