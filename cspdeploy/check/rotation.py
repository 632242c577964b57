"""Several inputs in turn, so that none of them is still in the device's cache when its turn comes again.

A bound input that is computed again and again lies in the L2 cache of a large GPU (50 MB on an H100) from the second
run on, where an application brings a new image each time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["MAX_SETS", "MIN_SETS", "UNKNOWN_L2_BYTES", "RotatedSets", "num_sets", "rotated_sets"]

UNKNOWN_L2_BYTES = 50_000_000
"""Where the device does not tell: that of an H100, among the largest that are common."""
CACHE_TIMES = 2
"""A cache that keeps what was used last holds nothing of what comes again after twice its size."""
MIN_SETS, MAX_SETS = 2, 256
"""Two at least, so that no address repeats from one run to the next. At most so many that one image of 256 px (0.8 MB)
has the 134 that it takes on an H100; of smaller ones, which are together less than the cache, the weights and
activations of the runs between push a set out as well."""
_STEPS = 32
_IMAGE_RANK = 3
_MOST_CHANNELS = 4

Array = npt.NDArray[np.generic]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RotatedSets:
    """Inputs by name, one mapping for each set. `num_bytes`: of all sets together."""

    sets: tuple[dict[str, Array], ...]
    num_bytes: int

    @property
    def words(self) -> str:
        """As a row says it: "rotated: 134 sets, 105 MB"."""
        return f"rotated: {len(self.sets)} sets, {max(1, round(1e-6 * self.num_bytes))} MB"


def num_sets(set_bytes: int, *, l2_bytes: int) -> int:
    """The fewest that are together more than `CACHE_TIMES` the cache, within `MIN_SETS` and `MAX_SETS`."""
    needed = CACHE_TIMES * l2_bytes // max(1, set_bytes) + 1
    return min(MAX_SETS, max(MIN_SETS, needed))


def rotated_sets(feeds: Mapping[str, Array], *, l2_bytes: int = 0) -> RotatedSets:
    """The given inputs, and others made of them by shifts and reflections: other content of the same distribution.

    Args:
        feeds: inputs of one call. Images are rolled and flipped in their own plane, each `[N, C, H, W]` or
            `[N, H, W, C]` of at most 4 channels; what is no image stays as it is, since its values may be sizes.
        l2_bytes: of the device's cache; 0: unknown.
    """
    set_bytes = sum(array.nbytes for array in feeds.values())
    count = num_sets(set_bytes, l2_bytes=l2_bytes or UNKNOWN_L2_BYTES)
    sets = tuple({name: _changed(array, k) for name, array in feeds.items()} for k in range(count))
    return RotatedSets(sets=sets, num_bytes=count * set_bytes)


def _changed(array: Array, k: int) -> Array:
    """The k-th of them: every second one is the mirror image, and every two are shifted further along the rows."""
    is_image = array.ndim >= _IMAGE_RANK and (array.dtype.kind == "f" or array.dtype == np.uint8)
    if not is_image or k == 0:
        return np.ascontiguousarray(array)
    last = array.shape[-1] <= _MOST_CHANNELS < array.shape[-2]
    rows, columns = (array.ndim - 3, array.ndim - 2) if last else (array.ndim - 2, array.ndim - 1)
    width = array.shape[columns]
    shift = k // 2 * max(1, width // _STEPS)
    moved = np.roll(array, (shift // width, shift % width), axis=(rows, columns))
    return np.ascontiguousarray(np.flip(moved, axis=columns) if k % 2 else moved)
