"""TorchScript files, run by PyTorch."""

from __future__ import annotations

import functools
import warnings
from typing import Any

from cspdeploy.core.errors import InputError
from cspdeploy.runtimes.base import Runtime, SessionRequest
from cspdeploy.runtimes.cuda_errors import told
from cspdeploy.runtimes.torch_device import TorchSession, missing_torch, probe_torch

__all__ = ["RUNTIMES"]


def _open(device: str, request: SessionRequest) -> TorchSession:
    from cspdeploy.runtimes.torch_cuda import opening
    from cspdeploy.runtimes.torch_variants import refuse_variants

    refuse_variants(request, what="a TorchScript file")
    with opening(device, request) as place:
        return TorchSession(_load(request, place), device=device, request=request)


def _load(request: SessionRequest, place: str) -> Any:
    import torch

    try:
        with warnings.catch_warnings():
            # PyTorch deprecates TorchScript as a whole; it is one of the formats that a bundle holds.
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch.jit.load(str(request.path), map_location=place).eval()  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as error:
        if told(error, doing="") is not None:
            raise  # of the GPU, not of the file
        reason = str(error).splitlines()[0][:200]
        raise InputError(f"{request.path}: not a TorchScript file ({reason})", fix="export it again") from error


RUNTIMES = tuple(
    Runtime(
        name=f"torchscript-{device}", device=device, formats=frozenset({"torchscript"}), precisions=frozenset({"fp32"}),
        timed=True, notes={}, missing=functools.partial(missing_torch, device),
        probe=functools.partial(probe_torch, device), open=functools.partial(_open, device), modules=("torch",),
    )
    for device in ("cpu", "cuda")
)  # fmt: skip
