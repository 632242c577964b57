"""NVIDIA's driver, asked directly: is a GPU there, what is it, and how long did the work on a stream take.

By ctypes on the driver's own library, which every machine with a driver has; no toolkit, no torch. Work is timed by
two events on the stream on which an engine computes, so that neither the host nor copies before them are in it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import weakref
from ctypes import byref, c_char_p, c_float, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any

from cspdeploy.core.errors import CspDeployError, InputError, RuntimeUnavailableError
from cspdeploy.runtimes.cuda_errors import cuda_version, error_of

__all__ = [
    "CudaDevice", "Driver", "Stream", "Timer", "compute_stream", "copy_on_device", "count_devices", "driver_problem",
    "driver_version", "find_driver_problem", "load_driver", "open_device",
]  # fmt: skip

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"

# CUdevice_attribute of cuda.h.
_NUM_MULTIPROCESSORS, _L2_BYTES, _CAPABILITY_MAJOR, _CAPABILITY_MINOR = 16, 38, 75, 76
_NON_BLOCKING = 1
"""CU_STREAM_NON_BLOCKING: work on the legacy default stream, of whichever library, does not hold this one up."""


class Driver:
    """The functions of CUDA's driver interface by name; a number other than 0 that one returns is raised.

    Args:
        library: what ctypes loaded, or anything that has the same functions.
    """

    def __init__(self, library: Any) -> None:
        self._library = library

    def call(self, name: str, *arguments: Any, doing: str, device: int | None = None) -> None:
        """Call a function. Arguments are of ctypes: a plain number would be passed as 32 bits, pointers too.

        Raises:
            DeviceMemoryError: no room on the device.
            InputError: no such device.
            RuntimeUnavailableError: anything else; names the error as CUDA does.
        """
        code = int(getattr(self._library, name)(*arguments))
        if code:
            raise error_of(code, name=self._error_name(code), doing=doing, device=device)

    def version(self) -> int:
        """The newest CUDA that this driver runs, as 13000; 0 where it does not tell. Needs no `cuInit`."""
        value = c_int(0)
        return value.value if int(self._library.cuDriverGetVersion(byref(value))) == 0 else 0

    def count(self) -> int:
        """GPUs that CUDA shows to this process."""
        value = c_int(0)
        self.call("cuDeviceGetCount", byref(value), doing="counting GPUs")
        return value.value

    def _error_name(self, code: int) -> str:
        name = c_char_p()
        if int(self._library.cuGetErrorName(c_int(code), byref(name))) == 0 and name.value:
            return name.value.decode()
        return ""


@functools.cache
def _open_library() -> Driver:
    return Driver(ctypes.CDLL(LIBRARY))


@functools.cache
def load_driver() -> Driver:
    """The driver, loaded and started, once in a process; a failure is not kept.

    Raises:
        RuntimeUnavailableError: there is none, or it does not start.
    """
    try:
        driver = _open_library()
    except OSError as error:
        raise RuntimeUnavailableError(
            f"no NVIDIA driver: {LIBRARY} cannot be loaded ({_first_line(error)})",
            fix="nvidia-smi, which comes with the driver; in a container: docker run --gpus all",
        ) from error
    driver.call("cuInit", c_uint(0), doing="starting the NVIDIA driver")
    return driver


def driver_version() -> str:
    """The newest CUDA that the driver runs, "13.0"; empty where there is no driver."""
    try:
        number = _open_library().version()
    except OSError:
        return ""
    return cuda_version(number) if number else ""


def count_devices() -> int:
    """GPUs that CUDA shows to this process.

    Raises:
        RuntimeUnavailableError: no driver, or none that works.
    """
    return load_driver().count()


def find_driver_problem(needs: str = "") -> tuple[str, str] | None:
    """Why no GPU can be used, with the fix; None where one can.

    Args:
        needs: the CUDA version that an engine was built for, "13.0". A driver runs every version of its own major
            number, older or newer (CUDA's minor version compatibility), and all older majors.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        driver = load_driver()
        count = driver.count()
    except CspDeployError as error:
        if visible is not None and "NO_DEVICE" in error.message:
            return f"{error.message}; CUDA_VISIBLE_DEVICES is '{visible}'", "unset CUDA_VISIBLE_DEVICES"
        return error.message, error.fix
    if count == 0:
        hidden = f": CUDA_VISIBLE_DEVICES is '{visible}'" if visible is not None else ""
        return f"CUDA finds no GPU{hidden}", "unset CUDA_VISIBLE_DEVICES" if hidden else "nvidia-smi -L"
    has = driver.version()
    if needs and has and has // 1000 < int(needs.partition(".")[0]):
        return (
            f"the NVIDIA driver is too old: it goes up to CUDA {cuda_version(has)}, the engine needs CUDA {needs}",
            "nvidia-smi, to see the driver; install a newer one, or an engine built for CUDA "
            f"{has // 1000}",
        )  # fmt: skip
    return None


def driver_problem(needs: str = "") -> str:
    """Why no GPU can be used; empty where one can. See `find_driver_problem`."""
    problem = find_driver_problem(needs)
    return "" if problem is None else problem[0]


class CudaDevice:
    """A GPU. Its facts cost no memory on it; only `activate` and what needs it hold its primary context.

    Args:
        index: among the GPUs that CUDA shows to this process.
        driver: another one than the machine's.

    Attributes:
        name: as "NVIDIA H100 80GB HBM3".
        compute_capability: as (9, 0).
        l2_bytes: of the second-level cache.
        total_bytes: of its memory.

    Raises:
        InputError: no GPU of that index; says how many there are.
        RuntimeUnavailableError: no driver, or none that works.
    """

    def __init__(self, index: int, *, driver: Driver | None = None) -> None:
        self.index = index
        self.driver = driver or load_driver()
        count = self.driver.count()
        if not 0 <= index < count:
            have = f"there are {count} (0 to {count - 1})" if count else "there is none"
            raise InputError(f"--device {index}: no such GPU, {have}", fix="nvidia-smi -L, and CUDA_VISIBLE_DEVICES")
        handle, total, name = c_int(0), c_size_t(0), ctypes.create_string_buffer(256)
        self._call("cuDeviceGet", byref(handle), c_int(index))
        self._handle, self._context = handle, c_void_p()
        self._call("cuDeviceGetName", name, c_int(len(name)), handle)
        self._call("cuDeviceTotalMem_v2", byref(total), handle)
        self.name, self.total_bytes = name.value.decode(), total.value
        self.l2_bytes, self.num_multiprocessors = self._attribute(_L2_BYTES), self._attribute(_NUM_MULTIPROCESSORS)
        self.compute_capability = self._attribute(_CAPABILITY_MAJOR), self._attribute(_CAPABILITY_MINOR)

    def activate(self) -> None:
        """Make its primary context, which the engines use too, that of this thread. It is held until the process ends.

        Raises:
            DeviceMemoryError: no room for a context.
            RuntimeUnavailableError: the device is busy, or broken.
        """
        if not self._context.value:
            self._call("cuDevicePrimaryCtxRetain", byref(self._context), self._handle)
        self._call("cuCtxSetCurrent", self._context)

    def synchronize(self) -> None:
        """Wait for all work on it, on every stream of this process. Raises as `activate`."""
        self.activate()
        self._call("cuCtxSynchronize")

    def free_bytes(self) -> int:
        """Of its memory, at this moment, by whichever process. Raises as `activate`."""
        self.activate()
        free, total = c_size_t(0), c_size_t(0)
        self._call("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value

    def _attribute(self, number: int) -> int:
        value = c_int(0)
        self._call("cuDeviceGetAttribute", byref(value), c_int(number), self._handle)
        return value.value

    def _call(self, name: str, *arguments: Any) -> None:
        self.driver.call(name, *arguments, doing=f"GPU {self.index}: {name}", device=self.index)


class Stream:
    """A queue of work on a device; what engines take as theirs. Lives as long as its process, as its users may.

    Attributes:
        pointer: CUstream and cudaStream_t, which are the same.
    """

    def __init__(self, device: CudaDevice) -> None:
        self.device = device
        device.activate()
        handle = c_void_p()
        device.driver.call("cuStreamCreate", byref(handle), c_uint(_NON_BLOCKING), doing="making a stream")
        self.pointer = handle.value or 0

    def synchronize(self) -> None:
        """Wait until all that was queued is done."""
        self.device.activate()
        self.device.driver.call("cuStreamSynchronize", c_void_p(self.pointer), doing="waiting for the GPU")


class Timer:
    """Two events on a stream: milliseconds of the device's own clock between `begin` and `end`, to some 0.5 us."""

    def __init__(self, stream: Stream) -> None:
        self._stream, self._driver = stream, stream.device.driver
        stream.device.activate()
        self._first, self._last = self._event(), self._event()

    def begin(self) -> None:
        """Queue the first event."""
        self._stream.device.activate()
        self._record(self._first)

    def end(self) -> None:
        """Queue the last event."""
        self._record(self._last)

    def ms(self) -> float:
        """Wait for the last event, and tell the time between both."""
        value = c_float(0)
        self._driver.call("cuEventSynchronize", self._last, doing="waiting for the GPU")
        self._driver.call("cuEventElapsedTime", byref(value), self._first, self._last, doing="reading events")
        return value.value

    def _record(self, event: c_void_p) -> None:
        self._driver.call("cuEventRecord", event, c_void_p(self._stream.pointer), doing="timing the GPU")

    def _event(self) -> c_void_p:
        event = c_void_p()
        self._driver.call("cuEventCreate", byref(event), c_uint(0), doing="making an event")
        weakref.finalize(self, _destroy_event, self._driver, event).atexit = False  # the context may be gone by then
        return event


def _destroy_event(driver: Driver, event: c_void_p) -> None:
    driver.call("cuEventDestroy_v2", event, doing="freeing an event")


def copy_on_device(destination: int, source: int, *, num_bytes: int, stream: Stream) -> None:
    """Queue a copy from one address of the device to another; returns at once.

    Raises:
        RuntimeUnavailableError: CUDA refused it.
    """
    stream.device.activate()
    stream.device.driver.call(
        "cuMemcpyDtoDAsync_v2", c_uint64(destination), c_uint64(source), c_size_t(num_bytes), c_void_p(stream.pointer),
        doing="copying on the GPU",
    )  # fmt: skip


@functools.cache
def open_device(index: int) -> CudaDevice:
    """The GPU of that index, once in a process. Raises as `CudaDevice`."""
    return CudaDevice(index)


@functools.cache
def compute_stream(index: int) -> Stream:
    """The stream on which the sessions of this process compute on that GPU. Raises as `CudaDevice` and `activate`."""
    return Stream(open_device(index))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
