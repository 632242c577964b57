"""Time is a fake clock that the timed callables move by themselves."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cspdeploy.check.latency import LatencySettings, measure_latency, noise_warning
from cspdeploy.core.types import Timing

QUICK = LatencySettings(min_runs=6, min_seconds=0.0, warmup_runs=1, warmup_seconds=0.0, lead_in_seconds=0.0, burst=1)


class Machine:
    """A clock, and callables that take a given time on it. `log` holds the names in the order of their calls."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.log: list[str] = []

    def clock(self) -> float:
        return self.now_s

    def job(self, name: str, seconds: Callable[[int], float] | float) -> Callable[[], None]:
        """Takes `seconds`, which may depend on how many calls of it there were before."""
        count = 0

        def call() -> None:
            nonlocal count
            self.now_s += seconds(count) if callable(seconds) else seconds
            self.log.append(name)
            count += 1

        return call


def _timing(samples_ms: list[float]) -> Timing:
    return Timing(
        p50_ms=1.0, p95_ms=1.0, ci_low_ms=1.0, ci_high_ms=1.0, num_runs=len(samples_ms), verdict="reference", ratio=1.0,
        samples_ms=tuple(samples_ms),
    )  # fmt: skip


def test_known_durations() -> None:
    machine = Machine()
    calls = {"a": machine.job("a", 0.010), "b": machine.job("b", 0.020), "c": machine.job("c", 0.005)}
    found = measure_latency(calls, QUICK, clock=machine.clock)
    assert [timing.p50_ms for timing in found.values()] == pytest.approx([10, 20, 5])
    assert [timing.p95_ms for timing in found.values()] == pytest.approx([10, 20, 5])
    assert [timing.verdict for timing in found.values()] == ["reference", "slower", "faster"]
    assert [timing.ratio for timing in found.values()] == pytest.approx([1, 0.5, 2])
    for timing in found.values():
        assert timing.ci_low_ms <= timing.p50_ms <= timing.ci_high_ms
        assert len(timing.samples_ms) == timing.num_runs


def test_both_minima_are_reached() -> None:
    machine = Machine()
    settings = LatencySettings(
        min_runs=10, min_seconds=1.0, warmup_runs=1, warmup_seconds=0.0, lead_in_seconds=0.0, burst=3
    )
    calls = {"quick": machine.job("quick", 0.01), "slow": machine.job("slow", 0.5)}
    found = measure_latency(calls, settings, clock=machine.clock)
    for timing in found.values():
        assert timing.num_runs >= 10
        assert sum(timing.samples_ms) >= 999.999
    assert found["quick"].num_runs >= 100  # the seconds bind

    machine = Machine()
    found = measure_latency({"slow": machine.job("slow", 0.5)}, settings, clock=machine.clock)
    assert 10 <= found["slow"].num_runs < 10 + settings.burst  # the runs bind


def test_warm_up_is_not_in_the_samples() -> None:
    machine = Machine()
    settings = LatencySettings(
        min_runs=6, min_seconds=0.0, warmup_runs=4, warmup_seconds=0.0, lead_in_seconds=0.0, burst=2
    )
    calls = {"cold": machine.job("cold", lambda count: 9.0 if count < 4 else 0.001)}
    found = measure_latency(calls, settings, clock=machine.clock)
    assert max(found["cold"].samples_ms) == pytest.approx(1.0)


def test_warm_up_lasts_for_its_seconds() -> None:
    machine = Machine()
    settings = LatencySettings(
        min_runs=3, min_seconds=0.0, warmup_runs=1, warmup_seconds=0.2, lead_in_seconds=0.0, burst=3
    )
    calls = {"cold": machine.job("cold", lambda count: 0.05 if count < 4 else 0.001)}
    found = measure_latency(calls, settings, clock=machine.clock)
    assert max(found["cold"].samples_ms) == pytest.approx(1.0)
    assert machine.log.count("cold") >= 4 + found["cold"].num_runs


def test_run_after_a_handover_is_not_in_the_samples() -> None:
    """The one before may have left its threads spinning and the caches full."""
    machine = Machine()

    def call() -> None:
        machine.now_s += 0.001 if machine.log and machine.log[-1] == "a" else 5.0
        machine.log.append("a")

    settings = LatencySettings(
        min_runs=12, min_seconds=0.0, warmup_runs=1, warmup_seconds=0.0, lead_in_seconds=0.0, burst=3
    )
    found = measure_latency({"a": call, "b": machine.job("b", 0.002)}, settings, clock=machine.clock)
    assert max(found["a"].samples_ms) == pytest.approx(1.0)


def _rounds(machine: Machine, names: str, *, num_warmups: int, turn: int) -> list[list[str]]:
    """The order of the turns in each round; fails unless each turn is `turn` calls of one name."""
    log = machine.log[num_warmups:]
    turns = [log[i : i + turn] for i in range(0, len(log), turn)]
    assert all(len(set(group)) == 1 for group in turns)
    firsts = [group[0] for group in turns]
    return [firsts[i : i + len(names)] for i in range(0, len(firsts), len(names))]


def test_turns_are_interleaved_in_an_order_that_changes() -> None:
    machine = Machine()
    settings = LatencySettings(
        min_runs=30, min_seconds=0.0, warmup_runs=1, warmup_seconds=0.0, lead_in_seconds=0.0, burst=2
    )
    measure_latency({name: machine.job(name, 0.001) for name in "abc"}, settings, clock=machine.clock)
    rounds = _rounds(machine, "abc", num_warmups=3, turn=3)
    assert len(rounds) == 15
    assert all(sorted(turns) == ["a", "b", "c"] for turns in rounds)
    assert len({tuple(turns) for turns in rounds}) > 2
    assert len({turns[0] for turns in rounds}) == 3  # nobody always comes first


