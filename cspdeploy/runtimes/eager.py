"""The network itself, as PyTorch runs it: the first rung of the ladder and the baseline of every latency."""

from __future__ import annotations

import functools

from cspdeploy.core.catalog import EAGER, OUTPUT_NAME
from cspdeploy.core.errors import InputError
from cspdeploy.runtimes.base import Runtime, SessionRequest
from cspdeploy.runtimes.torch_device import TorchSession, missing_torch, probe_torch

__all__ = ["RUNTIMES"]


def _open(device: str, request: SessionRequest) -> TorchSession:
    from cspdeploy.nets.registry import build
    from cspdeploy.nets.weights import load_weights, read_state_dict

    if request.spec is None:
        raise InputError(f"{request.path}: the eager network needs its spec.json beside the weights")
    model = build(request.spec)
    load_weights(model, read_state_dict(request.path), source=str(request.path))
    return TorchSession(model.eval().to(device), device=device, output=OUTPUT_NAME)


RUNTIMES = tuple(
    Runtime(
        name=f"torch-{device}", device=device, formats=frozenset({EAGER}), precisions=frozenset({"fp32"}), timed=True,
        notes={}, missing=functools.partial(missing_torch, device),
        probe=functools.partial(probe_torch, device), open=functools.partial(_open, device),
    )
    for device in ("cpu", "cuda")
)  # fmt: skip
