"""What a GPU did while something on it was timed, as a report keeps it."""

from __future__ import annotations

from dataclasses import dataclass

from cspdeploy.core.errors import CspDeployError
from cspdeploy.core.gpu import GpuSummary
from cspdeploy.core.gpu_smi import find_smi
from cspdeploy.runtimes.cuda_driver import open_device

__all__ = ["GpuRecord", "record_of", "unwatched"]

Range = tuple[float, ...]
"""Least, median and greatest of all samples; empty where the GPU does not tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuRecord:
    """As nvidia-smi told it; nothing of it was set.

    Attributes:
        group: of the rows that were timed then.
        num_samples: 0 where there is no nvidia-smi: then its name alone is known, by the driver.
        power_w, temperature_c: in watts, and in degrees Celsius.
        limits: what held its clocks in any sample: "power limit", "thermal limit", "idle", ...
    """

    group: str
    gpu: str
    num_samples: int
    sm_clock_mhz: Range = ()
    memory_clock_mhz: Range = ()
    power_w: Range = ()
    temperature_c: Range = ()
    pstates: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()


def record_of(summary: GpuSummary, *, group: str) -> GpuRecord | None:
    """None where nothing was seen."""
    if not summary.num_samples:
        return None
    return GpuRecord(
        group=group, gpu=summary.gpu, num_samples=summary.num_samples, sm_clock_mhz=tuple(summary.sm_clock_mhz or ()),
        memory_clock_mhz=tuple(summary.memory_clock_mhz or ()), power_w=tuple(summary.power_w or ()),
        temperature_c=tuple(summary.temperature_c or ()), pstates=summary.pstates, limits=summary.reasons,
    )  # fmt: skip


def unwatched(device: int, *, group: str) -> tuple[GpuRecord | None, str]:
    """Of a GPU that was timed and of which nothing was seen: its name by the driver, and a warning that says so.

    Args:
        device: CUDA's index of it.
    """
    why = "nvidia-smi gave no sample" if find_smi() else "no nvidia-smi"
    try:
        record = GpuRecord(group=group, gpu=open_device(device).name, num_samples=0)
    except CspDeployError:
        record = None
    name = record.gpu if record is not None else "the GPU"
    return record, f"clocks, power and temperature of {name} were not read: {why}"
