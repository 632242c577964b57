"""What checks and timings find. Frozen, slotted, keyword-only; JSON through `cspdeploy.core.codec`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from cspdeploy.core.types import PlacedNode

__all__ = [
    "VERIFY_SCHEMA_VERSION", "ColdStart", "ImageBoxes", "ImageDecision", "LayerCurve", "LayerError", "Limit",
    "MemoryUse", "ParityRow", "PrecisionAudit", "Regression", "Repeats", "Timing", "Verdict", "VerifyReport",
]  # fmt: skip

VERIFY_SCHEMA_VERSION = 1
"""Of what `verify --json` prints; raised when a field goes or changes its meaning."""


Verdict = Literal["pass", "numeric", "decision", "nan", "shape", "dtype", "order", "inputs", "accuracy", "precision",
                  "placement", "crash", "hang", "error", "not-checkable", "not-checked"]  # fmt: skip
"""pass; too far from the reference; another class wins; NaN or infinity; wrong shape, dtype, or outputs or images in
another order; a file with other inputs than listed; labelled accuracy out of budget; a file that is not of the
precision it is named for; nodes on another provider than the one asked for, where that was forbidden; the engine's
process died, or did not answer in time; the engine cannot open or run it; and not checkable here, which is neither
a pass nor a failure; not checked, where only latency was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """How far one output may be from the reference, and how that number came about."""

    output: str
    rel_l2: float
    why: str
    """One sentence: the model of the error, with its numbers."""
    terms: dict[str, float] = field(default_factory=dict)
    """The numbers it was made of: noise_floor, factor, cap, ..."""
    overridden: bool = False
    """Given by the user with --tolerance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionAudit:
    """What an ONNX file really is, read from the file. Shares are in [0, 1] and add up to 1.

    Attributes:
        declared: the precision it is named or listed as; empty where it carries none.
        found: "fp32", "fp16" or "int8": that in which most of its MACs are done (weights, where MACs are unknown).
        macs: share of multiply-accumulates by precision; empty where shapes are unknown.
        num_macs: for one image, or None.
        macs_unknown: why there are no MACs, or empty.
        weights: share of the values of floating-point and integer weights by precision.
        custom_operators: operators outside the ONNX domains, as "domain.Operator".
        problem: why the file is not what it is declared as; empty where it is.
    """

    declared: str
    found: str
    macs: dict[str, float]
    num_macs: int | None
    macs_unknown: str
    weights: dict[str, float]
    opsets: dict[str, int]
    ir_version: int
    operators: dict[str, int]
    custom_operators: tuple[str, ...]
    external_data: tuple[str, ...]
    problem: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ColdStart:
    """From nothing to the first result in a fresh process, in ms."""

    import_ms: float
    """The engine's modules."""
    open_ms: float
    """Reading the file, optimising the graph, creating the session."""
    first_run_ms: float

    @property
    def total_ms(self) -> float:
        """What a process that starts for one image waits."""
        return self.import_ms + self.open_ms + self.first_run_ms


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Of a process with this session alone, resident set, beyond what it had before the session was opened."""

    opened_bytes: int
    peak_bytes: int
    """Opening and running at batch 1, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Latency of one call, host wall clock, device finished."""

    p50_ms: float
    p90_ms: float | None = None
    """None where the samples are too few to know it."""
    p95_ms: float | None = None
    p99_ms: float | None = None
    ci_low_ms: float
    """Bootstrap 95 % interval of the median."""
    ci_high_ms: float
    num_runs: int
    verdict: Literal["reference", "faster", "slower", "indistinguishable"]
    """Against the first row that was timed."""
    ratio: float
    """Speed against the first row: median over rounds of the ratio of their medians; above 1 is faster."""
    ratio_low: float = 1.0
    """95 % interval of the ratio, by rounds of the interleaved run."""
    ratio_high: float = 1.0
    samples_ms: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageDecision:
    """What an artifact says of one golden image: the first class and its softmax probability in [0, 1]."""

    index: int
    probability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageBoxes:
    """What a detector makes of one golden image that the original does not.

    Attributes:
        lost: places in the original's boxes, best first, that have no match.
        new: left, top, right, bottom in pixels of the network's input, score and class of those that it adds, the best
            50 at most.
        more_new: how many it adds beyond those.
    """

    lost: tuple[int, ...] = ()
    new: tuple[tuple[float, ...], ...] = ()
    more_new: int = 0

    @property
    def num_new(self) -> int:
        """All that it adds."""
        return len(self.new) + self.more_new


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeats:
    """Whether one and the same input gives one and the same output, run after run in one session.

    Attributes:
        num_runs: of that input.
        num_different: runs whose outputs are not those of the first run to the bit.
        max_rel_l2: largest relative L2 of any run to the first one; infinite where one is not finite.
        first_bad_run: number, from 1, of the first run with a NaN or an infinity that the first run has not; 0: none.
    """

    num_runs: int
    num_different: int
    max_rel_l2: float
    first_bad_run: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityRow:
    """One artifact on one runtime against the golden outputs. Numbers are None where nothing was measured."""

    bundle: str
    artifact: str
    runtime: str
    verdict: Verdict
    reason: str = ""
    note: str = ""
    """What the reader must know of this runtime, whatever the verdict."""
    num_bytes: int = 0
    rel_l2: float | None = None
    limit: float | None = None
    limits: tuple[Limit, ...] = ()
    """Of each output; `limit` is that of the output nearest to its own."""
    max_abs: float | None = None
    sqnr_db: float | None = None
    """Signal to noise of all outputs together: -20 log10 of their relative L2."""
    top1_agreement: float | None = None
    top5_agreement: float | None = None
    box_recall: float | None = None
    """Of a detector: share of the original's boxes on the golden images that it finds; 1 where there is none."""
    box_precision: float | None = None
    """Share of its boxes that the original has."""
    num_boxes: int | None = None
    """The original's, on all golden images."""
    boxes: tuple[ImageBoxes, ...] = ()
    """Of a detector, one a golden image, in their order."""
    num_images: int = 0
    decisions: tuple[ImageDecision, ...] = ()
    """Of a classifier, one a golden image, in their order."""
    error_histogram: tuple[int, ...] = ()
    """Counts of |error| / rms(reference) of all output values in decades: below 1e-9, 1e-9 to 1e-8, ..., above 1."""
    top1: float | None = None
    top5: float | None = None
    map50: float | None = None
    """Of a detector: mean average precision at an overlap of 0.5, on labelled images."""
    map: float | None = None
    """The mean over overlaps of 0.5 to 0.95."""
    accuracy_images: int = 0
    placement: dict[str, int] = field(default_factory=dict)
    """Nodes on each provider after the engine's own optimisation, where the engine tells."""
    nodes_elsewhere: tuple[PlacedNode, ...] = ()
    """Nodes that are not on the provider that was asked for."""
    num_copies: int | None = None
    """Copies between devices that the engine inserted; None where it does not tell."""
    tf32_rel_l2: float | None = None
    """Distance to the reference with TF32 on, as in the speed run on CUDA; the verdict is with TF32 off."""
    repeats: Repeats | None = None
    """The same input again and again, where that was asked for; always on a GPU."""
    rounding_rel_l2: float | None = None
    """Of an FP16 file on a device that computes in FP16: distance to the same graph computed in float32 with every
    node's result rounded to FP16, which is as near as such arithmetic can be expected to come."""
    settings: dict[str, str] = field(default_factory=dict)
    """What the engine says that the session was opened with: TF32, algorithm search, layout, streams."""
    events_p50_ms: float | None = None
    """Median between two events on the device's stream: from the first kernel that was queued to the end of the last,
    the gaps between them included in which the GPU waits for the host to launch the next."""
    audit: PrecisionAudit | None = None
    cold: ColdStart | None = None
    memory: MemoryUse | None = None
    p50_ms: float | None = None
    p95_ms: float | None = None
    timing: Timing | None = None

    @property
    def failed(self) -> bool:
        """Whether the row makes the whole command fail."""
        return self.verdict not in ("pass", "not-checkable", "not-checked")


