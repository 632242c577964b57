"""Recorded facts of machines with GPUs, and what the doctor makes of them. No GPU is here."""

from __future__ import annotations

import dataclasses
from typing import Any

from cspdeploy.check.doctor import Diagnosis, judge
from cspdeploy.check.doctor_facts import CudaMachine
from cspdeploy.core.gpu import DriverFacts, Gpu, GpuProcess, VisibleGpus
from tests.core import smi

OK = {"works": True}
H100 = Gpu(
    index=0, uuid=smi.UUID, name="NVIDIA H100", driver_version="580.65.06", cuda_version="13.0", compute_mode="Default",
    compute_capability="9.0", memory_total_mib=81559.0, memory_used_mib=4.0, mig_mode="Disabled",
)  # fmt: skip
HOLDER = GpuProcess(pid=4242, gpu_uuid=smi.UUID, name="python3", memory_mib=61430.0)


def machine_of(*gpus: Gpu, **facts: Any) -> CudaMachine:
    driver = DriverFacts(smi="/usr/bin/nvidia-smi", cuda_version=gpus[0].cuda_version if gpus else "", gpus=gpus)
    known: dict[str, Any] = {
        "kernel_module": "580.65.06", "device_files": ("/dev/nvidia0",), "driver": driver,
        "visible": VisibleGpus(gpus=gpus), "distribution": "debian",
    }  # fmt: skip
    return CudaMachine(**(known | facts))


def trials_of(*, ort: bool = False, torch: bool = False, cuda: str = "13.0", torch_cuda: str = "", **more: Any) -> Any:
    def state(works: bool) -> dict[str, Any]:
        return OK if works else {"works": False, "reason": "the session runs on CPUExecutionProvider"}

    return {
        "engine:onnxruntime": {"works": True, "version": "1.31.1", "cuda": cuda, "providers": []},
        "engine:torch": {"works": True, "version": "2.13.0", "cuda": torch_cuda},
        "runtime:ort-cpu": OK, "runtime:ort-cuda": state(ort), "runtime:torch-cuda": state(torch), **more,
    }  # fmt: skip


def h100_with(**facts: Any) -> Gpu:
    return dataclasses.replace(H100, **facts)


def judged(machine: CudaMachine, trials: Any = None) -> Diagnosis:
    return judge(trials or trials_of(), environment={}, flags=(), machine=machine)
