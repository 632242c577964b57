"""INT8 as the file will compute it, in PyTorch: fake quantisation by a plan, before any file is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch

from cspdeploy.quant.plan import Floats, Grid, QuantPlan
from cspdeploy.quant.torch_graph import TorchGraph

__all__ = ["fake_quantise", "planned_weights", "run_batches", "simulate"]


def fake_quantise(x: torch.Tensor, grid: Grid) -> torch.Tensor:
    """To the nearest point of the grid, halves to even; values beyond its ends go to them."""
    low, high = grid.bounds
    steps = torch.round(x / grid.scale).add_(grid.zero_point).clamp_(low, high)
    return steps.sub_(grid.zero_point).mul_(grid.scale)


def planned_weights(graph: TorchGraph, plan: QuantPlan) -> dict[str, torch.Tensor]:
    """Every initializer that the plan changes, as the quantised graph will multiply it, float32."""
    found: dict[str, Floats] = dict(plan.values)
    for name, grid in plan.weights.items():
        weight = found[name] if name in found else graph.weights[name].numpy()
        found[name] = grid.dequantise(plan.integers[name] if name in plan.integers else grid.quantise(weight))
    for name, (tensor, weight_name) in plan.biases.items():
        bias = found[name] if name in found else graph.weights[name].numpy()
        step = np.float32(plan.grids[tensor].scale) * plan.weights[weight_name].scales
        found[name] = (np.rint(bias / step) * step).astype(np.float32)
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in found.items()}


def simulate(graph: TorchGraph, plan: QuantPlan, batches: Iterable[Floats]) -> dict[str, Floats]:
    """Outputs of the quantised graph, all batches in one array `[N, ...]` each."""
    changes = {name: _on(grid) for name, grid in plan.grids.items()}
    weights = planned_weights(graph, plan)
    return _joined(graph.run(torch.from_numpy(x), weights=weights, changes=changes) for x in batches)


def run_batches(graph: TorchGraph, batches: Iterable[Floats]) -> dict[str, Floats]:
    """Outputs of the float graph, in the same form."""
    return _joined(graph.run(torch.from_numpy(x)) for x in batches)


def _on(grid: Grid) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: fake_quantise(x, grid)


def _joined(outputs: Iterable[dict[str, torch.Tensor]]) -> dict[str, Floats]:
    found: dict[str, list[Floats]] = {}
    with torch.inference_mode():
        for batch in outputs:
            for name, value in batch.items():
                found.setdefault(name, []).append(value.numpy())
    return {name: np.concatenate(values) for name, values in found.items()}
