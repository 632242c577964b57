"""What can be said of latencies that were measured in rounds.

In each round every variant has one burst of runs. The samples of a burst are not independent of each other: the same
neighbour, the same clock and the same caches are in all of them. So rounds are resampled, not samples; and variants are
compared within a round, where slow drift of the machine is in both and cancels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

__all__ = [
    "EventTime", "Ratio", "compare_rounds", "event_time", "median_interval", "percentile", "spread",
    "supported_percentile",
]  # fmt: skip

Rounds = Sequence[Sequence[float]]
"""Samples by round, one at least in each."""

NUM_RESAMPLES = 2000
_TABLE_VALUES = 1 << 21
"""Of resamples times samples at once: 16 MB a table, of which there are three."""
CONFIDENCE = 0.95
_TAILS = [100 * (1 - CONFIDENCE) / 2, 100 * (1 + CONFIDENCE) / 2]

# Below two in a hundred a difference changes with the placement of buffers in memory from one process to the next, so
# no number of runs in one process can prove it.
SMALLEST_DIFFERENCE = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """Of the reference's time over another's, as speed: above 1 the other is faster. `low` to `high`: 95 %."""

    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> Literal["faster", "slower", "indistinguishable"]:
        """Not indistinguishable only if the interval lies wholly beyond a difference of 2 %."""
        if self.low > 1 + SMALLEST_DIFFERENCE:
            return "faster"
        if self.high < 1 / (1 + SMALLEST_DIFFERENCE):
            return "slower"
        return "indistinguishable"


def percentile(samples: Sequence[float], percent: float) -> float:
    """Linear between neighbours, as numpy does.

    Raises:
        ValueError: no samples.
    """
    if not samples:
        raise ValueError("no samples")
    return float(np.percentile(np.asarray(samples, np.float64), percent))


def supported_percentile(samples: Sequence[float], percent: float) -> float | None:
    """The percentile, or None where the samples are too few to know it.

    Few enough samples may all lie below the true percentile, and then nothing of them tells where it is. Here the
    chance of that must be below 5 %: `(percent / 100) ** n <= 0.05`, which takes 29 samples for p90, 59 for p95 and
    299 for p99 (S. S. Wilks, "Determination of Sample Sizes for Setting Tolerance Limits", 1941).
    """
    needed = math.ceil(math.log(1 - CONFIDENCE) / math.log(percent / 100))
    return percentile(samples, percent) if len(samples) >= needed else None


def spread(samples: Sequence[float]) -> float:
    """Distance between the quartiles over the median."""
    low, middle, high = (percentile(samples, percent) for percent in (25, 50, 75))
    return (high - low) / middle if middle else 0.0


def median_interval(rounds: Rounds, *, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the median of all samples, by resampling rounds with replacement (Efron's percentile method).

    Raises:
        ValueError: no samples.
    """
    pooled = np.concatenate([np.asarray(samples, np.float64) for samples in rounds]) if rounds else np.empty(0)
    if not pooled.size:
        raise ValueError("no samples")
    order = np.argsort(pooled, kind="stable")
    round_of = np.repeat(np.arange(len(rounds)), [len(samples) for samples in rounds])[order]
    counts = _resampled_counts(len(rounds), seed)  # [resamples, rounds]: how often each round was drawn
    middle = np.empty(NUM_RESAMPLES, np.int64)
    step = max(1, _TABLE_VALUES // pooled.size)
    for start in range(0, NUM_RESAMPLES, step):
        some = slice(start, start + step)
        reached = np.cumsum(counts[some, round_of], axis=1)  # samples up to there, in the order of their values
        middle[some] = (reached >= (reached[:, -1:] + 1) // 2).argmax(axis=1)
    low, high = np.percentile(pooled[order][middle], _TAILS)
    return float(low), float(high)


def _resampled_counts(num_rounds: int, seed: int) -> npt.NDArray[np.int64]:
    rng = np.random.default_rng(seed)
    return rng.multinomial(num_rounds, np.full(num_rounds, 1 / num_rounds), size=NUM_RESAMPLES)


def compare_rounds(reference: Rounds, rounds: Rounds, *, seed: int = 0) -> Ratio:
    """Speed of `rounds` against `reference`: the median over rounds of the ratio of their medians.

    In logarithms, so that swapping the two gives the inverse.

    Args:
        reference: as many rounds as `rounds`, measured in the same ones.

    Raises:
        ValueError: no samples, or not the same number of rounds.
    """
    if not reference or not rounds:
        raise ValueError("no samples")
    medians = ((percentile(ours, 50), percentile(theirs, 50)) for ours, theirs in zip(reference, rounds, strict=True))
    logs = np.array([math.log(ours / theirs) for ours, theirs in medians])
    picks = np.random.default_rng(seed).integers(0, len(logs), (NUM_RESAMPLES, len(logs)))
    low, high = np.percentile(np.median(logs[picks], axis=1), _TAILS)
    return Ratio(ratio=math.exp(np.median(logs)), low=math.exp(low), high=math.exp(high))


@dataclass(frozen=True, slots=True, kw_only=True)
class EventTime:
    """Median of the runs between two events on the device's stream, with its 95 % interval, in ms.

    From the first kernel that was queued to the end of the last one, gaps between kernels included: it does not tell
    how long the GPU worked (`cspdeploy.runtimes.kernels` does), and a run that waits for its launches waits between
    the events.

    Attributes:
        wait_ms: of the host's median, what is not between the events: waiting for the last one, and waking up. 0 at
            least.
    """

    p50_ms: float
    ci_low_ms: float
    ci_high_ms: float
    wait_ms: float


def event_time(rounds_ms: Sequence[Sequence[float]], device_rounds_ms: Sequence[Sequence[float]]) -> EventTime | None:
    """What events on the device's stream say of runs that the host's clock has timed too; None where there are none.

    Args:
        rounds_ms, device_rounds_ms: of the same runs, as in `cspdeploy.check.latency.Measured`.
    """
    if not rounds_ms or [len(found) for found in rounds_ms] != [len(found) for found in device_rounds_ms]:
        return None
    host_ms = percentile([value for found in rounds_ms for value in found], 50)
    p50_ms = percentile([value for found in device_rounds_ms for value in found], 50)
    low, high = median_interval(device_rounds_ms)
    return EventTime(p50_ms=p50_ms, ci_low_ms=low, ci_high_ms=high, wait_ms=max(0.0, host_ms - p50_ms))
