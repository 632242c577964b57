"""`export`: network -> TorchScript, ONNX -> simplified -> rewritten -> FP16, then the bundle around them."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cspdeploy.check.latency import LatencySettings, measure_latency
from cspdeploy.core.bundle import BUNDLE, disk_errors, file_record, staged_folder, write_manifest
from cspdeploy.core.catalog import (
    ARTIFACT_KINDS,
    DEFAULT_OPSET,
    INPUT_NAME,
    MAX_OPSET,
    MIN_OPSET,
    artifact_file,
)  # fmt: skip
from cspdeploy.core.env import tool_versions
from cspdeploy.core.errors import InputError
from cspdeploy.core.golden import GOLDEN_FILE, Golden, num_golden_images, write_golden
from cspdeploy.core.metrics import relative_l2
from cspdeploy.core.model_folder import LABELS_FILE, write_text
from cspdeploy.core.spec import ModelSpec
from cspdeploy.core.types import Artifact, Manifest, StepRecord, TensorInfo
from cspdeploy.export.fp16 import convert_fp16
from cspdeploy.export.onnx import export_onnx
from cspdeploy.export.reference import compute_reference
from cspdeploy.export.rewrite import split_expansion_convolutions
from cspdeploy.export.simplify import LIMIT, start_simplify
from cspdeploy.export.torchscript import export_torchscript
from cspdeploy.nets.exported import FEATURE_STRIDES
from cspdeploy.pipeline.images import prepare
from cspdeploy.pipeline.source import Source, resolve_source
from cspdeploy.runtimes.ort import open_cpu_session

__all__ = ["ExportReport", "ExportRequest", "export_bundle"]

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRequest:
    """What to export, and how. Paths are as the user gave them."""

    model: str
    models: Path = Path("models")
    output: Path = Path("exported")
    weights: str | None = None
    calibration: Path | None = None
    names: Path | None = None
    size_px: tuple[int, int] | None = None
    features: bool = False
    strides: tuple[int, ...] = ()
    """Of the feature maps; empty: the usual ones. Only with `features`."""
    fp16: bool = False
    opset: int = DEFAULT_OPSET
    dynamic_batch: bool = False

    def __post_init__(self) -> None:
        if not MIN_OPSET <= self.opset <= MAX_OPSET:
            raise InputError(
                f"--opset {self.opset}: expected {MIN_OPSET} to {MAX_OPSET}", fix=f"--opset {DEFAULT_OPSET}"
            )
        if self.strides and not self.features:
            raise InputError("--strides: are of feature maps", fix="add --features")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """The bundle that was written."""

    folder: str
    manifest: Manifest


def export_bundle(request: ExportRequest, *, progress: Progress = lambda what, done, total: None) -> ExportReport:
    """Export one model into `<output>/<model>/`, whole or not at all.

    Raises:
        InputError: the request does not fit together, or the bundle cannot be written.
    """
    progress("loading weights", 0, 6)
    source = resolve_source(
        request.model, models=request.models, weights=request.weights, names=request.names,
        images=request.calibration, size_px=request.size_px, strides=request.strides if request.features else None,
    )  # fmt: skip
    folder = request.output / source.spec.name
    with disk_errors(folder, kind=BUNDLE), staged_folder(folder) as staging:
        manifest = _Export(request, source, staging, progress).write()
    return ExportReport(folder=str(folder), manifest=manifest)


class _Export:
    """One export in its staging folder."""

    def __init__(self, request: ExportRequest, source: Source, staging: Path, progress: Progress) -> None:
        self._request, self._source, self._staging, self._progress = request, source, staging, progress
        self._spec = source.spec
        self._output_shapes = _output_shapes(source.model, self._spec)
        num = num_golden_images(
            self._spec.preprocess.height_px, self._spec.preprocess.width_px,
            num_output_values=sum(math.prod(shape) for shape in self._output_shapes.values()),
        )  # fmt: skip
        # Golden and probe images are different ones where there are enough: every second one.
        picks = np.unique(np.linspace(0, len(source.images) - 1, 2 * num).astype(np.int64))
        self._golden_images = source.images[picks[::2]]
        self._x_golden = prepare(self._golden_images, self._spec)
        self._x_probe = prepare(source.images[picks[1::2]], self._spec) if len(picks) > 1 else self._x_golden

    def write(self) -> Manifest:
        artifacts = self._artifacts()
        write_text(self._staging / LABELS_FILE, "\n".join(self._source.labels) + "\n")
        files = tuple(file_record(self._staging / name) for name in (GOLDEN_FILE, LABELS_FILE))
        manifest = Manifest(
            spec=self._spec, labels=self._source.labels, artifacts=tuple(artifacts), files=files,
            options=self._options(), tools=tool_versions(),
        )  # fmt: skip
        write_manifest(self._staging, manifest)
        return manifest

    def _options(self) -> dict[str, Any]:
        request = self._request
        size = [self._spec.preprocess.height_px, self._spec.preprocess.width_px]
        return {
            "model": request.model, "weights": self._source.weights, "images": self._source.images_origin,
            "features": request.features, "strides": list(request.strides),
            "labels": self._source.labels_origin, "size_px": size, "fp16": request.fp16,
            "opset": request.opset, "dynamic_batch": request.dynamic_batch,
        }  # fmt: skip

    def _artifacts(self) -> list[Artifact]:
        """All steps. While onnxsim's child works, this process traces and computes the reference."""
        work = self._staging / "work"
        work.mkdir()
        raw, simplified, rewritten = (work / f"{name}.onnx" for name in ("raw", "simplified", "rewritten"))
        model, example = self._source.model, torch.from_numpy(self._x_golden[:1])
        self._progress("ONNX", 1, 6)
        exported = export_onnx(
            model, example, raw, names=self._spec.outputs, opset=self._request.opset,
            dynamic_batch=self._request.dynamic_batch,
        )  # fmt: skip
        job = start_simplify(raw, simplified)
        try:
            self._progress("TorchScript, while onnxsim runs", 2, 6)
            script = self._path("torchscript")
            traced = export_torchscript(model, example, script)
            self._progress("reference outputs in FP64", 3, 6)
            self._write_golden()
            self._progress("simplifying", 4, 6)
            steps: tuple[StepRecord, ...] = (exported, job.finish(self._x_golden, batch=1))
        finally:
            job.stop()
        steps += self._rewrite(simplified, rewritten)
        shutil.move(rewritten if rewritten.is_file() else simplified, self._path("onnx"))
        artifacts = [self._artifact("torchscript", (traced,)), self._artifact("onnx", steps)]
        if self._request.fp16:
            self._progress("FP16", 5, 6)
            converted = convert_fp16(self._path("onnx"), self._path("onnx-fp16"), self._x_probe, batch=1)
            artifacts.append(self._artifact("onnx-fp16", (*steps, converted)))
        shutil.rmtree(work)
        return artifacts

    def _write_golden(self) -> None:
        outputs_fp64, outputs_fp32 = compute_reference(self._source.model, self._x_golden, names=self._spec.outputs)
        golden = Golden(
            images=self._golden_images, x_NCHW=self._x_golden, outputs_fp64=outputs_fp64, outputs_fp32=outputs_fp32
        )
        write_golden(self._staging / GOLDEN_FILE, golden)

    def _rewrite(self, source: Path, target: Path) -> tuple[StepRecord, ...]:
        """Split the expansion convolutions, unless that is not exact or measures slower here."""
        num_rewritten = split_expansion_convolutions(source, target)
        if not num_rewritten:
            return ()
        feeds = {INPUT_NAME: self._x_golden[:1]}
        before, after = open_cpu_session(source), open_cpu_session(target)
        expected, got = before.run(feeds), after.run(feeds)
        difference = max(relative_l2(got[name], expected[name]) for name in expected)  # type: ignore[arg-type]
        settings = LatencySettings(min_runs=15, min_seconds=0.1, warmup_seconds=0.05)
        timings = measure_latency({"before": before.bind(feeds), "after": after.bind(feeds)}, settings)
        facts = {"convolutions": num_rewritten, "limit": LIMIT}
        if not difference <= LIMIT or timings["after"].verdict == "slower":
            target.unlink()
            why = "outputs differ" if not difference <= LIMIT else "measured slower on this machine"
            return (StepRecord(name="split-expansion", outcome="kept", detail=f"not rewritten: {why}", facts=facts),)
        detail = f"{num_rewritten} expansion convolutions in two, so that no Split is left; outputs equal"
        return (StepRecord(name="split-expansion", outcome="done", detail=detail, facts=facts),)

    def _path(self, kind: str) -> Path:
        return self._staging / artifact_file(self._spec.name, kind)

    def _artifact(self, kind: str, steps: tuple[StepRecord, ...]) -> Artifact:
        described, record = ARTIFACT_KINDS[kind], file_record(self._path(kind))
        # TorchScript leaves the batch free whatever it was traced with.
        batch: int | str = "N" if self._request.dynamic_batch or described.format == "torchscript" else 1
        return Artifact(
            kind=kind, file=record.file, format=described.format, precision=described.precision, sha256=record.sha256,
            num_bytes=record.num_bytes, inputs=(_input_info(self._spec, batch),),
            outputs=tuple(
                TensorInfo(name=name, dtype="float32", shape=(batch, *shape))
                for name, shape in self._output_shapes.items()
            ),
            opset=self._request.opset if described.format == "onnx" else None, steps=steps,
        )  # fmt: skip


@torch.inference_mode()
def _output_shapes(model: torch.nn.Module, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of the outputs without their batch, by one run on an empty picture.

    Raises:
        InputError: the network does not run at that size.
    """
    size_px = (spec.preprocess.height_px, spec.preprocess.width_px)
    try:
        outputs = model(torch.zeros(1, 3, *size_px))
    except RuntimeError as error:  # maps that became empty, or that should meet and do not
        raise InputError(
            f"model '{spec.name}': does not run at {size_px[0]}x{size_px[1]} px ({str(error).splitlines()[0][:120]})",
            fix=f"--size with a multiple of {max(FEATURE_STRIDES)} px a side",
        ) from error
    values = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    return {name: tuple(value.shape[1:]) for name, value in zip(spec.outputs, values, strict=True)}


def _input_info(spec: ModelSpec, batch: int | str) -> TensorInfo:
    shape = (batch, 3, spec.preprocess.height_px, spec.preprocess.width_px)
    return TensorInfo(name=INPUT_NAME, dtype="float32", shape=shape)
