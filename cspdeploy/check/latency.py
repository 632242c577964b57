"""Latency of things that are compared: interleaved, warmed up, raw samples kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from cspdeploy.check.stats import bootstrap_median, compare_medians, percentile, spread
from cspdeploy.core.types import Timing

__all__ = ["LatencySettings", "measure_latency", "noise_warning"]

Progress = Callable[[str, int, int], None]

NOISY_SPREAD = 0.10
"""Quartiles further apart than a tenth of the median: neighbours on the machine, or a clock that changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencySettings:
    """How long to measure each thing. Both minima must be reached, or the maximum."""

    min_runs: int = 30
    min_seconds: float = 1.0
    max_runs: int = 2000
    """Enough for any interval; a network of microseconds would fill memory with samples before its seconds are over."""
    warmup_runs: int = 3
    warmup_seconds: float = 0.2
    burst: int = 5
    """Timed runs in a row before the next thing's turn, at least; more of them where runs are short, up to `max_burst`,
    until the burst has lasted as long as its lead-in: else nearly all the time would go into lead-ins."""
    max_burst: int = 100
    lead_in_seconds: float = 0.03
    """Untimed runs before a burst, one at least: an engine that hands over leaves caches full of its own weights, and
    threads that spin for some milliseconds more."""
    seed: int = 0


def measure_latency(
    calls: Mapping[str, Callable[[], None]],
    settings: LatencySettings,
    *,
    clock: Callable[[], float] = time.perf_counter,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Timing]:
    """Time each callable, in bursts, in an order that is drawn anew each round.

    Args:
        calls: by name; each computes once and returns when its device is done. The first is the reference.
        clock: seconds, monotonic.

    Raises:
        ValueError: nothing to time.
    """
    if not calls:
        raise ValueError("nothing to time")
    for call in calls.values():
        _run_untimed(call, settings.warmup_runs, settings.warmup_seconds, clock)
    samples_ms: dict[str, list[float]] = {name: [] for name in calls}
    rng = np.random.default_rng(settings.seed)
    names = list(calls)
    while True:
        done = min(_share_done(samples, settings) for samples in samples_ms.values())
        progress("latency", round(100 * min(1.0, done)), 100)
        if done >= 1:
            break
        for index in rng.permutation(len(names)):
            name = names[index]
            _run_untimed(calls[name], 1, settings.lead_in_seconds, clock)
            samples_ms[name] += _time_burst(calls[name], settings, clock)
    return {name: _summarise(samples, samples_ms[names[0]], name == names[0]) for name, samples in samples_ms.items()}


def _time_burst(call: Callable[[], None], settings: LatencySettings, clock: Callable[[], float]) -> list[float]:
    """Milliseconds of each run."""
    samples_ms: list[float] = []
    elapsed = 0.0
    while len(samples_ms) < settings.burst or (
        elapsed < settings.lead_in_seconds and len(samples_ms) < settings.max_burst
    ):
        started = clock()
        call()
        seconds = clock() - started
        elapsed += seconds
        samples_ms.append(1e3 * seconds)
    return samples_ms


def _run_untimed(call: Callable[[], None], min_runs: int, min_seconds: float, clock: Callable[[], float]) -> None:
    started = clock()
    runs = 0
    while runs < min_runs or clock() - started < min_seconds:
        call()
        runs += 1


def _share_done(samples_ms: list[float], settings: LatencySettings) -> float:
    by_time = sum(samples_ms) / (1e3 * settings.min_seconds) if settings.min_seconds > 0 else 1.0
    by_runs = len(samples_ms) / settings.min_runs
    return max(min(by_runs, by_time), len(samples_ms) / max(settings.max_runs, settings.min_runs))


def _summarise(samples_ms: list[float], reference_ms: list[float], is_reference: bool) -> Timing:
    low, high = bootstrap_median(samples_ms)
    verdict, ratio = ("reference", 1.0) if is_reference else compare_medians(reference_ms, samples_ms)
    return Timing(
        p50_ms=percentile(samples_ms, 50), p95_ms=percentile(samples_ms, 95), ci_low_ms=low, ci_high_ms=high,
        num_runs=len(samples_ms), verdict=verdict, ratio=ratio, samples_ms=tuple(samples_ms),  # type: ignore[arg-type]
    )  # fmt: skip


def noise_warning(timings: Mapping[str, Timing]) -> str:
    """One line if the machine was too noisy to judge, else an empty string."""
    noisy = {name: spread(timing.samples_ms) for name, timing in timings.items()}
    worst = max(noisy, key=lambda name: noisy[name], default="")
    if not worst or noisy[worst] <= NOISY_SPREAD:
        return ""
    return (
        f"noisy machine: the middle half of the runs of {worst} spreads over {100 * noisy[worst]:.0f} % of its median; "
        "stop other work and measure again"
    )
