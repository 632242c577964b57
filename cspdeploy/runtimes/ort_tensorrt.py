"""TensorRT behind ONNX Runtime, with CUDA for the nodes that it does not take. Imports neither torch nor onnx.

TensorRT computes FP32 networks in TF32 unless it is told not to, and ONNX Runtime has no option to tell it: only the
environment variable NVIDIA_TF32_OVERRIDE, which NVIDIA's libraries read once, when the first of them starts. So a
process keeps to one answer, and a session that needs the other one is refused instead of computed otherwise.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import importlib.util
import os
from pathlib import Path

from cspdeploy.core.errors import InputError, RuntimeUnavailableError
from cspdeploy.core.onnx_graph import read_onnx, walk_nodes
from cspdeploy.runtimes.base import Runtime, SessionRequest
from cspdeploy.runtimes.ort import OrtSession, open_on, probe_provider
from cspdeploy.runtimes.ort_cuda import built_for, loaded_libraries, missing_provider, preload_libraries
from cspdeploy.runtimes.ort_providers import TENSORRT, TensorrtFile
from cspdeploy.runtimes.tf32 import TF32_VARIABLE

__all__ = ["RUNTIMES", "find_tensorrt", "read_file", "set_tf32"]

_QUANTISING = ("QuantizeLinear", "DequantizeLinear")
_HALF = "float16"


def set_tf32(*, allowed: bool) -> None:
    """Tell NVIDIA's libraries whether float32 may be computed as TF32, before the first of them starts.

    Where the variable is 0 it may be the user's word for every program: it is never taken back here.

    Raises:
        RuntimeUnavailableError: the environment forbids TF32, or the libraries run already, with the other answer.
    """
    is_allowed = os.environ.get(TF32_VARIABLE) != "0"
    if is_allowed == allowed:
        return
    running = [name for name in ("nvinfer", "cublas", "cudnn") if name in loaded_libraries()]
    if running:
        raise RuntimeUnavailableError(
            f"TF32 is {'off' if allowed else 'on'} in this process for {', '.join(running)}, asked for the other one",
            fix=f"{f'unset {TF32_VARIABLE}' if allowed else f'export {TF32_VARIABLE}=0'}, in a process of its own",
        )
    if allowed:
        raise RuntimeUnavailableError(
            f"TF32 is off by {TF32_VARIABLE}=0 of the environment, asked for on",
            fix=f"unset {TF32_VARIABLE}, or leave TF32 off: --no-tf32",
        )
    os.environ[TF32_VARIABLE] = "0"


def read_file(path: Path) -> TensorrtFile:
    """What TensorRT must be told of an ONNX file.

    Raises:
        InputError: not an ONNX file.
    """
    graph = read_onnx(path).graph
    types = [value.dtype for value in (*graph.inputs, *graph.outputs, *graph.values.values())]
    types += [tensor.dtype for tensor in graph.initializers.values()]
    quantised = any(node.operator in _QUANTISING for node in walk_nodes(graph))
    return TensorrtFile(half=_HALF in types, quantised=quantised)


def _open(request: SessionRequest) -> OrtSession:
    if request.data is not None:
        raise InputError(f"{request.path}: TensorRT is given files, not parts of an archive", fix="unpack it first")
    set_tf32(allowed=request.tf32)
    if request.cuda.cache is not None:
        request.cuda.cache.mkdir(parents=True, exist_ok=True)
    _load_tensorrt()
    return open_on(TENSORRT, request, file=read_file(request.path))


def _missing() -> tuple[str, str] | None:
    """Also TensorRT itself, which comes in a package of its own. It is looked for, not loaded: see `set_tf32`."""
    problem = missing_provider(TENSORRT)
    if problem is not None or find_tensorrt() is not None:
        return problem
    major = built_for().partition(".")[0]
    return "TensorRT is not here: no libnvinfer.so", f"pip install tensorrt-cu{major}"


def find_tensorrt() -> Path | None:
    """TensorRT's main library: of its Python package, on LD_LIBRARY_PATH, or where the system's loader finds it."""
    spec = importlib.util.find_spec("tensorrt_libs")
    folders = [Path(place) for place in (spec.submodule_search_locations or ())] if spec is not None else []
    folders += [Path(place) for place in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if place]
    found = sorted(path for folder in folders for path in folder.glob("libnvinfer.so*"))
    if found:
        return found[0]
    name = ctypes.util.find_library("nvinfer")
    return Path(name) if name else None


def _load_tensorrt() -> None:
    """Where it comes from the Python package, which no loader searches; what else is wrong is told by the session."""
    spec = importlib.util.find_spec("tensorrt_libs")
    library = find_tensorrt() if spec is not None else None
    if library is not None:
        preload_libraries()
        with contextlib.suppress(OSError):
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _probe() -> None:
    set_tf32(allowed=False)
    _load_tensorrt()
    probe_provider(TENSORRT)


RUNTIMES = (
    Runtime(
        name="ort-tensorrt", device="cuda", formats=frozenset({"onnx"}),
        precisions=frozenset({"fp32", "fp16", "int8"}), timed=True, notes={}, missing=_missing,
        probe=_probe, open=_open, modules=("onnxruntime",), optional=True,
    ),
)  # fmt: skip
