"""What a caller says of the engine: its threads, and the GPU that it is to run on."""

from __future__ import annotations

from pathlib import Path

from cspdeploy.core.errors import InputError
from cspdeploy.runtimes.base import CudaOptions, Runtime, SessionRequest

__all__ = ["require_device", "require_threads", "session_request"]


def require_threads(num_threads: object) -> None:
    """Refuse what is no number of threads.

    Raises:
        InputError: not a whole number, or below 0.
    """
    if isinstance(num_threads, bool) or not isinstance(num_threads, int) or num_threads < 0:
        raise InputError(
            f"num_threads: got {num_threads!r}, expected a whole number: 0 (as the engine likes) or more",
            fix="--threads 0",
        )


def require_device(device: object, runtime: Runtime) -> None:
    """Refuse what is no index of a GPU, and an index for a runtime that is not on GPUs.

    Raises:
        InputError: as said; names `--runtime ort-cuda`.
    """
    if device is None:
        return
    if isinstance(device, bool) or not isinstance(device, int) or device < 0:
        raise InputError(f"device: got {device!r}, expected the index of a GPU: 0 or more", fix="--device 0")
    if runtime.device != "cuda":
        raise InputError(
            f"--device {device}: {runtime.name} does not run on a GPU", fix="add --runtime ort-cuda, or leave it away"
        )


def session_request(path: Path, outputs: tuple[str, ...], *, num_threads: int, device: int | None) -> SessionRequest:
    """What to open, with options that `require_threads` and `require_device` have passed."""
    cuda = CudaOptions(device=device or 0)
    return SessionRequest(path=path, outputs=outputs, num_threads=num_threads, cuda=cuda)
