"""Names of ONNX operators: when each came, which are made of simpler ones, and which each target has."""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "COMPOSITES", "COREML", "MOBILE", "MOBILE_MICROSOFT", "NNAPI", "NNAPI_MICROSOFT", "OPENCV", "OPENCV_MICROSOFT",
    "OPENVINO_ABSENT", "OPENVINO_MICROSOFT", "OPERATOR_SINCE", "TENSORRT_8_6", "TENSORRT_10", "Composite",
]  # fmt: skip


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


class Composite(NamedTuple):
    """An operator that can be written with older ones."""

    since: int
    made_of: str


# The opset that brought each of them (docs/Changelog.md of onnx/onnx), and what exporters write before that.
COMPOSITES: dict[str, Composite] = {
    "HardSwish": Composite(14, "HardSigmoid and Mul"),
    "LayerNormalization": Composite(17, "ReduceMean, Sub, Mul, Sqrt, Div and Add"),
    "Mish": Composite(18, "Softplus, Tanh and Mul"),
    "GroupNormalization": Composite(18, "Reshape, InstanceNormalization, Mul and Add"),
    "Gelu": Composite(20, "Div, Erf, Add and Mul"),
}

# Operators of the default domain by the opset that brought them: docs/Changelog.md of onnx/onnx.
_BY_OPSET = {
    1: """Abs Add And ArgMax ArgMin AveragePool BatchNormalization Cast Ceil Clip Concat Constant Conv ConvTranspose
        DepthToSpace Div Dropout Elu Equal Exp Flatten Floor GRU Gather Gemm GlobalAveragePool GlobalLpPool
        GlobalMaxPool Greater HardSigmoid Hardmax Identity If InstanceNormalization LRN LSTM LeakyRelu Less Log
        LogSoftmax Loop LpNormalization LpPool MatMul Max MaxPool MaxRoiPool Mean Min Mul Neg Not Or PRelu Pad Pow RNN
        RandomNormal RandomNormalLike RandomUniform RandomUniformLike Reciprocal ReduceL1 ReduceL2 ReduceLogSum
        ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Selu Shape
        Sigmoid Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tanh Tile TopK Transpose
        Unsqueeze Upsample Xor""",
    7: "Acos Asin Atan Cos Multinomial Sin Tan",
    8: "Expand Scan",
    9: """Acosh Asinh Atanh Compress ConstantOfShape Cosh Erf EyeLike IsNaN MaxUnpool MeanVarianceNormalization NonZero
        OneHot Scatter Shrink Sign Sinh TfIdfVectorizer Where""",
    10: """ConvInteger DequantizeLinear IsInf MatMulInteger Mod NonMaxSuppression QLinearConv QLinearMatMul
        QuantizeLinear Resize ReverseSequence RoiAlign StringNormalizer ThresholdedRelu""",
    11: """BitShift ConcatFromSequence CumSum Det DynamicQuantizeLinear GatherElements GatherND Range Round
        ScatterElements ScatterND SequenceAt SequenceConstruct SequenceEmpty SequenceErase SequenceInsert SequenceLength
        SplitToSequence Unique""",
    12: "Celu Einsum GreaterOrEqual LessOrEqual NegativeLogLikelihoodLoss SoftmaxCrossEntropyLoss",
    14: "HardSwish Trilu",
    15: "Bernoulli CastLike Optional OptionalGetElement OptionalHasElement",
    16: "GridSample",
    17: "BlackmanWindow DFT HammingWindow HannWindow LayerNormalization MelWeightMatrix STFT SequenceMap",
    18: "BitwiseAnd BitwiseNot BitwiseOr BitwiseXor CenterCropPad Col2Im GroupNormalization Mish",
    19: "DeformConv",
    20: "AffineGrid Gelu ImageDecoder RegexFullMatch StringConcat StringSplit",
    23: "Attention RMSNormalization RotaryEmbedding",
    24: "Swish TensorScatter",
    26: "BitCast CumProd",
    27: "CausalConvWithState LinearAttention",
    28: "SwiGLU",
}
OPERATOR_SINCE: dict[str, int] = {name: opset for opset, names in _BY_OPSET.items() for name in names.split()}

