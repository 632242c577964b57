"""Programs of `torch.export`, run by PyTorch as they are: not compiled."""

from __future__ import annotations

import functools
import warnings
from typing import Any

from cspdeploy.core.errors import InputError
from cspdeploy.runtimes.base import Runtime, SessionRequest
from cspdeploy.runtimes.pt2_archive import plain_program
from cspdeploy.runtimes.torch_device import TorchSession, missing_torch, probe_torch

__all__ = ["RUNTIMES"]

NOTE = "run node by node as PyTorch's eager mode; compile it for speed"


def _open(device: str, request: SessionRequest) -> TorchSession:
    from cspdeploy.runtimes.torch_cuda import opening
    from cspdeploy.runtimes.torch_variants import refuse_variants

    refuse_variants(request, what="a .pt2 file")
    modules = [_load(request)]  # in a list that is emptied, as in `cspdeploy.runtimes.eager`
    with opening(device, request) as place:
        return TorchSession(modules.pop().to(place), device=device, request=request)


def _load(request: SessionRequest) -> Any:
    import torch

    program = plain_program(request.path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PyTorch about its own files
            return torch.export.load(program).module()
    except Exception as error:  # what a broken archive makes torch raise shares no base class but this one
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"{request.path}: not a .pt2 file that this torch reads ({reason})",
                         fix="export it again") from error  # fmt: skip


RUNTIMES = tuple(
    Runtime(
        name=f"pt2-{device}", device=device, formats=frozenset({"pt2"}), precisions=frozenset({"fp32"}),
        timed=True, notes={"fp32": NOTE}, missing=functools.partial(missing_torch, device),
        probe=functools.partial(probe_torch, device), open=functools.partial(_open, device), modules=("torch",),
    )
    for device in ("cpu", "cuda")
)  # fmt: skip
