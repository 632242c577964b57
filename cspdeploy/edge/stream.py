"""Decode the next image while the engine computes the current one."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from cspdeploy.core.errors import InputError
from cspdeploy.core.preprocess import ImageSource

__all__ = ["Prepared", "prepare_ahead"]

T = TypeVar("T")

WAIT_S = 0.05
"""How often a thread that waits looks whether anybody still wants what it has: far below what a user notices."""
STOP_S = 1.0
"""How long the end of a stream waits for its thread. One that hangs in its source, a camera without a picture, is left
behind: it is a daemon, and ends with its source or the program."""


@dataclass(frozen=True, slots=True, eq=False)
class Prepared(Generic[T]):
    """A source, and what was made of it, or the reason why there is none."""

    source: ImageSource
    made: T | InputError


@dataclass(frozen=True, slots=True, eq=False)
class _End:
    """After the last source; `error` where taking the next one from the iterable failed."""

    error: BaseException | None = None


def prepare_ahead(
    sources: Iterable[ImageSource], prepare: Callable[[ImageSource], T], *, ahead: int = 1
) -> Iterator[Prepared[T]]:
    """Each source with what `prepare` makes of it, in order. One thread takes and prepares them.

    Never more than `ahead` + 2 images are in memory: waiting, being made, being used.

    Args:
        sources: is iterated in that thread; what it raises ends the stream and is raised here.
    """
    made: queue.Queue[Prepared[T] | _End] = queue.Queue(maxsize=ahead)
    stopped = threading.Event()
    worker = threading.Thread(
        target=_work, args=(sources, prepare, made, stopped), name="cspdeploy-decode", daemon=True
    )
    worker.start()
    try:
        while True:
            item = made.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item
    finally:
        stopped.set()
        worker.join(timeout=STOP_S)


def _work(
    sources: Iterable[ImageSource],
    prepare: Callable[[ImageSource], T],
    made: queue.Queue[Prepared[T] | _End],
    stopped: threading.Event,
) -> None:
    end = _End()
    try:
        for source in sources:
            if stopped.is_set() or not _put(made, Prepared(source, _prepared(prepare, source)), stopped):
                return
    except BaseException as error:  # whatever it is: the thread that reads must hear of it, not this one
        end = _End(error)
    _put(made, end, stopped)


def _prepared(prepare: Callable[[ImageSource], T], source: ImageSource) -> T | InputError:
    try:
        return prepare(source)
    except InputError as error:
        return error


def _put(made: queue.Queue[Prepared[T] | _End], item: Prepared[T] | _End, stopped: threading.Event) -> bool:
    """False where nobody takes it any more."""
    while not stopped.is_set():
        try:
            made.put(item, timeout=WAIT_S)
        except queue.Full:
            continue
        return True
    return False
