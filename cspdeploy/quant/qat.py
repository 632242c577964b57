"""Quantisation-aware training: weights are moved until the network computes well on the grids that its file will have.

What is trained are the weights of a float graph, equalised and with their batch norms folded, in units of the steps
that they are stored in: one learning rate then fits every layer, whatever equalisation made of its scale. Each forward
pass computes what the file will compute: weights, biases and activations on the plan's grids. Backwards, rounding is
passed straight through (Bengio et al., arXiv 1308.3432), and values beyond a grid's ends get no gradient. Grids stay
as they were chosen, so that nothing between two convolutions needs rounding twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from cspdeploy.quant.plan import Floats, Grid, QuantPlan, WeightGrid, fit_weight_grid
from cspdeploy.quant.simulate import fake_quantise, planned_weights
from cspdeploy.quant.torch_graph import TorchGraph

__all__ = ["QatNetwork"]

TRAINED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_INSIDE = 0.49
"""Of a step: where a weight starts that another rounding than the nearest was chosen for."""


class QatNetwork(nn.Module):
    """`[N, 3, H, W]` float32 to the first output `[N, C]` of the graph, as the file of the plan will compute it.

    Args:
        graph: as `prepare_float` leaves it.
        plan: to start from. Its grids stay; weights and biases of products are trained.
    """

    def __init__(self, graph: TorchGraph, plan: QuantPlan) -> None:
        super().__init__()
        self.graph, self.start = graph, plan
        self._changes = {name: _on(grid) for name, grid in plan.grids.items()}
        self.names, self._units = _units(graph, plan)
        rounded = planned_weights(graph, plan)
        self._fixed = {name: value for name, value in rounded.items() if name not in self._units}
        self.steps = nn.ParameterList(nn.Parameter(_start(graph, plan, name, self._units[name])) for name in self.names)

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        """The first output of the quantised graph, `[N, C]`."""
        trained = {name: self._value(name, steps) for name, steps in zip(self.names, self.steps, strict=True)}
        found = self.graph.run(x_NCHW, weights={**self._fixed, **trained}, changes=self._changes)
        return found[self.graph.output_names[0]]

    @torch.no_grad()
    def project(self) -> None:
        """Bring weights back that have left the ends of their grid, where rounding alone would hold them for ever."""
        for name, steps in zip(self.names, self.steps, strict=True):
            if name in self.start.weights:
                limit = self.start.weights[name].limit
                steps.clamp_(-limit, limit)

    @torch.no_grad()
    def plan(self) -> QuantPlan:
        """What has been trained: the plan whose file computes what this module does."""
        values, integers = dict(self.start.values), {}
        for name, steps in zip(self.names, self.steps, strict=True):
            if name in self.start.weights:
                grid = self.start.weights[name]
                integers[name] = torch.round(steps).clamp(-grid.limit, grid.limit).to(torch.int8).numpy()
                values[name] = grid.dequantise(integers[name])
            else:
                values[name] = (steps * self._units[name]).numpy()
        return replace(self.start, values=values, integers=integers)

    def _value(self, name: str, steps: torch.Tensor) -> torch.Tensor:
        """As the file will multiply or add it."""
        unit = self._units[name]
        if name in self.start.weights:
            whole: torch.Tensor = _Rounded.apply(steps)  # type: ignore[no-untyped-call]
            return whole * unit
        value = steps * unit
        if name in self.start.biases:
            tensor, weight = self.start.biases[name]
            step = torch.from_numpy(np.float32(self.start.grids[tensor].scale) * self.start.weights[weight].scales)
            whole = _Rounded.apply(value / step)  # type: ignore[no-untyped-call]
            return whole * step
        return value


class _Rounded(torch.autograd.Function):
    """To the nearest, halves to even; the gradient as if it were not."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0]


class _OnGrid(torch.autograd.Function):
    """To the grid's nearest point; the gradient passes between its ends."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        low, high = grid.range
        ctx.save_for_backward((x >= low) & (x <= high))
        return fake_quantise(x, grid)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] * ctx.saved_tensors[0], None


def _on(grid: Grid) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: _OnGrid.apply(x, grid)  # type: ignore[no-untyped-call]


def _units(graph: TorchGraph, plan: QuantPlan) -> tuple[tuple[str, ...], dict[str, torch.Tensor]]:
    """Initializers that are trained, in graph order, and the unit of each, of a shape that broadcasts to its own."""
    found: dict[str, torch.Tensor] = {}
    for node in graph.nodes:
        if node.operator not in TRAINED:
            continue
        for position, name in enumerate(node.inputs[1:3], start=1):
            if name not in graph.weights or name in found:
                continue
            value = _value_of(graph, plan, name)
            if position == 1:
                grid = plan.weights.get(name)
                found[name] = (
                    _along(grid, value.ndim) if grid else _near(fit_weight_grid(value, per_channel=False).scales[0])
                )
            else:
                found[name] = _near(_bias_unit(plan, node.outputs[0], value))
    return tuple(found), found


def _near(unit: float) -> torch.Tensor:
    """The power of two below: values survive the way to steps and back to the bit."""
    return torch.tensor(2.0 ** np.floor(np.log2(unit)), dtype=torch.float32)


def _along(grid: WeightGrid, rank: int) -> torch.Tensor:
    shape = [1] * rank
    if grid.scales.size > 1:
        shape[grid.axis] = -1
    return torch.from_numpy(grid.scales.reshape(shape))


def _bias_unit(plan: QuantPlan, output: str, value: Floats) -> float:
    """The step of what it is added to, where that lies on a grid; its own are far too fine to be learnt in."""
    if output in plan.grids:
        return plan.grids[output].scale
    return float(np.abs(value).max(initial=0.0)) / 127 or 1.0


def _value_of(graph: TorchGraph, plan: QuantPlan, name: str) -> Floats:
    value: Floats = plan.values[name] if name in plan.values else graph.weights[name].numpy()
    return value


def _start(graph: TorchGraph, plan: QuantPlan, name: str, unit: torch.Tensor) -> torch.Tensor:
    steps = torch.from_numpy(np.array(_value_of(graph, plan, name))) / unit
    if name not in plan.weights:
        return steps
    limit = plan.weights[name].limit
    steps = steps.clamp(-limit, limit)
    if name in plan.integers:
        whole = torch.from_numpy(plan.integers[name]).float()
        steps = whole + (steps - whole).clamp(-_INSIDE, _INSIDE)
    return steps
