"""What disturbs a measurement on this machine, and what to do about it. Linux tells; elsewhere little is known."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cspdeploy.core.env import clock_mhz, cpu_governor, num_usable_cpus, throttled_seconds
from cspdeploy.core.gpu import GpuSummary, GpuWatch

__all__ = ["MachineWatch", "advise"]

# Each is what moves a median by more than the 2 % that count as no difference.
STEAL_SHARE = 0.02
OTHERS_SHARE = 0.05  # of all CPUs: of two, a tenth of one
THROTTLED_SHARE = 0.02
CLOCK_CHANGE = 0.05

_PROC = Path("/proc")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Snapshot:
    seconds: float
    steal_ticks: int
    all_ticks: int
    process_ticks: dict[int, int]
    throttled_seconds: float
    mhz: float | None


class MachineWatch:
    """Watches from its making on.

    Args:
        num_threads: of the engine; 0 for its default.
        gpu: where something on a GPU is timed, CUDA's index of it: its clocks are sampled beside the measurement, from
            now until the findings are asked for. None: no GPU is looked at.

    Attributes:
        gpu_findings: those of the last `findings` that are of the GPU.
    """

    def __init__(self, *, num_threads: int = 0, gpu: int | None = None) -> None:
        self._num_threads = num_threads
        self._gpu = GpuWatch(gpu) if gpu is not None else None
        if self._gpu is not None:
            self._gpu.start()
        self._before = _look()
        self.gpu_findings: tuple[str, ...] = ()

    @property
    def gpu_summary(self) -> GpuSummary | None:
        """Clocks, power and temperature of the GPU up to now; None where none is watched."""
        return self._gpu.summary() if self._gpu is not None else None

    def findings(self) -> tuple[str, ...]:
        """What has disturbed since then, each with what to do; the likeliest first, empty where nothing shows.

        A GPU is watched no longer after that.
        """
        before, after = self._before, _look()
        of_gpu: tuple[str, ...] = ()
        if self._gpu is not None:
            self._gpu.stop()
            of_gpu = self.gpu_findings = self._gpu.findings()
        found = (
            _throttling(before, after), _steal(before, after), _others(before, after), _threads(self._num_threads),
            _governor(), _clock(before, after),
        )  # fmt: skip
        return (*of_gpu, *(finding for finding in found if finding))


def advise(findings: Sequence[str] | None = None) -> str:
    """The findings in one line, or what is left to try where there are none.

    Args:
        findings: of a `MachineWatch`; None: what can be seen without one.
    """
    if findings is None:
        findings = [finding for finding in (_load(), _governor()) if finding]
    unseen = "nothing that disturbs can be seen from here: measure for longer (cspdeploy bench --min-seconds 10)"
    return "; ".join(findings) or unseen


def _look() -> _Snapshot:
    fields = _read(_PROC / "stat").split("\n", 1)[0].split()[1:9]  # user nice system idle iowait irq softirq steal
    ticks = [int(field) for field in fields]
    return _Snapshot(
        seconds=time.monotonic(), steal_ticks=ticks[7] if len(ticks) > 7 else 0, all_ticks=sum(ticks),
        process_ticks=_process_ticks(), throttled_seconds=throttled_seconds(), mhz=clock_mhz(),
    )  # fmt: skip


def _process_ticks() -> dict[int, int]:
    """CPU time of every process that is not this one or a child of it, in clock ticks."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    with contextlib.suppress(OSError):
        for folder in _PROC.iterdir():
            # The name is in brackets and may hold anything; after it: state, parent, ... utime 14th, stime 15th.
            if folder.name.isdigit() and (fields := _read(folder / "stat").rpartition(")")[2].split()):
                parents[int(folder.name)], ticks[int(folder.name)] = int(fields[1]), int(fields[11]) + int(fields[12])
    return {pid: spent for pid, spent in ticks.items() if not _is_ours(pid, parents)}


def _is_ours(pid: int, parents: dict[int, int]) -> bool:
    while pid and pid != os.getpid():
        pid = parents.get(pid, 0)
    return pid == os.getpid()


def _steal(before: _Snapshot, after: _Snapshot) -> str:
    ticks = after.all_ticks - before.all_ticks
    share = (after.steal_ticks - before.steal_ticks) / ticks if ticks else 0.0
    if share < STEAL_SHARE:
        return ""
    return f"the host took {100 * share:.0f} % of this virtual machine's CPU time: measure on a host of your own"


def _others(before: _Snapshot, after: _Snapshot) -> str:
    ticks = after.all_ticks - before.all_ticks
    spent = {pid: used - before.process_ticks.get(pid, 0) for pid, used in after.process_ticks.items()}
    share = sum(spent.values()) / ticks if ticks else 0.0
    if share < OTHERS_SHARE:
        return ""
    pid = max(spent, key=lambda pid: spent[pid])
    name = _read(_PROC / str(pid) / "comm").strip()
    most = f", {name} (process {pid}) most" if name else ""
    return f"other processes used {100 * share:.0f} % of the CPUs{most}: stop them"


def _throttling(before: _Snapshot, after: _Snapshot) -> str:
    stopped, seconds = after.throttled_seconds - before.throttled_seconds, after.seconds - before.seconds
    if not seconds or stopped / seconds < THROTTLED_SHARE:
        return ""
    return f"this container's CPU quota stopped it for {stopped:.1f} s: raise the quota, or measure with --threads 1"


def _clock(before: _Snapshot, after: _Snapshot) -> str:
    if not before.mhz or not after.mhz or abs(after.mhz / before.mhz - 1) < CLOCK_CHANGE:
        return ""
    return f"the CPU clock went from {before.mhz:.0f} to {after.mhz:.0f} MHz: let it cool, or fix its frequency"


def _threads(num_threads: int) -> str:
    usable = num_usable_cpus()
    if num_threads <= usable:
        return ""
    return f"{num_threads} threads share {usable} CPUs: --threads {usable}"


def _governor() -> str:
    governor = cpu_governor()
    if governor in ("", "performance"):
        return ""
    return f"the CPU governor is '{governor}': sudo cpupower frequency-set -g performance"


def _load() -> str:
    """By load average, which holds the last minute's own work as well."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return f"the load average is {load:.1f}: stop other work" if load > num_usable_cpus() else ""


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
