"""Clocks, power and temperature of a GPU while something on it is timed: read by nvidia-smi beside it, never set."""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import subprocess
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple

from cspdeploy.core.gpu_facts import Gpu, GpuProcess, gpu_processes, list_gpus
from cspdeploy.core.gpu_smi import (
    REASONS,
    ask,
    find_smi,
    read_number,
    read_reasons,
    read_text,
    smi_environment,
    split_row,
)
from cspdeploy.core.gpu_visible import cuda_gpu

__all__ = ["GpuSample", "GpuSummary", "GpuWatch", "Spread", "explain_summary", "summarise_samples"]

PERIOD_MS = 200
"""Between samples: five a second, of one small query. What it costs a median has not been measured: the difference of
`cspdeploy bench FILE.onnx -r ort-cuda --min-seconds 10`, run in turns with and without nvidia-smi on PATH, would be."""
CLOCK_FALL = 0.05
"""Of the SM clock, as `cspdeploy.check.machine` has it of the CPU's: more than the 2 % that count as no difference."""
_LASTING = 2  # samples: one may fall into a pause between two runs
_STOP_S = 2.0

_FIELDS = ("timestamp", "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "pstate", REASONS)
_ADVICE = {
    "power limit": "timings are of this limit, not of the GPU: name it with them",
    "thermal limit": "let it cool between runs, and mind the airflow",
    "thermal slowdown by hardware": "let it cool between runs, and mind the airflow",
    "hardware slowdown": "look at its power supply and its cooling",
    "power brake by hardware": "look at its power supply",
}


class Spread(NamedTuple):
    """Of all samples."""

    minimum: float
    median: float
    maximum: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSample:
    """One line of nvidia-smi; None and empty: it does not tell."""

    sm_clock_mhz: float | None
    memory_clock_mhz: float | None = None
    power_w: float | None = None
    temperature_c: float | None = None
    pstate: str = ""
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSummary:
    """What the samples amount to; None where no sample tells. All zero and empty without a GPU.

    Attributes:
        reasons: what held the clocks in any sample.
        fallen_from_mhz: the highest SM clock under load, where it fell by more than 5 % later; else None.
        fallen_to_mhz: to which it then fell.
        others: processes of others that computed on this GPU when the watch began or ended.
    """

    gpu: str = ""
    num_samples: int = 0
    sm_clock_mhz: Spread | None = None
    memory_clock_mhz: Spread | None = None
    power_w: Spread | None = None
    temperature_c: Spread | None = None
    pstates: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    fallen_from_mhz: float | None = None
    fallen_to_mhz: float | None = None
    others: tuple[GpuProcess, ...] = ()


class GpuWatch:
    """Watches a GPU from `start` to `stop`, or inside `with`. Without nvidia-smi it does nothing and finds nothing.

    Args:
        device: CUDA's index of it in this process, or nvidia-smi's UUID of it.
    """

    def __init__(self, device: int | str = 0, *, period_ms: int = PERIOD_MS) -> None:
        self._device, self._period_ms = device, period_ms
        self._gpu: Gpu | None = None
        self._fields: dict[str, str] = {}
        self._lines: list[str] = []
        self._others: dict[int, GpuProcess] = {}
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None

    def __enter__(self) -> GpuWatch:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Begin to sample, in the background."""
        smi = find_smi()
        if not smi or self._process is not None:
            return
        self._gpu = _named(self._device) if isinstance(self._device, str) else cuda_gpu(self._device)
        if self._gpu is None:
            return
        self._fields = dict(ask(_FIELDS).spelt)
        self._note_others()
        # Line by line even where its output is no terminal: what waits in a buffer is lost when it is ended.
        prefix = [unbuffered, "-oL"] if (unbuffered := shutil.which("stdbuf")) else []
        command = [*prefix, smi, "-i", self._gpu.uuid, f"--query-gpu={','.join(self._fields.values())}",
                   "--format=csv,noheader,nounits", "-lms", str(self._period_ms)]  # fmt: skip
        try:
            # A pipe: should this process die, the next line that it writes ends nvidia-smi too.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                errors="replace", env=smi_environment(),
            )  # fmt: skip
        except OSError:
            return
        self._process = process
        self._reader = threading.Thread(target=_read_lines, args=(process.stdout, self._lines), daemon=True)
        self._reader.start()
        weakref.finalize(self, _end, process)  # also where nobody stops it: at the end of the program

    def stop(self) -> None:
        """End it; nothing runs on after that. May be called twice."""
        process, self._process = self._process, None
        if process is None:
            return
        _end(process)
        if self._reader is not None:
            self._reader.join(timeout=_STOP_S)
        self._note_others()

    def summary(self) -> GpuSummary:
        """What has been seen up to now."""
        if self._gpu is None:
            return GpuSummary()
        rows = (split_row(line, list(self._fields)) for line in tuple(self._lines))
        samples = [_sample(row) for row in rows if row]
        return summarise_samples(samples, gpu=self._gpu.name, others=tuple(self._others.values()))

    def findings(self) -> tuple[str, ...]:
        """What made timings on the GPU less true, each with what to do; empty where nothing shows."""
        return explain_summary(self.summary())

    def _note_others(self) -> None:
        for process in gpu_processes():
            # Without a name it cannot be told from this one: inside a container the number is the host's.
            if self._gpu and process.gpu_uuid == self._gpu.uuid and process.name and not _is_own(process.pid):
                self._others[process.pid] = process


def _read_lines(stream: IO[str] | None, lines: list[str]) -> None:
    """Until the program that writes them ends."""
    if stream is not None:
        with stream:
            lines.extend(stream)


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=_STOP_S)


def _named(uuid: str) -> Gpu | None:
    return next((gpu for gpu in list_gpus() if gpu.uuid == uuid), None)


def _is_own(pid: int) -> bool:
    """This process, or a child of it."""
    while pid > 1 and pid != os.getpid():
        try:
            # The name is in brackets and may hold anything; after it: state, parent.
            pid = int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
        except (OSError, IndexError, ValueError):
            return False
    return pid == os.getpid()


def _sample(row: dict[str, str]) -> GpuSample:
    return GpuSample(
        sm_clock_mhz=read_number(row.get("clocks.sm")), memory_clock_mhz=read_number(row.get("clocks.mem")),
        power_w=read_number(row.get("power.draw")), temperature_c=read_number(row.get("temperature.gpu")),
        pstate=read_text(row.get("pstate")), reasons=read_reasons(row.get(REASONS)),
    )  # fmt: skip


def summarise_samples(
    samples: Sequence[GpuSample], *, gpu: str = "", others: tuple[GpuProcess, ...] = ()
) -> GpuSummary:
    """What samples, in the order of time, amount to."""
    fallen = _fall([one.sm_clock_mhz for one in samples if one.sm_clock_mhz is not None and "idle" not in one.reasons])
    return GpuSummary(
        gpu=gpu, num_samples=len(samples), sm_clock_mhz=_spread([one.sm_clock_mhz for one in samples]),
        memory_clock_mhz=_spread([one.memory_clock_mhz for one in samples]),
        power_w=_spread([one.power_w for one in samples]),
        temperature_c=_spread([one.temperature_c for one in samples]),
        pstates=tuple(dict.fromkeys(one.pstate for one in samples if one.pstate)),
        reasons=tuple(dict.fromkeys(reason for one in samples for reason in one.reasons)),
        fallen_from_mhz=fallen[0] if fallen else None, fallen_to_mhz=fallen[1] if fallen else None, others=others,
    )  # fmt: skip


def _spread(values: Sequence[float | None]) -> Spread | None:
    told = [value for value in values if value is not None]
    return Spread(min(told), statistics.median(told), max(told)) if told else None


def _fall(clocks_mhz: Sequence[float]) -> tuple[float, float] | None:
    """The highest clock and the one to which it fell after that, where that is much and lasted.

    The rise before it is the ramp of a GPU that was idle, which the warm-up is there for.
    """
    if not clocks_mhz:
        return None
    highest = max(clocks_mhz)
    after = sorted(clocks_mhz[clocks_mhz.index(highest) + 1 :])
    if len(after) < _LASTING or after[_LASTING - 1] >= highest * (1 - CLOCK_FALL):
        return None
    return highest, after[_LASTING - 1]


def explain_summary(summary: GpuSummary) -> tuple[str, ...]:
    """What made timings on the GPU less true, each with what to do; the likeliest first."""
    found = []
    if summary.fallen_from_mhz is not None and summary.fallen_to_mhz is not None:
        found.append(
            f"the GPU's SM clock fell from {summary.fallen_from_mhz:.0f} to {summary.fallen_to_mhz:.0f} MHz: "
            "warm it up for longer, or lock it (sudo nvidia-smi -lgc)"
        )
    found += [f"the GPU's clocks were held by its {reason}: {_ADVICE[reason]}"
              for reason in summary.reasons if reason in _ADVICE]  # fmt: skip
    if summary.others:
        most = max(summary.others, key=lambda process: process.memory_mib or 0.0)
        holds = f", {most.memory_mib:.0f} MiB" if most.memory_mib is not None else ""
        found.append(f"another process used the GPU, {most.name} (process {most.pid}{holds}): stop it")
    return tuple(found)
