"""Where each engine wants its Q/DQ pairs, and on which integers: a closed table. Every row says why and who says so.

Sources: ORT is microsoft/onnxruntime, TRT docs NVIDIA's TensorRT developer guide, `owner/repo path` a public file.
"""

from __future__ import annotations

import dataclasses
import platform
from dataclasses import dataclass

from cspdeploy.core.env import cpu_flags
from cspdeploy.core.errors import InputError, did_you_mean
from cspdeploy.core.targets import TARGETS, find_target
from cspdeploy.quant.plan import ActivationType

__all__ = ["ARM64_MACHINES", "PLACEMENTS", "Placement", "find_placement"]


ARM64_MACHINES = frozenset({"aarch64", "arm64"})
"""As `platform.machine` spells them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """How a graph is quantised for one engine.

    Attributes:
        runtime: the one of ours that proves and times it; None where there is none here.
        activation: integers of activations; `symmetric`: their zero points are 0.
        weight_limit: largest magnitude of a weight's integer.
        per_channel: weights have a step for each output channel.
        before_activation: an INT8 kernel gives integers, so that the tensor between a convolution and its activation
            lies on a grid. Otherwise the engine computes both in one and a pair between them would part them.
        joins: inputs and outputs of Add and Concat lie on a grid, one step for all of them.
        residual_only: of an Add, the branch that ends in a convolution is left alone: the engine adds to its sums.
        integer_bias: biases are stored in steps of (input step * weight step), else in float32.
        kernels: operators of one input that have an INT8 kernel of their own.
        narrow_in_float: convolutions of at most 4 channels, as of the image, stay in float: the engine is slower there
            in INT8.
        min_opset, max_opset: of the file. 13 brought scales for each channel.
        why: what the engine does with it. source: where that is written or how it was measured.
        verify_with: the runtime that proves it on another machine, for an engine that is not here.
        caution: what whoever asks for it should know before choosing it, or empty.
    """

    name: str
    runtime: str | None
    activation: ActivationType
    symmetric: bool
    weight_limit: int
    per_channel: bool
    before_activation: bool
    joins: bool
    min_opset: int
    max_opset: int
    why: str
    source: str
    residual_only: bool = False
    integer_bias: bool = True
    kernels: frozenset[str] = frozenset()
    narrow_in_float: bool = False
    verify_with: str = ""
    caution: str = ""


_ORT_RULES = "ORT onnxruntime/core/optimizer/qdq_transformer/selectors_actions/qdq_selector_action_transformer.cc"
_ORT_TYPES = "onnxruntime.ai/docs/performance/model-optimizations/quantization.html#data-type-selection"
_MLAS = "ORT onnxruntime/core/mlas/lib"

# The head, where a pool by itself is cheap, stays in float; within the network these take and give integers.
_ORT_KERNELS = frozenset({"LeakyRelu", "AveragePool", "GlobalAveragePool"})

# Two products are summed in 16 bits: 2 * 255 * 64 = 32,640 is the last that fits below 32,767.
_WITHOUT_VNNI = 64

_ORT_CPU = Placement(
    name="ort-cpu", runtime="ort-cpu", activation="uint8", symmetric=False, weight_limit=127, per_channel=True,
    before_activation=True, joins=True, kernels=_ORT_KERNELS, narrow_in_float=True, min_opset=13, max_opset=20,
    why="x86 with VNNI sums four u8 * s8 products exactly in 32 bits; QLinear kernels take and give integers, so that "
    "every tensor between two convolutions lies on a grid",
    source=f"{_ORT_RULES}; {_MLAS}/platform.cpp; {_ORT_TYPES}",
)  # fmt: skip

_ORT_AVX2 = dataclasses.replace(
    _ORT_CPU, name="ort-cpu-avx2", weight_limit=_WITHOUT_VNNI,
    why="x86 without VNNI sums pairs of u8 * s8 products in 16 bits, which saturate beyond 7-bit weights; the rest is "
    "as with VNNI",
    source=f"{_ORT_TYPES} (reduce_range); {_MLAS}/platform.cpp",
)  # fmt: skip

# Zero points need not be 0: MLAS asks that of weights alone, and ONNX Runtime drops a Relu before QuantizeLinear only
# where the grid starts at zero, which a symmetric one does not: the convolution before it would stay in float.
_ARM64 = dataclasses.replace(
    _ORT_CPU, name="arm64", activation="int8",
    why="ARM's dot products take s8 * s8, and MLAS has its symmetric kernels (zero points of weights 0) for signed "
    "activations; grids of activations may be asymmetric",
    source=f"{_MLAS}/platform.cpp (SymmQgemmDispatch, ConvSymS8S8Dispatch); {_ORT_RULES}; {_ORT_TYPES}",
)  # fmt: skip

_ORT_WEB = dataclasses.replace(
    _ORT_CPU, name="ort-web", runtime=None, max_opset=19,
    why="WebAssembly SIMD widens u8 and s8 to 16 bits and sums in 32, exactly; signed activations have no kernel "
    "there; the graph rewrites are those of ort-cpu",
    source=f"{_MLAS}/qgemm.h and qgemm_kernel_wasmsimd.cpp (MlasGemmU8X8DispatchWasmSimd, unsigned A alone)",
)  # fmt: skip

_OPENVINO = Placement(
    name="openvino", runtime="openvino", activation="int8", symmetric=True, weight_limit=127, per_channel=True,
    before_activation=False, joins=True, integer_bias=False, min_opset=13, max_opset=20,
    # Measured on CSPDarknet53: u8 with zero points takes 1.25 times as long, float joins 1.09 times.
    why="convolution, bias and activation are one primitive, whose sums are float until they are rounded for the next "
    "convolution: a pair in between would part them; a zero point costs a correction of every sum",
    source="openvinotoolkit/nncf nncf/common/quantization (hardware configuration CPU); oneDNN attributes post-ops",
)  # fmt: skip

_TENSORRT = Placement(
    name="tensorrt", runtime=None, activation="int8", symmetric=True, weight_limit=127, per_channel=True,
    before_activation=False, joins=True, residual_only=True, integer_bias=False, min_opset=13, max_opset=20,
    verify_with="ort-tensorrt",
    # What is not between pairs is float there, and the file says nothing of how wide: the builder's FP16 flag does.
    caution="layers left in float are computed in FP16 where the engine is built with FP16 as well as INT8",
    why="TensorRT takes zero points of 0 alone, and refuses biases in INT32, so that they stay in float; it fuses "
    "convolution, residual Add and activation where the residual branch comes with its own pair and the branch of the "
    "convolution without",
    source="microsoft/onnxruntime#14229 (INT32 biases); TRT docs, Working with Quantized Types: Q/DQ Layer-Placement "
    "Recommendations (quantise the residual input, no pair between a linear operator and its activation); "
    "docs.nvidia.com/deeplearning/tensorrt/tensorflow-quantization-toolkit/docs/docs/add_custom_qdq_cases.html",
)  # fmt: skip

_ORT_CUDA = dataclasses.replace(
    _TENSORRT, name="ort-cuda", runtime="ort-cuda", verify_with="ort-cuda",
    why="placed as for TensorRT, which ONNX Runtime can call; its own CUDA provider has no INT8 convolution: it runs "
    "QuantizeLinear and DequantizeLinear as kernels of their own around convolutions in FP32, more work than FP32 "
    "alone; pairs become integer operators on the CPU, DML and ACL providers alone; a DequantizeLinear of an INT32 "
    "bias has no CUDA kernel, and would run on the CPU with copies",
    source="ORT docs/OperatorKernels.md, CUDAExecutionProvider: QuantizeLinear and DequantizeLinear of int8 and uint8, "
    f"no QLinearConv, no int32; {_ORT_RULES}: ConvQDQRules; ORT onnxruntime/core/optimizer/graph_transformer_utils.cc",
    caution="the CUDA provider computes the Q/DQ pairs as kernels around FP32 convolutions, so that this file does "
    "more work than FP32 and the FP16 artifact is the fast one there; not measured here",
)  # fmt: skip

PLACEMENTS: dict[str, Placement] = {
    row.name: row for row in (_ORT_CPU, _ORT_AVX2, _ARM64, _OPENVINO, _TENSORRT, _ORT_CUDA, _ORT_WEB)
}

# Rows by the name of a target of cspdeploy.core.targets; a target not in here has no placement that could be verified.
_ROW_OF_TARGET = {
    "tensorrt-8.6": "tensorrt", "tensorrt-10": "tensorrt", "openvino": "openvino", "ort-web": "ort-web",
    "ort-mobile": "arm64",
}  # fmt: skip
_X86_DOT_PRODUCTS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})


def find_placement(target: str | None, *, features: frozenset[str] | None = None, machine: str = "") -> Placement:
    """The row for a target, its opsets narrowed to those that the target reads.

    Args:
        target: a row's name, or a target of `cspdeploy.core.targets`; None: ONNX Runtime on the CPU.
        features: CPU flags as `cspdeploy.core.env.cpu_flags` has them, for ONNX Runtime on the CPU; None: this one's.
            Where they are not known (no flags at all, as outside of Linux), x86 is taken to have VNNI.
        machine: as `platform.machine` has it, which is the default.

    Raises:
        InputError: an unknown name; a target for which there is no verified INT8 form, or whose opsets are too old.
    """
    if target is None or target.strip().lower() == "ort-cpu":
        return _on_cpu(features, machine)
    spelled = target.strip().lower()
    if spelled in PLACEMENTS:
        return PLACEMENTS[spelled]
    try:
        found = find_target(spelled)
    except InputError:
        names = [*PLACEMENTS, *TARGETS]
        raise InputError(
            f"target '{target}': unknown, expected one of {', '.join(PLACEMENTS)} or a target of cspdeploy check",
            fix=f"{did_you_mean(target, names)}cspdeploy check --help",
        ) from None
    if found.name.startswith("ort-1."):
        row = _on_cpu(features, machine)
    elif found.name in _ROW_OF_TARGET:
        row = PLACEMENTS[_ROW_OF_TARGET[found.name]]
    else:
        raise InputError(
            f"target '{found.name}': no INT8 form that is known to be computed in integers there",
            fix="--fp16, or a target that takes INT8: " + ", ".join(PLACEMENTS),
        )
    if found.max_opset < row.min_opset:
        raise InputError(
            f"target '{found.name}': reads opsets up to {found.max_opset}, INT8 with a scale for each channel needs "
            f"{row.min_opset}",
            fix="--fp16, or a newer version of the target",
        )
    return dataclasses.replace(row, max_opset=min(row.max_opset, found.max_opset))


def _on_cpu(features: frozenset[str] | None, machine: str) -> Placement:
    """Of ONNX Runtime, for this machine's instructions."""
    if (machine or platform.machine()).lower() in ARM64_MACHINES:
        return _ARM64
    flags = frozenset(cpu_flags()) if features is None else features
    return _ORT_AVX2 if flags and not flags & _X86_DOT_PRODUCTS else _ORT_CPU
