"""Whether a GPU can be used, by the standard library alone: asked before minutes go into installing anything.

As a script: exit 0 where there is one, else one line on stderr and exit 3.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["EXIT_NO_GPU", "gpu_problem"]

EXIT_NO_GPU = 3
"""As `cspdeploy` has it for an engine or device that was asked for and is not there."""
_LIBRARIES = ("libcuda.so.1", "nvcuda.dll")
_TOLD = {
    3: "the driver is shutting down",
    100: "no NVIDIA GPU is visible to this process",
    46: "all GPUs are busy or not available to this process",
    802: "the GPU system is not ready (its fabric manager does not run?)",
    803: "the driver of the kernel and the driver's library are of different versions",
}
"""CUresult of the driver's interface, as cuda.h names them."""
_FIX = "run it where `nvidia-smi` lists a GPU (in a container: docker run --gpus all)"


def gpu_problem(load: Callable[[str], Any] = ctypes.CDLL) -> tuple[str, str] | None:
    """Why no GPU can be used here, with the fix; None where one can.

    Args:
        load: opens a library by its name, or raises OSError.
    """
    driver = None
    for name in _LIBRARIES:
        try:
            driver = load(name)
            break
        except OSError:
            continue
    if driver is None:
        return f"no NVIDIA driver: {_LIBRARIES[0]} is not found", _FIX
    count = ctypes.c_int(0)
    code = int(driver.cuInit(0)) or int(driver.cuDeviceGetCount(ctypes.byref(count)))
    if code:
        return f"{_TOLD.get(code, 'the NVIDIA driver cannot be used')} (cuInit: CUDA error {code})", _FIX
    return None if count.value else (_TOLD[100], _FIX)


def main() -> int:
    problem = gpu_problem()
    if problem is not None:
        sys.stderr.write(f"error: {problem[0]}; fix: {problem[1]}\n")
        return EXIT_NO_GPU
    return 0


if __name__ == "__main__":
    sys.exit(main())
