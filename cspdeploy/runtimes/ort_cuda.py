"""ONNX Runtime on a GPU: its libraries, why a session did not get the GPU, and what it was set to.

Imports neither torch nor onnx, nor onnxruntime before a session is opened.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cspdeploy.core.errors import RuntimeUnavailableError
from cspdeploy.runtimes.cuda_driver import driver_version, find_driver_problem
from cspdeploy.runtimes.ort_providers import CPU, CUDA, ON_GPU, TENSORRT
from cspdeploy.runtimes.tf32 import override_setting

if TYPE_CHECKING:
    import onnxruntime

__all__ = [
    "built_for", "library_refusal", "loaded_libraries", "missing_library", "missing_provider", "open_quietly",
    "preload_libraries", "read_settings", "require_taken", "why_not_taken",
]  # fmt: skip

_PROVIDER_LIBRARIES = {CUDA: "libonnxruntime_providers_cuda.so", TENSORRT: "libonnxruntime_providers_tensorrt.so"}
_NO_LIBRARY = re.compile(r"Please install (?:TensorRT|CUDA)|Failed to load (?:shared )?library|"
                         r"cannot open shared object file")  # fmt: skip
_MISSING_LIBRARY = re.compile(r"(\S+\.so[.\d]*): cannot open shared object file")
_OF_PACKAGE = {
    "libcudnn": "nvidia-cudnn-cu", "libcublas": "nvidia-cublas-cu", "libcufft": "nvidia-cufft-cu",
    "libcurand": "nvidia-curand-cu", "libcudart": "nvidia-cuda-runtime-cu", "libnvrtc": "nvidia-cuda-nvrtc-cu",
    "libnvinfer": "tensorrt-cu",
}  # fmt: skip
_SILENT, _WARNINGS = 4, 2
"""Severities of ONNX Runtime's log: only what ends the process; its default."""


def built_for() -> str:
    """The CUDA version that this onnxruntime was built for, "13.0"; empty where it was built for none."""
    try:
        info = importlib.import_module("onnxruntime.capi.build_and_package_info")
    except ImportError:
        return ""
    return str(getattr(info, "cuda_version", "") or "")


def missing_provider(provider: str) -> tuple[str, str] | None:
    """Why sessions on that provider cannot be had here, with the fix, or None. Opens nothing."""
    if importlib.util.find_spec("onnxruntime") is None:
        extra = "cpu" if provider == CPU else "gpu"
        return "onnxruntime is not installed", f"pip install 'cspdeploy[{extra}]'"
    if provider == CPU:
        return None
    import onnxruntime

    if provider not in onnxruntime.get_available_providers():
        return (
            f"this onnxruntime has no {provider} (it has {', '.join(onnxruntime.get_available_providers())})",
            "pip uninstall onnxruntime && pip install 'cspdeploy[gpu]'",
        )
    return find_driver_problem(built_for())


def preload_libraries() -> None:
    """Load CUDA and cuDNN from the Python packages, where they are installed; what is missing is told by the session.

    `onnxruntime.preload_dlls` came with 1.21 and prints what it does not find.
    """
    import onnxruntime

    preload = getattr(onnxruntime, "preload_dlls", None)
    if preload is not None:
        with contextlib.redirect_stdout(io.StringIO()):
            preload()


@contextlib.contextmanager
def open_quietly() -> Iterator[None]:
    """Without the lines that the engine prints when a provider fails: the reason is in the error that we raise."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(_SILENT)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        onnxruntime.set_default_logger_severity(_WARNINGS)


def why_not_taken(provider: str) -> tuple[str, str]:
    """Why a session on that provider was opened without it, with the fix; two empty strings where it cannot be told."""
    if provider not in ON_GPU:
        return "", ""
    problem = find_driver_problem(built_for())
    if problem is not None:
        return problem
    import onnxruntime

    library = Path(onnxruntime.__file__).parent / "capi" / _PROVIDER_LIBRARIES[provider]
    if not library.is_file():
        return f"{library.name} is not in this onnxruntime", "pip install 'cspdeploy[gpu]'"
    return missing_library(library)


def missing_library(library: Path) -> tuple[str, str]:
    """The first library that another one needs and that is not here, with the fix; empty where nothing is missing."""
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        found = _MISSING_LIBRARY.search(str(error))
        if found is None:
            return "", ""  # a symbol of its host, which is not there when it is loaded alone
        return f"{found[1]} is missing, which {library.name} needs", _install(found[1])
    return "", ""


def _install(library: str) -> str:
    """The command that brings a library of NVIDIA's, of the major version of CUDA that this onnxruntime needs."""
    if library.startswith("libcuda.so"):
        return "nvidia-smi, which comes with the driver"
    package = next((own for start, own in _OF_PACKAGE.items() if library.startswith(start)), "")
    major = built_for().partition(".")[0]
    if not package or not major:
        return "cspdeploy doctor"
    # From CUDA 13 on NVIDIA's packages carry no version in their names, but for those of cuDNN and TensorRT.
    plain = int(major) >= 13 and not package.startswith(("nvidia-cudnn", "tensorrt"))
    return f"pip install {package.removesuffix('-cu') if plain else package + major}"


