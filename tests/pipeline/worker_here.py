"""What `pair_latency.Worker` does, in this process: real sessions of real engines, without a process for each."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import ClassVar

from cspdeploy.check.burst import run_burst
from cspdeploy.check.worker import EngineError, Opened
from cspdeploy.core.errors import CspDeployError
from cspdeploy.runtimes import all_runtimes
from cspdeploy.runtimes.base import Feeds, Session, SessionRequest

__all__ = ["WorkerHere"]


class CallHere:
    """A bound call of it. `inputs` and `device_rounds_ms` as a CPU has them."""

    inputs = ""

    def __init__(self, call: Callable[[], None], clock: Callable[[], float]) -> None:
        self._call, self._clock = call, clock
        self.device_rounds_ms: list[tuple[float, ...]] = []

    def forget_rounds(self) -> None:
        self.device_rounds_ms = []

    def burst(self, *, min_runs: int, min_seconds: float, max_runs: int, lead_in_seconds: float) -> list[float]:
        return run_burst(
            self._call, clock=self._clock, min_runs=min_runs, min_seconds=min_seconds, max_runs=max_runs,
            lead_in_seconds=lead_in_seconds,
        )  # fmt: skip


class WorkerHere:
    """Sessions of this process. `opened` counts those that are open at a time, `asked` holds every request."""

    clock: ClassVar[Callable[[], float]] = time.perf_counter
    open_now: ClassVar[list[WorkerHere]] = []
    most_open: ClassVar[int] = 0
    asked: ClassVar[list[tuple[str, SessionRequest]]] = []

    def __init__(self, runtime: str, request: SessionRequest, *, time_limit_s: float) -> None:
        self._runtime, self._request = all_runtimes()[runtime], request
        self._session: Session | None = None
        type(self).asked.append((runtime, request))

    def __enter__(self) -> WorkerHere:
        self.open_now.append(self)
        type(self).most_open = max(self.most_open, len(self.open_now))
        return self

    def __exit__(self, *_: object) -> None:
        self.open_now.remove(self)
        self._session = None

    def wait_opened(self) -> Opened:
        try:
            self._session = self._runtime.open(self._request)
        except CspDeployError:
            raise
        except Exception as error:  # an engine's own, told as by a worker
            raise EngineError(str(error).split("\n")[0]) from error
        settings = dict(getattr(self._session, "settings", {}))
        return Opened(placement={}, nodes=(), num_copies=None, cold_import_ms=0.0, cold_open_ms=0.0, settings=settings)

    def bind(self, feeds: Feeds, *, rotate: bool = False) -> CallHere:
        assert self._session is not None
        return CallHere(self._session.bind(feeds), type(self).clock)
