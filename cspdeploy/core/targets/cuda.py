"""Which operators ONNX Runtime's CUDA provider has kernels for, and for which element types.

Source: docs/OperatorKernels.md of microsoft/onnxruntime (commit 001d12d2), section CUDAExecutionProvider. An operator
that is not in here runs on the CPU: ConvInteger, QLinearConv, QLinearMatMul and every QLinear* of com.microsoft, Celu,
DynamicQuantizeLinear, Hardmax, LpPool, MaxRoiPool, and DeformConv, which later versions have.
"""

from __future__ import annotations

from cspdeploy.core.targets.model import PatternRule, Rule

__all__ = ["CUDA", "CUDA_KERNELS", "CUDA_LEFT", "CUDA_MICROSOFT", "CUDA_PATTERNS", "CUDA_RULES"]

CUDA_KERNELS = "microsoft/onnxruntime docs/OperatorKernels.md, CUDAExecutionProvider (001d12d2)"
CUDA_LEFT = "no CUDA kernel: runs on the CPU with copies at each side"
_REGISTRY = "microsoft/onnxruntime onnxruntime/core/framework/kernel_registry.cc"
_QDQ_RULES = "onnxruntime/core/optimizer/qdq_transformer/selectors_actions/qdq_selector_action_transformer.cc"

# Element types of the kernels by operator; of the first input where nothing else is said below. All: whatever it takes.
_ALL = """Cast Compress Concat ConstantOfShape Expand Flatten Gather GatherElements Identity If Loop Reshape
    ReverseSequence Scan Scatter ScatterElements ScatterND Shape Size Slice Split Squeeze Transpose Trilu Unsqueeze
    Abs Sign Shrink Neg EyeLike OneHot IsInf IsNaN RandomNormal RandomNormalLike RandomUniform RandomUniformLike"""
_FLOAT = """ArgMax ArgMin AveragePool BatchNormalization Ceil Conv ConvTranspose Cos DepthToSpace Dropout Einsum Elu
    Floor GRU GlobalAveragePool GlobalMaxPool HardSigmoid HardSwish InstanceNormalization LRN LSTM LeakyRelu Log
    LogSoftmax PRelu RNN Reciprocal ReduceLogSum ReduceLogSumExp ReduceSumSquare Round Selu Sin Softplus Softsign
    SpaceToDepth ThresholdedRelu"""
_FLOAT_BFLOAT = "Erf Exp Gelu Gemm LayerNormalization MatMul Relu Sigmoid Softmax Sqrt Sum Tanh"
_LOGIC = "And Not Or Xor"
_F = ("float16", "float32", "float64")
_BF = ("bfloat16", *_F)
_WHOLE = ("int32", "int64", "uint32", "uint64")
_SMALL = ("int8", "int16", "uint8", "uint16")
# ONNX defines them by other operators, which take their place when the file is loaded: seen in 1.31.1, where Mish is
# Softplus, Tanh and Mul. Constant becomes an initializer.
_EXPANDED = "CastLike CenterCropPad Constant GroupNormalization Mish"
_SPECIAL: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("ReduceL1 ReduceL2 ReduceMean ReduceProd", (*_F, "int32")),
    ("ReduceMax", (*_F, "int32", "int64")),
    ("ReduceMin", (*_F, "int32", "int64", "int8", "uint8")),
    ("ReduceSum", (*_BF, "int32", "int64")),
    ("Equal", ("bool", *_F, *_WHOLE)),
    ("Greater GreaterOrEqual Less LessOrEqual", (*_F, *_WHOLE)),
    ("Max Min Mod", (*_BF, *_WHOLE)),
    ("Pow", (*_BF, "int32", "int64")),
    ("CumSum", (*_F, *_WHOLE)),
    ("Pad", ("bool", *_F)),
    ("Resize Upsample", (*_F, "int32", "uint8")),
    ("TopK", (*_F, "int32", "int64")),
    ("Tile", (*_BF, "int32", "int64")),
    ("Range", ("float32", "float64", "int16", "int32", "int64")),
    ("NonZero", ("bool", "float16", "float32", "int32", "int64", "uint8")),
    ("GatherND", ("bool", *_BF, "int64")),
    ("GridSample NonMaxSuppression", ("float32",)),
    ("RoiAlign", ("float32", "float64")),
    ("MatMulInteger", ("int8",)),
    ("DequantizeLinear", ("int8", "uint8", "int4", "uint4", "float8e4m3fn", "float8e5m2")),
)
_BY_OPSET: tuple[tuple[str, tuple[int, int], tuple[str, ...]], ...] = (
    ("Add Div Mul Sub", (7, 13), (*_BF, *_WHOLE)),
    ("Add Div Mul Sub", (14, 10_000), (*_BF, *_WHOLE, *_SMALL)),
    ("Clip", (1, 11), ("float32",)),
    ("Clip", (12, 10_000), (*_F, "int8", "uint8", "int64", "uint64")),
    ("MaxPool", (1, 11), _F),
    ("MaxPool", (12, 10_000), (*_F, "int8", "uint8")),
    ("QuantizeLinear", (10, 18), ("float32",)),
    ("QuantizeLinear", (19, 10_000), ("float16", "float32")),
)
# A kernel without a last opset fits the one form that it was written for. In these the operator got a new form, and
# releases before the threads named register no kernel for it.
_FORMS: tuple[tuple[str, int, str], ...] = (
    ("RoiAlign", 16, f"{CUDA_KERNELS}; {_REGISTRY}: VerifyVersion"),
    ("Pad", 19, "microsoft/onnxruntime#26393, microsoft/onnxruntime#27416"),
    ("Equal", 19, f"{CUDA_KERNELS}; {_REGISTRY}: VerifyVersion"),
    ("Size", 19, "microsoft/onnxruntime#27728"),
    ("ReduceMax ReduceMin", 20, f"{CUDA_KERNELS}; {_REGISTRY}: VerifyVersion"),
    ("ConstantOfShape", 20, "microsoft/onnxruntime#27728"),
    ("Flatten Identity If Loop Scan", 21, "microsoft/onnxruntime#27728"),
)


