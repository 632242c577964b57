"""What is looked at before ONNX Runtime opens a file, and its refusals in one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from cspdeploy.core.errors import CspDeployError, DeviceMemoryError, InputError
from cspdeploy.core.onnx_file import check_external_data, data_locations
from cspdeploy.runtimes.base import SessionRequest
from cspdeploy.runtimes.ort_versions import read_model, require_readable, told_too_old

if TYPE_CHECKING:
    import onnxruntime

__all__ = [
    "CPU", "CUDA", "ON_GPU", "TENSORRT", "Closed", "gpu_refusal", "refusal", "require_openable", "session_options",
]  # fmt: skip

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
ON_GPU = (CUDA, TENSORRT)

MAX_REASON = 240
"""Characters of the engine's own message that an error shows."""
_ORT_FORMAT = b"ORTM"
# "This session cannot use the graph capture feature as requested by the user as ..."; before 1.19 "the CUDA Graph
# feature". The rest says why: control flow, nodes on the CPU, copies.
_NO_CAPTURE = re.compile(r"cannot use the (?:graph capture|CUDA Graph) feature as requested by the user\s+(?:as )?(.*)")


class Closed:
    """In place of an engine's session that ran out of memory: whatever is asked of it says so."""

    def __init__(self, error: DeviceMemoryError) -> None:
        self._error = error

    def __getattr__(self, name: str) -> NoReturn:
        raise DeviceMemoryError(f"{self._error.message}; the session was closed", fix=self._error.fix)


def require_openable(request: SessionRequest) -> None:
    """Refuse what the engine must not open, or cannot.

    Raises:
        EngineTooOldError: of a newer opset or IR version than this onnxruntime reads.
        InputError: not an ONNX file, or external data that is missing or outside its folder.
    """
    import onnxruntime

    if _is_ort_format(request):
        return  # holds its own version, which the engine reads by itself
    if request.data is None:
        check_external_data(request.path)
    elif read_model(request, data_locations):
        raise InputError(f"{request.path}: keeps weights in other files, expected all in one", fix="unpack it first")
    require_readable(request, engine=onnxruntime.__version__)


def _is_ort_format(request: SessionRequest) -> bool:
    """ONNX Runtime's own format, a flat buffer with this identifier after its first offset."""
    if request.data is not None:
        return request.data[4:8] == _ORT_FORMAT
    try:
        with request.path.open("rb") as file:
            return file.read(8)[4:] == _ORT_FORMAT
    except OSError:
        return False  # what is wrong with it is told by whoever reads it next


def refusal(error: Exception, request: SessionRequest) -> InputError:
    """Why the engine did not open it."""
    import onnxruntime

    too_old = told_too_old(error, request, engine=onnxruntime.__version__)
    if too_old is not None:
        return too_old
    # What is wrong stands last, after the engine's own code and file: the start of a long message is of no use.
    told = " ".join(str(error).split())
    reason = told if len(told) <= MAX_REASON else f"...{told[-MAX_REASON:]}"
    return InputError(f"{request.path}: ONNX Runtime cannot open it ({reason})", fix=f"cspdeploy check {request.path}")


def gpu_refusal(error: Exception, request: SessionRequest, *, needs: str = "") -> CspDeployError | None:
    """Why the engine did not open it on a GPU, where the reason is the GPU or its graphs; else None.

    Args:
        needs: the CUDA version that the engine was built for.
    """
    from cspdeploy.runtimes.cuda_errors import told

    text = " ".join(str(error).split())
    graph = _NO_CAPTURE.search(text)
    if graph is not None:
        return InputError(
            f"{request.path}: cannot be captured as a CUDA graph: {graph[1][:MAX_REASON]}",
            fix="run it without a CUDA graph; cspdeploy verify lists the nodes that are not on CUDA",
        )
    return told(error, doing=f"opening {request.path}", needs=needs, device=request.cuda.device)


def session_options(*, optimise: bool, num_threads: int = 0, profile: Path | None = None) -> onnxruntime.SessionOptions:
    """Options that every session has: quiet, and with a record of which provider took which node."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    options.intra_op_num_threads = num_threads
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile / "onnxruntime")
    return options
