"""What can be said of a list of latencies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["bootstrap_median", "compare_medians", "percentile", "ratio_interval", "spread"]

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95

# Below two in a hundred a difference changes with the placement of buffers in memory from one process to the next, so
# no number of runs in one process can prove it.
SMALLEST_DIFFERENCE = 0.02


def percentile(samples: Sequence[float], percent: float) -> float:
    """Linear between neighbours, as numpy does.

    Raises:
        ValueError: no samples.
    """
    if not samples:
        raise ValueError("no samples")
    return float(np.percentile(np.asarray(samples, np.float64), percent))


def spread(samples: Sequence[float]) -> float:
    """Distance between the quartiles over the median."""
    low, middle, high = (percentile(samples, percent) for percent in (25, 50, 75))
    return (high - low) / middle if middle else 0.0


def _resampled_medians(samples: Sequence[float], rng: np.random.Generator) -> npt.NDArray[np.float64]:
    if not samples:
        raise ValueError("no samples")
    values = np.sort(np.asarray(samples, np.float64))  # the interval does not depend on the order of the samples
    picks = rng.integers(0, len(values), (NUM_RESAMPLES, len(values)))
    return np.asarray(np.median(values[picks], axis=1))


def bootstrap_median(samples: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the median, by resampling with replacement (Efron's percentile method).

    Raises:
        ValueError: no samples.
    """
    medians = _resampled_medians(samples, np.random.default_rng(seed))
    tail = 100 * (1 - CONFIDENCE) / 2
    return percentile(medians.tolist(), tail), percentile(medians.tolist(), 100 - tail)


def ratio_interval(reference: Sequence[float], samples: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """95 % interval of median(reference) / median(samples), by resampling both.

    Raises:
        ValueError: no samples.
    """
    rng = np.random.default_rng(seed)
    ratios = (_resampled_medians(reference, rng) / _resampled_medians(samples, rng)).tolist()
    tail = 100 * (1 - CONFIDENCE) / 2
    return percentile(ratios, tail), percentile(ratios, 100 - tail)


def compare_medians(reference: Sequence[float], samples: Sequence[float], *, seed: int = 0) -> tuple[str, float]:
    """Verdict ("faster", "slower", "indistinguishable") and ratio: median(reference) / median(samples).

    Not indistinguishable only if the 95 % interval of the ratio lies wholly beyond a difference of 2 %.
    """
    low, high = ratio_interval(reference, samples, seed=seed)
    ratio = percentile(reference, 50) / percentile(samples, 50)
    if low > 1 + SMALLEST_DIFFERENCE:
        return "faster", ratio
    if high < 1 - SMALLEST_DIFFERENCE:
        return "slower", ratio
    return "indistinguishable", ratio
