"""Inputs that lie ready in a worker, to be timed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from cspdeploy.runtimes.base import ProfiledNode

__all__ = ["BoundCall"]


class _Asked(Protocol):
    def ask(self, command: str, *arguments: Any, doing: str) -> Any: ...


class BoundCall:
    """A binding of a `cspdeploy.check.worker.Worker`. Bursts of several may alternate.

    Attributes:
        inputs: how they are rotated, such as "rotated: 134 sets, 105 MB"; empty where one input is used all the time.
        device_rounds_ms: milliseconds of each timed run between events on its stream, burst after burst since
            `forget_rounds`; empty where the engine has no such clock. `measure_rounds` forgets those of the warm-up.
    """

    def __init__(self, worker: _Asked, name: str, *, inputs: str = "") -> None:
        self._worker, self._name, self.inputs = worker, name, inputs
        self.device_rounds_ms: list[tuple[float, ...]] = []

    def burst(self, *, min_runs: int, min_seconds: float, max_runs: int, lead_in_seconds: float) -> list[float]:
        """Milliseconds of each timed run on the host's clock; see `cspdeploy.check.burst.run_burst`.

        The time limit is for each run.
        """
        samples, device = self._worker.ask(
            "burst", self._name, min_runs, min_seconds, max_runs, lead_in_seconds, doing="running"
        )
        if device:
            self.device_rounds_ms.append(tuple(device))
        return list(samples)

    def forget_rounds(self) -> None:
        """Begin `device_rounds_ms` anew."""
        self.device_rounds_ms = []

    def kernels(self, num_runs: int) -> tuple[Sequence[ProfiledNode], float]:
        """Kernels of the device by name, and the milliseconds of one run in which one of them at least ran.

        Raises:
            InputError: kernels cannot be recorded here.
            CspDeployError: as `Worker.run`.
        """
        nodes, busy_ms = self._worker.ask("kernels", self._name, num_runs, doing="profiling")
        return nodes, busy_ms
