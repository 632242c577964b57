"""Latency of things that are compared: interleaved, warmed up until stable, raw samples kept by round."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cspdeploy.check.burst import Burst, run_burst
from cspdeploy.check.latency_settings import STABLE_WINDOWS, LatencySettings, gpu_settings
from cspdeploy.check.machine import advise
from cspdeploy.check.stats import compare_rounds, median_interval, percentile, spread, supported_percentile
from cspdeploy.core.errors import CspDeployError
from cspdeploy.core.results import Timing

__all__ = [
    "LatencySettings", "Measured", "gpu_settings", "measure_latency", "measure_rounds", "noise_warning", "summarise",
    "timing_warnings",
]  # fmt: skip

Progress = Callable[[str, int, int], None]
Timed = Callable[[], None] | Burst
"""Computes once and returns when its device is done; or times itself, as a bound call in a worker does."""

NOISY_SPREAD = 0.10
"""Quartiles further apart than a tenth of the median: neighbours on the machine, or a clock that changes."""


WARMUP_SHARE = 0.25
_WINDOW_RUNS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Of one thing.

    Attributes:
        rounds_ms: milliseconds of each run, by round, in the order of time.
        num_warmups: untimed runs before the first round.
        stable: the warm-up ended since its times had settled, not since it had lasted long enough.
        device_rounds_ms: the same runs between events on its stream; empty where there are none, or they told of some
            of them only.
    """

    rounds_ms: tuple[tuple[float, ...], ...]
    num_warmups: int
    stable: bool
    device_rounds_ms: tuple[tuple[float, ...], ...] = ()


def measure_latency(
    calls: Mapping[str, Timed],
    settings: LatencySettings,
    *,
    clock: Callable[[], float] = time.perf_counter,
    progress: Progress = lambda what, done, total: None,
    failures: dict[str, CspDeployError] | None = None,
) -> dict[str, Timing]:
    """Time each thing, in bursts, in an order that is drawn anew each round. See `measure_rounds`."""
    return summarise(measure_rounds(calls, settings, clock=clock, progress=progress, failures=failures))


def measure_rounds(
    calls: Mapping[str, Timed],
    settings: LatencySettings,
    *,
    clock: Callable[[], float] = time.perf_counter,
    progress: Progress = lambda what, done, total: None,
    failures: dict[str, CspDeployError] | None = None,
) -> dict[str, Measured]:
    """The raw samples of what did not fail, in the order of `calls`.

    Args:
        calls: by name. The first is the reference.
        clock: seconds, monotonic; of calls in this process.
        failures: takes the errors of those that fail, which then leave the rounds; None: an error is raised.

    Raises:
        ValueError: nothing to time.
    """
    if not calls:
        raise ValueError("nothing to time")
    return _Interleaved(calls, settings, clock, progress, failures).measure()


class _LocalCall:
    """A call in this process, as a thing that times itself."""

    def __init__(self, call: Callable[[], None], clock: Callable[[], float]) -> None:
        self._call, self._clock = call, clock
        self.device_rounds_ms: list[tuple[float, ...]] = []

    def burst(self, *, min_runs: int, min_seconds: float, max_runs: int, lead_in_seconds: float) -> list[float]:
        device_ms: list[float] = []
        samples = run_burst(
            self._call, clock=self._clock, min_runs=min_runs, min_seconds=min_seconds, max_runs=max_runs,
            lead_in_seconds=lead_in_seconds, device_ms=device_ms,
        )  # fmt: skip
        self.device_rounds_ms += [tuple(device_ms)] if device_ms else []
        return samples

    def forget_rounds(self) -> None:
        self.device_rounds_ms = []


