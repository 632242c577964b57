"""`compare A B`: what two networks cost, how fast they are on each runtime, how accurate, how they were trained."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cspdeploy.check.latency import LatencySettings
from cspdeploy.core.catalog import ARTIFACT_KINDS
from cspdeploy.core.env import describe_environment
from cspdeploy.core.errors import InputError
from cspdeploy.core.model_folder import SPEC_FILE, WEIGHTS_FILE
from cspdeploy.nets.cost import Cost, measure_cost
from cspdeploy.pipeline.pair_latency import LatencyRow, time_pair
from cspdeploy.pipeline.pair_sides import Prepared, find_images, prepare_side
from cspdeploy.pipeline.regimes import check_device, check_regimes, common_regimes, default_batches, timed_runtimes
from cspdeploy.pipeline.sides import AccuracyPair, Side, TrainingPair, find_side, pair_accuracy, pair_training
from cspdeploy.runtimes.base import Runtime

__all__ = ["CompareReport", "CompareRequest", "ComparedSide", "Quantity", "Regime", "check_batches", "compare_models"]

Progress = Callable[[str, int, int], None]
MAX_BATCH = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareRequest:
    """What to compare, and how.

    Attributes:
        size_px: None: that of a bundle, else the larger of the two's own sizes.
        batches: images a call; None: 1 and 8 on CPUs, 1 and 32 on GPUs.
        runtimes: names; empty for all that are here.
        on: "cuda" or "cpu": time on these devices alone; empty for all.
        regimes: "all", "plain", names of variants; empty for the plain ones.
        all_on_gpu: where `regimes` is empty: all variants of runtimes on a GPU.
        device: index of the GPU; None: the first.
    """

    a: str
    b: str
    models: Path = Path("models")
    size_px: tuple[int, int] | None = None
    batches: tuple[int, ...] | None = None
    latency: bool = True
    runtimes: tuple[str, ...] = ()
    on: str = ""
    regimes: tuple[str, ...] = ()
    all_on_gpu: bool = False
    device: int | None = None
    calibration: Path | None = None
    settings: LatencySettings = field(default_factory=LatencySettings)

    def __post_init__(self) -> None:
        check_batches(self.batches)


def check_batches(batches: tuple[int, ...] | None) -> None:
    """Before anything is measured.

    Raises:
        InputError: a batch that no call can have, or none at all.
    """
    if batches is None:
        return
    wrong = [batch for batch in batches if not 1 <= batch <= MAX_BATCH]
    if wrong or not batches:
        got = wrong[0] if wrong else "none"
        raise InputError(f"--batch {got}: expected 1 to {MAX_BATCH} images a call", fix="--batch 1 --batch 8")


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedSide:
    """What one side is. `weights` says which weights were timed; empty where nothing was."""

    given: str
    kind: Literal["network", "cfg", "model", "bundle"]
    name: str
    family: str
    num_classes: int
    own_size_px: tuple[int, int]
    weights: str
    untrained: bool
    """Whether the weights that were timed are random ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """One number of each side, and B over A (None where A is 0)."""

    name: str
    kind: Literal["count", "bytes"]
    a: int
    b: int
    ratio: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Regime:
    """What the numbers hold for, the same for both sides; each latency names its engine, variant and batch.

    `layout` is that of the inputs; a variant may compute in another one. `batches`: all that were timed.
    """

    size_px: tuple[int, int]
    size_from: str
    layout: str
    batches: tuple[int, ...]
    min_runs: int
    min_seconds: float
    environment: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareReport:
    """What `cspdeploy compare A B` found. Ratios are B over A throughout."""

    a: ComparedSide
    b: ComparedSide
    quantities: tuple[Quantity, ...]
    accuracy: AccuracyPair
    training: TrainingPair | None
    """None unless both are model folders that `cspdeploy train` made."""
    latency: tuple[LatencyRow, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    regime: Regime


def compare_models(
    request: CompareRequest, *, progress: Progress = lambda what, done, total: None
) -> CompareReport:  # fmt: skip
    """Compare two networks at the same input size.

    Counts need no weights and no image. For file sizes and latency both are exported into a temporary folder, with
    random weights where none are here, and timed in turns.

    Raises:
        InputError: one of them is unknown or cannot be built, or they cannot be timed at one size; no such regime.
        RuntimeUnavailableError: a runtime or a device that was asked for is missing.
    """
    runtimes = _runtimes(request)
    a, b = (find_side(given, models=request.models) for given in (request.a, request.b))
    size_px, size_from = _common_size(request, a, b)
    progress("counting", 0, 1)
    quantities = _count(_cost_at(a, size_px), _cost_at(b, size_px))
    rows: list[LatencyRow] = []
    warnings: list[str] = []
    if request.latency:
        with tempfile.TemporaryDirectory(prefix="cspdeploy-compare-") as work:
            prepared = _prepare(request, (a, b), size_px, Path(work), progress)
            quantities += _file_sizes(*prepared)
            regimes = common_regimes(
                *prepared, runtimes, names=request.regimes, all_on_gpu=request.all_on_gpu, device=request.device or 0
            )
            rows, warnings = time_pair(
                *prepared, regimes=regimes, batches=default_batches(runtimes, request.batches),
                settings=request.settings, asked=bool(request.runtimes), progress=progress,
            )  # fmt: skip
    regime = Regime(
        size_px=size_px, size_from=size_from, layout="NCHW", batches=tuple(sorted({row.batch for row in rows})),
        min_runs=request.settings.min_runs, min_seconds=request.settings.min_seconds,
        environment=describe_environment(),
    )  # fmt: skip
    return CompareReport(
        a=_describe(a, timed=request.latency), b=_describe(b, timed=request.latency), quantities=tuple(quantities),
        accuracy=pair_accuracy(a, b), training=pair_training(a, b), latency=tuple(rows),
        notes=_notes(a, b, request), warnings=tuple(warnings), regime=regime,
    )  # fmt: skip


def _runtimes(request: CompareRequest) -> list[Runtime]:
    """Those to time on, before minutes go into an export that nothing could be timed with."""
    found = timed_runtimes(request.runtimes, device=request.on)
    if request.latency:
        check_regimes(request.regimes, found)
        check_device(request.device, found)
    return found


def _common_size(request: CompareRequest, a: Side, b: Side) -> tuple[tuple[int, int], str]:
    """Height and width for both, and why these."""
    if request.size_px:
        return request.size_px, "as asked"
    if a.size_px == b.size_px:
        return a.size_px, "both sides' own"
    bundle = next((side for side in (a, b) if side.kind == "bundle"), None)
    if bundle is not None and request.latency:
        return bundle.size_px, f"that of the bundle {bundle.given}"
    larger = max((a, b), key=lambda side: side.size_px[0] * side.size_px[1])
    return larger.size_px, f"that of {larger.given}, the larger of the two"


def _cost_at(side: Side, size_px: tuple[int, int]) -> Cost:
    spec = dataclasses.replace(side.spec, preprocess=side.spec.preprocess.with_size(*size_px))
    try:
        return measure_cost(spec)
    except (RuntimeError, ValueError) as error:  # a map that became smaller than its kernel
        size = "x".join(map(str, size_px))
        raise InputError(
            f"{side.given}: does not work at {size} px ({str(error).splitlines()[0][:120]})", fix="give a larger --size"
        ) from error


def _count(a: Cost, b: Cost) -> list[Quantity]:
    return [
        _quantity("parameters", "count", a.num_parameters, b.num_parameters),
        _quantity("conv weights", "count", a.num_conv_weights, b.num_conv_weights),
        _quantity("MACs", "count", a.num_macs, b.num_macs),
        _quantity("activations", "count", a.num_activations, b.num_activations),
        _quantity("peak activation memory", "bytes", a.peak_activation_bytes, b.peak_activation_bytes),
    ]


def _quantity(name: str, kind: Literal["count", "bytes"], a: int, b: int) -> Quantity:
    return Quantity(name=name, kind=kind, a=a, b=b, ratio=b / a if a else None)


def _file_sizes(a: Prepared, b: Prepared) -> list[Quantity]:
    ours, theirs = a.artifacts(), b.artifacts()
    return [
        _quantity(f"{kind} file", "bytes", ours[kind].num_bytes, theirs[kind].num_bytes)
        for kind in ARTIFACT_KINDS
        if kind in ours and kind in theirs
    ]


def _prepare(
    request: CompareRequest, sides: tuple[Side, Side], size_px: tuple[int, int], work: Path, progress: Progress
) -> tuple[Prepared, Prepared]:  # fmt: skip
    images = find_images(sides, request.calibration)
    first, second = (
        prepare_side(
            side, size_px=size_px, images=images, calibration=request.calibration, work=work / place, progress=progress
        )
        for side, place in zip(sides, ("a", "b"), strict=True)
    )
    return first, second


def _describe(side: Side, *, timed: bool) -> ComparedSide:
    spec = side.spec
    untrained = spec.provenance.untrained or not _has_weights(side)
    weights = ""
    if timed:
        weights = "random, UNTRAINED" if untrained else spec.provenance.origin or spec.provenance.source
    return ComparedSide(
        given=side.given, kind=side.kind, name=spec.name, family=spec.network.family, num_classes=spec.num_classes,
        own_size_px=side.size_px, weights=weights, untrained=timed and untrained,
    )  # fmt: skip


def _has_weights(side: Side) -> bool:
    if side.kind == "model" and side.folder is not None:
        return (side.folder / WEIGHTS_FILE).is_file()
    return side.kind == "bundle"


def _notes(a: Side, b: Side, request: CompareRequest) -> tuple[str, ...]:
    notes = []
    if a.spec.task != b.spec.task:
        notes.append(f"{a.given} is for {a.spec.task}, {b.given} for {b.spec.task}: what they compute is not the same")
    elif a.spec.num_classes != b.spec.num_classes:
        notes.append(
            f"{a.given} has {a.spec.num_classes} classes, {b.given} {b.spec.num_classes}: their last layers differ in "
            "parameters and MACs"
        )
    for name in dict.fromkeys(side.given for side in (a, b) if side.kind == "network"):
        folder = request.models / name
        if (folder / SPEC_FILE).is_file():
            notes.append(f"{name} is the network of the registry; to compare the model that is here, name {folder}")
    if request.latency and not (_has_weights(a) and _has_weights(b)):
        notes.append(
            "UNTRAINED networks were timed with random weights: in FP32 the time does not depend on the values; in "
            "FP16 time and file size do, for the values decide which nodes stay in FP32"
        )
    return tuple(notes)
