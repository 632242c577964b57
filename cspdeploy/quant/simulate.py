"""INT8 as the file will compute it, in PyTorch: fake quantisation by a plan, before any file is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch

from cspdeploy.quant.plan import Floats, Grid, QuantPlan, WeightGrid
from cspdeploy.quant.torch_graph import TorchGraph

__all__ = ["RoundedWeights", "fake_quantise", "planned_weights", "run_batches", "simulate"]


def fake_quantise(x: torch.Tensor, grid: Grid) -> torch.Tensor:
    """To the nearest point of the grid, halves to even; values beyond its ends go to them."""
    low, high = grid.bounds
    steps = torch.round(x / grid.scale).add_(grid.zero_point).clamp_(low, high)
    return steps.sub_(grid.zero_point).mul_(grid.scale)


class RoundedWeights:
    """Weights on their grids, each remembered until another is asked for: plans mostly differ in their activations."""

    def __init__(self) -> None:
        self._made: dict[str, tuple[Floats, WeightGrid, torch.Tensor]] = {}

    def round(self, name: str, weight: Floats, grid: WeightGrid) -> torch.Tensor:
        """As `WeightGrid` quantises and dequantises, to the bit."""
        known = self._made.get(name)
        if known is not None and known[0] is weight and _same_grid(known[1], grid):
            return known[2]
        shape = [1] * weight.ndim
        shape[grid.axis] = -1
        scales = torch.from_numpy(grid.scales).view(shape)
        rounded = torch.from_numpy(np.ascontiguousarray(weight)) / scales
        rounded.round_().clamp_(-grid.limit, grid.limit).mul_(scales)
        self._made[name] = (weight, grid, rounded)
        return rounded


def _same_grid(one: WeightGrid, other: WeightGrid) -> bool:
    return (one.axis, one.limit) == (other.axis, other.limit) and np.array_equal(one.scales, other.scales)


def planned_weights(
    graph: TorchGraph, plan: QuantPlan, *, rounded: RoundedWeights | None = None
) -> dict[str, torch.Tensor]:
    """Every initializer that the plan changes, as the quantised graph will multiply it, float32.

    Args:
        rounded: remembers weights between plans.
    """
    remembered = rounded or RoundedWeights()
    found = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in plan.values.items()}
    for name, grid in plan.weights.items():
        if name in plan.integers:
            found[name] = torch.from_numpy(grid.dequantise(plan.integers[name]))
        else:
            weight = plan.values[name] if name in plan.values else graph.weights[name].numpy()
            found[name] = remembered.round(name, weight, grid)
    for name, (tensor, weight_name) in plan.biases.items():
        bias = plan.values[name] if name in plan.values else graph.weights[name].numpy()
        step = np.float32(plan.grids[tensor].scale) * plan.weights[weight_name].scales
        found[name] = torch.from_numpy((np.rint(bias / step) * step).astype(np.float32))
    return found


def simulate(
    graph: TorchGraph, plan: QuantPlan, batches: Iterable[Floats], *, rounded: RoundedWeights | None = None
) -> dict[str, Floats]:
    """Outputs of the quantised graph, all batches in one array `[N, ...]` each.

    Args:
        rounded: remembers weights between plans.
    """
    changes = {name: _on(grid) for name, grid in plan.grids.items()}
    weights = planned_weights(graph, plan, rounded=rounded)
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
