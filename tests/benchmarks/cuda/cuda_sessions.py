"""Sessions of the benchmark, each in a process of its own; what compiles is opened ahead, side by side."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import numpy as np
import numpy.typing as npt
from cuda_budget import OUT_OF_TIME, Budget
from cuda_networks import Network
from cuda_regimes import Regime

from cspdeploy.check.worker import Worker
from cspdeploy.core.catalog import INPUT_NAME
from cspdeploy.core.env import num_usable_cpus
from cspdeploy.core.errors import CspDeployError, InputError, RuntimeUnavailableError
from cspdeploy.core.spec import ModelSpec
from cspdeploy.runtimes import require_runtime

__all__ = ["Sessions", "random_feeds"]

_CPUS_A_COMPILE = 4
"""Inductor compiles kernels in a pool of processes; more networks at once than this leaves them waiting for CPUs."""
OPEN_SECONDS = 120.0
"""For opening anything but what is compiled ahead, and for one run: minutes of silence are a hang."""

Key = tuple[str, str, int]
"""Network, regime, batch; the batch is 0 for a session that takes any."""


def random_feeds(spec: ModelSpec, batch: int) -> dict[str, npt.NDArray[np.float32]]:
    """Seeded inputs `[batch, 3, H, W]`, of mean 0 and deviation 1 as normalised pixels are."""
    shape = (batch, 3, spec.preprocess.height_px, spec.preprocess.width_px)
    return {INPUT_NAME: np.random.default_rng(0).standard_normal(shape, np.float32)}


class Sessions:
    """Workers by network, regime and batch. Each is opened once; one that failed keeps its error.

    Use as a context manager: leaving it ends all processes.
    """

    def __init__(self) -> None:
        self._workers: dict[Key, Worker] = {}
        self._errors: dict[Key, CspDeployError] = {}

    def __enter__(self) -> Sessions:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers.values():
            worker.close()

    def start(self, network: Network, regime: Regime, batch: int, *, seconds: float = OPEN_SECONDS) -> None:
        """Begin to open, if that has not begun; whatever is wrong shows in `get`."""
        key = _key(network, regime, batch)
        if key in self._workers or key in self._errors or _fixed(network, regime, batch):
            return
        try:
            require_runtime(regime.runtime)
            self._workers[key] = Worker(regime.runtime, network.request(regime), time_limit_s=max(1.0, seconds))
        except CspDeployError as error:
            self._errors[key] = error

    def get(self, network: Network, regime: Regime, batch: int) -> Worker:
        """The session, opened.

        Raises:
            CspDeployError: whatever kept it from opening.
        """
        key = _key(network, regime, batch)
        if _fixed(network, regime, batch):
            raise InputError(f"the file is exported for a batch of {network.batch}")
        if key in self._errors:
            raise self._errors[key]
        if key not in self._workers:
            raise RuntimeUnavailableError(OUT_OF_TIME)
        try:
            self._workers[key].wait_opened()
        except CspDeployError as error:
            self._errors[key] = error
            raise
        return self._workers[key]

    def compile_ahead(self, wanted: Sequence[tuple[Network, Regime, int]], *, seconds: float, budget: Budget) -> None:
        """Open what compiles and run it once, several side by side, until `seconds` have passed: then the rest is left.

        Nothing may be timed meanwhile. Inductor's cache is shared between them (TORCHINDUCTOR_CACHE_DIR).
        """
        at_end = budget.left - seconds
        room = max(1, num_usable_cpus() // _CPUS_A_COMPILE)
        pool = ThreadPoolExecutor(room)
        waiting: dict[Future[None], Key] = {}
        queue: Iterator[tuple[Network, Regime, int]] = iter(wanted)
        try:
            while budget.left > at_end:
                for network, regime, batch in itertools.islice(queue, room - len(waiting)):
                    self.start(network, regime, batch, seconds=budget.left - at_end)
                    key = _key(network, regime, batch)
                    if key in self._workers:
                        waiting[pool.submit(self._run_once, network, regime, batch)] = key
                if not waiting:
                    break
                done, _ = wait(waiting, timeout=max(0.0, budget.left - at_end), return_when=FIRST_COMPLETED)
                for future in done:
                    del waiting[future]
        finally:
            for key in waiting.values():
                self._drop(key)
            pool.shutdown(wait=True, cancel_futures=True)

    def _run_once(self, network: Network, regime: Regime, batch: int) -> None:
        key = _key(network, regime, batch)
        try:
            self.get(network, regime, batch).run(random_feeds(network.spec, batch))
        except CspDeployError as error:
            self._errors.setdefault(key, error)

    def _drop(self, key: Key) -> None:
        """It is not ready in time."""
        self._errors[key] = RuntimeUnavailableError(OUT_OF_TIME)
        self._workers[key].close()

    def close_of(self, network: Network, *, batch: int | None = None) -> None:
        """End the processes of a network; of those that hold for one batch, that batch's alone."""
        for key in [key for key in self._workers if key[0] == network.name and (batch is None or key[2] == batch)]:
            self._workers.pop(key).close()
            self._errors.setdefault(key, RuntimeUnavailableError("its process was ended"))


def _fixed(network: Network, regime: Regime, batch: int) -> bool:
    """Whether the file takes another batch than this one, and no other."""
    return regime.source != "eager" and network.batch not in (0, batch)


def _key(network: Network, regime: Regime, batch: int) -> Key:
    return network.name, regime.name, batch if regime.one_batch else 0
