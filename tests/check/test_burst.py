from __future__ import annotations

import pytest

from cspdeploy.check.burst import run_burst

TIMES = {"min_runs": 5, "min_seconds": 0.0, "max_runs": 5, "lead_in_seconds": 0.0}


class Device:
    """A call whose device is done after `1 + n / 10` ms of the n-th run, and whose host sees 0.5 ms more."""

    def __init__(self, *, preparing_s: float = 0.0) -> None:
        self.now_s, self.num_runs, self.num_prepared = 0.0, 0, 0
        self.device_ms: float | None = None
        self._preparing_s = preparing_s

    def clock(self) -> float:
        return self.now_s

    def prepare(self) -> None:
        self.num_prepared += 1
        self.now_s += self._preparing_s

    def __call__(self) -> None:
        self.device_ms = 1.0 + self.num_runs / 10
        self.num_runs += 1
        self.now_s += 1e-3 * (self.device_ms + 0.5)


def test_device_and_host_are_of_the_same_runs() -> None:
    device, found = Device(), list[float]()
    samples = run_burst(device, clock=device.clock, device_ms=found, **TIMES)
    assert found == pytest.approx([1.1, 1.2, 1.3, 1.4, 1.5])  # the untimed first run is in neither
    assert samples == pytest.approx([ms + 0.5 for ms in found])


def test_call_without_a_clock_of_its_own_gives_none() -> None:
    found: list[float] = []
    now = iter(range(100))
    samples = run_burst(lambda: None, clock=lambda: float(next(now)), device_ms=found, **TIMES)
    assert (len(samples), found) == (5, [])


def test_what_a_run_needs_before_it_is_not_in_its_time() -> None:
    device = Device(preparing_s=7.0)
    samples = run_burst(device, clock=device.clock, **TIMES)
    assert device.num_prepared == device.num_runs == 6
    assert max(samples) < 3.0
