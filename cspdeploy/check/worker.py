"""One session in a fresh process of its own: a crash or a hang stays there, and start-up and memory are its own.

The child is `cspdeploy.check.worker_child`. Both sides trust each other: they are the same program.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
import weakref
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from types import TracebackType
from typing import IO, Any, NoReturn, Self

from cspdeploy.check.bound_call import BoundCall
from cspdeploy.core.child import child_command, child_environment
from cspdeploy.core.errors import (
    EXIT_CHECK_FAILED,
    CspDeployError,
    DeviceMemoryError,
    InputError,
    RuntimeUnavailableError,
)
from cspdeploy.core.results import ColdStart, MemoryUse
from cspdeploy.core.types import PlacedNode
from cspdeploy.runtimes.base import Feeds, Outputs, ProfiledNode, SessionRequest

__all__ = ["BoundCall", "EngineError", "Opened", "Worker", "WorkerCrashedError", "WorkerHungError"]

CHILD = tuple(child_command("cspdeploy.check.worker_child"))
_REFUSALS: dict[str, type[CspDeployError]] = {
    "input": InputError, "memory": DeviceMemoryError, "unavailable": RuntimeUnavailableError,
}  # fmt: skip
_LAST_WORDS_BYTES = 4096
_REAPING_S = 10.0
"""Until the kernel has torn down a killed process with much memory; a second is usual, an engine's dump takes more."""


class EngineError(CspDeployError):
    """The engine raised something of its own. Its process lives on."""

    exit_code = EXIT_CHECK_FAILED


class WorkerCrashedError(CspDeployError):
    """The process of the engine died. `signal_name` is "SIGSEGV" or the like, or "exit code 3"."""

    exit_code = EXIT_CHECK_FAILED

    def __init__(self, signal_name: str, *, doing: str, last_words: str = "") -> None:
        told = f": {last_words}" if last_words else ""
        why = ", most often for lack of memory" if signal_name == "SIGKILL" else ""
        super().__init__(f"the engine's process died while {doing} ({signal_name}{why}){told}")
        self.signal_name = signal_name


class WorkerHungError(CspDeployError):
    """The process of the engine did not answer in `seconds` and was killed."""

    exit_code = EXIT_CHECK_FAILED

    def __init__(self, seconds: float, *, doing: str) -> None:
        super().__init__(f"the engine did not answer within {seconds:g} s while {doing}; its process was killed")
        self.seconds = seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """What opening a session told. Both times are of a fresh process whose files may be in the system's cache.

    Attributes:
        num_copies: between devices in one run; None where the engine does not tell.
        settings: what the engine says that the session was opened with; empty where it does not tell.
    """

    placement: dict[str, int]
    nodes: tuple[PlacedNode, ...]
    num_copies: int | None
    cold_import_ms: float
    cold_open_ms: float
    settings: dict[str, str] = field(default_factory=dict)


