"""The CUDA libraries that ONNX Runtime's providers need: which are not here, which are loaded, what brings them."""

from __future__ import annotations

import contextlib
import ctypes
import re
import struct
from collections.abc import Iterable
from pathlib import Path

__all__ = ["DRIVER_LIBRARIES", "bringing_packages", "loaded_libraries", "missing_libraries", "needed_libraries"]

DRIVER_LIBRARIES = ("libcuda.so.1", "nvcuda.dll")
"""Of the driver itself: no package of Python brings them."""

_CUDA = re.compile(
    r"lib(cuda|cudart|cublas\w*|cudnn\w*|cufft|curand|cusparse|cusolver|nvrtc|nvJitLink|nvinfer\w*|nvonnxparser)\.so"
)
_SONAME = re.compile(r"lib(\w+)\.so\.(\d+)")

# Packages of CUDA 13; those of CUDA 12 and 11 have "-cu12" and "-cu11" at their end.
_PACKAGES = {
    "cublas": "nvidia-cublas", "cublasLt": "nvidia-cublas", "cudart": "nvidia-cuda-runtime", "cufft": "nvidia-cufft",
    "curand": "nvidia-curand", "cusparse": "nvidia-cusparse", "cusolver": "nvidia-cusolver",
    "nvrtc": "nvidia-cuda-nvrtc", "nvJitLink": "nvidia-nvjitlink",
}  # fmt: skip

# Of ELF64: offsets in the header, kinds of program headers and of dynamic entries.
_ELF64_LITTLE = b"\x7fELF\x02\x01"
_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_NEEDED, _DT_STRTAB = 1, 5


def needed_libraries(path: Path) -> tuple[str, ...]:
    """What a shared object names as needed, in its order; empty for what is none of 64-bit Linux.

    The loader tells the first alone that is missing, and a provider of 280 MB is not read whole: only its headers are.
    """
    with contextlib.suppress(OSError, struct.error, ValueError), path.open("rb") as file:

        def read(offset: int, size: int) -> bytes:
            file.seek(offset)
            return file.read(size)

        header = read(0, 64)
        if header[:6] != _ELF64_LITTLE:
            return ()
        (start,), (size, number) = struct.unpack_from("<Q", header, 32), struct.unpack_from("<HH", header, 54)
        segments = [struct.unpack_from("<IIQQQQ", read(start + size * place, size)) for place in range(number)]
        # kind, flags, offset in the file, address, physical address, size in the file
        dynamic = next((one for one in segments if one[0] == _PT_DYNAMIC), None)
        if dynamic is None:
            return ()
        entries = list(struct.iter_unpack("<qQ", read(dynamic[2], dynamic[5] // 16 * 16)))
        address = next(value for tag, value in entries if tag == _DT_STRTAB)
        loaded = next(one for one in segments if one[0] == _PT_LOAD and one[3] <= address < one[3] + one[5])
        names = loaded[2] + address - loaded[3]
        return tuple(
            read(names + value, 256).split(b"\0", 1)[0].decode() for tag, value in entries if tag == _DT_NEEDED
        )  # fmt: skip
    return ()


def missing_libraries(provider: Path, *, also: Iterable[str] = ()) -> tuple[str, ...]:
    """Names of the CUDA libraries that a provider needs and that this process cannot load.

    Call it in a process of its own, after `onnxruntime.preload_dlls()`: it loads all that it finds.

    Args:
        provider: "libonnxruntime_providers_cuda.so".
        also: what it opens later, as cuDNN, and so does not name.
    """
    wanted = [name for name in needed_libraries(provider) if _CUDA.match(name)]
    return tuple(name for name in dict.fromkeys((*wanted, *also)) if not _loads(name))


def _loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def loaded_libraries(maps: Path = Path("/proc/self/maps")) -> tuple[str, ...]:
    """Paths of the CUDA libraries in this process, sorted; empty where the system does not tell."""
    try:
        lines = maps.read_text(errors="replace").splitlines()
    except OSError:
        return ()
    paths = {line.split(maxsplit=5)[5] for line in lines if line.count("/") and len(line.split(maxsplit=5)) > 5}
    return tuple(sorted(path for path in paths if _CUDA.match(path.rpartition("/")[2])))


def bringing_packages(libraries: Iterable[str], *, cuda: str) -> tuple[str, ...]:
    """The packages that bring libraries, as pip takes them, each once; the driver's libraries have none.

    Args:
        cuda: version that the engine was built for: "13.0"; it decides on the packages' names.
    """
    major = cuda.partition(".")[0]
    found: dict[str, None] = {}
    for library in libraries:
        match = _SONAME.match(library)
        if match is None or library in DRIVER_LIBRARIES:
            continue
        name, version = match[1], match[2]
        if name.startswith("cudnn"):
            found[f"nvidia-cudnn-cu{major}=={version}.*"] = None
        elif name.startswith(("nvinfer", "nvonnxparser")):
            found[f"tensorrt-cu{major}=={version}.*"] = None
        elif name in _PACKAGES:
            package = _PACKAGES[name] if int(major or 0) >= 13 else f"{_PACKAGES[name]}-cu{major}"
            # Most carry CUDA's own version; cuFFT and cuRAND count by themselves.
            found[f"{package}=={version}.*" if version == major else package] = None
    return tuple(found)
