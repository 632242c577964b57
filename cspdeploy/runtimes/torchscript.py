"""TorchScript files, run by PyTorch."""

from __future__ import annotations

import functools
import warnings

from cspdeploy.core.errors import InputError
from cspdeploy.runtimes.base import Runtime, SessionRequest
from cspdeploy.runtimes.torch_device import TorchSession, missing_torch, probe_torch

__all__ = ["RUNTIMES"]


def _open(device: str, request: SessionRequest) -> TorchSession:
    import torch

    try:
        with warnings.catch_warnings():
            # PyTorch deprecates TorchScript as a whole; it is one of the formats that a bundle holds.
            warnings.simplefilter("ignore", DeprecationWarning)
            module = torch.jit.load(str(request.path), map_location=device).eval()  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise InputError(f"{request.path}: not a TorchScript file ({reason})", fix="export it again") from error
    return TorchSession(module, device=device, request=request)


RUNTIMES = tuple(
    Runtime(
        name=f"torchscript-{device}", device=device, formats=frozenset({"torchscript"}), precisions=frozenset({"fp32"}),
        timed=True, notes={}, missing=functools.partial(missing_torch, device),
        probe=functools.partial(probe_torch, device), open=functools.partial(_open, device), modules=("torch",),
    )
    for device in ("cpu", "cuda")
)  # fmt: skip
