"""A session to check: in a process of its own, or in this one, behind one set of methods."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Protocol

from cspdeploy.check.burst import Burst, run_burst
from cspdeploy.check.settings import VerifySettings
from cspdeploy.check.time_limits import time_limit_of
from cspdeploy.check.worker import BoundCall, EngineError, Worker
from cspdeploy.core.errors import CspDeployError
from cspdeploy.core.results import ColdStart, MemoryUse
from cspdeploy.core.types import PlacedNode
from cspdeploy.runtimes.base import Feeds, Outputs, Runtime, Session, SessionRequest

__all__ = ["CheckedSession", "start_session"]


class CheckedSession(Protocol):
    """A session, which may still be opening until `wait` returns. Any engine's exception may come from any method."""

    placement: Mapping[str, int]
    nodes: tuple[PlacedNode, ...]
    num_copies: int | None
    settings: Mapping[str, str]

    def wait(self) -> None:
        """Until it is open; `placement`, `nodes`, `num_copies` and `settings` are known then."""
        ...

    def run(self, feeds: Feeds) -> Outputs:
        """Compute once."""
        ...

    def bind(self, feeds: Feeds) -> Burst:
        """Fix the inputs; gives what `measure_latency` takes. Timing raises `CspDeployError` alone."""
        ...

    def first_result(self, feeds: Feeds) -> tuple[Outputs, ColdStart | None, MemoryUse | None]:
        """Compute for the first time; and what it cost since the process began, where that is known."""
        ...

    def close(self) -> None:
        """Let go of all that it holds; it may be closed twice."""
        ...


def start_session(runtime: Runtime, request: SessionRequest, settings: VerifySettings) -> CheckedSession:
    """Begin to open a session; returns at once."""
    if settings.isolate:
        return _Isolated(
            Worker(runtime.name, request, time_limit_s=time_limit_of(runtime, request, settings.time_limit_s))
        )
    return _Local(runtime, request)


class _Isolated:
    """In a process of its own."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.placement: Mapping[str, int] = {}
        self.nodes: tuple[PlacedNode, ...] = ()
        self.num_copies: int | None = None
        self.settings: Mapping[str, str] = {}

    def wait(self) -> None:
        opened = self._worker.wait_opened()
        self.placement, self.nodes, self.num_copies = opened.placement, opened.nodes, opened.num_copies
        self.settings = opened.settings

    def run(self, feeds: Feeds) -> Outputs:
        return self._worker.run(feeds)

    def bind(self, feeds: Feeds) -> BoundCall:
        return self._worker.bind(feeds, rotate=True)

    def first_result(self, feeds: Feeds) -> tuple[Outputs, ColdStart | None, MemoryUse | None]:
        outputs = self._worker.run(feeds)
        return outputs, self._worker.cold, self._worker.memory()

    def close(self) -> None:
        self._worker.close()


class _LocalCall:
    """A call in this process that can be timed; an engine's error becomes one that its row can tell."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call

    def burst(self, *, min_runs: int, min_seconds: float, max_runs: int, lead_in_seconds: float) -> list[float]:
        try:
            return run_burst(
                self._call, clock=time.perf_counter, min_runs=min_runs, min_seconds=min_seconds, max_runs=max_runs,
                lead_in_seconds=lead_in_seconds,
            )  # fmt: skip
        except CspDeployError:
            raise
        except Exception as error:  # whatever an engine raises after hundreds of good runs
            raise EngineError(str(error) or type(error).__name__) from error


class _Local:
    """In this process, which has imported other engines before: of cold start and memory nothing can be said."""

    def __init__(self, runtime: Runtime, request: SessionRequest) -> None:
        self._runtime, self._request = runtime, request
        self._session: Session | None = None
        self.placement: Mapping[str, int] = {}
        self.nodes: tuple[PlacedNode, ...] = ()
        self.num_copies: int | None = None
        self.settings: Mapping[str, str] = {}

    def wait(self) -> None:
        self._session = self._runtime.open(self._request)
        self.placement, self.nodes = self._session.placement, self._session.nodes
        self.num_copies = getattr(self._session, "num_copies", None)
        self.settings = dict(getattr(self._session, "settings", {}))

    def _opened(self) -> Session:
        if self._session is None:
            raise RuntimeError("the session is not open")
        return self._session

    def run(self, feeds: Feeds) -> Outputs:
        return self._opened().run(feeds)

    def bind(self, feeds: Feeds) -> Burst:
        call = self._opened().bind(feeds)
        call()  # what cannot run fails here, in its own row
        return _LocalCall(call)

    def first_result(self, feeds: Feeds) -> tuple[Outputs, ColdStart | None, MemoryUse | None]:
        return self.run(feeds), None, None

    def close(self) -> None:
        self._session = None
