"""TorchScript files, run by PyTorch."""

from __future__ import annotations

import warnings

from cspdeploy.core.catalog import OUTPUT_NAME
from cspdeploy.core.errors import InputError
from cspdeploy.runtimes.base import Runtime, SessionRequest
from cspdeploy.runtimes.torch_device import TorchSession, missing_torch, probe_torch

__all__ = ["RUNTIMES"]


def _open(device: str, request: SessionRequest) -> TorchSession:
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript as such is deprecated; users still ask for it
            module = torch.jit.load(str(request.path), map_location=device).eval()  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise InputError(f"{request.path}: not a TorchScript file ({reason})", fix="export it again") from error
    return TorchSession(module, device=device, output=OUTPUT_NAME)


RUNTIMES = tuple(
    Runtime(
        name=f"torchscript-{device}", device=device, formats=frozenset({"torchscript"}), precisions=frozenset({"fp32"}),
        timed=True, notes={}, missing=lambda device=device: missing_torch(device),
        probe=lambda device=device: probe_torch(device), open=lambda request, device=device: _open(device, request),
    )
    for device in ("cpu", "cuda")
)  # fmt: skip
