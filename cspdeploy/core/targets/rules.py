"""Demands of targets on single operators, from the remarks beside their lists of operators."""

from __future__ import annotations

from cspdeploy.core.targets.model import Rule

__all__ = [
    "COREML_OPERATORS", "COREML_RULES", "NNAPI_OPERATORS", "NNAPI_RULES", "OPENCV_IMPORTER", "OPENCV_RULES",
    "TENSORRT_8_6_RULES", "TENSORRT_10_OPERATORS", "TENSORRT_10_RULES",
]  # fmt: skip

OPENCV_IMPORTER = "opencv/opencv modules/dnn/src/onnx/onnx_importer.cpp (4771da51)"
NNAPI_OPERATORS = "microsoft/onnxruntime tools/ci_build/github/android/nnapi_supported_ops.md"
COREML_OPERATORS = "microsoft/onnxruntime tools/ci_build/github/apple/coreml_supported_mlprogram_ops.md"
TENSORRT_10_OPERATORS = "onnx/onnx-tensorrt docs/operators.md (10.15)"
_TENSORRT_8_OPERATORS = "onnx/onnx-tensorrt docs/operators.md (8.5)"

_REDUCTIONS = ("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin",
               "ReduceProd", "ReduceSum", "ReduceSumSquare")  # fmt: skip
_QUANTIZE = ("QuantizeLinear", "DequantizeLinear")
_FOLD = "simplify the file, so that the value becomes a constant"
_CPU = "nothing, or rewrite the node: it runs on the CPU"

OPENCV_RULES = (
    Rule(
        kind="constant", operators=("Slice",), positions=(1, 2, 3, 4), takes="constant starts, ends, axes and steps",
        fix=_FOLD, source=f"{OPENCV_IMPORTER}: parseSlice",
    ),
    Rule(
        kind="constant", operators=("Split",), positions=(1,), takes="constant sizes of the parts", fix=_FOLD,
        source=f"{OPENCV_IMPORTER}: parseSplit",
    ),
    Rule(
        kind="constant", operators=_REDUCTIONS, positions=(1,), takes="constant axes", fix=_FOLD,
        source=f"{OPENCV_IMPORTER}: parseReduce",
    ),
    # Each quantised tensor is a CV_8S there, and a zero point is read as int8: 128 would become -128.
    Rule(
        kind="zero-point-dtype", operators=_QUANTIZE, values=("int8",), takes="int8 for quantised values",
        fix="quantise activations and weights to int8", source=f"{OPENCV_IMPORTER}: parseQuantDequant",
    ),
)  # fmt: skip

_POOL_2D_3D = "2-D and 3-D pooling"
_SYMMETRIC = (
    Rule(
        kind="zero-point", operators=_QUANTIZE, takes="symmetric quantisation: every zero point 0",
        fix="quantise symmetrically", source=f"{_TENSORRT_8_OPERATORS}, NVIDIA/TensorRT#2774, NVIDIA/TensorRT#4698",
    ),
    Rule(
        kind="zero-point-dtype", operators=_QUANTIZE,
        values=("int8", "int4", "float8e4m3fn", "float8e5m2", "float4e2m1"), takes="int8 for quantised values",
        fix="quantise activations and weights to int8", source=f"{_TENSORRT_8_OPERATORS}: DequantizeLinear",
    ),
)  # fmt: skip
_TENSORRT_RESIZE = (
    Rule(
        kind="attribute", operators=("Resize",), attribute="mode", values=("nearest", "linear"), default="nearest",
        takes="nearest and linear", fix="upsample by nearest or linear", source=_TENSORRT_8_OPERATORS,
    ),
    Rule(
        kind="attribute", operators=("Resize",), attribute="coordinate_transformation_mode", default="half_pixel",
        values=("half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners"),
        takes="half_pixel, pytorch_half_pixel, tf_half_pixel_for_nn, asymmetric, align_corners",
        fix="export Resize with one of these", source=_TENSORRT_8_OPERATORS,
    ),
)  # fmt: skip
_TENSORRT_COMMON = (
    *_SYMMETRIC,
    *_TENSORRT_RESIZE,
    Rule(
        kind="spatial", operators=("AveragePool", "MaxPool"), values=(2, 3), takes=_POOL_2D_3D,
        fix="add a dimension of 1 before the pooling", source=_TENSORRT_8_OPERATORS,
    ),
    Rule(
        kind="unused-output", operators=("MaxPool",), positions=(1,), takes="MaxPool without its Indices output",
        fix="use MaxPool's values alone", source=_TENSORRT_8_OPERATORS,
    ),
    Rule(
        kind="constant", operators=("CumSum", "Squeeze", "Unsqueeze"), positions=(1,), takes="constant axes", fix=_FOLD,
        source=_TENSORRT_8_OPERATORS,
    ),
)  # fmt: skip

TENSORRT_8_6_RULES = (
    *_TENSORRT_COMMON,
    Rule(
        kind="constant", operators=("Slice",), positions=(3,), takes="constant axes", fix=_FOLD,
        source=_TENSORRT_8_OPERATORS,
    ),
    Rule(
        kind="constant", operators=("InstanceNormalization",), positions=(1, 2), takes="constant scale and bias",
        fix=_FOLD, source=_TENSORRT_8_OPERATORS,
    ),
)  # fmt: skip