_VERSIONED = re.compile(r"\S*/(lib(cudnn|cublas|cudart|nvinfer)\.so[.\d]*)$")


def loaded_libraries(maps: Iterable[str] | None = None) -> dict[str, str]:
    """Paths of NVIDIA's libraries in this process by name: "cudnn", "cublas", "cudart", "nvinfer".

    More than one of each may be installed; the one that was found first is the one that computes.

    Args:
        maps: lines of /proc/self/maps; None: read it, where there is one.
    """
    if maps is None:
        try:
            maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        except OSError:
            return {}
    found = (_VERSIONED.search(line) for line in maps)
    return {match[2]: match[0].strip() for match in found if match}


def _version(name: str, path: str) -> str:
    """Its version, by asking it; the name of its file where it does not tell."""
    try:
        library = ctypes.CDLL(path)
        if name == "cudnn":
            number = int(library.cudnnGetVersion())
            return f"{number // 10000}.{number % 10000 // 100}.{number % 100}"
        if name == "cublas":
            return ".".join(str(_cublas_property(library, kind)) for kind in range(3))
    except (OSError, AttributeError, ValueError):
        pass
    return Path(path).name


def _cublas_property(library: Any, kind: int) -> int:
    value = ctypes.c_int(0)
    if int(library.cublasGetProperty(ctypes.c_int(kind), ctypes.byref(value))) != 0:
        raise ValueError("cublasGetProperty")
    return value.value


def read_settings(session: onnxruntime.InferenceSession, provider: str) -> dict[str, str]:
    """What a session on a GPU was opened with, read back from the engine, and the versions that it computes with."""
    import onnxruntime

    if provider not in ON_GPU:
        return {}
    given: Mapping[str, Mapping[str, str]] = session.get_provider_options()
    # Addresses differ from run to run and tell nothing; that there is a stream of ours is told by the other option.
    options = {
        name: str(value) for name, value in given.get(provider, {}).items()
        if name != "user_compute_stream" and not name.startswith("gpu_external")
    }  # fmt: skip
    if provider == TENSORRT:
        options["use_tf32"] = given.get(CUDA, {}).get("use_tf32", "")
    versions = {"onnxruntime": onnxruntime.__version__, "cuda": built_for(), "driver_cuda": driver_version()}
    libraries = {name: _version(name, path) for name, path in loaded_libraries().items()}
    found = options | override_setting() | versions | libraries
    return {name: value for name, value in found.items() if value}


def library_refusal(error: Exception, provider: str) -> RuntimeUnavailableError | None:
    """An engine's refusal for a library that it could not load, as one of ours; None where it is of something else."""
    if not _NO_LIBRARY.search(str(error)):
        return None
    reason, fix = why_not_taken(provider)
    told = reason or " ".join(str(error).split())[:200]
    return RuntimeUnavailableError(f"asked for {provider}: {told}", fix=fix or "cspdeploy doctor")


def require_taken(provider: str, taken: Sequence[str]) -> None:
    """Refuse a session that was opened without the provider that was asked for.

    Raises:
        RuntimeUnavailableError: it runs elsewhere; says why, where that can be told.
    """
    if provider in taken:
        return
    reason, fix = why_not_taken(provider)
    raise RuntimeUnavailableError(
        f"asked for {provider}, the session runs on {', '.join(taken)}{f': {reason}' if reason else ''}",
        fix=fix or "cspdeploy doctor",
    )