_ALL_24 = frozenset(name for name, opset in OPERATOR_SINCE.items() if opset <= 24)

# onnx-tensorrt docs/operators.md, TensorRT 8.5 (commit 6d0ab7be): those marked N, of the operators up to opset 17 ...
_TENSORRT_8_5_ABSENT = _names(
    """Bernoulli BitShift BlackmanWindow Compress ConcatFromSequence ConvInteger DFT Det DynamicQuantizeLinear
    HammingWindow HannWindow Hardmax IsInf LayerNormalization MatMulInteger MaxRoiPool MaxUnpool MelWeightMatrix
    Multinomial NegativeLogLikelihoodLoss Optional OptionalGetElement OptionalHasElement QLinearConv QLinearMatMul
    STFT SequenceAt SequenceConstruct SequenceEmpty SequenceErase SequenceInsert SequenceLength SequenceMap
    SoftmaxCrossEntropyLoss SplitToSequence StringNormalizer TfIdfVectorizer Unique CastLike"""
)
# ... and what 8.6 added: onnx-tensorrt#904.
TENSORRT_8_6 = frozenset(
    name for name, opset in OPERATOR_SINCE.items() if opset <= 17 and name not in _TENSORRT_8_5_ABSENT
) | {"GroupNormalization", "LayerNormalization", "IsInf"}

# onnx-tensorrt docs/operators.md, TensorRT 10.15: those marked N or not listed, of the operators up to opset 24.
_TENSORRT_10_ABSENT = _names(
    """AffineGrid Bernoulli BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Col2Im CenterCropPad Compress
    ConcatFromSequence ConvInteger DFT Det DynamicQuantizeLinear ImageDecoder MatMulInteger MaxRoiPool MaxUnpool
    MelWeightMatrix Multinomial NegativeLogLikelihoodLoss Optional OptionalGetElement OptionalHasElement QLinearConv
    QLinearMatMul RegexFullMatch SequenceAt SequenceConstruct SequenceEmpty SequenceErase SequenceInsert
    SequenceLength SequenceMap SoftmaxCrossEntropyLoss SplitToSequence StringConcat StringNormalizer StringSplit
    Swish TfIdfVectorizer Unique"""
)
TENSORRT_10 = _ALL_24 - _TENSORRT_10_ABSENT

# opencv modules/dnn/src/onnx/onnx_importer.cpp, buildDispatchMap_ONNX_AI and _COM_MICROSOFT (commit 4771da51), without
# the names that ONNX does not have.
OPENCV = _names(
    """ArgMax ArgMin MaxUnpool MaxPool AveragePool GlobalAveragePool GlobalMaxPool ReduceMax ReduceMin ReduceMean
    ReduceSum ReduceSumSquare ReduceProd ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp Slice Split Neg Constant
    LSTM GRU Clip LeakyRelu Relu Elu Tanh Abs PRelu LRN InstanceNormalization BatchNormalization Gemm MatMul Conv
    ConvTranspose Transpose Squeeze Flatten Unsqueeze Expand Reshape Pad Shape Cast ConstantOfShape Gather
    GatherElements Concat Resize Upsample Softmax LogSoftmax CumSum SpaceToDepth DepthToSpace ScatterElements
    Scatter ScatterND Tile LayerNormalization GroupNormalization TopK Equal Greater Less Pow Add Sub Mul Div
    GreaterOrEqual LessOrEqual Mod And Or Xor Sum Min Max Mean Where Range Einsum Hardmax GatherND Acos Acosh Asin
    Asinh Atan Atanh Ceil Celu Cos Cosh Dropout Erf Exp Floor HardSigmoid HardSwish Identity Log Round Reciprocal
    Selu Sign Sigmoid Sin Sinh Softplus Softsign Shrink Sqrt Tan ThresholdedRelu Gelu QuantizeLinear
    DequantizeLinear QLinearConv QLinearMatMul"""
)
OPENCV_MICROSOFT = _names(
    """QLinearAdd QLinearMul QLinearAveragePool QLinearGlobalAveragePool QLinearLeakyRelu QLinearSigmoid QLinearConcat
    QGemm QLinearSoftmax Attention"""
)

