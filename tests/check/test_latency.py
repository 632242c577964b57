"""Time is a fake clock that the timed callables move by themselves."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cspdeploy.check.latency import LatencySettings, gpu_settings, measure_latency, measure_rounds, noise_warning
from cspdeploy.core.errors import CspDeployError, InputError
from cspdeploy.core.results import Timing

QUICK = LatencySettings(min_runs=6, min_seconds=0.0, warmup_runs=1, warmup_seconds=0.0, lead_in_seconds=0.0, burst=1,
                        max_warmup_seconds=0.0)  # fmt: skip


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
        p50_ms=1.0, ci_low_ms=1.0, ci_high_ms=1.0, num_runs=len(samples_ms), verdict="reference", ratio=1.0,
        samples_ms=tuple(samples_ms),
    )  # fmt: skip


def test_known_durations() -> None:
    machine = Machine()
    calls = {"a": machine.job("a", 0.010), "b": machine.job("b", 0.020), "c": machine.job("c", 0.005)}
    found = measure_latency(calls, QUICK, clock=machine.clock)
    assert [timing.p50_ms for timing in found.values()] == pytest.approx([10, 20, 5])
    assert [timing.p95_ms for timing in found.values()] == [None] * 3  # of six runs none need lie beyond it
    assert [timing.verdict for timing in found.values()] == ["reference", "slower", "faster"]
    assert [timing.ratio for timing in found.values()] == pytest.approx([1, 0.5, 2])
    assert [timing.ratio_low for timing in found.values()] == pytest.approx([1, 0.5, 2])
    assert [timing.ratio_high for timing in found.values()] == pytest.approx([1, 0.5, 2])
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
    assert found["slow"].num_runs == settings.min_rounds * settings.burst  # the rounds bind


def test_warm_up_is_not_in_the_samples() -> None:
    machine = Machine()
    settings = LatencySettings(
        min_runs=6,
        min_seconds=0.0,
        warmup_runs=4,
        warmup_seconds=0.0,
        lead_in_seconds=0.0,
        burst=2,
        max_warmup_seconds=0.0,
    )
    calls = {"cold": machine.job("cold", lambda count: 9.0 if count < 4 else 0.001)}
    found = measure_latency(calls, settings, clock=machine.clock)
    assert max(found["cold"].samples_ms) == pytest.approx(1.0)


def test_warm_up_lasts_for_its_seconds() -> None:
    machine = Machine()
    settings = LatencySettings(
        min_runs=3,
        min_seconds=0.0,
        warmup_runs=1,
        warmup_seconds=0.2,
        lead_in_seconds=0.0,
        burst=3,
        max_warmup_seconds=0.0,
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
        min_runs=30,
        min_seconds=0.0,
        warmup_runs=1,
        warmup_seconds=0.0,
        lead_in_seconds=0.0,
        burst=2,
        max_warmup_seconds=0.0,
    )
    measure_latency({name: machine.job(name, 0.001) for name in "abc"}, settings, clock=machine.clock)
    rounds = _rounds(machine, "abc", num_warmups=6, turn=3)
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
        min_runs=4,
        min_seconds=0.0,
        warmup_runs=1,
        warmup_seconds=0.0,
        lead_in_seconds=0.05,
        burst=2,
        max_warmup_seconds=0.0,
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
    assert found["a"].num_runs == 6 * 15  # 30 ms of 2 ms
    assert found["b"].num_runs == 6 * 3  # longer than that with the fewest


# --- warm-up ---


def test_warm_up_lasts_until_the_times_have_settled() -> None:
    """Twenty runs that get faster one by one, as a clock that climbs: none of them counts."""
    machine = Machine()
    settings = LatencySettings(min_runs=6, min_seconds=0.0, warmup_runs=3, warmup_seconds=0.0, lead_in_seconds=0.0)
    calls = {"cold": machine.job("cold", lambda count: 0.060 - 0.0025 * min(count, 20))}
    found = measure_rounds(calls, settings, clock=machine.clock)["cold"]
    assert found.stable
    assert found.num_warmups >= 20
    assert {round(value, 6) for samples in found.rounds_ms for value in samples} == {10.0}


def test_warm_up_that_never_settles_ends_and_is_known() -> None:
    machine = Machine()
    settings = LatencySettings(
        min_runs=6, min_seconds=0.0, warmup_runs=3, warmup_seconds=0.0, max_warmup_seconds=2.0, lead_in_seconds=0.0
    )
    calls = {"wild": machine.job("wild", lambda count: 0.050 + 0.030 * (count // 4 % 2))}
    found = measure_rounds(calls, settings, clock=machine.clock)["wild"]
    assert not found.stable
    assert 2.0 <= 0.08 * found.num_warmups <= 6.0


# --- how long ---


def test_it_goes_on_until_the_ratio_is_known_or_the_time_is_up() -> None:
    """Rounds of B take 10 and 13 ms in turns: six of them say little, and no number of them makes its median sharp."""

    def measure(max_seconds: float, wild: float) -> int:
        machine = Machine()
        settings = LatencySettings(
            min_runs=6, min_seconds=0.0, warmup_runs=1, warmup_seconds=0.0, max_warmup_seconds=0.0, burst=1,
            lead_in_seconds=0.0, max_seconds=max_seconds,
        )  # fmt: skip
        calls = {
            "a": machine.job("a", 0.010),
            "b": machine.job("b", lambda count: 0.010 * (1 + wild * (count // 2 % 2))),
        }
        return measure_latency(calls, settings, clock=machine.clock)["b"].num_runs

    assert measure(0.0, 0.3) == 6
    assert measure(1.0, 0.0) == 6
    assert 80 <= measure(1.0, 0.3) <= 101


# --- failures ---


def _refuse() -> None:
    raise InputError("cannot run")


def test_failure_of_one_leaves_the_others() -> None:
    machine = Machine()
    failures: dict[str, CspDeployError] = {}
    calls = {"broken": _refuse, "a": machine.job("a", 0.01), "b": machine.job("b", 0.02)}
    found = measure_latency(calls, QUICK, clock=machine.clock, failures=failures)
    assert {name: error.message for name, error in failures.items()} == {"broken": "cannot run"}
    assert {name: timing.verdict for name, timing in found.items()} == {"a": "reference", "b": "slower"}


def test_failure_half_way_takes_its_rounds_along() -> None:
    machine = Machine()
    count = 0

    def breaks() -> None:
        nonlocal count
        count += 1
        machine.now_s += 0.01
        if count > 8:
            _refuse()

    failures: dict[str, CspDeployError] = {}
    found = measure_latency({"a": machine.job("a", 0.01), "b": breaks}, QUICK, clock=machine.clock, failures=failures)
    assert list(failures) == ["b"]
    assert list(found) == ["a"]
    assert measure_latency({"b": _refuse}, QUICK, clock=machine.clock, failures=failures) == {}


def test_failure_is_raised_where_nobody_takes_it() -> None:
    with pytest.raises(InputError, match="cannot run"):
        measure_latency({"a": _refuse}, QUICK)


# --- noise ---


def test_warning_says_what_to_do_about_what_was_found() -> None:
    noisy = {"a": _timing([10.0, 14.0, 9.0, 12.0])}
    assert noise_warning(noisy, ["the fan stands still: oil it"]).endswith(
        "of its median; the fan stands still: oil it"
    )
    assert "measure for longer" in noise_warning(noisy, [])


# --- a bound on wall time ---


def test_wall_time_is_bounded_on_a_machine_that_never_settles() -> None:
    """A hundred runs of 10 ms to 190 ms are asked for; the fewest rounds are measured, and no warm-up lasts."""
    settings = LatencySettings(min_runs=100, min_seconds=20.0, max_wall_seconds=5.0)
    machine = Machine()
    calls = {name: machine.job(name, lambda count: 0.010 + 0.018 * (7 * count % 11)) for name in "abcd"}
    begun = machine.now_s
    found = measure_rounds(calls, settings, clock=machine.clock)
    assert machine.now_s - begun < 1.1 * 4 * settings.max_wall_seconds
    assert all(len(one.rounds_ms) >= settings.min_rounds and not one.stable for one in found.values())

    machine = Machine()
    calls = {name: machine.job(name, 0.010) for name in "ab"}
    unbounded = measure_rounds(calls, LatencySettings(min_runs=100, min_seconds=15.0), clock=machine.clock)
    assert all(sum(map(sum, one.rounds_ms)) >= 14_999 for one in unbounded.values())


def test_runs_that_are_slow_for_the_bound_come_one_by_one() -> None:
    machine = Machine()
    settings = LatencySettings(max_wall_seconds=5.0)
    calls = {"slow": machine.job("slow", 1.0), "quick": machine.job("quick", 0.050)}
    found = measure_rounds(calls, settings, clock=machine.clock)
    assert [len(found[name].rounds_ms) for name in calls] == [settings.min_rounds] * 2
    assert {len(samples) for samples in found["slow"].rounds_ms} == {1}
    assert {len(samples) for samples in found["quick"].rounds_ms} == {settings.burst}


def _climb(machine: Machine, *, seconds: float, from_factor: float = 2.0) -> Callable[[], None]:
    """2 ms at the full clock, to which it climbs for so many seconds from the first run on."""
    began_s = machine.now_s

    def call() -> None:
        share = min(1.0, (machine.now_s - began_s) / seconds)
        machine.now_s += 0.002 * (from_factor + (1 - from_factor) * share)
        machine.log.append("gpu")

    return call


def test_warm_up_of_a_gpu_survives_the_ramp_of_its_clock() -> None:
    """Times fall for 1.5 s and are flat then. Three windows of 50 ms agree long before."""
    found = {}
    for name, settings in (("cpu", LatencySettings()), ("gpu", gpu_settings())):
        machine = Machine()
        found[name] = measure_rounds({"a": _climb(machine, seconds=1.5)}, settings, clock=machine.clock)["a"]
    assert found["cpu"].stable  # it takes itself for settled
    assert found["cpu"].rounds_ms[0][0] > 1.3 * 2.0
    assert found["gpu"].stable
    assert max(ms for samples in found["gpu"].rounds_ms for ms in samples) == pytest.approx(2.0)


def test_clock_that_climbs_for_ever_is_said() -> None:
    machine = Machine()
    calls = {"a": _climb(machine, seconds=12.0, from_factor=11.0)}
    found = measure_rounds(calls, gpu_settings(), clock=machine.clock)["a"]
    assert not found.stable


def test_flat_times_end_the_warm_up_of_a_gpu_after_its_second() -> None:
    machine = Machine()
    settings = gpu_settings()
    found = measure_rounds({"a": machine.job("a", 0.002)}, settings, clock=machine.clock)["a"]
    assert found.stable
    assert settings.stable_seconds <= 0.002 * found.num_warmups < settings.stable_seconds + 0.3


def test_settings_of_a_gpu_are_nowhere_shorter() -> None:
    given = LatencySettings(min_runs=200, min_seconds=9.0, max_warmup_seconds=60.0, max_wall_seconds=100.0, burst=50)
    found = gpu_settings(given)
    assert (found.min_runs, found.min_seconds, found.max_warmup_seconds, found.burst) == (200, 9.0, 60.0, 50)
    assert found.max_wall_seconds == 100.0
    assert gpu_settings(LatencySettings(max_wall_seconds=4.0)).max_wall_seconds > 4.0
    assert gpu_settings(LatencySettings()).max_wall_seconds == 0.0  # still not bounded


def test_bounded_wall_time_leaves_room_for_the_ramp() -> None:
    """As `verify` bounds it: 4 s, of which a warm-up may take 1 s, were too little."""
    machine = Machine()
    settings = gpu_settings(LatencySettings(max_wall_seconds=4.0))
    found = measure_rounds({"a": _climb(machine, seconds=1.5)}, settings, clock=machine.clock)["a"]
    assert found.stable
    assert found.rounds_ms[0][0] == pytest.approx(2.0)


class _Device:
    """Its own clock tells half of what the host sees; in its runs `silent` it tells nothing."""

    def __init__(self, machine: Machine, seconds: float, *, silent: range = range(0)) -> None:
        self._machine, self._seconds, self._silent, self._runs = machine, seconds, silent, 0
        self.device_ms: float | None = None

    def __call__(self) -> None:
        self._machine.now_s += self._seconds
        self.device_ms = None if self._runs in self._silent else 1e3 * self._seconds / 2
        self._runs += 1


def test_device_rounds_are_those_of_the_timed_runs() -> None:
    machine = Machine()
    settings = LatencySettings(min_runs=12, min_seconds=0.0, lead_in_seconds=0.0)
    calls = {"gpu": _Device(machine, 0.01), "cpu": machine.job("cpu", 0.01)}
    found = measure_rounds(calls, settings, clock=machine.clock)
    gpu = found["gpu"]
    assert gpu.num_warmups > 3
    assert [len(samples) for samples in gpu.device_rounds_ms] == [len(samples) for samples in gpu.rounds_ms]
    assert {ms for samples in gpu.device_rounds_ms for ms in samples} == {5.0}
    assert found["cpu"].device_rounds_ms == ()


def test_device_that_told_of_some_runs_only_tells_nothing() -> None:
    machine = Machine()
    settings = LatencySettings(min_runs=12, min_seconds=0.0, lead_in_seconds=0.0)
    silent = range(32, 36)  # one round of a lead-in and three timed runs
    found = measure_rounds({"gpu": _Device(machine, 0.01, silent=silent)}, settings, clock=machine.clock)["gpu"]
    assert found.num_warmups <= silent.start < silent.stop < found.num_warmups + 4 * len(found.rounds_ms)
    assert found.device_rounds_ms == ()
