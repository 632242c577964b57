"""Which operators of ONNX, of ONNX Runtime and of PyTorch do the same, and which hand their input on."""

from __future__ import annotations

import re

__all__ = ["family", "hands_on", "plain_name", "same_family"]

_FAMILIES = {
    "convolution": "Conv FusedConv NhwcFusedConv QLinearConv ConvInteger convolution _convolution conv1d conv2d conv3d "
    "mkldnn_convolution cudnn_convolution cudnn_convolution_relu",
    "matrix product": "Gemm MatMul FusedGemm FusedMatMul QGemm QLinearMatMul MatMulInteger linear addmm mm matmul bmm",
    "normalisation": "BatchNormalization batch_norm native_batch_norm _native_batch_norm_legit_no_training "
    "cudnn_batch_norm _batch_norm_impl_index",
    "leaky relu": "LeakyRelu QLinearLeakyRelu leaky_relu",
    "relu": "Relu relu",
    "sigmoid": "Sigmoid QLinearSigmoid sigmoid",
    "silu": "Silu silu QuickGelu",
    "mish": "Mish mish",
    "clip": "Clip clamp hardtanh relu6 clamp_min",
    "hard swish": "HardSwish hardswish",
    "max pool": "MaxPool NhwcMaxPool max_pool2d max_pool2d_with_indices",
    "average pool": "AveragePool QLinearAveragePool avg_pool2d",
    "global pool": "GlobalAveragePool QLinearGlobalAveragePool ReduceMean adaptive_avg_pool2d "
    "_adaptive_avg_pool2d mean",
    "concat": "Concat QLinearConcat cat concat",
    "resize": "Resize Upsample upsample_nearest2d upsample_bilinear2d upsample_bicubic2d _upsample_nearest_exact2d "
    "interpolate",
    "add": "Add QLinearAdd add", "multiply": "Mul QLinearMul mul", "subtract": "Sub sub", "divide": "Div div",
    "split": "Split split split_with_sizes chunk", "slice": "Slice slice narrow",
    "pad": "Pad pad constant_pad_nd reflection_pad2d replication_pad2d",
    "softmax": "Softmax softmax _softmax",
    "hands on": "Identity Dropout Cast Reshape Flatten Squeeze Unsqueeze QuantizeLinear DequantizeLinear lift_fresh to "
    "_to_copy detach alias view _unsafe_view reshape flatten squeeze unsqueeze dropout contiguous clone resolve_conj "
    "resolve_neg lift copy",
}  # fmt: skip
_FAMILY_OF = {name: family for family, names in _FAMILIES.items() for name in names.split()}

# What rewrites, converters and quantisers append to a tensor's name.
_DECORATION = re.compile(
    r"(/fp16|/fp32|/exact|/half|/cast|/part\d+|/q\d*|/dq\d*|/float\d*|_QuantizeLinear_Output|_DequantizeLinear_Output|_QuantizeLinear_Input"
    r"|_DequantizeLinear|_QuantizeLinear|_quantized|_token_\d+|_InsertedPrecisionFreeCast_.*)$"
)


def family(operator: str) -> str:
    """Operators of one family do the same; one that is in none is its own."""
    return _FAMILY_OF.get(operator) or operator.lower().strip("_")


def same_family(a: str, b: str) -> bool:
    """Whether two operators do the same."""
    return family(a) == family(b)


def hands_on(operator: str) -> bool:
    """Whether it gives the values that it takes, in another shape or type at most."""
    return family(operator) == "hands on"


def plain_name(name: str) -> str:
    """A tensor's name without what rewrites appended to it."""
    while (shorter := _DECORATION.sub("", name)) != name:
        name = shorter
    return name
