"""Sessions of the benchmark, each in a process of its own; what compiles is opened ahead, side by side."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

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
        self._ahead: dict[Key, Future[None]] = {}
        self._pool = ThreadPoolExecutor(max(1, num_usable_cpus() // _CPUS_A_COMPILE))

    def __enter__(self) -> Sessions:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait_compiled(0.0)
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

    def compile_ahead(
        self, name: str, load: Callable[[], Network], regime: Regime, batch: int, *, end: float, budget: Budget
    ) -> None:
        """Begin to open what compiles, and to run it once, in a thread of its own: several side by side.

        Nothing may be timed until `wait_compiled` has returned. Inductor's cache is shared between them
        (TORCHINDUCTOR_CACHE_DIR).

        Args:
            load: waits for the network's weights.
            end: what is left of the budget when it is given up.
        """
        key = (name, regime.name, batch)
        self._ahead[key] = self._pool.submit(self._compile, key, load, regime, end, budget)

    def wait_compiled(self, seconds: float) -> None:
        """Until all is compiled, or `seconds` have passed: the rest is left, and what had begun is ended."""
        _, late = wait(self._ahead.values(), timeout=max(0.0, seconds))
        dropped = [key for key, future in self._ahead.items() if future in late]
        for key in dropped:
            self._drop(key)
        self._pool.shutdown(wait=True, cancel_futures=True)
        for key in dropped:  # whose thread was just about to begin
            self._drop(key)

    def _compile(self, key: Key, load: Callable[[], Network], regime: Regime, end: float, budget: Budget) -> None:
        try:
            if budget.left <= end:
                raise RuntimeUnavailableError(OUT_OF_TIME)
            network = load()
            self.start(network, regime, key[2], seconds=budget.left - end)
            self.get(network, regime, key[2]).run(random_feeds(network.spec, key[2]))
        except CspDeployError as error:
            self._errors.setdefault(key, error)

    def _drop(self, key: Key) -> None:
        """It is not ready in time."""
        self._errors[key] = RuntimeUnavailableError(OUT_OF_TIME)
        if key in self._workers:
            self._workers[key].close()

    def release(self, network: Network) -> None:
        """End all processes of a network but those that took a compilation to open; they can be opened again."""
        for key in [key for key in list(self._workers) if key[0] == network.name and key not in self._ahead]:
            self._workers.pop(key).close()

    def close_of(self, network: Network, *, batch: int | None = None) -> None:
        """End the processes of a network; of those that hold for one batch, that batch's alone."""
        for key in [
            key for key in list(self._workers) if key[0] == network.name and (batch is None or key[2] == batch)
        ]:
            self._workers.pop(key).close()
            self._errors.setdefault(key, RuntimeUnavailableError("its process was ended"))


def _fixed(network: Network, regime: Regime, batch: int) -> bool:
    """Whether the file takes another batch than this one, and no other."""
    return regime.source != "eager" and network.batch not in (0, batch)


def _key(network: Network, regime: Regime, batch: int) -> Key:
    return network.name, regime.name, batch if regime.one_batch else 0
