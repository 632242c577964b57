"""Findings from what the system would tell: /proc of a folder, and figures of two moments."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cspdeploy.check import machine
from cspdeploy.check.machine import MachineWatch, advise
from tests.core import smi


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of two idle CPUs without a quota, whose counters a test moves."""
    monkeypatch.setattr(machine, "_PROC", tmp_path)
    for name, value in (("clock_mhz", 3000.0), ("cpu_governor", "performance"), ("throttled_seconds", 0.0),
                        ("num_usable_cpus", 2)):  # fmt: skip
        monkeypatch.setattr(machine, name, lambda value=value: value)
    _write_stat(tmp_path, idle=1000)
    return tmp_path


def _write_stat(proc: Path, *, idle: int, user: int = 0, steal: int = 0) -> None:
    (proc / "stat").write_text(f"cpu  {user} 0 0 {idle} 0 0 0 {steal} 0 0\ncpu0 0 0 0 0\n")


def _write_process(proc: Path, pid: int, *, parent: int, ticks: int, name: str = "job") -> None:
    (proc / str(pid)).mkdir(exist_ok=True)
    (proc / str(pid) / "stat").write_text(f"{pid} ({name} a) b) S {parent} 0 0 0 0 0 0 0 0 0 {ticks} 5 0 0\n")
    (proc / str(pid) / "comm").write_text(f"{name}\n")


def test_quiet_machine_has_no_findings(proc: Path) -> None:
    watch = MachineWatch(num_threads=2)
    _write_stat(proc, idle=1200, user=300)
    assert watch.findings() == ()


def test_steal_of_the_host(proc: Path) -> None:
    watch = MachineWatch()
    _write_stat(proc, idle=1090, steal=10)
    (finding,) = watch.findings()
    assert finding.startswith("the host took 10 % of this virtual machine's CPU time: ")


def test_other_processes_are_named_and_own_children_are_not(proc: Path) -> None:
    for pid, parent in ((11, 1), (12, 1), (13, os.getpid()), (14, 13)):
        _write_process(proc, pid, parent=parent, ticks=50)
    watch = MachineWatch()
    _write_stat(proc, idle=1050, user=50)
    for pid, parent, ticks in ((11, 1, 55), (13, os.getpid(), 90), (14, 13, 90)):
        _write_process(proc, pid, parent=parent, ticks=ticks)
    _write_process(proc, 12, parent=1, ticks=70, name="renderer")
    assert watch.findings() == ("other processes used 25 % of the CPUs, renderer (process 12) most: stop them",)


@pytest.mark.parametrize(
    ("name", "value", "finding"),
    [("throttled_seconds", 1e9, "CPU quota stopped it"), ("clock_mhz", 2000.0, "from 3000 to 2000 MHz"),
     ("cpu_governor", "powersave", "governor is 'powersave': sudo cpupower")],
)  # fmt: skip
def test_what_the_system_tells(
    proc: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: object, finding: str
) -> None:
    watch = MachineWatch()
    monkeypatch.setattr(machine, name, lambda: value)
    (found,) = watch.findings()
    assert finding in found
    assert ": " in found


def test_more_threads_than_cpus(proc: Path) -> None:
    assert MachineWatch(num_threads=3).findings() == ("3 threads share 2 CPUs: --threads 2",)


def test_advice_without_a_watch_is_what_can_be_seen_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cpu_governor", lambda: "")
    monkeypatch.setattr(os, "getloadavg", lambda: (99.0, 0.0, 0.0))
    assert advise() == "the load average is 99.0: stop other work"
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    assert "--min-seconds" in advise()
    assert "--min-seconds" in advise([])


def test_system_that_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_PROC", tmp_path / "none")
    for name in ("clock_mhz", "cpu_governor", "throttled_seconds"):
        monkeypatch.setattr(machine, name, lambda name=name: {"clock_mhz": None, "cpu_governor": ""}.get(name, 0.0))
    assert MachineWatch().findings() == ()


def test_gpu_that_is_timed_is_watched_and_its_findings_come_first(
    proc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bin"
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    line = "2026/11/02 10:20:30.800, 1755, 2619, 698.00, 61, P0, 0x0000000000000004"
    smi.install(folder, smi.Machine(*smi.H100_580.gpus, heading=smi.H100_580.heading, stream=(line,)))
    assert MachineWatch().gpu_summary is None
    watch = MachineWatch(num_threads=3, gpu=0)
    for _ in range(400):
        if watch.gpu_summary is not None and watch.gpu_summary.num_samples:
            break
        time.sleep(0.02)
    of_gpu, of_cpu = watch.findings()
    assert of_gpu.startswith("the GPU's clocks were held by its power limit: ")
    assert of_cpu == "3 threads share 2 CPUs: --threads 2"
    assert watch.gpu_summary is not None
    assert watch.gpu_summary.num_samples == 1
    assert watch.findings() == (of_gpu, of_cpu)


@pytest.mark.skipif(not Path("/proc/stat").is_file(), reason="no /proc")
def test_busy_process_is_seen_and_own_children_are_not() -> None:
    """For real: a process of this one spins. It is ours until it is counted as another's."""
    spin = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        before = machine._look()
        time.sleep(1.0)
        after = machine._look()
        assert spin.pid not in after.process_ticks
        assert os.getpid() not in after.process_ticks
        assert after.all_ticks > before.all_ticks
    finally:
        spin.kill()
        spin.wait()
