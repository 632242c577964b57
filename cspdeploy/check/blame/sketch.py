"""Small linear sketches of large tensors, so that any two can be compared without both being in memory.

Each value, with a sign of its own drawn once and for all, is added to one of `NUM_BUCKETS` sums. The sketch of a
difference is the difference of the sketches, and its norm estimates the norm of the difference without bias (the
count sketch of Charikar, Chen and Farach-Colton, 2002). With 509 buckets the standard error of the estimate is
1 / sqrt(2 * 509) = 3 % of the truth; a difference in a single value comes out exactly.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["NUM_BUCKETS", "Record", "Recorder", "distance"]

Array = npt.NDArray[Any]

NUM_BUCKETS = 509
"""A prime, so that no channel or row count falls into step with it."""
_BLOCK = NUM_BUCKETS << 11
"""Values at a time: a million, whose signs and products take some tens of megabytes."""


@dataclass(slots=True, kw_only=True)
class Record:
    """What is kept of a tensor, over all calls.

    Attributes:
        size: values in all calls together; a constant counts once.
        shape: of one call.
        square: sum of squares of the finite values.
        low, high: the least and the greatest finite value.
        num_bad: NaN and infinite values.
        sketch: `[NUM_BUCKETS]`, of the finite values.
    """

    name: str
    constant: bool
    shape: tuple[int, ...]
    size: int = 0
    square: float = 0.0
    low: float = float("inf")
    high: float = float("-inf")
    num_bad: int = 0
    sketch: Array = field(default_factory=lambda: np.zeros(NUM_BUCKETS))

    @property
    def norm(self) -> float:
        """Square root of the sum of squares."""
        return float(np.sqrt(self.square))

    @property
    def absmax(self) -> float:
        """The largest finite magnitude; 0 where there is none."""
        return max(0.0, self.high, -self.low)

    def add(self, values: Array) -> None:
        """The tensor of the next call."""
        flat = np.ascontiguousarray(values).reshape(-1)
        for start in range(0, flat.size, _BLOCK):
            part = flat[start : start + _BLOCK].astype(np.float64)
            finite = np.isfinite(part)
            if not finite.all():
                self.num_bad += int(part.size - np.count_nonzero(finite))
                part[~finite] = 0.0
            self.low, self.high = min(self.low, float(part.min())), max(self.high, float(part.max()))
            self.square += float(part @ part)
            _add(self.sketch, part, self.size)
            self.size += part.size


class Recorder:
    """A sink that keeps a `Record` of each tensor, in the order in which they first came."""

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}

    def __call__(self, name: str, values: Array, constant: bool) -> None:
        """Add the tensor of one call."""
        record = self.records.get(name)
        if record is None:
            record = self.records[name] = Record(name=name, constant=constant, shape=tuple(values.shape))
        record.add(values)


def distance(actual: Record, reference: Record) -> float:
    """Estimate of ||actual - reference|| / ||reference||.

    Infinite where the sizes differ, `actual` is not finite throughout, or the reference is all zero and it is not.
    """
    if actual.size != reference.size or actual.num_bad or reference.num_bad:
        return float("inf")
    gap = float(np.linalg.norm(actual.sketch - reference.sketch))
    if reference.square == 0:
        return 0.0 if actual.square == 0 else float("inf")
    return gap / reference.norm


def _add(sketch: Array, values: Array, offset: int) -> None:
    """Add values whose first one is number `offset` of the tensor."""
    at = 0
    while at < values.size:
        block, start = divmod(offset + at, _BLOCK)
        count = min(values.size - at, _BLOCK - start)
        signed = values[at : at + count] * _signs(block)[start : start + count]
        lead = start % NUM_BUCKETS
        padded = np.zeros(-(-(lead + count) // NUM_BUCKETS) * NUM_BUCKETS)
        padded[lead : lead + count] = signed
        sketch += padded.reshape(-1, NUM_BUCKETS).sum(axis=0)
        at += count


@functools.lru_cache(maxsize=64)
def _signs(block: int) -> Array:
    """+1 and -1 for the values of one block, a byte each."""
    return np.random.default_rng((0, block)).integers(0, 2, _BLOCK, dtype=np.int8) * np.int8(2) - np.int8(1)
