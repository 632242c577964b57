"""How the values of a tensor are spread, and what rounding them to a grid would cost.

A histogram here says that the values of a bin are spread evenly over it, with exact zeros counted apart. On that
assumption the squared error of any grid has a closed form in the moments beyond each of its 256 rounding boundaries, so
that judging one grid costs the same whatever the number of bins, and no error depends on where bins and steps meet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt

__all__ = ["NUM_BINS", "NUM_CODES", "Doubles", "Histogram", "Side", "pool_sides"]

Doubles = npt.NDArray[np.float64]

NUM_BINS = 2048
"""Of one side of a tensor's histogram: eight to a step of a grid that spends its 255 codes on that side, as entropy
calibration needs (TensorRT uses as many)."""

NUM_CODES = 255
"""Steps between the ends of an 8-bit grid."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Side:
    """Magnitudes of the values on one side of zero, zeros left out.

    Attributes:
        top: upper edge of the last bin; bins are equally wide and begin at zero.
        counts: float64 `[K]`.
    """

    top: float
    counts: Doubles

    @property
    def total(self) -> float:
        """Number of values."""
        return float(self.counts.sum())

    @property
    def edges(self) -> Doubles:
        """float64 `[K + 1]`."""
        return np.linspace(0.0, self.top, len(self.counts) + 1)

    def moments_beyond(self, edges: Doubles) -> tuple[Doubles, Doubles, Doubles]:
        """Number, sum and sum of squares of the magnitudes above each of `edges`, in the shape of `edges`."""
        if self.top <= 0:
            nothing = np.zeros_like(edges)
            return nothing, nothing, nothing
        own, width = self.edges, self.top / len(self.counts)
        density = self.counts / width
        parts = (density * np.diff(own), density * np.diff(own**2) / 2, density * np.diff(own**3) / 3)
        places = np.clip(edges, 0.0, self.top)
        bins = np.minimum((places / width).astype(np.int64), len(self.counts) - 1)
        upper, inside = own[bins + 1], density[bins]
        rest = (upper - places, (upper**2 - places**2) / 2, (upper**3 - places**3) / 3)
        found = [
            np.append(np.cumsum(part[::-1])[::-1], 0.0)[bins + 1] + inside * left
            for part, left in zip(parts, rest, strict=True)
        ]
        return found[0], found[1], found[2]

    def errors(self, steps: Doubles, *, slope: float = 1.0, rounded: bool = True) -> Doubles:
        """Sum of squared errors for every step and every number of codes that this side may get.

        A magnitude x becomes the code k = min(round(x / step), n), n the number of codes; what follows multiplies by
        `slope` and rounds to the same step: round(slope * k) * step. The error is against slope * x. Slope 1 is the
        rounding of the tensor itself.

        Args:
            steps: float64 `[S]`, above zero.
            rounded: count the rounding of what lies within half a step above the last code; not for values that are on
                the grid already, as sums of values on it are.

        Returns:
            float64 `[S, 256]`: by step, and by number of codes from 0 to 255.
        """
        codes = np.arange(NUM_CODES + 1)
        reached = np.rint(slope * codes) * steps[:, None]
        boundaries = np.concatenate([[0.0], codes + 0.5]) * steps[:, None]
        count, first, second = self.moments_beyond(boundaries)

        def error_beyond(places: slice) -> Doubles:
            """If all of them went to the code: from its cell's lower end on, or from its upper end."""
            rest = slope**2 * second[:, places] - 2 * slope * reached * first[:, places]
            return cast(Doubles, rest + reached**2 * count[:, places])

        clipped = error_beyond(slice(1, None))
        within = np.cumsum(error_beyond(slice(None, -1)) - clipped, axis=1) if rounded else np.zeros_like(clipped)
        return cast(Doubles, np.maximum(within, 0.0) + np.maximum(clipped, 0.0))

    def beyond(self, limit: float) -> float:
        """Number of values of a magnitude above `limit`."""
        return float(self.moments_beyond(np.array([limit]))[0][0])

    def limit_of(self, count: float) -> float:
        """The magnitude that `count` values exceed; 0 where there are no more than that."""
        if self.total <= count:
            return 0.0
        below = np.concatenate([[0.0], np.cumsum(self.counts)])
        return float(np.interp(self.total - count, below, self.edges))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Histogram:
    """Values of one tensor: exact zeros, and what lies on each side of them."""

    num_zeros: float
    positive: Side
    negative: Side

    @property
    def total(self) -> float:
        """Number of values."""
        return self.num_zeros + self.positive.total + self.negative.total

    @property
    def low(self) -> float:
        """Smallest value, at most zero."""
        return -self.negative.top

    @property
    def high(self) -> float:
        """Largest value, at least zero."""
        return self.positive.top

    def central_range(self, share: float) -> tuple[float, float]:
        """The range that leaves out (1 - share) / 2 of the values at each end, zero always in it."""
        left_out = self.total * (1.0 - share) / 2.0
        return -self.negative.limit_of(left_out), self.positive.limit_of(left_out)

    def clipped_share(self, low: float, high: float) -> float:
        """Of the values, those outside `[low, high]`, which holds zero."""
        if self.total == 0:
            return 0.0
        return (self.negative.beyond(-low) + self.positive.beyond(high)) / self.total


def pool_sides(
    counts: npt.NDArray[np.integer] | Doubles, widths: Doubles, largest: Doubles, *, num_bins: int = NUM_BINS
) -> Side:
    """One side of a tensor's histogram from those of its channels, each in bins of its own width.

    Args:
        counts: `[C, B]`: bin i of channel c holds the magnitudes in `(i * widths[c], (i + 1) * widths[c]]`.
        widths: `[C]`.
        largest: magnitude `[C]` of the channels: no value of the channel's last filled bin lies above.
    """
    top = float(largest.max(initial=0.0))
    if top <= 0 or not counts.any():
        return Side(top=max(top, 0.0), counts=np.zeros(num_bins))
    channel, index = np.nonzero(counts)
    lower = index * widths[channel]
    # Rounding in a factor can put the largest value a hair below the edge of its bin.
    upper = np.maximum(np.minimum(lower + widths[channel], largest[channel]), lower + 1e-6 * widths[channel])
    density = counts[channel, index] / (upper - lower)
    # The density of the whole is a sum of boxes: its cumulative count at an edge e is e * D(e) - M(e), where D and M
    # sum up the changes of the density before e, and these times their places.
    width = top / num_bins
    places = np.concatenate([lower, upper])
    changes = np.concatenate([density, -density])
    bins = np.minimum(places / width, num_bins).astype(np.int64) + 1
    slopes = np.cumsum(np.bincount(bins, changes, num_bins + 2))[: num_bins + 1]
    offsets = np.cumsum(np.bincount(bins, changes * places, num_bins + 2))[: num_bins + 1]
    below = np.linspace(0.0, top, num_bins + 1) * slopes - offsets
    below[-1] = counts.sum()
    return Side(top=top, counts=np.maximum(np.diff(below), 0.0))
