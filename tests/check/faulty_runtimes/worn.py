"""ONNX Runtime on the CPU, in sessions that do not keep up what their first run gave, or that run out of memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from cspdeploy.core.errors import DeviceMemoryError
from cspdeploy.core.types import PlacedNode
from cspdeploy.runtimes.base import Feeds, Outputs, Runtime, SessionRequest
from cspdeploy.runtimes.ort import CPU, OrtSession

Array = npt.NDArray[np.generic]
Wear = Callable[[Array, int], Array]


def _nan_from_second(array: Array, number: int) -> Array:
    return _spoiled(array, np.nan) if number > 1 else array


def _infinite_in_third(array: Array, number: int) -> Array:
    return _spoiled(array, np.inf) if number == 3 else array


def _half_in_fourth(array: Array, number: int) -> Array:
    return np.multiply(array, 0.5, dtype=np.float32) if number == 4 else array


def _last_bits(array: Array, number: int) -> Array:
    return np.nextafter(array, array.dtype.type(np.inf)) if number % 2 == 0 else array


def _spoiled(array: Array, value: float) -> Array:
    changed = array.copy()
    changed.flat[0] = value
    return changed


class _Worn:
    """Counts its runs; each output passes through `wear` with the number of its run, from 1."""

    def __init__(self, request: SessionRequest, wear: Wear) -> None:
        self._session, self._wear, self._num_runs = OrtSession(request.path, provider=CPU), wear, 0
        self.placement: Mapping[str, int] = self._session.placement
        self.nodes: tuple[PlacedNode, ...] = self._session.nodes
        self.settings = {"tf32": "on" if request.tf32 else "off", "device": str(request.cuda.device)}

    def run(self, feeds: Feeds) -> Outputs:
        self._num_runs += 1
        return {name: self._wear(array, self._num_runs) for name, array in self._session.run(feeds).items()}

    def bind(self, feeds: Feeds) -> Callable[[], None]:
        return self._session.bind(feeds)


def _no_room(doing: str) -> DeviceMemoryError:
    return DeviceMemoryError(f"{doing}: out of GPU memory (2.00 GiB asked for, 1.10 GiB free)", fix="--batch 8")


class _Full(_Worn):
    def run(self, feeds: Feeds) -> Outputs:
        raise _no_room("running")


class _FullWhenTimed(_Worn):
    def bind(self, feeds: Feeds) -> Callable[[], None]:
        num_runs = 0

        def call() -> None:
            nonlocal num_runs
            num_runs += 1
            if num_runs > 1:
                raise _no_room("running")

        return call


class _Clock:
    """A bound call whose device has a clock of its own, which says a quarter of a millisecond."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call
        self.device_ms: float | None = None

    def __call__(self) -> None:
        self._call()
        self.device_ms = 0.25


class _WithClock(_Worn):
    def bind(self, feeds: Feeds) -> Callable[[], None]:
        return _Clock(super().bind(feeds))


def _open_full(request: SessionRequest) -> _Full:
    raise _no_room("opening")


def _same(array: Array, number: int) -> Array:
    return array


_OPENS: dict[str, Callable[[SessionRequest], _Worn]] = {
    "nan-from-second": functools.partial(_Worn, wear=_nan_from_second),
    "infinite-in-third": functools.partial(_Worn, wear=_infinite_in_third),
    "half-in-fourth": functools.partial(_Worn, wear=_half_in_fourth),
    "last-bits": functools.partial(_Worn, wear=_last_bits),
    "full-open": _open_full,
    "full-run": functools.partial(_Full, wear=_same),
    "full-timed": functools.partial(_FullWhenTimed, wear=_same),
    "with-clock": functools.partial(_WithClock, wear=_same),
}

RUNTIMES = tuple(
    Runtime(
        name=name, device="cpu", formats=frozenset({"onnx"}), precisions=frozenset({"fp32"}), timed=True,
        notes={}, missing=lambda: None, probe=lambda: None, open=open_, modules=("onnxruntime",),
    )
    for name, open_ in _OPENS.items()
)  # fmt: skip
