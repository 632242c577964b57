"""The network itself, as PyTorch runs it: the first rung of the ladder and the baseline of every latency."""

from __future__ import annotations

import dataclasses
import functools

from cspdeploy.core.catalog import EAGER
from cspdeploy.core.errors import InputError
from cspdeploy.runtimes.base import Runtime, SessionRequest
from cspdeploy.runtimes.torch_device import TorchSession, missing_torch, probe_torch

__all__ = ["RUNTIMES"]


def _open(device: str, request: SessionRequest) -> TorchSession:
    from cspdeploy.nets.exported import load_exported
    from cspdeploy.runtimes.torch_cuda import opening
    from cspdeploy.runtimes.torch_variants import prepared

    if request.spec is None:
        raise InputError(f"{request.path}: the eager network needs its spec.json beside the weights")
    spec, request = request.spec, dataclasses.replace(request, outputs=request.spec.outputs)
    # In a list that is emptied, since a name here would hold what lies on the GPU when its memory is given back.
    models = [load_exported(spec, request.path).eval()]
    with opening(device, request) as place:
        return TorchSession(prepared(models.pop().to(place), request=request), device=device, request=request)


RUNTIMES = tuple(
    Runtime(
        name=f"torch-{device}", device=device, formats=frozenset({EAGER}), precisions=frozenset({"fp32"}), timed=True,
        notes={}, missing=functools.partial(missing_torch, device),
        probe=functools.partial(probe_torch, device), open=functools.partial(_open, device),
        modules=("torch", "cspdeploy.nets.exported"),
    )
    for device in ("cpu", "cuda")
)  # fmt: skip
