"""What a network costs: parameters and multiply-accumulates.

A MAC is one multiplication and one addition. Convolutions and linear layers are counted, as in published tables;
norms, activations, sums and pools are not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cspdeploy.core.spec import ModelSpec
from cspdeploy.nets.registry import build

__all__ = ["Cost", "measure_cost"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one image. `num_parameters` are the learnable ones; `num_activations` the outputs of what is counted."""

    num_parameters: int
    num_macs: int
    num_activations: int


def measure_cost(spec: ModelSpec) -> Cost:
    """Cost at the input size of `spec`. Runs on PyTorch's meta device: shapes alone, no memory, no arithmetic."""
    with torch.device("meta"):
        model = build(spec).eval()
        x_NCHW = torch.empty(1, 3, spec.preprocess.height_px, spec.preprocess.width_px)
    macs = activations = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal macs, activations
        weight: Tensor = module.weight  # type: ignore[assignment]
        macs += output.numel() * weight[0].numel()  # each output element is one dot product with one weight row
        activations += output.numel()

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    with torch.inference_mode():
        model(x_NCHW)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Cost(num_parameters=parameters, num_macs=macs, num_activations=activations)
