"""The closed tables: what a bundle can hold, in which precision, and how far each may stray from the original."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = [
    "ARTIFACT_KINDS", "CLASSES_OUTPUT", "EAGER", "FP16_LIMIT", "FP16_NOISE_FACTOR", "FP16_NOISE_RATIO", "FP32_FLOOR",
    "FP32_NOISE_FACTOR", "FRONTEND_KINDS", "IMAGE_INPUT", "INT8_KINDS", "INT8_LIMIT", "NORMALISED_NODE",
    "PROBABILITIES_OUTPUT", "TIE_FACTOR", "ArtifactFormat", "ArtifactKind", "Effort", "Int8Mode", "Precision",
    "RangeMethod", "artifact_file",
]  # fmt: skip

ArtifactFormat = Literal["torchscript", "pt2", "onnx", "ort"]
Precision = Literal["fp32", "fp16", "int8"]
Int8Mode = Literal["static", "dynamic", "weights"]
"""static: activations on grids that were chosen from real images. dynamic: each activation's range is measured while
the network runs. weights: only stored in 8 bits, all arithmetic in float."""
RangeMethod = Literal["auto", "minmax", "percentile", "entropy", "mse", "channels", "through"]
Effort = Literal["normal", "high"]

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
        weights_only: its weights are of that precision, its arithmetic is not.
        frontend_of: the kind that this one is with preprocessing in its graph; empty for any other.
        also: the `--also` by which it is asked for; empty for any other.
        summary: one line for README and reports.
    """

    name: str
    suffix: str
    format: ArtifactFormat
    precision: Precision
    weights_only: bool = False
    frontend_of: str = ""
    also: str = ""
    summary: str


# In the order of the ladder: each one is made from an earlier one.
ARTIFACT_KINDS: dict[str, ArtifactKind] = {
    kind.name: kind
    for kind in (
        ArtifactKind(
            name="torchscript", suffix=".torchscript.pt", format="torchscript", precision="fp32",
            summary="traced and frozen, batch norms folded; PyTorch is retiring the format",
        ),
        ArtifactKind(
            name="pt2", suffix=".pt2", format="pt2", precision="fp32", also="pt2",
            summary="the program of torch.export, which PyTorch keeps",
        ),
        ArtifactKind(
            name="onnx", suffix=".onnx", format="onnx", precision="fp32",
            summary="one file, simplified, float32",
        ),
        ArtifactKind(
            name="onnx-fp16", suffix=".fp16.onnx", format="onnx", precision="fp16",
            summary="float16 weights and arithmetic, float32 inputs and outputs",
        ),
        ArtifactKind(
            name="onnx-int8", suffix=".int8.onnx", format="onnx", precision="int8",
            summary="8-bit weights and activations where that pays, float32 inputs and outputs",
        ),
        ArtifactKind(
            name="onnx-int8-weights", suffix=".int8-weights.onnx", format="onnx", precision="int8", weights_only=True,
            summary="8-bit weights, all arithmetic in float32: a smaller file, not a faster one",
        ),
        ArtifactKind(
            name="onnx-u8", suffix=".u8.onnx", format="onnx", precision="fp32", frontend_of="onnx",
            summary="the same with preprocessing in the graph: bytes of a picture in",
        ),
        ArtifactKind(
            name="onnx-fp16-u8", suffix=".fp16.u8.onnx", format="onnx", precision="fp16", frontend_of="onnx-fp16",
            summary="float16 behind float32 preprocessing in the graph: bytes of a picture in",
        ),
        ArtifactKind(
            name="onnx-int8-u8", suffix=".int8.u8.onnx", format="onnx", precision="int8", frontend_of="onnx-int8",
            summary="8 bits behind float32 preprocessing in the graph: bytes of a picture in",
        ),
        ArtifactKind(
            name="ort", suffix=".ort", format="ort", precision="fp32", also="ort",
            summary="float32 in ONNX Runtime's flat format, for mobile builds",
        ),
        ArtifactKind(
            name="ort-int8", suffix=".int8.ort", format="ort", precision="int8", also="ort",
            summary="8 bits in ONNX Runtime's flat format, for mobile builds",
        ),
        ArtifactKind(
            name="onnx-opt", suffix=".opt.onnx", format="ort", precision="fp32", also="opt",
            summary="float32 as ONNX Runtime optimises it on one machine: opens faster there",
        ),
        ArtifactKind(
            name="onnx-int8-opt", suffix=".int8.opt.onnx", format="ort", precision="int8", also="opt",
            summary="8 bits as ONNX Runtime optimises them on one machine: opens faster there",
        ),
    )
}  # fmt: skip