def test_order_is_drawn_from_the_seed() -> None:
    logs = []
    for seed in (0, 0, 1):
        machine = Machine()
        settings = LatencySettings(
            min_runs=12, min_seconds=0.0, warmup_runs=1, warmup_seconds=0.0, lead_in_seconds=0.0, burst=1, seed=seed
        )
        measure_latency({name: machine.job(name, 0.001) for name in "abcd"}, settings, clock=machine.clock)
        logs.append(machine.log)
    assert logs[0] == logs[1] != logs[2]


def test_drift_of_the_machine_hits_all_alike() -> None:
    """A clock that slows down by half on the way: measured one after another, the second would seem slower."""
    machine = Machine()

    def job(name: str) -> Callable[[], None]:
        return machine.job(name, lambda count: 0.001 if count < 40 else 0.0015)

    settings = LatencySettings(
        min_runs=60, min_seconds=0.0, warmup_runs=1, warmup_seconds=0.0, lead_in_seconds=0.0, burst=3
    )
    found = measure_latency({"a": job("a"), "b": job("b")}, settings, clock=machine.clock)
    assert found["b"].verdict == "indistinguishable"


def test_progress_rises_to_the_end() -> None:
    machine = Machine()
    seen: list[tuple[str, int, int]] = []
    calls = {"a": machine.job("a", 0.001)}
    measure_latency(calls, QUICK, clock=machine.clock, progress=lambda *state: seen.append(state))
    shares = [done for _, done, _ in seen]
    assert shares == sorted(shares)
    assert shares[-1] == 100
    assert {total for _, _, total in seen} == {100}


def test_nothing_to_time() -> None:
    with pytest.raises(ValueError, match="nothing to time"):
        measure_latency({}, QUICK)


def test_failure_of_a_call_is_not_swallowed() -> None:
    def broken() -> None:
        raise RuntimeError("device lost")

    with pytest.raises(RuntimeError, match="device lost"):
        measure_latency({"a": broken}, QUICK)


def test_noisy_machine_is_warned_of() -> None:
    quiet, noisy = _timing([10.0, 10.1, 9.9, 10.0]), _timing([10.0, 14.0, 9.0, 12.0])
    warning = noise_warning({"quiet": quiet, "torch-cpu": noisy})
    assert "noisy machine" in warning
    assert "torch-cpu" in warning
    assert "\n" not in warning


def test_quiet_machine_is_not() -> None:
    assert noise_warning({"a": _timing([10.0, 10.1, 9.9, 10.0])}) == ""
    assert noise_warning({}) == ""


def test_one_slow_run_in_many_is_no_noise() -> None:
    assert noise_warning({"a": _timing([10.0] * 30 + [90.0])}) == ""


def test_each_burst_is_led_in_by_untimed_runs() -> None:
    """What an engine leaves behind when it hands over must not be in the samples of the next one."""
    machine = Machine()
    settings = LatencySettings(
        min_runs=4, min_seconds=0.0, warmup_runs=1, warmup_seconds=0.0, lead_in_seconds=0.05, burst=2
    )

    def engine(name: str) -> Callable[[], None]:
        def call() -> None:
            changed = not machine.log or machine.log[-1] != name
            machine.now_s += 0.030 if changed else 0.010  # the first run after a change of engine is slow
            machine.log.append(name)

        return call

    found = measure_latency({"a": engine("a"), "b": engine("b")}, settings, clock=machine.clock)
    for timing in found.values():
        assert timing.samples_ms == pytest.approx([10.0] * timing.num_runs)


def test_network_of_microseconds_ends_and_keeps_a_bounded_number_of_samples() -> None:
    """Three seconds of 10 us runs would be 300,000 samples, and hours of lead-ins in bursts of five."""
    now = 0.0
    num_calls = 0

    def fast() -> None:
        nonlocal now, num_calls
        now += 1e-5
        num_calls += 1

    def slow() -> None:
        nonlocal now
        now += 1e-2

    settings = LatencySettings(min_runs=50, min_seconds=3.0)
    found = measure_latency({"fast": fast, "slow": slow}, settings, clock=lambda: now)
    assert settings.max_runs <= found["fast"].num_runs < 50_000
    assert sum(found["slow"].samples_ms) >= 3000
    alone = measure_latency({"fast": fast}, settings, clock=lambda: now)["fast"]
    assert settings.max_runs <= alone.num_runs <= settings.max_runs + settings.max_burst
    assert num_calls < 1_000_000


def test_burst_of_short_runs_lasts_as_long_as_its_lead_in() -> None:
    now = 0.0
    order: list[str] = []

    def make(name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            nonlocal now
            now += seconds
            order.append(name)

        return call

    settings = LatencySettings(min_runs=5, min_seconds=0.0, warmup_runs=1, warmup_seconds=0.0, lead_in_seconds=0.03)
    found = measure_latency({"a": make("a", 0.002), "b": make("b", 0.05)}, settings, clock=lambda: now)
    assert found["a"].num_runs == 15  # 30 ms of 2 ms
    assert found["b"].num_runs == 5  # longer than that with the fewest
