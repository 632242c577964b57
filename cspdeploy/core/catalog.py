"""The closed tables: what a bundle can hold, in which precision, and how far each may stray from the original."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = [
    "ARTIFACT_KINDS", "EAGER", "FP16_LIMIT", "FP32_NOISE_FACTOR", "ArtifactFormat", "ArtifactKind", "Precision",
    "artifact_file",
]  # fmt: skip

ArtifactFormat = Literal["torchscript", "onnx"]
Precision = Literal["fp32", "fp16"]

EAGER = "eager"
"""The rung before every artifact: the network as PyTorch runs it. Not a file of the bundle."""

DEFAULT_OPSET = 18
MIN_OPSET, MAX_OPSET = 13, 20
MAX_IR_VERSION = 10
"""ONNX Runtime 1.18 and later read it; every opset up to 20 fits in it."""
INPUT_NAME, OUTPUT_NAME = "input", "logits"


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactKind:
    """A sort of file in a bundle.

    Attributes:
        name: as tables, options and JSON spell it.
        suffix: after the model's name.
        summary: one line for README and reports.
    """

    name: str
    suffix: str
    format: ArtifactFormat
    precision: Precision
    summary: str


# In the order of the ladder: each one is made from an earlier one.
ARTIFACT_KINDS: dict[str, ArtifactKind] = {
    kind.name: kind
    for kind in (
        ArtifactKind(
            name="torchscript", suffix=".torchscript.pt", format="torchscript", precision="fp32",
            summary="traced and frozen, batch norms folded",
        ),
        ArtifactKind(
            name="onnx", suffix=".onnx", format="onnx", precision="fp32",
            summary="one file, simplified, float32",
        ),
        ArtifactKind(
            name="onnx-fp16", suffix=".fp16.onnx", format="onnx", precision="fp16",
            summary="float16 weights and arithmetic, float32 inputs and outputs",
        ),
    )
}  # fmt: skip


def artifact_file(model: str, kind: str) -> str:
    """File name of an artifact: the model's name and the suffix of its kind."""
    return f"{model}{ARTIFACT_KINDS[kind].suffix}"


# Why 16: the noise floor is the distance between the eager FP32 and FP64 outputs. Another FP32 engine sums in another
# order (blocked, Winograd, fused multiply-add) and so lands at a comparable distance, measured at 0.8 to 2 times the
# floor on CSPDarknet53 with ONNX Runtime and TorchScript. A fault of one part in ten thousand in one weight tensor is
# hundreds of times the floor.
FP32_NOISE_FACTOR = 16.0
FP32_FLOOR = 2.0**-23
"""The floor is never taken as less than one unit in the last place: a network of one layer can have none."""

# Why 1e-2: float16 rounds by at most 2^-11 = 4.9e-4. Roundings of about 170 nodes that add up like a random walk reach
# sqrt(170) * 4.9e-4 = 6e-3. Beyond 1e-2 something other than rounding is at work.
FP16_LIMIT = 1e-2

ACCURACY_BUDGET = {"fp32": 0.0005, "fp16": 0.001}
"""Labelled top-1 may differ from the original's by this share: 5 and 10 of 10,000 images."""
