"""The driver's functions are played by a Python object: what is asked of it, and what is made of its answers.

That the real ones behave so is for `tests/cuda`, on a machine with a GPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest

from cspdeploy.core.errors import DeviceMemoryError, InputError, RuntimeUnavailableError
from cspdeploy.runtimes import cuda_driver
from cspdeploy.runtimes.cuda_driver import (
    CudaDevice,
    Driver,
    Stream,
    Timer,
    copy_on_device,
    driver_problem,
    find_driver_problem,
    load_driver,
)

ATTRIBUTES = {16: 132, 38: 52428800, 75: 9, 76: 0}


class Library:
    """Functions as the driver's: a number as result, values through pointers. `failing`: name to number."""

    def __init__(self, *, num_devices: int = 2, version: int = 13000, failing: dict[str, int] | None = None) -> None:
        self.num_devices, self.driver_version = num_devices, version
        self.failing = failing or {}
        self.called: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def function(*arguments: Any) -> int:
            self.called.append((name, arguments))
            if name in self.failing:
                return self.failing[name]
            self._answer(name, arguments)
            return 0

        return function

    def _answer(self, name: str, arguments: tuple[Any, ...]) -> None:
        values: dict[str, Any] = {
            "cuDriverGetVersion": self.driver_version, "cuDeviceGetCount": self.num_devices, "cuDeviceGet": 0,
            "cuDeviceTotalMem_v2": 80 << 30, "cuStreamCreate": 4096, "cuDevicePrimaryCtxRetain": 512,
            "cuEventCreate": 8192, "cuEventElapsedTime": 1.25, "cuMemGetInfo_v2": 70 << 30,
        }  # fmt: skip
        if name == "cuDeviceGetName":
            arguments[0].value = b"NVIDIA H100 80GB HBM3"
        elif name == "cuDeviceGetAttribute":
            arguments[0]._obj.value = ATTRIBUTES[arguments[1].value]
        elif name == "cuGetErrorName":
            arguments[1]._obj.value = b"CUDA_ERROR_NAMED_BY_DRIVER"
        elif name in values:
            arguments[0]._obj.value = values[name]

    def names(self) -> list[str]:
        return [name for name, _ in self.called]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    caches = (cuda_driver._open_library, load_driver, cuda_driver.open_device, cuda_driver.compute_stream)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def _install(monkeypatch: pytest.MonkeyPatch, library: Library) -> Library:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return library


def test_facts_of_a_gpu_hold_no_context_on_it() -> None:
    library = Library()
    device = CudaDevice(1, driver=Driver(library))
    assert (device.name, device.total_bytes, device.l2_bytes) == ("NVIDIA H100 80GB HBM3", 80 << 30, 52428800)
    assert device.compute_capability == (9, 0)
    assert device.num_multiprocessors == 132
    assert "cuDevicePrimaryCtxRetain" not in library.names()
    assert device.free_bytes() == 70 << 30
    assert library.names().count("cuDevicePrimaryCtxRetain") == 1
    device.free_bytes()
    assert library.names().count("cuDevicePrimaryCtxRetain") == 1


@pytest.mark.parametrize("index", [-1, 2])
def test_wrong_index(index: int) -> None:
    with pytest.raises(InputError, match=rf"--device {index}: no such GPU, there are 2 \(0 to 1\)"):
        CudaDevice(index, driver=Driver(Library()))
    with pytest.raises(InputError, match="there is none"):
        CudaDevice(0, driver=Driver(Library(num_devices=0)))


