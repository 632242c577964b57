"""The targets. Every row and every rule names its source; what could not be verified is not in here.

Sources: ORT is microsoft/onnxruntime, TRT onnx/onnx-tensorrt, `owner/repo#n` a public thread.
"""

from __future__ import annotations

from cspdeploy.core.targets.cuda import CUDA, CUDA_KERNELS, CUDA_LEFT, CUDA_MICROSOFT, CUDA_PATTERNS, CUDA_RULES
from cspdeploy.core.targets.model import DtypeRule, Rule, Target
from cspdeploy.core.targets.operators import (
    COREML,
    MOBILE,
    MOBILE_MICROSOFT,
    NNAPI,
    NNAPI_MICROSOFT,
    OPENCV,
    OPENCV_MICROSOFT,
    OPENVINO_ABSENT,
    OPENVINO_MICROSOFT,
    OPERATOR_SINCE,
    TENSORRT_8_6,
    TENSORRT_10,
)
from cspdeploy.core.targets.qdq import TENSORRT_PATTERNS
from cspdeploy.core.targets.rules import (
    COREML_OPERATORS,
    COREML_RULES,
    NNAPI_OPERATORS,
    NNAPI_RULES,
    OPENCV_IMPORTER,
    OPENCV_RULES,
    TENSORRT_8_6_RULES,
    TENSORRT_10_OPERATORS,
    TENSORRT_10_RULES,
)

__all__ = ["TARGETS"]

_ORT_COMPATIBILITY = "onnxruntime.ai/docs/reference/compatibility.html"
_ORT_KERNELS = "microsoft/onnxruntime docs/OperatorKernels.md"
_FIXED_SHAPES = "onnxruntime.ai/docs/tutorials/mobile/helpers/make-dynamic-shape-fixed.html"
_ORT_DYNAMIC = f"{_FIXED_SHAPES}: only accelerators need fixed shapes"
_MOBILE_OPERATORS = "onnxruntime.ai/docs/reference/operators/mobile_package_op_type_support_1.17.html"
_WEB_README = "npmjs.com/package/onnxruntime-web: WebAssembly has full ONNX operator coverage"
_OPENVINO_OPERATORS = "openvinotoolkit/openvino src/frontends/onnx/docs/supported_ops.md"
_TENSORRT_8_5_OPERATORS = "onnx/onnx-tensorrt docs/operators.md (8.5) and onnx/onnx-tensorrt#904 (8.6)"

# NVIDIA/TensorRT plugin/efficientNMSPlugin/README.md: found by the operator's name, whatever its domain.
_TENSORRT_PLUGINS = {"TRT": frozenset({"EfficientNMS_TRT"})}
_MICROSOFT_ALL = {"com.microsoft": None, "ai.onnx.ml": None}


def _ort(version: str, *, opset: int, ir: int) -> Target:
    """ONNX Runtime on the CPU. It runs all that earlier versions ran, so that a row holds for every later version.

    IR 8 brought functions to files: docs/IR.md of onnx/onnx.
    """
    return Target(
        name=f"ort-{version}", aliases=(f"ort>={version}", f"onnxruntime-{version}", f"onnxruntime>={version}"),
        summary=f"ONNX Runtime {version} and later, CPU", min_opset=7, max_opset=opset, max_ir=ir,
        caps_source=_ORT_COMPATIBILITY, operators=None, operators_source=_ORT_KERNELS, free_dims="any",
        free_dims_source=_ORT_DYNAMIC, domains=_MICROSOFT_ALL, functions=ir >= 8,
    )  # fmt: skip


# Opset 12: 4.7.0 loads a network at opset 12 that it refuses at 17, for the form of Split that takes its sizes as an
# input (opencv/opencv#23137); opencv/opencv#23482 reads that form. TopK came with opencv/opencv#23279, after 4.10.
_OPENCV_4 = Target(
    name="opencv-4", aliases=("opencv", "opencv4", "opencv-4.7", "opencv>=4.7"), summary="OpenCV DNN 4.7 and later",
    min_opset=1, max_opset=12, max_ir=None, caps_source="opencv/opencv#23137, ultralytics/yolov5#10665",
    operators=OPENCV - {"TopK", "Mod"},
    operators_source=f"{OPENCV_IMPORTER}; not in 4.7: TopK (opencv/opencv#23749) and Mod (opencv/opencv#23174)",
    free_dims="batch", free_dims_source="opencv/opencv#26141, opencv/opencv#19499",
    domains={"com.microsoft": OPENCV_MICROSOFT}, rules=OPENCV_RULES,
)  # fmt: skip

