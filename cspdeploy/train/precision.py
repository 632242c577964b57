"""What training computes in: autocast, its data type on each device, and the fast kernels of a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from cspdeploy.runtimes.torch_process import float32_parts, set_tf32

__all__ = ["autocast", "choose_dtype", "device_of", "fast_kernels", "make_scaler", "true_float32"]


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

    Every step has the same shapes, so that trying pays. Both are settings of the process and are put back.
    """
    if device.type != "cuda":
        yield
        return
    cudnn = torch.backends.cudnn
    before, cudnn.benchmark = cudnn.benchmark, True
    try:
        with _tf32(allowed=True):
            yield
    finally:
        cudnn.benchmark = before


@contextlib.contextmanager
def true_float32(device: torch.device) -> Iterator[None]:
    """For a figure that is kept: float32 on a GPU without the TF32 that PyTorch allows convolutions unless told."""
    with _tf32(allowed=False) if device.type == "cuda" else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _tf32(*, allowed: bool) -> Iterator[None]:
    """Of convolutions and matrix products, for the time; settings of the process, which are put back."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    parts = list(float32_parts().values())
    words = [part.fp32_precision for part in parts]
    try:
        flags = cudnn.allow_tf32, matmul.allow_tf32
    except RuntimeError:  # whoever uses this as a library has set the precisions alone
        flags = None
    set_tf32(allowed)
    try:
        yield
    finally:
        if flags is not None:
            cudnn.allow_tf32, matmul.allow_tf32 = flags
        for part, word in zip(parts, words, strict=True):
            part.fp32_precision = word
