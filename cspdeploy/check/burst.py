"""A burst: runs in a row, the first ones untimed. The same code times a call in this process and in a child."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Protocol

__all__ = ["Burst", "run_burst"]


class Burst(Protocol):
    """Something that can be timed, wherever it computes."""

    def burst(self, *, min_runs: int, min_seconds: float, max_runs: int, lead_in_seconds: float) -> list[float]:
        """Milliseconds of each timed run; see `run_burst`."""
        ...


def run_burst(
    call: Callable[[], None],
    *,
    clock: Callable[[], float],
    min_runs: int,
    min_seconds: float,
    max_runs: int,
    lead_in_seconds: float,
    between: Callable[[], None] = lambda: None,
    device_ms: list[float] | None = None,
) -> list[float]:
    """Milliseconds of each timed run: at least `min_runs` and `min_seconds` of them, `max_runs` at most.

    Untimed runs go first, one at least, for `lead_in_seconds`: what ran before left the caches full of its own data,
    and threads that spin for some milliseconds more.

    Args:
        call: computes once and returns when its device is done; one with an attribute `prepare` has that called before
            each run, outside of what is timed.
        clock: seconds, monotonic.
        between: called after each run, outside of what is timed.
        device_ms: takes the milliseconds of each timed run between events on its stream, from a
            `cspdeploy.runtimes.base.DeviceCall`; nothing from any other call.
    """
    prepare: Callable[[], None] | None = getattr(call, "prepare", None)
    collecting = gc.isenabled()
    gc.disable()  # a collection in a timed run is Python's time, not the engine's
    try:
        started = clock()
        while True:
            if prepare is not None:
                prepare()
            call()
            between()
            if clock() - started >= lead_in_seconds:
                break
        samples_ms: list[float] = []
        elapsed = 0.0
        while len(samples_ms) < min_runs or (elapsed < min_seconds and len(samples_ms) < max_runs):
            if prepare is not None:
                prepare()
            started = clock()
            call()
            seconds = clock() - started
            _note_device(call, device_ms)
            between()
            elapsed += seconds
            samples_ms.append(1e3 * seconds)
        return samples_ms
    finally:
        if collecting:
            gc.enable()


def _note_device(call: Callable[[], None], device_ms: list[float] | None) -> None:
    found: float | None = getattr(call, "device_ms", None)
    if device_ms is not None and found is not None:
        device_ms.append(found)