_OPENCV_4_11 = Target(
    name="opencv-4.11", aliases=("opencv>=4.11",), summary="OpenCV DNN 4.11 and later of the 4 series", min_opset=1,
    max_opset=18, max_ir=None, caps_source=f"{OPENCV_IMPORTER}: reads Split-13 and the reductions of opset 18",
    operators=OPENCV, operators_source=OPENCV_IMPORTER, free_dims="batch",
    free_dims_source="opencv/opencv#26141, opencv/opencv#19499", domains={"com.microsoft": OPENCV_MICROSOFT},
    rules=OPENCV_RULES,
)  # fmt: skip

_TENSORRT_INT64 = DtypeRule(
    dtypes=frozenset({"int64"}), where="inputs", severity="warning",
    takes="int64 is cast to int32, values beyond it are clamped", fix="make the input int32 or float32",
    source=_TENSORRT_8_5_OPERATORS,
)  # fmt: skip

_TENSORRT_8_6 = Target(
    name="tensorrt-8.6", aliases=("trt-8.6", "tensorrt-8"), summary="TensorRT 8.6 through its ONNX parser",
    min_opset=1, max_opset=17, max_ir=None,
    caps_source="NVIDIA/Deep-Learning-Accelerator-SW operators: TensorRT 8.6 supports operators up to opset 17",
    operators=TENSORRT_8_6, operators_source=_TENSORRT_8_5_OPERATORS, free_dims="any",
    free_dims_source="onnx/onnx-tensorrt docs/Changelog.md, 7.2.1: dynamic shapes, with an optimisation profile",
    dtypes=(
        DtypeRule(
            dtypes=frozenset({"float64"}), severity="warning",
            takes="float64 is cast to float32, values beyond it are clamped", fix="export in float32",
            source=_TENSORRT_8_5_OPERATORS,
        ),
        _TENSORRT_INT64,
        DtypeRule(
            dtypes=frozenset({"bfloat16", "float8e4m3fn", "float8e4m3fnuz", "float8e5m2", "float8e5m2fnuz", "int16",
                              "uint16", "uint32", "uint64", "int4", "uint4", "complex64", "complex128", "string"}),
            takes="float32, float16, int8, int32, bool; int64 and float64 by casts", fix="export in float32 or float16",
            source=_TENSORRT_8_5_OPERATORS,
        ),
    ),
    domains=_TENSORRT_PLUGINS, rules=TENSORRT_8_6_RULES, patterns=TENSORRT_PATTERNS,
)  # fmt: skip

_TENSORRT_10 = Target(
    name="tensorrt-10", aliases=("trt-10",), summary="TensorRT 10 through its ONNX parser", min_opset=9, max_opset=22,
    max_ir=None,
    # Its own page has moved on to 10.15, which takes opset 24; what it said before is quoted elsewhere.
    caps_source="onnx/onnx-tensorrt docs/operators.md (opset 9 to 24 in 10.15); before that to 22: "
    "deepwiki.com/onnx/onnx-tensorrt/2.2-operator-support",
    operators=TENSORRT_10, operators_source=TENSORRT_10_OPERATORS, free_dims="any",
    free_dims_source="onnx/onnx-tensorrt docs/Changelog.md, 7.2.1: dynamic shapes, with an optimisation profile",
    functions=True,
    dtypes=(
        DtypeRule(
            dtypes=frozenset({"float64"}), severity="warning",
            takes="float64 is cast to float32, values beyond it are clamped", fix="export in float32",
            source=TENSORRT_10_OPERATORS,
        ),
        DtypeRule(
            dtypes=frozenset({"int16", "uint16", "uint32", "uint64", "complex64", "complex128", "string"}),
            takes="float32, float16, bfloat16, fp8, fp4, int64, int32, int8, int4, bool; uint8 for inputs and outputs",
            fix="export in float32 or float16", source=TENSORRT_10_OPERATORS,
        ),
    ),
    domains=_TENSORRT_PLUGINS, rules=TENSORRT_10_RULES, patterns=TENSORRT_PATTERNS,
)  # fmt: skip

_OPENVINO = Target(
    name="openvino", summary="OpenVINO through its ONNX frontend", min_opset=1, max_opset=21, max_ir=None,
    # The last opset whose changed operators (QuantizeLinear, GroupNormalization) are listed as read in their new form.
    caps_source=_OPENVINO_OPERATORS,
    operators=frozenset(name for name in OPERATOR_SINCE if name not in OPENVINO_ABSENT and OPERATOR_SINCE[name] <= 23),
    operators_source=_OPENVINO_OPERATORS, free_dims="any",
    free_dims_source="intel.com/content/www/us/en/support/articles/000090776.html",
    domains={"com.microsoft": OPENVINO_MICROSOFT, "ai.onnx.ml": frozenset({"Normalizer"})},
    rules=(
        Rule(
            kind="form", operators=("ReduceL1", "ReduceLogSum", "ReduceLogSumExp"), opsets=(13, 17), attribute="axes",
            takes="these reductions up to opset 12 or from opset 18 on: in between it reduces over all axes, silently",
            fix="export it with --opset 18", source="openvinotoolkit/openvino#38241",
        ),
    ),
)  # fmt: skip

