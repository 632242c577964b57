"""Exports and compilations, side by side: what compiles begins as soon as a network's weights are there."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from cuda_budget import OUT_OF_TIME, Budget
from cuda_networks import ExportJob, Network, exports_at_once, name_of, start_export
from cuda_regimes import Regime
from cuda_sessions import Sessions

from cspdeploy.core.errors import CspDeployError, RuntimeUnavailableError

__all__ = ["Preparation", "with_int8"]

_LOOK_S = 0.2
"""Between two looks at whether weights are there."""


class Preparation:
    """Children that export, in the order in which they were begun, until `end`. Leaving it ends the others.

    Args:
        end: seconds left of the budget when whatever is not done is given up.
    """

    def __init__(self, folder: Path, sessions: Sessions, budget: Budget, *, size_px: int, end: float) -> None:
        self._folder, self._sessions, self._budget, self._size_px, self._end = folder, sessions, budget, size_px, end
        self._pool = ThreadPoolExecutor(exports_at_once())
        self._jobs: dict[str, ExportJob] = {}
        self._exports: dict[str, Future[Network]] = {}

    def __enter__(self) -> Preparation:
        return self

    def __exit__(self, *_: object) -> None:
        self._end = float("inf")
        for job in list(self._jobs.values()):
            job.stop()
        self._pool.shutdown(wait=True, cancel_futures=True)

    @property
    def begun(self) -> frozenset[str]:
        """Names of the exports that were begun."""
        return frozenset(self._exports)

    def export(self, name: str, given: str, *, size_px: int | None = None, int8: bool = False) -> None:
        """Begin to export what was given, to be asked for by `name`."""
        self._exports[name] = self._pool.submit(self._export, name, given, size_px or self._size_px, int8)

    def take(self, name: str) -> Network:
        """The network, once it is exported.

        Raises:
            CspDeployError: it cannot be exported, or not in time.
        """
        return self._exports[name].result()

    def compile(self, name: str, regimes: Sequence[Regime], batches: Sequence[int]) -> None:
        """Begin to compile an exported network in what regimes compile.

        Raises:
            InputError: no network, model folder or bundle.
        """
        for regime in regimes:
            for batch in batches if regime.compiled else ():
                self._sessions.compile_ahead(
                    name_of(name), lambda: self._weights(name), regime, batch, end=self._end, budget=self._budget
                )

    def _export(self, name: str, given: str, size_px: int, int8: bool) -> Network:
        place = self._folder / f"{Path(name).name}-{len(self._jobs)}"
        self._jobs[name] = start_export(given, place, size_px=size_px, int8=int8)
        return self._jobs[name].finish(self._budget.left - self._end)

    def _weights(self, name: str) -> Network:
        while self._budget.left > self._end:
            job, export = self._jobs.get(name), self._exports[name]
            if job is not None and (found := job.weights(self._size_px)) is not None:
                return found
            if export.done():  # a bundle, or one that failed
                return export.result()
            time.sleep(_LOOK_S)
        raise RuntimeUnavailableError(OUT_OF_TIME)


def with_int8(network: Network, preparation: Preparation, name: str) -> Network:
    """The network with the INT8 file of another export, or with the reason why there is none."""
    try:
        made = preparation.take(name).files["onnx-int8"]
    except (CspDeployError, KeyError) as error:
        return dataclasses.replace(network, missing={**network.missing, "onnx-int8": str(error)})
    return dataclasses.replace(network, files={**network.files, "onnx-int8": made})
