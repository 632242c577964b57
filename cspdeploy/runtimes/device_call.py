"""A bound run on a device that has a clock of its own: see `cspdeploy.runtimes.base.DeviceCall`. Knows no engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from cspdeploy.core.errors import DeviceMemoryError, InputError
from cspdeploy.runtimes.base import Feeds

__all__ = ["Clock", "CudaCall", "batch_of", "kind_of", "require_alike"]

Array = npt.NDArray[np.generic]


class Clock(Protocol):
    """Two events on the stream on which the work is."""

    def begin(self) -> None:
        """Queue the first."""
        ...

    def end(self) -> None:
        """Queue the last."""
        ...

    def ms(self) -> float:
        """Wait for the last; milliseconds between both."""
        ...


class CudaCall:
    """A `DeviceCall`: launches in turn, each between two events on the stream.

    Args:
        launches: one for each set of inputs, or the one of a captured graph.
        fail: raises what an engine's error means, as one of ours.
        fill: queues the copies that a run needs, given its number from 0 on, on the timer's stream.
        read: one for each launch: its outputs on the host, in the engine's order.
        clocked: False where the engine waits for the device before the last event is queued, which then tells of the
            host's waking up; `device_ms` stays None.
    """

    def __init__(
        self,
        launches: Sequence[Callable[[], None]],
        *,
        timer: Clock,
        fail: Callable[[Exception], NoReturn],
        fill: Callable[[int], None] | None = None,
        read: Sequence[Callable[[], list[Array]]] = (),
        clocked: bool = True,
    ) -> None:
        self._launches, self._timer, self._fill, self._fail = launches, timer, fill, fail
        self._read, self._clocked = read, clocked
        self._turn, self._filled = 0, -1
        self._dropped: DeviceMemoryError | None = None
        self.device_ms: float | None = None
        self.copies_in = fill is not None

    def prepare(self) -> None:
        """Bring the next run's inputs to their place and wait until they are there. Once a run: again is for free."""
        self._require_alive()
        if self._fill is None or self._filled == self._turn:
            return
        try:
            self._fill(self._turn)
            self._timer.begin()
            self._timer.end()
            self._timer.ms()  # waits for all that is queued before it
        except Exception as error:  # engines' exceptions share no base class but this one
            self._fail(error)
        self._filled = self._turn

    def __call__(self) -> None:
        """Compute once, and return when the device is done."""
        self.prepare()
        try:
            self._timer.begin()
            self._launches[self._turn % len(self._launches)]()
            self._timer.end()
            between_ms = self._timer.ms()
        except Exception as error:  # as above
            self._fail(error)
        self.device_ms = between_ms if self._clocked else None
        self._turn += 1

    def outputs(self) -> list[Array]:
        """Of the last run, on the host, in the engine's order.

        Raises:
            DeviceMemoryError: the session was closed.
            InputError: nothing was run yet, or the engine gives its outputs back to its allocator after each run.
        """
        self._require_alive()
        if not self._turn or not self._read:
            raise InputError("no outputs: nothing was run yet" if self._read else "no outputs: none are kept")
        return self._read[(self._turn - 1) % len(self._read)]()

    def drop(self, error: DeviceMemoryError) -> None:
        """Let go of all that is held on the device; what is called after that says so."""
        self._launches, self._read, self._fill, self._dropped = (), (), None, error

    def _require_alive(self) -> None:
        if self._dropped is not None:
            raise DeviceMemoryError(f"{self._dropped.message}; the session was closed", fix=self._dropped.fix)


def require_alike(sets: Sequence[Feeds]) -> None:
    """Refuse sets that one captured graph cannot take in turn.

    Raises:
        InputError: they differ in names, shapes or types.
    """
    if len({kind_of(feeds) for feeds in sets}) > 1:
        raise InputError(
            "input sets differ in shape or type, expected all alike: a CUDA graph has one place for each input",
            fix="bind them one by one",
        )


def kind_of(feeds: Feeds) -> tuple[object, ...]:
    """Names, shapes and types: what one captured graph is of."""
    return tuple((name, array.shape, array.dtype.str) for name, array in feeds.items())


def batch_of(feeds: Feeds) -> int | None:
    """The first dimension of the first input; None where there is none."""
    first = next(iter(feeds.values()), None)
    return first.shape[0] if first is not None and first.ndim else None