def _types(
    names: str, values: tuple[str, ...], *, positions: tuple[int, ...] = (0,), opsets: tuple[int, int] = (1, 10_000)
) -> Rule:
    return Rule(
        kind="element-type", operators=tuple(names.split()), values=values, positions=positions, opsets=opsets,
        takes=f"{', '.join(values)}; for others {CUDA_LEFT}", fix="nothing, or a Cast around it: it runs on the CPU",
        severity="warning", source=CUDA_KERNELS,
    )  # fmt: skip


def _form(names: str, first: int, source: str) -> Rule:
    return Rule(
        kind="form", operators=tuple(names.split()), opsets=(first, 10_000), severity="warning", source=source,
        takes=f"the form before opset {first}; for the newer one some versions have {CUDA_LEFT}",
        fix=f"export it with --opset {min(first - 1, 18)}",
    )  # fmt: skip


CUDA = frozenset(
    " ".join((_ALL, _FLOAT, _FLOAT_BFLOAT, _LOGIC, _EXPANDED, "Where", *(names for names, _ in _SPECIAL),
              *(names for names, _, _ in _BY_OPSET))).split()
)  # fmt: skip
_MICROSOFT = """Attention BiasAdd BiasGelu BiasSoftmax BiasSplitGelu DequantizeLinear FastGelu FusedConv FusedMatMul
    Gelu GridSample GroupNorm Inverse MatMulBnb4 MatMulNBits MultiHeadAttention NhwcConv QuantizeLinear QuickGelu
    RotaryEmbedding SkipGroupNorm SkipLayerNormalization SkipSimplifiedLayerNormalization TransposeMatMul Trilu"""
CUDA_MICROSOFT = frozenset(_MICROSOFT.split())

CUDA_RULES = (
    _types(_FLOAT, _F),
    _types(_FLOAT_BFLOAT, _BF),
    _types(_LOGIC, ("bool",)),
    _types("Where", (*_BF, "int32", "int64", "uint8"), positions=(1,)),
    *(_types(names, values) for names, values in _SPECIAL),
    *(_types(names, values, opsets=opsets) for names, opsets, values in _BY_OPSET),
    _types("DequantizeLinear", ("float32",), positions=(1,), opsets=(10, 18)),
    *(_form(*row) for row in _FORMS),
    # Not left to the CPU: the kernel takes the node, and gives up when it runs.
    Rule(
        kind="rank", operators=("Resize", "Upsample"), values=(2, 4), only_if=("mode", "cubic"),
        takes="cubic interpolation of 2-D and 4-D inputs", fix="resize by linear or nearest",
        source="microsoft/onnxruntime onnxruntime/core/providers/cpu/tensor/upsamplebase.h: Cubic mode only supports",
    ),
    Rule(
        kind="attribute", operators=("Resize",), attribute="mode", values=("linear", "cubic"), only_if=("antialias", 1),
        takes="antialias with linear and cubic", fix="upsample without antialias",
        source="microsoft/onnxruntime onnxruntime/core/providers/cuda/tensor/resize_antialias_impl.cu",
    ),
)  # fmt: skip

CUDA_PATTERNS = (
    PatternRule(
        kind="quantised-product", severity="warning",
        takes="float: it has no INT8 convolution, and computes the pairs as kernels around one in FP32",
        fix="the FP16 artifact here; this file for TensorRT: cspdeploy verify BUNDLE --runtime ort-tensorrt",
        source=f"{CUDA_KERNELS}: no QLinearConv; microsoft/onnxruntime {_QDQ_RULES}: ConvQDQRules names the CPU, DML "
        "and ACL providers",
    ),
)  # fmt: skip
