"""Seconds that a run may take, and what is left out of it rather than overrun."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cuda_result import Stage

from cspdeploy.core.errors import CspDeployError

__all__ = ["OUT_OF_TIME", "Budget", "Pace"]

OUT_OF_TIME = "not measured: out of time"


class Budget:
    """Counts from its making.

    Args:
        seconds: of the whole run.
        clock: seconds, monotonic.
    """

    def __init__(self, seconds: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._started, self.seconds = clock, clock(), seconds
        self.stages: list[Stage] = []

    @property
    def left(self) -> float:
        """Seconds until the end; negative after it."""
        return self.seconds - (self._clock() - self._started)

    def allows(self, seconds: float) -> bool:
        """Whether something that takes so long would be done in time."""
        return seconds <= self.left

    def share(self, part: float, *, most: float = float("inf")) -> float:
        """Seconds that one stage may take: a part of what is left, and `most` at most."""
        return max(0.0, min(most, part * self.left))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Note what the block takes, and what ends it: an error meant for the user ends the stage, not the run."""
        started, reason = self._clock(), ""
        try:
            yield
        except CspDeployError as error:
            reason = str(error)
        except BaseException as error:
            reason = f"{type(error).__name__}: {error}"
            raise
        finally:
            self.stages.append(
                Stage(name=name, outcome="not done" if reason else "done", seconds=round(self._clock() - started, 1),
                      reason=reason)
            )  # fmt: skip

    def skip(self, name: str, reason: str = OUT_OF_TIME) -> None:
        """Note a stage that is left out."""
        self.stages.append(Stage(name=name, outcome="not done", seconds=0.0, reason=reason))


class Pace:
    """What a row of a table has cost up to now: nothing is begun that would not be done in time.

    Args:
        seconds_a_row: a guess for the first group; the dearest group seen decides from then on.
    """

    def __init__(self, seconds_a_row: float) -> None:
        self._guess, self._seen = seconds_a_row, 0.0

    def need(self, num_rows: int) -> float:
        """Seconds that so many rows will take."""
        return num_rows * (self._seen or self._guess)

    def note(self, seconds: float, num_rows: int) -> None:
        """So many rows have taken so many seconds."""
        if num_rows:
            self._seen = max(self._seen, seconds / num_rows)
