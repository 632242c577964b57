"""The range whose 8-bit distribution diverges the least from that of all values (Kullback-Leibler).

Source: S. Migacz, "8-bit inference with TensorRT", GTC 2017; there for magnitudes and 128 levels. Here both sides of
zero share 255 levels in proportion to what is kept of them, and exact zeros, which every grid holds, are left out.
"""

from __future__ import annotations

import numpy as np

from cspdeploy.quant.histogram import NUM_CODES, Doubles, Histogram

__all__ = ["least_divergent_range"]

NUM_CANDIDATES = 112
MIN_SHARE = 0.125
"""Of the larger end: TensorRT too begins with as many of its 2,048 bins as there are levels."""


def least_divergent_range(histogram: Histogram) -> tuple[float, float]:
    """Both ends are cut at one magnitude, so that a side that is small stays whole."""
    largest = max(-histogram.low, histogram.high)
    if histogram.positive.total + histogram.negative.total == 0:
        return 0.0, 0.0
    width, values = _even_bins(histogram, largest)
    limits = largest * np.linspace(MIN_SHARE, 1.0, NUM_CANDIDATES)
    found = [_divergence(values, width, max(histogram.low, -limit), min(histogram.high, limit)) for limit in limits]
    limit = float(limits[int(np.argmin(found))])
    return max(histogram.low, -limit), min(histogram.high, limit)


def _even_bins(histogram: Histogram, largest: float) -> tuple[float, Doubles]:
    """Counts in equal bins of both sides, zero in the middle: `[2 * K]`."""
    num_bins = len(histogram.positive.counts)
    edges = np.linspace(0.0, largest, num_bins + 1)
    sides = [-np.diff(side.moments_beyond(edges)[0]) for side in (histogram.negative, histogram.positive)]
    return largest / num_bins, np.concatenate([sides[0][::-1], sides[1]])


def _divergence(values: Doubles, width: float, low: float, high: float) -> float:
    """Of what is left after cutting at low and high, as 255 levels tell it, from all values moved into that range."""
    middle = len(values) // 2
    first, last = middle - round(-low / width), middle + round(high / width)
    kept = values[first:last]
    whole = kept.copy()
    whole[0] += values[:first].sum()
    whole[-1] += values[last:].sum()
    levels = np.arange(len(kept)) * NUM_CODES // len(kept)
    filled = kept > 0
    per_level = np.bincount(levels, kept, NUM_CODES) / np.maximum(np.bincount(levels, filled, NUM_CODES), 1)
    told = np.where(filled, per_level[levels], 0.0)
    # As in the source: a bin that only holds what was cut has no counterpart, and is not counted.
    both = (whole > 0) & (told > 0)
    p, q = whole[both] / whole.sum(), told[both] / told.sum()
    return float(np.sum(p * np.log(p / q)))
