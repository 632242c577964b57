"""What was seen of the tensors of a network, and what can be asked of it afterwards without another pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from cspdeploy.quant.histogram import Doubles, Histogram, pool_sides
from cspdeploy.quant.plan import Floats

__all__ = ["Observations", "TensorObservation"]

Integers = npt.NDArray[np.int32]
_WHOLE = ("num_values", "num_nonfinite")
_BY_CHANNEL = ("low", "high", "mean", "square_mean", "counts", "exponents")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TensorObservation:
    """Values of one tensor over all images; C channels along axis 1, one if it has fewer than two axes.

    Attributes:
        low, high, mean, square_mean: float32 `[C]`.
        num_values: seen in all.
        num_nonfinite: NaN or infinite, counted as zeros in everything else.
        counts: int32 `[C, 2 * B + 1]`: exact zeros in the middle, the negative side before, the positive side after it.
            Bin i of a side, counted from 1 away from zero, holds magnitudes in `((i - 1) * w, i * w]`.
        exponents: int32 `[C]`: `w * B` is 2 to the power of these.
    """

    low: Floats
    high: Floats
    mean: Floats
    square_mean: Floats
    num_values: int
    num_nonfinite: int
    counts: Integers
    exponents: Integers

    def histogram(self, factors: Floats | None = None, *, weights: Doubles | None = None) -> Histogram:
        """Of the whole tensor, each channel multiplied by its factor `[C]` (above zero).

        Args:
            factors: of equalisation.
            weights: `[C]`: what a value of a channel counts for; 1 without.
        """
        scales = np.ones(len(self.low)) if factors is None else np.asarray(factors, dtype=np.float64)
        largest = (np.maximum(-self.low, 0.0).astype(np.float64), np.maximum(self.high, 0.0).astype(np.float64))
        weighted = np.ones(len(self.low)) if weights is None else weights
        sides = [pool_sides(self._side(i) * weighted[:, None], self._widths * scales, largest[i] * scales)
                 for i in (0, 1)]  # fmt: skip
        zeros = float(self.counts[:, self._num_bins] @ weighted)
        return Histogram(num_zeros=zeros, negative=sides[0], positive=sides[1])

    def magnitudes(self, quantile: float | None = None, *, negative_share: float = 1.0) -> Floats:
        """What each channel needs room for: the larger of its two ends, float32 `[C]`.

        Args:
            quantile: share of the channel's values that lie within the end; None: the last value.
            negative_share: of the negative end, what counts: the slope of an activation that follows.
        """
        if quantile is None:
            ends = [np.maximum(-self.low, 0.0), np.maximum(self.high, 0.0)]
        else:
            ends = [self._quantile(side, quantile) for side in (0, 1)]
        found: Floats = np.maximum(negative_share * ends[0], ends[1]).astype(np.float32)
        return found

    @property
    def _num_bins(self) -> int:
        return int(self.counts.shape[1]) // 2

    def _side(self, side: int) -> Integers:
        """`[C, B]`, away from zero."""
        bins = self._num_bins
        return self.counts[:, bins + 1 :] if side else self.counts[:, :bins][:, ::-1]

    @property
    def _widths(self) -> Doubles:
        widths: Doubles = np.ldexp(1.0 / self._num_bins, self.exponents)
        return widths

    def _quantile(self, side: int, quantile: float) -> Doubles:
        counts = self._side(side)
        reach = (1.0 - quantile) * self.counts.sum(axis=1, dtype=np.int64)
        beyond = np.cumsum(counts[:, ::-1], axis=1, dtype=np.int64)[:, ::-1]  # above the lower edge of each bin
        place = np.maximum((beyond > reach[:, None]).sum(axis=1) - 1, 0)  # the bin in which that many values are passed
        rows = np.arange(len(counts))
        inside = np.maximum(counts[rows, place], 1)
        # Within its bin the end lies as far from the upper edge as its values beyond are many.
        left = reach - (beyond[rows, place] - counts[rows, place])
        end = (place + 1 - left / inside) * self._widths
        largest = np.maximum(self.high if side else -self.low, 0.0)
        found: Doubles = np.where(beyond[:, 0] > reach, np.clip(end, 0.0, largest), 0.0)
        return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Observations:
    """Of all tensors.

    Attributes:
        tensors: by name, in the order of the graph: every float tensor that depends on the image.
        num_images: in all batches.
    """

    tensors: Mapping[str, TensorObservation]
    num_images: int
    _pooled: dict[str, tuple[Floats | None, Histogram]] = field(default_factory=dict, repr=False)
    _magnitudes: dict[tuple[str, float | None, float], Floats] = field(default_factory=dict, repr=False)

    def histogram(self, name: str, factors: Floats | None = None) -> Histogram:
        """Of one tensor, remembered until it is asked for with other factors: methods share it."""
        known = self._pooled.get(name)
        if known is None or known[0] is not factors:
            known = self._pooled[name] = (factors, self.tensors[name].histogram(factors))
        return known[1]

    def magnitudes_of(self, name: str, quantile: float | None, *, negative_share: float = 1.0) -> Floats:
        """Of one tensor, `TensorObservation.magnitudes`, remembered."""
        key = (name, quantile, negative_share)
        if key not in self._magnitudes:
            self._magnitudes[key] = self.tensors[name].magnitudes(quantile, negative_share=negative_share)
        return self._magnitudes[key]

    def magnitudes(self, quantile: float | None, *, slopes: Mapping[str, float] | None = None) -> dict[str, Floats]:
        """Of every tensor; `slopes`: of the activation that follows a tensor, on the negative side."""
        shares = slopes or {}
        return {name: self.magnitudes_of(name, quantile, negative_share=shares.get(name, 1.0)) for name in self.tensors}

    def to_arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """For an .npz file, a few large arrays; `from_arrays` is the inverse."""
        seen = list(self.tensors.values())
        arrays: dict[str, npt.NDArray[np.generic]] = {
            "names": np.array(list(self.tensors), dtype=np.str_),
            "num_channels": np.array([len(one.low) for one in seen], dtype=np.int64),
            "num_images": np.array([self.num_images], dtype=np.int64),
        }
        for key in _WHOLE:
            arrays[key] = np.array([getattr(one, key) for one in seen], dtype=np.int64)
        for key in _BY_CHANNEL:
            arrays[key] = np.concatenate([getattr(one, key) for one in seen])
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[np.generic]]) -> Observations:
        """Raises KeyError where an array is missing."""
        ends = np.cumsum(np.asarray(arrays["num_channels"], dtype=np.int64))[:-1]
        columns: dict[str, Sequence[Any]] = {key: np.split(np.asarray(arrays[key]), ends) for key in _BY_CHANNEL}
        columns |= {key: [int(value) for value in np.asarray(arrays[key], dtype=np.int64)] for key in _WHOLE}
        tensors = {
            str(name): TensorObservation(**{key: column[i] for key, column in columns.items()})
            for i, name in enumerate(arrays["names"])
        }
        return cls(tensors=tensors, num_images=int(np.asarray(arrays["num_images"], dtype=np.int64)[0]))
