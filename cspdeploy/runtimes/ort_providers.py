"""ONNX Runtime's providers, and the options that each is given on purpose. Opens nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cspdeploy.core.errors import InputError
from cspdeploy.runtimes.base import CudaOptions
from cspdeploy.runtimes.ort_open import CPU, CUDA, ON_GPU, TENSORRT

if TYPE_CHECKING:
    import onnxruntime

__all__ = [
    "CPU", "CUDA", "ON_GPU", "TENSORRT", "TensorrtFile", "cuda_options", "keep_pairs", "provider_list",
    "tensorrt_options",
]  # fmt: skip

WORKSPACE_BYTES = 1 << 32
"""Of TensorRT's own choice of kernels: 4 GiB is above what any layer of these networks can use at batch 32, and keeps
a smaller GPU, of which it would otherwise take all, usable by others."""


def cuda_options(cuda: CudaOptions, *, tf32: bool = False, cuda_graph: bool = False, stream: int = 0) -> dict[str, str]:
    """Options of the CUDA provider (onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html).

    use_tf32: TF32 keeps 10 bits of mantissa and passes as float32; a verdict is on true float32.
    cudnn_conv_algo_search: HEURISTIC chooses the same algorithm in every session, EXHAUSTIVE measures and may not.
    cudnn_conv_use_max_workspace: without it the fastest algorithms of a convolution are not among those looked at.
    arena_extend_strategy: shapes are fixed, so the arena grows in the first runs alone; to grow to the next power of
        two, the default, would only take up to twice the memory from other processes.
    do_copy_in_default_stream: on the engine's own copy streams a copy may overtake the work that it belongs to.
    user_compute_stream: ours, so that events around a run can be recorded on it. It goes together with
        enable_cuda_graph: the graph is captured and replayed on that stream.

    Args:
        stream: address of a cudaStream_t; 0: the engine makes its own.
    """
    options = {
        "device_id": str(cuda.device),
        "use_tf32": str(int(tf32)),
        "cudnn_conv_algo_search": cuda.conv_search.upper(),
        "cudnn_conv_use_max_workspace": "1",
        "prefer_nhwc": str(int(cuda.channels_last)),
        "enable_cuda_graph": str(int(cuda_graph)),
        "arena_extend_strategy": "kSameAsRequested",
        "do_copy_in_default_stream": "1",
    }
    if cuda.memory_limit_bytes:
        options["gpu_mem_limit"] = str(cuda.memory_limit_bytes)
    return options | _stream_options(stream)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorrtFile:
    """What TensorRT must be told of a file, since it chooses precisions by itself.

    Attributes:
        half: it has FP16 tensors.
        quantised: it has QuantizeLinear and DequantizeLinear, whose scales TensorRT takes as they are.
    """

    half: bool = False
    quantised: bool = False


def tensorrt_options(
    cuda: CudaOptions, *, file: TensorrtFile, tf32: bool = False, cuda_graph: bool = False, stream: int = 0
) -> dict[str, str]:
    """Options of the TensorRT provider (onnxruntime.ai/docs/execution-providers/TensorRT-ExecutionProvider.html).

    A precision is let in only where the file itself has it, so that an FP32 file stays FP32. There is no option for
    TF32: see `cspdeploy.runtimes.ort_tensorrt`. An engine built with it must not be found by a session without, hence
    the prefix of the cache.
    """
    options = {
        "device_id": str(cuda.device),
        "trt_fp16_enable": str(int(file.half)),
        "trt_int8_enable": str(int(file.quantised)),
        "trt_bf16_enable": "0",
        "trt_max_workspace_size": str(cuda.memory_limit_bytes or WORKSPACE_BYTES),
        "trt_cuda_graph_enable": str(int(cuda_graph)),
        "trt_engine_cache_enable": str(int(cuda.cache is not None)),
        "trt_timing_cache_enable": str(int(cuda.cache is not None)),
    }
    if cuda.cache is not None:
        prefix = "tf32" if tf32 else "fp32"
        options |= {
            "trt_engine_cache_path": str(cuda.cache), "trt_timing_cache_path": str(cuda.cache),
            "trt_engine_cache_prefix": f"cspdeploy-{prefix}-{'half' if file.half else 'full'}",
        }  # fmt: skip
    return options | _stream_options(stream)


def _stream_options(stream: int) -> dict[str, str]:
    return {"has_user_compute_stream": "1", "user_compute_stream": str(stream)} if stream else {}


def provider_list(
    provider: str,
    *,
    cuda: CudaOptions,
    tf32: bool = False,
    cuda_graph: bool = False,
    stream: int = 0,
    file: TensorrtFile | None = None,
) -> list[Any]:
    """What a session is opened with, the provider that is asked for first, the CPU last.

    Raises:
        InputError: a CUDA graph on a provider that has none.
    """
    if provider not in ON_GPU:
        if cuda_graph:
            raise InputError(f"a CUDA graph was asked for on {provider}", fix="--runtime ort-cuda")
        return [CPU] if provider == CPU else [provider, CPU]
    # Under TensorRT's graph the nodes that it leaves to CUDA cannot be captured a second time.
    on_cuda = cuda_options(cuda, tf32=tf32, cuda_graph=cuda_graph and provider == CUDA, stream=stream)
    if provider == CUDA:
        return [(CUDA, on_cuda), CPU]
    own: Mapping[str, str] = tensorrt_options(
        cuda, file=file or TensorrtFile(), tf32=tf32, cuda_graph=cuda_graph, stream=stream
    )
    return [(TENSORRT, dict(own)), (CUDA, on_cuda), CPU]


def keep_pairs(provider: str, options: onnxruntime.SessionOptions) -> list[str]:
    """See to it that Q/DQ pairs reach the provider as they are in the file; gives the optimisers to switch off.

    ONNX Runtime rewrites them for the integer kernels of its CPU provider. On CUDA there are none: left alone, it makes
    biases INT32, whose DequantizeLinear has no CUDA kernel, and expands the weights anew in every run. TensorRT takes
    the pairs itself, and refuses such a bias (microsoft/onnxruntime#14229).
    """
    if provider == CUDA:
        options.add_session_config_entry("session.disable_quant_qdq", "1")  # weights are then expanded once, on loading
    return ["WeightBiasQuantization"] if provider == TENSORRT else []
