"""Samples of a GPU's clocks: from a program that prints them as nvidia-smi does, and what they amount to."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from cspdeploy.core.gpu import GpuProcess, GpuWatch
from cspdeploy.core.gpu_watch import GpuSample, GpuSummary, Spread, explain_summary, summarise_samples
from tests.core import smi

LINES = (
    "2026/11/02 10:20:30.400, 345, 2619, 70.61, 29, P0, 0x0000000000000001",
    "2026/11/02 10:20:30.600, 1980, 2619, 320.10, 35, P0, 0x0000000000000000",
    "2026/11/02 10:20:30.800, 1755, 2619, 698.00, 61, P0, 0x0000000000000004",
    "2026/11/02 10:20:31.000, 1740, 2619, [N/A], 63, P0, 0x0000000000000004",
)


def _busy(*clocks_mhz: float, reasons: tuple[str, ...] = ()) -> list[GpuSample]:
    return [GpuSample(sm_clock_mhz=clock, reasons=reasons) for clock in clocks_mhz]


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return folder


def _until(path: Path, watch: GpuWatch, count: int) -> int:
    """Wait until the program has printed so much that the watch has it; the number of its process."""
    for _ in range(400):
        if (path / "running").is_file() and watch.summary().num_samples >= count:
            return int((path / "running").read_text())
        time.sleep(0.02)
    raise AssertionError("no sample came")


def _runs(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def test_samples_are_read_while_it_runs_and_it_ends_with_the_watch(path: Path) -> None:
    machine = smi.Machine(*smi.H100_580.gpus, heading=smi.H100_580.heading, apps=smi.H100_580.apps, stream=LINES)
    smi.install(path, machine)
    with GpuWatch(0) as watch:
        pid = _until(path, watch, len(LINES))
        assert _runs(pid)
    assert not _runs(pid)
    found = watch.summary()
    assert (found.gpu, found.num_samples) == ("NVIDIA H100 80GB HBM3", 4)
    assert found.sm_clock_mhz == Spread(345.0, 1747.5, 1980.0)
    assert found.power_w == Spread(70.61, 320.1, 698.0)
    assert found.temperature_c == Spread(29.0, 48.0, 63.0)
    assert (found.pstates, found.reasons) == (("P0",), ("idle", "power limit"))
    assert (found.fallen_from_mhz, found.fallen_to_mhz) == (1980.0, 1755.0)
    assert [other.pid for other in found.others] == [4242]
    assert watch.findings() == (
        "the GPU's SM clock fell from 1980 to 1755 MHz: warm it up for longer, or lock it (sudo nvidia-smi -lgc)",
        "the GPU's clocks were held by its power limit: timings are of this limit, not of the GPU: name it with them",
        "another process used the GPU, python3, train.py (process 4242, 61430 MiB): stop it",
    )
    watch.stop()  # once more does no harm


def test_watch_that_nobody_stops_ends_with_its_owner(path: Path) -> None:
    smi.install(path, smi.Machine(*smi.GTX_470.gpus, heading=smi.GTX_470.heading, stream=LINES))
    watch = GpuWatch(smi.OTHER)  # by its UUID; and with the older driver's name of the reasons
    watch.start()
    watch.start()  # once is enough
    pid = _until(path, watch, 1)
    del watch
    assert not _runs(pid)


def test_own_processes_are_no_others(path: Path) -> None:
    apps = (f"{os.getpid()}, {smi.UUID}, 900, python", f"77, {smi.UUID}, 900, [Not Found]", f"78, {smi.OTHER}, 900, x")
    smi.install(path, smi.Machine(*smi.H100_580.gpus, heading=smi.H100_580.heading, apps=apps, stream=LINES[1:2]))
    with GpuWatch(0) as watch:
        _until(path, watch, 1)
    assert watch.summary().others == ()
    assert watch.findings() == ()


@pytest.mark.parametrize("script", ["", "echo No devices were found; exit 6\n"])
def test_without_a_gpu_it_does_nothing(path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    if script:
        smi.install(path, script=script)
    else:
        monkeypatch.setenv("PATH", str(path))
    with GpuWatch(0) as watch:
        pass
    assert (watch.summary(), watch.findings()) == (GpuSummary(), ())


@pytest.mark.parametrize(
    ("clocks_mhz", "fallen"),
    [
        ((345.0, 1200.0, 1980.0, 1980.0, 1965.0), None),  # the ramp, and a step of the boost
        ((1980.0, 1000.0, 1980.0, 1980.0), None),  # one sample, of a pause
        ((1980.0, 1890.0, 1880.0, 1870.0), (1980.0, 1880.0)),
        ((1980.0, 1882.0, 1882.0), None),  # 4.95 %
        ((), None),
    ],
)
def test_fall_of_the_clock(clocks_mhz: tuple[float, ...], fallen: tuple[float, float] | None) -> None:
    found = summarise_samples(_busy(*clocks_mhz))
    assert ((found.fallen_from_mhz, found.fallen_to_mhz) if found.fallen_from_mhz else None) == fallen


def test_idle_samples_at_the_end_are_no_fall() -> None:
    found = summarise_samples([*_busy(1980.0, 1980.0), *_busy(345.0, 345.0, 345.0, reasons=("idle",))])
    assert found.fallen_from_mhz is None
    assert explain_summary(found) == ()


def test_settings_are_no_disturbance_and_heat_is() -> None:
    reasons = ("application clocks", "sync boost", "thermal slowdown by hardware", "power brake by hardware")
    found = explain_summary(summarise_samples(_busy(1400.0, reasons=reasons)))
    assert [line.partition(":")[0] for line in found] == [
        "the GPU's clocks were held by its thermal slowdown by hardware",
        "the GPU's clocks were held by its power brake by hardware",
    ]
    unseen = GpuSummary(others=(GpuProcess(pid=7, gpu_uuid="u", name="x"),))
    assert explain_summary(unseen) == ("another process used the GPU, x (process 7): stop it",)


@pytest.mark.cuda
def test_real_nvidia_smi_gives_samples_while_it_runs() -> None:
    with GpuWatch(0) as watch:
        for _ in range(500):
            if watch.summary().num_samples >= 3:
                break
            time.sleep(0.02)
    found = watch.summary()
    assert found.num_samples >= 3
    assert found.gpu
    assert found.sm_clock_mhz is not None
    assert found.sm_clock_mhz.maximum > 0