class _Interleaved:
    def __init__(
        self, calls: Mapping[str, Timed], settings: LatencySettings, clock: Callable[[], float], progress: Progress,
        failures: dict[str, CspDeployError] | None,
    ) -> None:  # fmt: skip
        self._bursts: dict[str, Burst] = {
            name: _LocalCall(call, clock) if callable(call) else call for name, call in calls.items()
        }
        self._settings, self._progress, self._failures, self._clock = settings, progress, failures, clock
        self._end = clock() + settings.max_wall_seconds * len(calls) if settings.max_wall_seconds else math.inf
        self._burst_runs: dict[str, int] = {}
        self._rounds: dict[str, list[tuple[float, ...]]] = {name: [] for name in calls}
        self._warmups: dict[str, tuple[int, bool]] = {}
        self._next_look = 0

    def measure(self) -> dict[str, Measured]:
        for name in tuple(self._bursts):
            self._progress(f"warm-up of {name}", 0, 100)
            self._guard(name, self._warm_up)
        rng = np.random.default_rng(self._settings.seed)
        while self._bursts and not self._done():
            names = list(self._bursts)
            for index in rng.permutation(len(names)):
                self._guard(names[index], self._take_turn)
        return {name: self._found(name) for name in self._bursts}

    def _found(self, name: str) -> Measured:
        rounds_ms = tuple(self._rounds[name])
        device_ms = tuple(getattr(self._bursts[name], "device_rounds_ms", ()))
        complete = [len(found) for found in device_ms] == [len(found) for found in rounds_ms]
        num_warmups, stable = self._warmups[name]
        return Measured(
            rounds_ms=rounds_ms, num_warmups=num_warmups, stable=stable, device_rounds_ms=device_ms if complete else ()
        )

    def _guard(self, name: str, work: Callable[[str], None]) -> None:
        try:
            work(name)
        except CspDeployError as error:
            if self._failures is None:
                raise
            self._failures[name] = error
            del self._bursts[name]

    def _warm_up(self, name: str) -> None:
        """Run until the times have settled, or for as long as the settings allow."""
        settings = self._settings
        num_runs, seconds, started = 0, 0.0, self._clock()
        longest = WARMUP_SHARE * settings.max_wall_seconds if settings.max_wall_seconds else math.inf
        windows: list[tuple[float, float]] = []
        while True:
            samples = self._bursts[name].burst(
                min_runs=min(_WINDOW_RUNS, max(1, settings.warmup_runs - 1)),
                min_seconds=min(settings.window_seconds, settings.warmup_seconds), max_runs=settings.max_burst,
                lead_in_seconds=0.0,
            )  # fmt: skip
            num_runs += 1 + len(samples)
            seconds += 1e-3 * sum(samples)
            windows = _latest([*windows, (percentile(samples, 50), 1e-3 * sum(samples))], settings.stable_seconds)
            stable = _is_stable(windows, settings)
            enough = num_runs >= settings.warmup_runs and seconds >= settings.warmup_seconds
            late = seconds >= settings.max_warmup_seconds or self._clock() - started >= longest
            if enough and (stable or late):
                self._warmups[name] = num_runs, stable
                self._burst_runs[name] = self._affordable(1e-3 * windows[-1][0])
                if (forget := getattr(self._bursts[name], "forget_rounds", None)) is not None:
                    forget()
                return

    def _affordable(self, seconds: float) -> int:
        """Runs in a burst, of so many seconds each."""
        settings = self._settings
        rest = (1 - WARMUP_SHARE) * settings.max_wall_seconds
        slow = rest > 0 and settings.min_rounds * (1 + settings.burst) * seconds > rest
        return 1 if slow else settings.burst

    def _take_turn(self, name: str) -> None:
        settings = self._settings
        samples = self._bursts[name].burst(
            min_runs=self._burst_runs[name], min_seconds=settings.lead_in_seconds, max_runs=settings.max_burst,
            lead_in_seconds=settings.lead_in_seconds,
        )  # fmt: skip
        self._rounds[name].append(tuple(samples))

    def _done(self) -> bool:
        rounds = [self._rounds[name] for name in self._bursts]
        done = min(self._share_done(found) for found in rounds)
        self._progress("latency", round(100 * min(1.0, done)), 100)
        if self._clock() >= self._end and len(rounds[0]) >= self._settings.min_rounds:
            return True
        return done >= 1 and (self._exhausted(rounds) or self._precise(rounds))

    def _share_done(self, rounds: Sequence[tuple[float, ...]]) -> float:
        settings = self._settings
        num_runs, milliseconds = sum(map(len, rounds)), sum(map(sum, rounds))
        by_time = milliseconds / (1e3 * settings.min_seconds) if settings.min_seconds > 0 else 1.0
        by_rounds = len(rounds) / settings.min_rounds
        # The fewest rounds are due even where they are more than the most runs.
        by_most = min(by_rounds, num_runs / max(settings.max_runs, settings.min_runs))
        return max(min(num_runs / settings.min_runs, by_time, by_rounds), by_most)

    def _exhausted(self, rounds: list[list[tuple[float, ...]]]) -> bool:
        """Nothing more is allowed for the one that has had most."""
        most = max(sum(map(sum, found)) for found in rounds)
        runs = max(sum(map(len, found)) for found in rounds)
        return most >= 1e3 * self._settings.max_seconds or runs >= self._settings.max_runs

    def _precise(self, rounds: list[list[tuple[float, ...]]]) -> bool:
        """Every ratio to the first is known closely. Looked at now and then: each look is a chance to stop by luck."""
        if len(rounds[0]) < self._next_look:
            return False
        self._next_look = len(rounds[0]) + max(2, len(rounds[0]) // 4)
        ratios = [compare_rounds(rounds[0], found) for found in rounds[1:]]
        return all(found.high - found.low <= 2 * self._settings.close_enough * found.ratio for found in ratios)


def _latest(windows: list[tuple[float, float]], seconds: float) -> list[tuple[float, float]]:
    """The last `STABLE_WINDOWS` of them, or as many more as it takes to hold so many seconds of work."""
    first, held = len(windows), 0.0
    while first > 0 and (len(windows) - first < STABLE_WINDOWS or held < seconds):
        first -= 1
        held += windows[first][1]
    return windows[first:]


def _is_stable(windows: list[tuple[float, float]], settings: LatencySettings) -> bool:
    """Windows are pairs: median in ms, seconds of work."""
    if len(windows) < STABLE_WINDOWS or sum(seconds for _, seconds in windows) < settings.stable_seconds:
        return False
    medians = [median for median, _ in windows]
    return max(medians) <= (1 + settings.stable_within) * min(medians)


def summarise(measured: Mapping[str, Measured]) -> dict[str, Timing]:
    """Median, percentiles, intervals, and the verdict of each against the first."""
    reference = next(iter(measured.values())).rounds_ms if measured else ()
    return {
        name: _timing(found.rounds_ms, None if found.rounds_ms is reference else reference)
        for name, found in measured.items()
    }


def _timing(rounds_ms: tuple[tuple[float, ...], ...], reference_ms: tuple[tuple[float, ...], ...] | None) -> Timing:
    samples = [milliseconds for found in rounds_ms for milliseconds in found]
    low, high = median_interval(rounds_ms)
    ratio = compare_rounds(reference_ms, rounds_ms) if reference_ms is not None else None
    return Timing(
        p50_ms=percentile(samples, 50), p90_ms=supported_percentile(samples, 90),
        p95_ms=supported_percentile(samples, 95), p99_ms=supported_percentile(samples, 99),
        ci_low_ms=low, ci_high_ms=high, num_runs=len(samples), verdict=ratio.verdict if ratio else "reference",
        ratio=ratio.ratio if ratio else 1.0, ratio_low=ratio.low if ratio else 1.0,
        ratio_high=ratio.high if ratio else 1.0, samples_ms=tuple(samples),
    )  # fmt: skip


def timing_warnings(timings: Mapping[str, Timing], findings: Sequence[str], *, of_gpu: Sequence[str] = ()) -> list[str]:
    """What to know of a measurement before its numbers are believed: that of `noise_warning`, and all of the GPU.

    A clock that a limit held lower all the time gives runs that are all alike, and all too slow.

    Args:
        findings: of `cspdeploy.check.machine.MachineWatch` during it.
        of_gpu: those among them, or beside them, that are of the GPU.
    """
    noisy = noise_warning(timings, findings)
    return [*filter(None, [noisy]), *(finding for finding in of_gpu if finding not in noisy)]


def noise_warning(timings: Mapping[str, Timing], findings: Sequence[str] | None = None) -> str:
    """One line if the machine was too noisy to judge, else an empty string.

    Args:
        findings: of `cspdeploy.check.machine.MachineWatch` during the measurement; None: what can be seen now.
    """
    noisy = {name: spread(timing.samples_ms) for name, timing in timings.items()}
    worst = max(noisy, key=lambda name: noisy[name], default="")
    if not worst or noisy[worst] <= NOISY_SPREAD:
        return ""
    return (
        f"noisy machine: the middle half of the runs of {worst} spreads over {100 * noisy[worst]:.0f} % of its median; "
        f"{advise(findings)}"
    )
