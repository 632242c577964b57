"""Where the time of a check goes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Phases"]


class Phases:
    """Seconds of wall time by phase."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._started = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time of the block to phase `name`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - started

    def seconds(self) -> dict[str, object]:
        """`seconds` in all since this began, of which `phase_seconds` by phase."""
        found = {name: round(seconds, 4) for name, seconds in self._seconds.items()}
        return {"seconds": round(time.perf_counter() - self._started, 4), "phase_seconds": found}