class Worker:
    """A session in a child process. The child starts at once; every method but the constructor waits for it.

    After a crash or a hang the child is gone, and every later call raises the same error; likewise after a session
    that could not be opened. An error in a run leaves the session as it is. Several workers may open side by side, but
    then their cold starts are those of a busy machine.

    Args:
        runtime_name: of `cspdeploy.runtimes`.
        time_limit_s: seconds for opening, and for each run.
    """

    def __init__(self, runtime_name: str, request: SessionRequest, *, time_limit_s: float) -> None:
        self._time_limit_s = time_limit_s
        self._failure: CspDeployError | None = None
        self._opened: Opened | None = None
        self._file = request.path.name
        self._noise = tempfile.TemporaryFile()  # noqa: SIM115  # engines write to stdout and stderr at any time
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [*CHILD, str(theirs.fileno()), str(time_limit_s)], pass_fds=(theirs.fileno(),), env=child_environment(),
                stdin=subprocess.DEVNULL, stdout=self._noise, stderr=self._noise,
            )  # fmt: skip
        self._connection = Connection(ours.detach())
        self._finalizer = weakref.finalize(self, _end, self._process, self._connection, self._noise)
        self._deadline = time.monotonic() + time_limit_s
        self._send((runtime_name, request), doing="starting")

    def wait_opened(self) -> Opened:
        """Wait for the session.

        Raises:
            InputError: the engine cannot read the artifact.
            RuntimeUnavailableError: the engine or its device is not here, or did not take the work.
            EngineError: anything else that the engine raised.
            WorkerCrashedError, WorkerHungError: its process died, or did not answer in time.
        """
        if self._opened is None:
            try:
                self._opened = self._receive(doing=f"opening {self._file}")
            except CspDeployError as error:
                self._fail(error)
        return self._opened

    def run(self, feeds: Feeds) -> Outputs:
        """Compute once: host arrays in, host arrays out. Raises as `wait_opened`."""
        outputs: Outputs = self.ask("run", dict(feeds), doing="running")
        return outputs

    def bind(self, feeds: Feeds, *, name: str = "", copies: bool = False, rotate: bool = False) -> BoundCall:
        """Put inputs in place, to be timed by `burst`. Bindings of other names stay. Raises as `wait_opened`.

        Args:
            copies: bring the inputs to the device and the outputs back in every run.
            rotate: on a GPU, take turns with other inputs made of these, so many that its cache holds none of them
                when its turn comes; see `cspdeploy.check.rotation`. Elsewhere nothing changes.

        Raises:
            ValueError: both.
        """
        if copies and rotate:
            raise ValueError("copies and rotate: inputs that are brought anew in every run are not rotated")
        inputs = self.ask("bind", name, dict(feeds), copies, rotate, doing="running")
        return BoundCall(self, name, inputs=inputs)

    def burst(self, *, min_runs: int, min_seconds: float, max_runs: int, lead_in_seconds: float) -> list[float]:
        """Time the inputs that were bound without a name. Raises as `wait_opened`."""
        return BoundCall(self, "").burst(
            min_runs=min_runs, min_seconds=min_seconds, max_runs=max_runs, lead_in_seconds=lead_in_seconds
        )

    @property
    def cold(self) -> ColdStart | None:
        """From nothing to the first result; None before the first run. Python's own start is not in it."""
        opened = self.wait_opened()
        first_run_ms = self.first_run_ms
        if first_run_ms is None:
            return None
        return ColdStart(import_ms=opened.cold_import_ms, open_ms=opened.cold_open_ms, first_run_ms=first_run_ms)

    @property
    def first_run_ms(self) -> float | None:
        """Of the first run in this process, or None before it."""
        milliseconds: float | None = self.ask("first_run_ms", doing="answering")
        return milliseconds

    def memory(self) -> MemoryUse:
        """What the session has added to its process up to now."""
        use: MemoryUse = self.ask("memory", doing="answering")
        return use

    def profile(self) -> tuple[ProfiledNode, ...]:
        """Time of each node since the session was opened with `SessionRequest.profile`; ends the profiling.

        Raises:
            InputError: this runtime has no profile.
        """
        nodes: tuple[ProfiledNode, ...] = self.ask("profile", doing="profiling")
        return nodes

    def close(self) -> None:
        """End the child. May be called twice."""
        self._failure = self._failure or EngineError("the worker has been closed")
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ask(self, command: str, *arguments: Any, doing: str) -> Any:
        """Send one command of `worker_child` and wait for its answer. Raises as `wait_opened`."""
        self.wait_opened()
        if self._failure is not None:
            raise self._failure
        self._deadline = time.monotonic() + self._time_limit_s
        self._send((command, arguments), doing=doing)
        return self._receive(doing=doing)

    def _send(self, message: object, *, doing: str) -> None:
        try:
            self._connection.send(message)
        except OSError:
            self._fail(self._crash(doing))

    def _receive(self, *, doing: str) -> Any:
        if self._failure is not None:
            raise self._failure
        while True:
            try:
                if not self._connection.poll(max(0.0, self._deadline - time.monotonic())):
                    self._fail(WorkerHungError(self._time_limit_s, doing=doing))
                kind, *content = self._connection.recv()
            except (EOFError, OSError):
                self._fail(self._crash(doing))
            if kind == "alive":
                self._deadline = time.monotonic() + self._time_limit_s
            elif kind == "done":
                return content[0]
            elif kind == "failed":
                raise EngineError(content[0])
            else:
                refused = _REFUSALS[kind](content[0], fix=content[1])
                if kind == "memory":
                    self._fail(refused)  # what it had allocated goes with its process
                raise refused

    def _crash(self, doing: str) -> WorkerCrashedError:
        try:
            code = self._process.wait(_REAPING_S)
        except subprocess.TimeoutExpired:
            code = 0
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return WorkerCrashedError(name, doing=doing, last_words=self._last_words())

    def _last_words(self) -> str:
        size = self._noise.seek(0, os.SEEK_END)
        self._noise.seek(max(0, size - _LAST_WORDS_BYTES))
        lines = self._noise.read().decode(errors="replace").split("\n")
        return next((" ".join(line.split())[:200] for line in reversed(lines) if line.strip()), "")

    def _fail(self, error: CspDeployError) -> NoReturn:
        """For good: the child ends, and every later call raises this."""
        self._failure = error
        self._finalizer()
        raise error


def _end(process: subprocess.Popen[bytes], connection: Connection, noise: IO[bytes]) -> None:
    connection.close()
    noise.close()
    process.kill()  # nothing of it is kept, and an engine may take its time or hang when it tears down
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_REAPING_S)
