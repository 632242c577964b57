"""The child process of `cspdeploy.check.worker`: one session, commands from a socket. Not for direct use."""

from __future__ import annotations

import functools
import importlib
import resource
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from cspdeploy.check.burst import run_burst
from cspdeploy.check.rotation import rotated_sets
from cspdeploy.check.worker import Opened
from cspdeploy.core.errors import EXIT_NO_ENGINE, CspDeployError, DeviceMemoryError, InputError, RuntimeUnavailableError
from cspdeploy.core.results import MemoryUse
from cspdeploy.runtimes import all_runtimes
from cspdeploy.runtimes.base import Feeds, Outputs, ProfiledNode, Runtime, Session, SessionRequest

__all__ = ["main"]

_ALIVE_EVERY_S = 0.5
_GRACE_S = 5.0
"""The parent ends this process at the time limit. If the parent is gone too, the kernel does so, this much later: the
signal's default action needs no Python, which a hung engine may not let run."""


class _Child:
    """The session and what is known of it. Methods without an underscore are commands."""

    def __init__(self, connection: Connection, time_limit_s: float) -> None:
        self._connection, self._time_limit_s = connection, time_limit_s
        self._calls: dict[str, Callable[[], None]] = {}
        self._first_run_ms: float | None = None
        self._last_alive = 0.0

    def open(self, runtime_name: str, request: SessionRequest) -> Opened:
        runtime = all_runtimes()[runtime_name]
        self._on_gpu, self._gpu_index = runtime.device == "cuda", request.cuda.device
        started = time.perf_counter()
        _import_engine(runtime)
        imported = time.perf_counter()
        self._before_bytes = _resident_bytes()
        _forget_peak()
        opening = time.perf_counter()
        self._session: Session = runtime.open(request)
        opened = time.perf_counter()
        self._opened_bytes, self._peak_bytes = _resident_bytes(), _peak_bytes()
        nodes = self._session.nodes  # after the clock and the memory were read: some engines must look into it first
        _forget_peak()
        return Opened(
            placement=dict(self._session.placement), nodes=nodes, num_copies=getattr(self._session, "num_copies", None),
            cold_import_ms=1e3 * (imported - started), cold_open_ms=1e3 * (opened - opening),
            settings=dict(getattr(self._session, "settings", {})),
        )  # fmt: skip

    def run(self, feeds: Feeds) -> Outputs:
        started = time.perf_counter()
        outputs = self._session.run(feeds)
        self._note_first_run(started)
        return outputs

    def bind(self, name: str, feeds: Feeds, copies: bool, rotate: bool) -> str:
        def compute_with_copies() -> None:
            self._session.run(feeds)

        bind_sets = getattr(self._session, "bind_sets", None)
        if rotate and self._on_gpu and bind_sets is not None:
            rotated = rotated_sets(feeds, l2_bytes=_l2_bytes(self._gpu_index))
            call = self._calls[name] = bind_sets(rotated.sets)
            # A captured run reads one place, which was just written: its input is in the cache, whatever the turn.
            copied = getattr(call, "copies_in", False)
            return f"{rotated.words}, copied in before each run" if copied else rotated.words
        self._calls[name] = compute_with_copies if copies else self._session.bind(feeds)
        return ""

    def burst(
        self, name: str, min_runs: int, min_seconds: float, max_runs: int, lead_in_seconds: float
    ) -> tuple[list[float], list[float]]:
        call, device_ms = self._calls[name], list[float]()
        if self._first_run_ms is None:
            started = time.perf_counter()
            call()
            self._note_first_run(started)
        samples = run_burst(
            call, clock=time.perf_counter, min_runs=min_runs, min_seconds=min_seconds, max_runs=max_runs,
            lead_in_seconds=lead_in_seconds, between=self._say_alive, device_ms=device_ms,
        )  # fmt: skip
        return samples, device_ms

    def first_run_ms(self) -> float | None:
        return self._first_run_ms

    def memory(self) -> MemoryUse:
        peak = max(self._peak_bytes, _peak_bytes())
        return MemoryUse(
            opened_bytes=max(0, self._opened_bytes - self._before_bytes), peak_bytes=max(0, peak - self._before_bytes)
        )

    def profile(self) -> tuple[ProfiledNode, ...]:
        end = getattr(self._session, "end_profile", None)
        if end is None:
            raise InputError("this runtime has no profile of its nodes", fix="--runtime ort-cpu")
        nodes: tuple[ProfiledNode, ...] = end()
        return nodes

    def kernels(self, name: str, num_runs: int) -> tuple[tuple[ProfiledNode, ...], float]:
        from cspdeploy.runtimes.kernels import profile_kernels

        found = profile_kernels(self._calls[name], num_runs)
        return found.nodes, found.busy_ms

    def answer(self, work: Callable[[], object]) -> None:
        """Do the work and send what came of it. The time limit runs until then."""
        self._limit()
        message: tuple[Any, ...]
        try:
            message = ("done", work())
        except CspDeployError as error:
            kind = "unavailable" if error.exit_code == EXIT_NO_ENGINE else "input"
            kind = "memory" if isinstance(error, DeviceMemoryError) else kind
            message = (kind, error.message, error.fix)
        except Exception as error:  # an engine may raise anything; the parent makes a row of it
            message = ("failed", " ".join((str(error).strip() or type(error).__name__).split("\n")[0].split())[:300])
        signal.setitimer(signal.ITIMER_REAL, 0)
        self._connection.send(message)

    def _note_first_run(self, started: float) -> None:
        if self._first_run_ms is None:
            self._first_run_ms = 1e3 * (time.perf_counter() - started)

    def _say_alive(self) -> None:
        """The limit is for each run, not for a burst of them."""
        now = time.monotonic()
        if now - self._last_alive > _ALIVE_EVERY_S:
            self._last_alive = now
            self._limit()
            self._connection.send(("alive",))

    def _limit(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, self._time_limit_s + _GRACE_S)


def _import_engine(runtime: Runtime) -> None:
    for module in runtime.modules:
        try:
            importlib.import_module(module)
        except (ImportError, OSError) as error:
            reason = str(error).split("\n")[0][:200]
            raise RuntimeUnavailableError(f"{module} cannot be imported ({reason})", fix="cspdeploy doctor") from error


def _l2_bytes(device: int) -> int:
    """Of that GPU's cache; 0 where its driver does not tell."""
    from cspdeploy.runtimes.cuda_driver import CudaDevice

    try:
        return int(CudaDevice(device).l2_bytes)
    except CspDeployError:
        return 0


def _status_bytes(key: str) -> int:
    """A line of /proc/self/status, where there is one, else the peak as the system counts it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
    except (OSError, StopIteration):
        scale = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
        return scale * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _resident_bytes() -> int:
    return _status_bytes("VmRSS")


def _peak_bytes() -> int:
    return _status_bytes("VmHWM")


def _forget_peak() -> None:
    """So that the peak is of what comes now, not of the imports (Linux; elsewhere it stays, and is only too high)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def main(arguments: list[str]) -> int:
    """Answer commands until the parent hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: the parent says so, this process just ends
    connection = Connection(int(arguments[0]))
    child = _Child(connection, float(arguments[1]))
    try:
        runtime_name, request = connection.recv()
        child.answer(functools.partial(child.open, runtime_name, request))
        while True:
            command, given = connection.recv()
            child.answer(functools.partial(getattr(child, command), *given))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