TENSORRT_10_RULES = (
    *_TENSORRT_COMMON,
    Rule(
        kind="attribute", operators=("Resize",), attribute="antialias", values=(0,), default=0,
        takes="Resize without antialias", fix="upsample without antialias", source=TENSORRT_10_OPERATORS,
    ),
    Rule(
        kind="attribute", operators=("Resize",), attribute="keep_aspect_ratio_policy", values=("stretch",),
        default="stretch", takes="stretch", fix="resize to a size of the same ratio", source=TENSORRT_10_OPERATORS,
    ),
    Rule(
        kind="attribute", operators=("ScatterND",), attribute="reduction", values=("none",), default="none",
        takes="ScatterND without a reduction", fix="add after a ScatterND of zeros", source=TENSORRT_10_OPERATORS,
    ),
    Rule(
        kind="attribute", operators=("TopK",), attribute="sorted", values=(1,), default=1, takes="sorted TopK",
        fix="export TopK with sorted=1", source=TENSORRT_10_OPERATORS,
    ),
    Rule(
        kind="constant", operators=_REDUCTIONS, positions=(1,), takes="constant axes", fix=_FOLD,
        source=TENSORRT_10_OPERATORS,
    ),
    Rule(
        kind="rank", operators=("GridSample",), values=(4,), takes="GridSample on 4-D inputs",
        fix="fold the third spatial dimension into the batch", source=TENSORRT_10_OPERATORS,
    ),
    Rule(
        kind="form", operators=("GroupNormalization",), opsets=(21, 10_000),
        takes="GroupNormalization as opset 18 defines it", fix="export it with --opset 18",
        source="NVIDIA/TensorRT#4336",
    ),
)  # fmt: skip

COREML_RULES = (
    Rule(
        kind="spatial", operators=("Conv",), values=(1, 2), takes="1-D and 2-D convolutions", fix=_CPU,
        severity="warning", source=COREML_OPERATORS,
    ),
    Rule(
        kind="spatial", operators=("AveragePool", "MaxPool"), values=(2,), takes="2-D pooling", fix=_CPU,
        severity="warning", source=COREML_OPERATORS,
    ),
    Rule(
        kind="rank", operators=("GlobalAveragePool", "GlobalMaxPool", "GridSample"), values=(4,), takes="4-D inputs",
        fix=_CPU, severity="warning", source=COREML_OPERATORS,
    ),
    Rule(
        kind="constant", operators=("Conv",), positions=(2,), takes="a constant bias", fix=_FOLD, severity="warning",
        source=COREML_OPERATORS,
    ),
    Rule(
        kind="constant", operators=("ConvTranspose",), positions=(1, 2), takes="constant weights and bias", fix=_FOLD,
        severity="warning", source=COREML_OPERATORS,
    ),
    Rule(
        kind="constant", operators=("Slice",), positions=(1, 2, 3, 4), takes="constant starts, ends, axes and steps",
        fix=_FOLD, severity="warning", source=COREML_OPERATORS,
    ),
    Rule(
        kind="constant", operators=("Split", "Gemm"), positions=(1,), takes="a constant second input", fix=_FOLD,
        severity="warning", source=COREML_OPERATORS,
    ),
    Rule(
        kind="attribute", operators=("GatherND",), attribute="batch_dims", values=(0,), default=0,
        takes="batch_dims 0", fix=_CPU, severity="warning", source=COREML_OPERATORS,
    ),
)  # fmt: skip

NNAPI_RULES = (
    Rule(
        kind="spatial", operators=("Conv", "QLinearConv", "AveragePool", "MaxPool"), values=(2,),
        takes="2-D convolution and pooling", fix=_CPU, severity="warning", source=NNAPI_OPERATORS,
    ),
    Rule(
        kind="rank", operators=("GlobalAveragePool", "GlobalMaxPool", "Resize"), values=(4,), takes="4-D inputs",
        fix=_CPU, severity="warning", source=NNAPI_OPERATORS,
    ),
    Rule(
        kind="constant", operators=("Conv",), positions=(1, 2), takes="constant weights and bias", fix=_FOLD,
        severity="warning", source=NNAPI_OPERATORS,
    ),
    Rule(
        kind="constant", operators=_QUANTIZE, positions=(1, 2), takes="constant scales and zero points", fix=_FOLD,
        severity="warning", source=NNAPI_OPERATORS,
    ),
    Rule(
        kind="attribute", operators=("DepthToSpace",), attribute="mode", values=("DCR",), default="DCR",
        takes="DepthToSpace in mode DCR", fix=_CPU, severity="warning", source=NNAPI_OPERATORS,
    ),
    Rule(
        kind="attribute", operators=("Pad",), attribute="mode", values=("constant",), default="constant",
        takes="Pad in mode constant", fix=_CPU, severity="warning", source=NNAPI_OPERATORS,
    ),
)  # fmt: skip
