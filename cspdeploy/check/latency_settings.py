"""How long latency is measured, on a CPU and on a GPU."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

__all__ = ["GPU_STABLE_SECONDS", "STABLE_WINDOWS", "LatencySettings", "gpu_settings"]

STABLE_WINDOWS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencySettings:
    """How long to measure each thing. The minima must all be reached, or `max_runs`."""

    min_runs: int = 30
    min_seconds: float = 1.0
    min_rounds: int = 6
    """Fewer rounds prove nothing, even where one thing is the faster in all of them: among 5 that happens by chance in
    2 of 32 cases, which is more than 1 in 20."""
    max_runs: int = 2000
    """Enough for any interval; a network of microseconds would fill memory with samples before its seconds are over."""
    max_seconds: float = 0.0
    """Timed seconds of each thing, at most, if after the minima some ratio is not known to within `close_enough`; below
    `min_seconds`: it ends with the minima."""
    max_wall_seconds: float = 0.0
    """Wall time for each thing, its warm-up and lead-ins included; 0: any. When all things together have taken as much,
    the fewest rounds are enough, whatever the other minima; a warm-up may take a quarter of it; and where a run is so
    slow that the fewest rounds would take longer, a burst is a single run."""
    close_enough: float = 0.01
    """Half of the ratio's interval, relative: with the 2 % that count as no difference, 5 % are seen well beyond it."""
    warmup_runs: int = 3
    warmup_seconds: float = 0.2
    max_warmup_seconds: float = 3.0
    """Until which to wait for a stable time beyond those minima; 0: the minima are enough."""
    stable_within: float = 0.05
    """The medians of `STABLE_WINDOWS` windows in a row differ by this at most: half of what counts as noise."""
    stable_seconds: float = 0.0
    """Work that those windows must have done together, at least: more than three of them where that is more."""
    window_seconds: float = 0.05
    """Of the runs whose median is a window's."""
    burst: int = 3
    """Timed runs in a row before the next thing's turn, at least; more of them where runs are short, up to `max_burst`,
    until the burst has lasted as long as its lead-in: else nearly all the time would go into lead-ins."""
    max_burst: int = 100
    lead_in_seconds: float = 0.03
    """Untimed runs before a burst, one at least: an engine that hands over leaves caches full of its own weights, and
    threads that spin for some milliseconds more."""
    seed: int = 0


# A GPU that was idle begins at a clock of some hundred MHz and climbs for up to two seconds; under power and heat it
# then settles over as long again. Three windows of 50 ms lie within 5 % of each other in the middle of such a climb: a
# clock that doubles in 1.5 s changes a time by 3 to 4 % in 0.1 s. In a second of work it changes by far more than 5 %.
GPU_STABLE_SECONDS = 1.0
GPU_WINDOW_SECONDS = 0.1
"""Ten windows in that second; a hundred runs of a network of a millisecond in each."""
GPU_MAX_WARMUP_SECONDS = 8.0
"""Twice a climb of two seconds, and the same again for one that settles under its limit of power."""
GPU_LEAD_IN_SECONDS = 0.25
"""Between its turns a GPU idles while a CPU computes, and its clock may fall. Its driver raises it in steps of tens of
milliseconds once there is work, so that this is several steps; while others compute on it, it costs little."""
GPU_MIN_SECONDS = 2.0
"""At a limit of power the clock swings over some tenths of a second: this is several such swings."""
GPU_BURST = 10
"""Runs are short, and events cost none of them their time."""
GPU_MAX_BURST, GPU_MAX_RUNS = 1000, 20_000
"""A burst that lasts as long as its lead-in, of runs of a quarter of a millisecond, and twenty of those."""
GPU_WALL_SECONDS = 16.0
"""Where wall time is bounded, a warm-up has a quarter of it: 4 s, for a climb of 1.5 s and a flat second after it."""


def gpu_settings(settings: LatencySettings | None = None) -> LatencySettings:
    """For things of which at least one computes on a GPU: nothing is shorter than in `settings`, most is longer."""
    given = settings or LatencySettings()
    return dataclasses.replace(
        given, min_seconds=max(given.min_seconds, GPU_MIN_SECONDS), burst=max(given.burst, GPU_BURST),
        max_burst=max(given.max_burst, GPU_MAX_BURST), max_runs=max(given.max_runs, GPU_MAX_RUNS),
        lead_in_seconds=max(given.lead_in_seconds, GPU_LEAD_IN_SECONDS),
        max_warmup_seconds=max(given.max_warmup_seconds, GPU_MAX_WARMUP_SECONDS),
        stable_seconds=max(given.stable_seconds, GPU_STABLE_SECONDS),
        window_seconds=max(given.window_seconds, GPU_WINDOW_SECONDS),
        max_wall_seconds=max(given.max_wall_seconds, GPU_WALL_SECONDS) if given.max_wall_seconds else 0.0,
    )  # fmt: skip