_ORT_WEB = Target(
    name="ort-web", aliases=("onnxruntime-web",), summary="ONNX Runtime Web 1.16 and later (WebAssembly, WebGPU)",
    min_opset=7, max_opset=19, max_ir=9,
    caps_source=f"{_ORT_COMPATIBILITY} (1.16); microsoft/onnxruntime#16638 (IR 8 before)",
    operators=None, operators_source=_WEB_README, free_dims="any", free_dims_source=_ORT_DYNAMIC,
    domains=_MICROSOFT_ALL, functions=True,
    rules=(
        Rule(
            kind="spatial", operators=("Conv", "ConvTranspose"), values=(1, 2), severity="warning",
            takes="1-D and 2-D convolutions on WebGPU; others run in WebAssembly, with a copy each way",
            fix="use the WebAssembly provider for this network",
            source="microsoft/onnxruntime js/web/docs/webgpu-operators.md",
        ),
    ),
)  # fmt: skip

_ORT_MOBILE = Target(
    name="ort-mobile", aliases=("onnxruntime-mobile",), summary="ONNX Runtime Mobile's reduced package, 1.17",
    min_opset=12, max_opset=15, max_ir=9,
    caps_source=f"{_MOBILE_OPERATORS}; microsoft/onnxruntime#20559 (IR 9 is the highest of 1.17)",
    operators=MOBILE, operators_source=_MOBILE_OPERATORS, free_dims="any", free_dims_source=_ORT_DYNAMIC,
    domains={"com.microsoft": MOBILE_MICROSOFT},
    dtypes=(
        DtypeRule(
            dtypes=frozenset({"float16", "bfloat16", "float64", "int16", "uint16", "uint32", "uint64", "string",
                              "int4", "uint4"}),
            takes="float32, int8 and uint8; int32 and int64 for shapes and indices",
            fix="use the FP32 or INT8 artifact", source=_MOBILE_OPERATORS,
        ),
    ),
)  # fmt: skip

_COREML = Target(
    name="coreml-via-ort", aliases=("coreml", "ort-coreml"), accelerator=True,
    summary="Core ML (ML Program) through ONNX Runtime 1.16 and later", min_opset=7, max_opset=19, max_ir=9,
    caps_source=_ORT_COMPATIBILITY, operators=COREML, operators_source=COREML_OPERATORS, free_dims="none",
    free_dims_severity="warning", free_dims_source=_FIXED_SHAPES,
    domains={"com.microsoft": frozenset({"QuickGelu", "FusedConv"})}, functions=True, rules=COREML_RULES,
)  # fmt: skip

_NNAPI = Target(
    name="nnapi-via-ort", aliases=("nnapi", "ort-nnapi"), accelerator=True,
    summary="Android's NNAPI through ONNX Runtime 1.16 and later", min_opset=7, max_opset=19, max_ir=9,
    caps_source=_ORT_COMPATIBILITY, operators=NNAPI, operators_source=NNAPI_OPERATORS, free_dims="none",
    free_dims_severity="violation", free_dims_source=_FIXED_SHAPES, domains={"com.microsoft": NNAPI_MICROSOFT},
    functions=True, rules=NNAPI_RULES,
)  # fmt: skip

# The opset and IR of 1.18: a file that its CPU provider does not load runs nowhere.
_ORT_CUDA = Target(
    name="ort-cuda", aliases=("cuda", "onnxruntime-gpu"), accelerator=True, left=CUDA_LEFT,
    summary="ONNX Runtime 1.18 and later on CUDA", min_opset=7, max_opset=21, max_ir=10,
    caps_source=_ORT_COMPATIBILITY, operators=CUDA, operators_source=CUDA_KERNELS, free_dims="any",
    free_dims_source="onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html: a CUDA graph alone needs "
    "shapes that do not change",
    domains={"com.microsoft": CUDA_MICROSOFT}, functions=True, rules=CUDA_RULES, patterns=CUDA_PATTERNS,
)  # fmt: skip

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        _ort("1.10", opset=15, ir=8), _ort("1.12", opset=17, ir=8), _ort("1.14", opset=18, ir=8),
        _ort("1.16", opset=19, ir=9), _OPENCV_4, _OPENCV_4_11, _TENSORRT_8_6, _TENSORRT_10, _OPENVINO, _ORT_WEB,
        _ORT_MOBILE, _COREML, _NNAPI, _ORT_CUDA,
    )
}  # fmt: skip