def test_work_is_timed_between_two_events_on_the_stream() -> None:
    library = Library()
    stream = Stream(CudaDevice(0, driver=Driver(library)))
    timer = Timer(stream)
    library.called.clear()
    timer.begin()
    copy_on_device(1 << 40, 1 << 41, num_bytes=1 << 33, stream=stream)
    timer.end()
    assert timer.ms() == 1.25
    events = [name for name in library.names() if name != "cuCtxSetCurrent"]
    assert events == [
        "cuEventRecord", "cuMemcpyDtoDAsync_v2", "cuEventRecord", "cuEventSynchronize", "cuEventElapsedTime"
    ]  # fmt: skip
    copied = next(arguments for name, arguments in library.called if name == "cuMemcpyDtoDAsync_v2")
    # A plain number would be passed as 32 bits, and an address on the device be cut.
    assert [argument.value for argument in copied] == [1 << 40, 1 << 41, 1 << 33, stream.pointer]
    assert [ctypes.sizeof(argument) for argument in copied] == [8, 8, 8, 8]


def test_events_are_freed_with_their_timer() -> None:
    library = Library()
    timer = Timer(Stream(CudaDevice(0, driver=Driver(library))))
    del timer
    assert library.names().count("cuEventDestroy_v2") == 2


@pytest.mark.parametrize(
    ("code", "kind"), [(2, DeviceMemoryError), (46, RuntimeUnavailableError), (999, RuntimeUnavailableError)]
)
def test_error_is_named_as_the_driver_names_it(code: int, kind: type[Exception]) -> None:
    device = CudaDevice(0, driver=Driver(Library(failing={"cuDevicePrimaryCtxRetain": code})))
    with pytest.raises(kind, match=r"cuDevicePrimaryCtxRetain.*CUDA_ERROR_NAMED_BY_DRIVER"):
        device.activate()


def test_driver_that_does_not_tell_names_is_told_by_ours() -> None:
    device = CudaDevice(0, driver=Driver(Library(failing={"cuStreamCreate": 802, "cuGetErrorName": 1})))
    with pytest.raises(RuntimeUnavailableError, match="CUDA_ERROR_SYSTEM_NOT_READY"):
        Stream(device)


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    problem = find_driver_problem()
    assert problem is not None
    assert problem[0].startswith("no NVIDIA driver: libcuda.so.1 cannot be loaded (libcuda.so.1: cannot open")
    assert "docker run --gpus all" in problem[1]
    assert cuda_driver.driver_version() == ""
    with pytest.raises(RuntimeUnavailableError, match="no NVIDIA driver"):
        CudaDevice(0)


def test_gpu_that_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, Library())
    assert find_driver_problem("13.0") is None
    assert driver_problem("12.8") == ""  # a newer driver runs older versions
    assert cuda_driver.driver_version() == "13.0"


def test_failed_start_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    library = _install(monkeypatch, Library(failing={"cuInit": 802}))
    assert "starting the NVIDIA driver: CUDA failed" in driver_problem()
    library.failing.clear()
    assert driver_problem() == ""


@pytest.mark.parametrize(("needs", "old"), [("13.0", True), ("12.8", False), ("", False)])
def test_driver_of_an_older_major_version_is_too_old(monkeypatch: pytest.MonkeyPatch, needs: str, old: bool) -> None:
    """12.2 runs what was built for 12.8: minor versions are compatible."""
    _install(monkeypatch, Library(version=12020))
    told = "the NVIDIA driver is too old: it goes up to CUDA 12.2, the engine needs CUDA 13.0"
    assert driver_problem(needs) == (told if old else "")


def test_devices_hidden_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, Library(num_devices=0))
    assert find_driver_problem() == ("CUDA finds no GPU", "nvidia-smi -L")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert find_driver_problem() == ("CUDA finds no GPU: CUDA_VISIBLE_DEVICES is '7'", "unset CUDA_VISIBLE_DEVICES")
    _install(monkeypatch, Library(failing={"cuInit": 100, "cuGetErrorName": 1}))
    load_driver.cache_clear()
    cuda_driver._open_library.cache_clear()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    problem = find_driver_problem()
    assert problem is not None
    assert problem[0].endswith("(CUDA_ERROR_NO_DEVICE); CUDA_VISIBLE_DEVICES is ''")
    assert problem[1] == "unset CUDA_VISIBLE_DEVICES"