# openvino src/frontends/onnx/docs/supported_ops.md (commit 0ae60f0f): those without a supported version.
OPENVINO_ABSENT = _names(
    """Bernoulli DeformConv Det ImageDecoder LpPool MaxUnpool MelWeightMatrix Optional OptionalGetElement
    OptionalHasElement RegexFullMatch SequenceMap StringConcat StringNormalizer StringSplit TfIdfVectorizer"""
)
OPENVINO_MICROSOFT = _names(
    """Attention BiasAdd BiasGelu BiasSplitGelu BifurcationDetector DequantizeLinear DynamicQuantizeMatMul
    EmbedLayerNormalization FastGelu FusedConv FusedGemm FusedMatMul GatherND Gelu GroupNorm GroupQueryAttention
    MatMulIntegerToFloat MatMulNBits Pad QLinearAdd QLinearAveragePool QLinearConcat QLinearLeakyRelu QLinearMul
    QLinearReduceMean QLinearSigmoid QLinearSoftmax QLinearWhere QuantizeLinear QuickGelu Range RotaryEmbedding
    SimplifiedLayerNormalization SkipLayerNormalization SkipSimplifiedLayerNormalization Trilu"""
)

# onnxruntime docs/reference/operators/mobile_package_op_type_support_1.17.md (gh-pages); and Constant, which is no
# kernel: it becomes an initializer when the file is loaded. So in the two lists below.
MOBILE = _names(
    """Abs Add And ArgMax ArgMin AveragePool Cast Ceil Clip Concat ConstantOfShape Conv ConvTranspose Cos CumSum
    DepthToSpace DequantizeLinear Div DynamicQuantizeLinear Elu Equal Erf Exp Expand Flatten Floor Gather GatherND
    Gemm GlobalAveragePool Greater GreaterOrEqual HardSigmoid Identity If InstanceNormalization LRN
    LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax Loop MatMul MatMulInteger Max MaxPool Mean Min Mul
    Neg NonMaxSuppression NonZero Not Or PRelu Pad Pow QLinearConv QLinearMatMul QuantizeLinear Range Reciprocal
    ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum Relu Reshape Resize ReverseSequence Round Scan ScatterND
    Shape Sigmoid Sin Size Slice Softmax SpaceToDepth Split Sqrt Squeeze Sub Sum Tanh ThresholdedRelu Tile TopK
    Transpose Unique Unsqueeze Where Constant"""
)
MOBILE_MICROSOFT = _names(
    """DynamicQuantizeMatMul FusedConv FusedGemm FusedMatMul Gelu MatMulIntegerToFloat NhwcMaxPool QLinearAdd
    QLinearAveragePool QLinearConv QLinearGlobalAveragePool QLinearLeakyRelu QLinearMul QLinearSigmoid"""
)

# onnxruntime tools/ci_build/github/apple/coreml_supported_mlprogram_ops.md (commit 04f568d8).
COREML = _names(
    """Add ArgMax AveragePool Cast Clip Concat Conv ConvTranspose Cos DepthToSpace Ceil Div Elu Erf Exp GatherND Gemm
    Gelu GlobalAveragePool GlobalMaxPool GridSample GroupNormalization HardSigmoid Identity InstanceNormalization
    LayerNormalization LeakyRelu MatMul MaxPool Max Mul Pow PRelu Range Reciprocal ReduceSum ReduceMean ReduceMax
    Relu Reshape Resize Round Shape Sin Slice Softplus Split Sub Sigmoid Softmax Sqrt Squeeze Tanh Tile Transpose
    Unsqueeze Constant"""
)

# onnxruntime tools/ci_build/github/android/nnapi_supported_ops.md (commit 53086759).
NNAPI = _names(
    """Abs Add AveragePool Cast Clip Concat Conv DepthToSpace DequantizeLinear Div Elu Exp Flatten Floor Gather Gemm
    GlobalAveragePool GlobalMaxPool Identity Log MatMul MaxPool Max Min Mul Neg Pad Pow PRelu QLinearConv
    QLinearMatMul QuantizeLinear Relu Reshape Resize Sigmoid Sin Slice Softmax Sqrt Squeeze Sub Tanh Transpose
    Unsqueeze Constant"""
)
NNAPI_MICROSOFT = _names("QLinearAdd QLinearAveragePool QLinearSigmoid")
