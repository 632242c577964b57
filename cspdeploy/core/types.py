"""What flows between the stages. Frozen, slotted, keyword-only; JSON through `cspdeploy.core.codec`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from cspdeploy.core.spec import ModelSpec

__all__ = [
    "MANIFEST_SCHEMA_VERSION", "Artifact", "FileRecord", "Manifest", "ParityRow", "StepRecord", "TensorInfo", "Timing",
    "Verdict", "VerifyReport",
]  # fmt: skip

MANIFEST_SCHEMA_VERSION = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """An input or output. A dimension that is free is a name, such as "N"."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One step of an export: a file (or the network) to a new file.

    `outcome` "kept": the step's result was refused and its input kept, for the reason in `detail`.
    Holds nothing that changes from run to run, so that a manifest can be compared byte for byte.
    """

    name: str
    outcome: Literal["done", "kept"]
    detail: str
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """A file of the bundle."""

    file: str
    sha256: str
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A file that an application runs."""

    kind: str
    file: str
    format: Literal["torchscript", "onnx"]
    precision: Literal["fp32", "fp16"]
    sha256: str
    num_bytes: int
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    opset: int | None
    steps: tuple[StepRecord, ...]

    def __post_init__(self) -> None:
        if len(self.inputs) != 1 or not self.inputs[0].shape or not self.outputs:
            raise ValueError(
                f"{self.file}: got {len(self.inputs)} inputs and {len(self.outputs)} outputs, expected 1 each"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """manifest.json: all that is known of a bundle. Every file in it but the manifest itself has a hash here."""

    schema_version: int = MANIFEST_SCHEMA_VERSION
    spec: ModelSpec
    labels: tuple[str, ...]
    artifacts: tuple[Artifact, ...]
    files: tuple[FileRecord, ...]
    """Those that are not artifacts: golden.npz, labels.txt."""
    options: dict[str, Any]
    """The export's own options, as given or by default."""
    tools: dict[str, str]
    """Versions that decide the bytes."""

    def __post_init__(self) -> None:
        if not self.artifacts:
            raise ValueError("artifacts: got none, expected at least one")
        if len(self.labels) != self.spec.num_classes:
            raise ValueError(f"labels: got {len(self.labels)}, expected {self.spec.num_classes}")


Verdict = Literal["pass", "numeric", "decision", "nan", "shape", "dtype", "order", "accuracy", "error",
                  "not-checkable", "not-checked"]  # fmt: skip
"""pass; too far from the reference; another class wins; NaN or infinity; wrong shape, dtype, or outputs or images in
another order; labelled accuracy out of budget; the engine cannot open or run it; and not checkable here, which is
neither a pass nor a failure; not checked, where only latency was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Latency of one call, host wall clock, device finished."""

    p50_ms: float
    p95_ms: float
    ci_low_ms: float
    """Bootstrap 95 % interval of the median."""
    ci_high_ms: float
    num_runs: int
    verdict: Literal["reference", "faster", "slower", "indistinguishable"]
    """Against the first row that was timed."""
    ratio: float
    """Median of the first row over the median of this one: above 1 is faster."""
    samples_ms: tuple[float, ...]


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
    max_abs: float | None = None
    top1_agreement: float | None = None
    top5_agreement: float | None = None
    num_images: int = 0
    top1: float | None = None
    top5: float | None = None
    accuracy_images: int = 0
    placement: dict[str, int] = field(default_factory=dict)
    """Nodes on each provider after the engine's own optimisation, where the engine tells."""
    p50_ms: float | None = None
    p95_ms: float | None = None
    timing: Timing | None = None

    @property
    def failed(self) -> bool:
        """Whether the row makes the whole command fail."""
        return self.verdict not in ("pass", "not-checkable", "not-checked")


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What `cspdeploy verify` found."""

    verdict: Literal["pass", "fail", "not-checked"]
    first_break: str
    """The first rung of the ladder that broke, or empty."""
    noise_floor: dict[str, float]
    """Relative L2 between the eager FP32 and FP64 outputs, for each bundle."""
    untrained: tuple[str, ...]
    rows: tuple[ParityRow, ...]
    warnings: tuple[str, ...]
    environment: dict[str, str]
