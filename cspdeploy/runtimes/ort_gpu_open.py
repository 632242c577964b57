"""An ONNX Runtime session opened on another provider than the CPU's. Imported where one is asked for."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import onnxruntime

from cspdeploy.runtimes.base import CudaOptions
from cspdeploy.runtimes.ort_cuda import open_quietly, read_settings, require_taken
from cspdeploy.runtimes.ort_gpu_calls import GpuCalls, Owner
from cspdeploy.runtimes.ort_providers import ON_GPU, TensorrtFile, keep_pairs, provider_list

__all__ = ["GpuSession", "open_engine"]


class GpuSession(NamedTuple):
    """What was opened.

    Attributes:
        engine: the session.
        providers: that it was asked for, with their options.
        settings: read back from it; empty off GPUs.
        calls: its runs; None off GPUs.
    """

    engine: Any
    providers: list[Any]
    settings: dict[str, str]
    calls: GpuCalls | None


def open_engine(
    owner: Owner,
    source: str | bytes,
    options: onnxruntime.SessionOptions,
    *,
    provider: str,
    cuda: CudaOptions,
    tf32: bool,
    cuda_graph: bool,
    file: TensorrtFile | None,
) -> GpuSession:
    """Open it, and refuse one that was opened without the provider.

    Raises:
        DeviceMemoryError, InputError, RuntimeUnavailableError: as `OrtSession`.
    """
    # An engine that does not have the provider is told by what the session runs on.
    on_gpu = provider in ON_GPU and provider in onnxruntime.get_available_providers()
    calls = GpuCalls(owner, device=cuda.device, cuda_graph=cuda_graph, provider=provider) if on_gpu else None
    stream = calls.stream.pointer if calls is not None else 0
    providers = provider_list(provider, cuda=cuda, tf32=tf32, cuda_graph=cuda_graph, stream=stream, file=file)
    # Its own fallback would print, and open the session without the GPU, whatever went wrong there.
    own: dict[str, Any] = {"enable_fallback": 0} if on_gpu else {}
    if switched_off := keep_pairs(provider, options):
        own["disabled_optimizers"] = switched_off
    with open_quietly() if on_gpu else contextlib.nullcontext():
        engine = onnxruntime.InferenceSession(source, options, providers=providers, **own)
    require_taken(provider, engine.get_providers())
    return GpuSession(engine, providers, read_settings(engine, provider) if on_gpu else {}, calls)