FRONTEND_KINDS: dict[str, str] = {kind.frontend_of: kind.name for kind in ARTIFACT_KINDS.values() if kind.frontend_of}
"""By the kind that goes in: the one with preprocessing in its graph."""
IMAGE_INPUT, PROBABILITIES_OUTPUT, CLASSES_OUTPUT = "image", "probabilities", "classes"
"""Of files with preprocessing in the graph."""
NORMALISED_NODE = "frontend/normalise"
"""The last node of the preprocessing: its output is the float32 input of the network."""

INT8_KINDS: dict[Int8Mode, str] = {"static": "onnx-int8", "dynamic": "onnx-int8", "weights": "onnx-int8-weights"}
"""What each mode makes. A bundle holds one of them at most."""
INT8_MAX_IMAGES = 512
"""To calibrate on, unless told otherwise: as many as prove an export."""
INT8_TIME_LIMIT_S = 600.0
"""Of a search for what meets a budget: some tens of files, at 0.5 to 10 s each to make and judge."""


def artifact_file(model: str, kind: str, *, size_px: tuple[int, int] | None = None) -> str:
    """File name of an artifact: the model's name and the suffix of its kind.

    Args:
        size_px: height and width where that is not the bundle's own: `name.320x320.onnx`.
    """
    size = "" if size_px is None else f".{size_px[0]}x{size_px[1]}"
    return f"{model}{size}{ARTIFACT_KINDS[kind].suffix}"


# Why 16: the noise floor is the distance between the eager FP32 and FP64 outputs. Another FP32 engine sums in another
# order (blocked, Winograd, fused multiply-add) and so lands at a comparable distance, measured at 0.8 to 2 times the
# floor on CSPDarknet53 with ONNX Runtime and TorchScript. A fault of one part in ten thousand in one weight tensor is
# hundreds of times the floor.
FP32_NOISE_FACTOR = 16.0
FP32_FLOOR = 2.0**-23
"""The floor is never taken as less than one unit in the last place: a network of one layer can have none."""

# FP16, a model: 11 significant bits against 24, so that each rounding is 2^13 times as coarse as a float32 one, and the
# network amplifies both alike. What that amplification is, its noise floor has measured. An FP16 artifact is therefore
# expected at 2^13 times the floor. Measured, with every result rounded: 0.87 of that on CSPDarknet53 as trained, 0.34
# on a random network of three stages. Beyond four times it, something other than rounding is at work: a value near
# 65504 or below 6e-8, a sum in FP16 that should be wider.
FP16_NOISE_RATIO = 2.0**13
FP16_NOISE_FACTOR = 4.0
# Why never above 1e-2: roundings of 4.9e-4 by about 170 nodes that add up like a random walk reach
# sqrt(170) * 4.9e-4 = 6e-3; and a noisy or tampered reference would otherwise excuse anything.
# Never below 4 * 2^13 * FP32_FLOOR = 3.9e-3, eight roundings of a single value: less could be bad luck.
FP16_LIMIT = 1e-2

# INT8, a model: a tensor whose range (peak to peak) is `crest` times its rms is stored in 255 steps, each of which adds
# noise of a step / sqrt(12): crest / (255 sqrt(12)) of its rms. K such tensors, rounded independently, add up to
# sqrt(K) times that, if all of it reaches the output. Crest 8: a bell curve that is clipped nowhere has 6 to 9. Later
# layers average independent noise, so that about a quarter arrives: measured 0.21 of the sum on CSPDarknet53 (K 248,
# QDQ and QOperator, per tensor and per channel, by ONNX Runtime's quantiser) and 0.24 on a network of three stages
# (K 77). The undamped sum is the limit: four times what is measured, as for FP16.
INT8_STEPS = 255
INT8_CREST = 8.0
# Why never above 0.25: signal to noise of 12 dB, where the two best of ten classes begin to change places on clear
# images. A model that expects more says that the network does not bear INT8, not that more is good.
INT8_LIMIT = 0.25
INT8_AGREEMENT = 0.95
"""Share of golden images that must keep their first class, clear or not; one may always change. INT8 alone is asked
for it: rounding to FP32 or FP16 has no business with any but near ties, and those are told apart."""

TIE_FACTOR = 4.0
"""An image whose two best classes are closer than this many times the typical error that the limit allows is a near
tie, and may go either way; any other is clear. Four standard deviations: one image in 30,000 by chance."""

ACCURACY_BUDGET = {"fp32": 0.0005, "fp16": 0.001, "int8": 0.01}
"""Labelled top-1 may differ from the original's by this share: 5, 10 and 100 of 10,000 images. One point for INT8 is
what post-training quantisers promise by default (NNCF's `max_drop`, Neural Compressor's `tolerable_loss`)."""