@dataclass(frozen=True, slots=True, kw_only=True)
class Regression:
    """One artifact on one runtime in a new bundle against the same in an old one."""

    artifact: str
    runtime: str
    verdict: Literal["same", "better", "worse", "gone", "new"]
    """worse: a check that held fails, or one of the figures below leaves its budget. gone: was in the old bundle."""
    reason: str = ""
    old_verdict: str = ""
    new_verdict: str = ""
    rel_l2: float | None = None
    """New outputs against old outputs, on the new bundle's inputs."""
    top1_agreement: float | None = None
    same_boxes: float | None = None
    """Of a detector: share of the boxes of either that the other has too, the smaller one."""
    old_bytes: int | None = None
    new_bytes: int | None = None
    latency: Literal["", "faster", "slower", "indistinguishable"] = ""
    ratio: float | None = None
    """Speed of the new one against the old one, interleaved: above 1, the new one is faster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What `cspdeploy verify` found."""

    schema_version: int = VERIFY_SCHEMA_VERSION
    verdict: Literal["pass", "fail", "not-checked"]
    first_break: str
    """The first rung of the ladder that broke, or empty."""
    noise_floor: dict[str, float]
    """Relative L2 between the eager FP32 and FP64 outputs, for each bundle."""
    untrained: tuple[str, ...]
    rows: tuple[ParityRow, ...]
    warnings: tuple[str, ...]
    environment: dict[str, str]
    notes: tuple[str, ...] = ()
    """What the reader may want to know of how it was judged; nothing is wrong with it."""
    against: str = ""
    """The old bundle of `regressions`, or empty."""
    regressions: tuple[Regression, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    """How it was measured: latency settings, time limit, seeds, tolerances given by the user."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerError:
    """How far one tensor of an artifact is from its counterpart in the reference."""

    node: str
    operator: str
    module: str
    """Path of the torch module, such as "stages.0.blocks.1.conv2"; empty where the node carries none."""
    rel_l2: float
    sqnr_db: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCurve:
    """Error along a graph, in graph order, of those nodes that have a counterpart in the reference."""

    artifact: str
    runtime: str
    against: str
    layers: tuple[LayerError, ...]
