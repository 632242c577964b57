"""Where TensorRT wants QuantizeLinear and DequantizeLinear, as it can be seen in the file.

Sources: TRT is NVIDIA's TensorRT guide (docs.nvidia.com/deeplearning/tensorrt), Working with Quantized Types.
"""

from __future__ import annotations

from cspdeploy.core.targets.model import PatternRule

__all__ = ["TENSORRT_PATTERNS"]

_GUIDE = "docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-quantized-types.html"
_PLACEMENT = f"{_GUIDE}: Q/DQ Layer-Placement Recommendations"
_LAYER = "docs.nvidia.com/deeplearning/tensorrt/api/c_api/classnvinfer1_1_1_i_quantize_layer.html"
_RESIDUAL = "docs.nvidia.com/deeplearning/tensorrt/tensorflow-quantization-toolkit/docs/docs/add_custom_qdq_cases.html"

TENSORRT_PATTERNS = (
    PatternRule(
        kind="scale", takes="scales that are constant, finite and above 0",
        fix="write them as initializers, and leave layers without range in float", source=_LAYER,
    ),
    PatternRule(
        kind="channel-axis",
        takes="one scale for an activation; for weights one for each output channel: axis 0 of Conv, 1 of "
        "ConvTranspose, the last of MatMul, 1 of Gemm or 0 with transB",
        fix="quantise weights along their output channels, activations by one scale", source=f"{_LAYER}: setAxis",
    ),
    PatternRule(
        kind="pair", severity="warning",
        takes="QuantizeLinear with DequantizeLinear of the same scale right behind it, and nothing else",
        fix="move what is between them before or behind the pair, and give both one scale",
        source=f"{_GUIDE}: Explicit Quantization",
    ),
    PatternRule(
        kind="half-quantised", severity="warning", takes="pairs on both inputs, else it computes in float",
        fix="quantise its input and its weight, or neither", source=_PLACEMENT,
    ),
    PatternRule(
        kind="activation", severity="warning", takes="no pair in between: it parts what the engine computes in one",
        fix="quantise behind the activation", source=_PLACEMENT,
    ),
    PatternRule(
        kind="residual", severity="warning",
        takes="a pair on the branch that goes around, none on that of the convolution, which adds to its sums",
        fix="quantise the other input of the Add alone", source=f"{_PLACEMENT}; {_RESIDUAL}",
    ),
    PatternRule(
        kind="concat", severity="warning", takes="inputs of one scale, or a pair behind it",
        fix="give all of its inputs one scale: else each is converted", source=_PLACEMENT,
    ),
    PatternRule(
        kind="grid-kept", severity="warning", takes="one scale on both sides of a node that only moves values",
        fix="give the pair behind it the scale of the one before", source=f"{_GUIDE}: Q/DQ propagation",
    ),
    PatternRule(
        kind="output", severity="warning", takes="outputs as they are computed: a pair only rounds them",
        fix="leave the pair on the output out", source=_PLACEMENT,
    ),
)  # fmt: skip
