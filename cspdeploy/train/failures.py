"""What may end a step, in one line: no memory left on the device, or workers that are gone."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator

import torch
from torch import distributed

from cspdeploy.core.errors import CspDeployError, DeviceMemoryError
from cspdeploy.runtimes import cuda_errors
from cspdeploy.train.workers import Workers, lost_workers

__all__ = ["explained", "told"]

NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")
"""Of CUDA and cuDNN, and of PyTorch's allocator on the CPU, which has two wordings."""
LOST = ("closed by peer", "reset by peer", "Broken pipe", "Timed out waiting", "timed out", "gloo", "NCCL")
"""Of gloo's connections and of the watchdog of nccl."""


def told(error: RuntimeError, *, workers: Workers, batch: int, kept: bool) -> CspDeployError | None:
    """The same for the user; None where it is a fault of the program.

    Args:
        batch: images a step, over all workers.
        kept: whether finished epochs are in a checkpoint.
    """
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or any(words in text for words in NO_MEMORY):
        return _no_memory(text, workers=workers, batch=batch, kept=kept)
    if workers.num > 1 and (isinstance(error, distributed.DistError) or any(words in text for words in LOST)):
        return lost_workers(error, workers.share, doing="training")
    if workers.device.type == "cuda":  # a driver that is too old, a device that another process holds
        return cuda_errors.told(error, doing="training", batch=batch, device=workers.device.index)
    return None


def _no_memory(text: str, *, workers: Workers, batch: int, kept: bool) -> DeviceMemoryError:
    """Half the batch, still a multiple of the workers. A resumed run must have the batch of the first one."""
    half = batch // 2 // workers.num * workers.num
    smaller = f"--batch {half}" if half >= 2 * workers.num else "a smaller --size"
    fix = (
        f"{smaller} --overwrite starts anew; with the same batch on more workers, --resume goes on" if kept else smaller
    )
    each = f" ({batch // workers.num} on each of {workers.num} workers)" if workers.num > 1 else ""
    lines = text.splitlines()
    return DeviceMemoryError(
        f"no memory left on {workers.device} for a step of {batch} images{each}"
        f"{'; finished epochs are kept' if kept else ''} ({lines[0][:160] if lines else 'out of memory'})", fix=fix,
    )  # fmt: skip


@contextlib.contextmanager
def explained(workers: Workers, *, batch: int, kept: bool) -> Iterator[None]:
    """Turns such an end into its line, and gives the device its memory back.

    Raises:
        DeviceMemoryError: no memory left.
        RuntimeUnavailableError: another worker ended or hangs.
    """
    failure: CspDeployError | None = None
    try:
        yield
    except RuntimeError as error:
        failure = told(error, workers=workers, batch=batch, kept=kept)
        if failure is None:
            raise
        traceback.clear_frames(error.__traceback__)  # which hold the tensors of the step
        error.__traceback__ = None
    if failure is not None:
        if workers.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            raise failure
        finally:
            del failure  # its traceback has this frame, which would have it: a ring, and all tensors of the run in it
