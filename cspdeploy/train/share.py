"""What one of several workers takes of a batch and of a set."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Share"]


@dataclass(frozen=True, slots=True)
class Share:
    """Of worker `rank` among `num`; all of it where there is one worker.

    Attributes:
        rank: from 0 on.
        num: how many workers there are.
    """

    rank: int = 0
    num: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.num:
            raise ValueError(f"rank {self.rank} of {self.num} workers, expected 0 <= rank < num")

    def of(self, num_items: int) -> slice:
        """Its part of a batch: as large as everybody's, so that the mean over workers is that over the batch.

        Raises:
            ValueError: the workers do not divide the batch.
        """
        each, rest = divmod(num_items, self.num)
        if rest:
            raise ValueError(f"{num_items} images over {self.num} workers, expected a multiple")
        return slice(self.rank * each, (self.rank + 1) * each)

    def takes(self, index: int) -> bool:
        """Whether whole batch `index` is its own: batches stay as one worker has them, and so do their results."""
        return index % self.num == self.rank
