"""What a latency holds for: the engine with its version, its device and its threads, in one line."""

from __future__ import annotations

import functools

import torch

from cspdeploy.core.env import num_usable_cpus, package_version
from cspdeploy.core.gpu_visible import cuda_gpu
from cspdeploy.pipeline.regimes import PairRegime

__all__ = ["describe_engine"]


def describe_engine(regime: PairRegime) -> str:
    """Such as "torch 2.13.0, NVIDIA H100 PCIe, TF32 on".

    CUDA is not asked: a process that has once used it keeps some hundred megabytes of the device for itself.
    """
    runtime = regime.runtime
    packages = _packages(runtime.name)
    version = next((f"{name} {found}" for name in packages if (found := package_version(name))), runtime.name)
    if regime.on_gpu:
        return f"{version}, {_gpu_name(regime.device)}, TF32 {'on' if regime.tf32 else 'off'}"
    if packages[0] != "torch":
        return f"{version}, its default threads on {num_usable_cpus()} CPUs"
    return f"{version}, {torch.get_num_threads()} threads"


def _packages(runtime_name: str) -> tuple[str, ...]:
    """Whose version counts, the first that is installed."""
    if runtime_name == "ort-cpu":
        return "onnxruntime", "onnxruntime-gpu"
    if runtime_name.startswith("ort-"):
        return "onnxruntime-gpu", "onnxruntime"
    return ("openvino",) if runtime_name == "openvino" else ("torch",)


@functools.cache
def _gpu_name(index: int) -> str:
    gpu = cuda_gpu(index)
    return gpu.name if gpu is not None and gpu.name else f"GPU {index}"
