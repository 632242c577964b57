"""What training computes in: autocast, its data type on each device, and the fast kernels of a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

__all__ = ["autocast", "choose_dtype", "device_of", "fast_kernels", "make_scaler"]


def choose_dtype(wanted: torch.dtype, device: torch.device) -> torch.dtype:
    """Of the autocast on that device.

    Float32 stays. bfloat16, which has the exponents of float32 and needs no scaling of the loss, stays where the device
    computes in it: on every CPU, and on GPUs from Ampere on. Older GPUs compute in float16.
    """
    if wanted == torch.float32 or device.type != "cuda":
        return wanted
    with torch.cuda.device(device):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Compute in `dtype`; float32 leaves everything as it is."""
    enabled = dtype != torch.float32
    return torch.autocast(device.type, dtype if enabled else torch.bfloat16, enabled=enabled)


def make_scaler(dtype: torch.dtype) -> torch.amp.GradScaler:
    """Scales the loss so that small gradients are no zeros in float16; for any other type it does nothing."""
    return torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)


def device_of(model: nn.Module) -> torch.device:
    """Where its parameters lie; the CPU for a module that has none."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


@contextlib.contextmanager
def fast_kernels(device: torch.device) -> Iterator[None]:
    """On a GPU, for the time of training: TF32 for what is left in float32, and cuDNN tries its algorithms.

    Every step has the same shapes, so that trying pays. Both are settings of the process; they are put back, since
    what is measured afterwards is to be float32.
    """
    if device.type != "cuda":
        yield
        return
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    cudnn.benchmark = cudnn.allow_tf32 = matmul.allow_tf32 = True
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before
