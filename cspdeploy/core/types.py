"""What flows between the stages. Frozen, slotted, keyword-only; JSON through `cspdeploy.core.codec`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from cspdeploy.core.detection.spec import Decode
from cspdeploy.core.spec import ModelSpec

__all__ = [
    "MANIFEST_SCHEMA_VERSION", "Artifact", "FileRecord", "Frontend", "Manifest", "PlacedNode", "StepRecord",
    "TensorInfo",
]  # fmt: skip

MANIFEST_SCHEMA_VERSION = 3


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
class Frontend:
    """What a graph does itself, before the network and after it.

    Its input is then uint8 `[N, H, W, 3]`, and it casts, scales, normalises and transposes as the contract says.

    Attributes:
        channel_order: of the input's last axis; the network's own order is in the contract.
        resize: it also resizes and crops: H and W are free. Without it they are those of the contract.
        top_k: beside the network's outputs, "probabilities" float32 `[N, k]` and "classes" int64 `[N, k]`, likeliest
            first; 0: no such outputs.
        max_difference: largest distance, in steps of the 8-bit input, between what the graph makes of the golden images
            and what Pillow's resampling makes of them; 0 without `resize`.
    """

    channel_order: Literal["rgb", "bgr"] = "rgb"
    resize: bool = False
    top_k: int = 0
    max_difference: float = 0.0

    def __post_init__(self) -> None:
        if self.top_k < 0 or not 0 <= self.max_difference < math.inf:
            raise ValueError(f"frontend: got top_k {self.top_k}, max_difference {self.max_difference}, expected >= 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A file that an application runs.

    Attributes:
        frontend: preprocessing in the graph, or None: the input is the float tensor of the contract.
        machine: processor and engine that a file with an engine's own optimisations is for; empty: any.
        decode: of a detector, the contract of its outputs; None for anything else.
    """

    kind: str
    file: str
    format: Literal["torchscript", "pt2", "onnx", "ort"]
    precision: Literal["fp32", "fp16", "int8"]
    sha256: str
    num_bytes: int
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    opset: int | None
    steps: tuple[StepRecord, ...]
    frontend: Frontend | None = None
    machine: str = ""
    decode: Decode | None = None

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


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedNode:
    """A node of the graph that the engine really runs, and the provider that runs it."""

    provider: str
    node: str
    operator: str
