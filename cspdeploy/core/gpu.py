"""NVIDIA GPUs as nvidia-smi tells of them: read, never set. Where there is none it costs one look along PATH."""

from __future__ import annotations

from cspdeploy.core.gpu_facts import DriverFacts, Gpu, GpuProcess, driver_facts, gpu_processes, list_gpus
from cspdeploy.core.gpu_visible import VisibleGpus, cuda_gpu, see_gpus
from cspdeploy.core.gpu_watch import GpuSummary, GpuWatch, Spread

__all__ = [
    "DriverFacts", "Gpu", "GpuProcess", "GpuSummary", "GpuWatch", "Spread", "VisibleGpus", "cuda_gpu", "driver_facts",
    "gpu_processes", "list_gpus", "see_gpus",
]  # fmt: skip
