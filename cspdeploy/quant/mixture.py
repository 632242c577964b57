"""Ranges of a detector, tensor by tensor, by what each moves at the outputs, value by value.

Histograms count all positions alike, and most of a detector's maps show background, whose values move neither a box nor
a score. Here each value's rounding error counts by its gradient: to first order the outputs move by the sum of both
(`cspdeploy.quant.perturbation`), so that one backward pass judges all candidates for all tensors at once. Measured on a
YOLOv4-tiny: one group of tensors made a third of the noise under the ranges that were best for the network as a whole,
and a 19th of that under another method's, which for the network was 3 dB worse. Shapes: K samples, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from cspdeploy.quant.plan import Floats, Grid, QuantPlan
from cspdeploy.quant.range_weights import Sharing, joined_tensors
from cspdeploy.quant.simulate import fake_quantise, planned_weights
from cspdeploy.quant.torch_graph import TorchGraph
from cspdeploy.quant.view import View

__all__ = ["choose_mixture", "tensor_groups"]

Samples = npt.NDArray[np.float64]
Candidates = Sequence[Mapping[str, Grid]]
Change = Callable[[torch.Tensor], torch.Tensor]

WORTH = 0.97
"""Of the noise of a group of tensors, what another candidate may leave of it at most: less of a gain is chance."""


def tensor_groups(layout: Sharing) -> tuple[frozenset[str], ...]:
    """Tensors that share one step, and those that share it with none, one by one."""
    inside = {name for group in layout.groups for name in group}
    return (*layout.groups, *(frozenset({name}) for name in layout.tensors if name not in inside))


def choose_mixture(
    graph: TorchGraph, plan: QuantPlan, layout: Sharing, candidates: Candidates, batches: Iterable[Floats], *,
    view: View, seed: int = 0,
) -> dict[str, int]:  # fmt: skip
    """The candidate of least noise for each tensor; those that share a step take the same.

    Args:
        plan: under which gradients are taken; its grids are the first candidate.
        candidates: grids of all tensors of the layout each.
        batches: images `[N, 3, H, W]` to choose by, few at a time: activations are all kept.
        view: of the outputs: what noise is counted in.
        seed: of the directions.
    """
    effects = _Effects(graph, plan, layout, candidates)
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False), torch.enable_grad():
        for x_NCHW in batches:
            for start in range(len(x_NCHW)):
                effects.add(x_NCHW[start : start + 1], view, generator)
    found: dict[str, int] = {}
    for group in tensor_groups(layout):
        rows = [np.stack(effects.samples[name], axis=1) for name in sorted(group) if name in effects.samples]
        noise = np.mean(np.square(np.sum(rows, axis=0)), axis=1) if rows else np.zeros(1)
        best = int(noise.argmin())
        found.update(dict.fromkeys(group, best if noise[best] < WORTH * noise[0] else 0))
    return found


class _Effects:
    """Gathers `samples`: of a tensor, for each image `[C]`: what each candidate's rounding moves the outputs by.

    A tensor before an activation and the one after it are one: the sample is that of the second, of both roundings.
    """

    def __init__(self, graph: TorchGraph, plan: QuantPlan, layout: Sharing, candidates: Candidates) -> None:
        self._graph, self._plan, self._candidates = graph, plan, candidates
        self._weights = planned_weights(graph, plan)
        self._before = {after: before for before, after in layout.followed_by.items()}
        # What is joined from its own group is on that grid already.
        self._silent = frozenset(layout.followed_by) | joined_tensors(graph, layout)
        self._scales: dict[str, float] = {}
        self._values: dict[str, torch.Tensor] = {}
        self._ends: dict[str, torch.Tensor] = {}
        self.samples: dict[str, list[Samples]] = {}

    def add(self, x_1CHW: Floats, view: View, generator: torch.Generator) -> None:
        """One image, one direction."""
        x = torch.from_numpy(np.ascontiguousarray(x_1CHW)).requires_grad_()
        names = {*self._plan.grids, *self._graph.output_names}
        self._graph.run(x, weights=self._weights, changes={name: self._change(name) for name in names})
        seen = view(self._ends, {name: value.detach() for name, value in self._ends.items()})
        for name, value in seen.items():  # each output counts alike, whatever its unit
            power = float(value.detach().double().square().sum())
            if name not in self._scales and power:
                self._scales[name] = power**-0.5
        signs = [
            self._scales.get(name, 1.0) * (2.0 * torch.randint(0, 2, value.shape, generator=generator) - 1.0)
            for name, value in seen.items()
        ]
        torch.autograd.grad(list(seen.values()), [x], signs, allow_unused=True)
        self._values.clear()
        self._ends.clear()

    def _change(self, name: str) -> Change:
        grid = self._plan.grids.get(name)

        def change(x: torch.Tensor) -> torch.Tensor:
            if grid is not None:
                self._values[name] = x.detach()
                if name not in self._silent and x.requires_grad:
                    x.register_hook(  # type: ignore[no-untyped-call]  # torch's own
                        lambda gradient: self._keep(name, gradient)
                    )
                x = x + (fake_quantise(x.detach(), grid) - x.detach())  # straight through
            if name in self._graph.output_names:
                self._ends[name] = x
            return x

        return change

    @torch.no_grad()
    def _keep(self, name: str, gradient: torch.Tensor) -> None:
        before = self._before.get(name)
        respond, taken = (self._activation(name), before) if before else (None, name)
        x = self._values[taken]
        exact = respond(x) if respond else x
        row = []
        for grids in self._candidates:
            y = respond(fake_quantise(x, grids[taken])) if respond else x
            row.append(float((gradient * (fake_quantise(y, grids[name]) - exact)).sum(dtype=torch.float64)))
        self.samples.setdefault(name, []).append(np.array(row))

    def _activation(self, after: str) -> Change:
        node = self._graph.producers[after]
        constants = [self._graph.weights[name] for name in node.inputs[1:]]
        return lambda x: self._graph.compute(node, [x, *constants])[0]
