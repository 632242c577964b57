"""What every rounding of a plan does to the outputs, to first order, image by image, from one backward pass.

The graph runs as the plan quantises it. A rounding adds an error e to a tensor; to first order the outputs move by J e,
J their Jacobian at that tensor. With random signs r, one for each value of the outputs, <r, J e> = <J^T r, e>, and
J^T r is the gradient of <r, y>: one backward pass gives it for every tensor at once. The mean of <r, J e>^2 over r is
|J e|^2 (M. F. Hutchinson, "A stochastic estimator of the trace of the influence matrix", 1990). The sum over several
roundings before it is squared holds their correlation too. Shapes: N images of a batch, K samples (images times
directions).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from cspdeploy.core.errors import InputError
from cspdeploy.quant.plan import Floats, Grid, QuantPlan
from cspdeploy.quant.simulate import fake_quantise, planned_weights
from cspdeploy.quant.torch_graph import GraphNode, TorchGraph
from cspdeploy.quant.view import View, plain_view

__all__ = ["Perturbation", "Samples", "layers_of"]

Samples = npt.NDArray[np.float64]
Source = tuple[str, str]
"""("tensor", its name) for an activation's rounding, ("weights", first output of the node) for those of a layer."""

_CHUNK_BYTES = 512 << 20
_COPIES = 4
"""Of each activation, at once: the value, its rounding error, what the weights' error makes of it, and the gradient."""
_MAX_CHUNK = 64
_SHAPES_ALONE = frozenset({"Shape", "Size"})
"""Operators to which the values that they take do not matter."""


def layers_of(graph: TorchGraph, plan: QuantPlan) -> tuple[GraphNode, ...]:
    """Nodes whose weights the plan quantises, in graph order."""
    return tuple(node for node in graph.nodes if any(name in plan.weights for name in node.inputs))


@dataclass(slots=True)
class _Errors:
    """What came of one chunk: a row of N numbers for each source."""

    num_images: int
    rows: dict[Source, Samples]

    def add(self, source: Source, gradient: torch.Tensor, error: torch.Tensor) -> None:
        products = (gradient * error).reshape(self.num_images, -1).sum(1, dtype=torch.float64)
        self.rows[source] = products.numpy()


class Perturbation:
    """Runs batches, and gathers the samples.

    Args:
        float_values: initializers of the float network that the plan was made for: equalised, say, but without what
            bias correction has added. By default those of the plan.
        view: of the outputs: what errors are counted in.

    Raises:
        InputError: no output can be differentiated with respect to the image.
    """

    def __init__(
        self, graph: TorchGraph, plan: QuantPlan, float_values: Mapping[str, Floats] | None, *, view: View = plain_view
    ) -> None:
        self._graph, self._plan, self._view = graph, plan, view
        given = plan.values if float_values is None else float_values
        exact = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in given.items()}
        self._weights = planned_weights(graph, plan)
        self._weight_errors = {
            name: value - exact.get(name, graph.weights[name]) for name, value in self._weights.items()
        }
        self._layers = {node.outputs[0]: node for node in layers_of(graph, plan)}
        self._taken = {name for node in self._layers.values() for name in node.inputs}
        self._targets = self._find_targets()
        self._scales: dict[str, float] = {}
        self._samples: dict[Source, list[Samples]] = {}
        self._signal, self._num_images = 0.0, 0
        self._ends: dict[str, torch.Tensor] = {}
        self._inputs: dict[str, torch.Tensor] = {}

    @property
    def num_images(self) -> int:
        """Seen so far."""
        return self._num_images

    def chunks(self, x_NCHW: Floats) -> Iterator[Floats]:
        """The batch in parts whose activations fit into memory with their errors and gradients."""
        num_values = sum(math.prod(shape) for shape in self._graph.probe.shapes.values())
        step = min(_MAX_CHUNK, max(1, _CHUNK_BYTES // (4 * _COPIES * max(1, num_values))))
        for start in range(0, len(x_NCHW), step):
            yield x_NCHW[start : start + step]

    def add(self, x_NCHW: Floats, *, num_directions: int, generator: torch.Generator) -> None:
        """Take the samples of some images."""
        with torch.inference_mode(False), torch.enable_grad():
            x = torch.from_numpy(np.ascontiguousarray(x_NCHW)).requires_grad_()
            errors = _Errors(num_images=len(x_NCHW), rows={})
            self._graph.run(x, weights=self._weights, changes=self._changes(errors))
            raw = {name: self._ends[name] for name in self._targets}
            # The view hangs on the reference only to first order where the two are near.
            ends = self._view(raw, {name: value.detach() for name, value in raw.items()})
            self._note_signal(ends, len(x_NCHW))
            for i in range(num_directions):
                signs = [
                    self._scales[name] * (2.0 * torch.randint(0, 2, end.shape, generator=generator) - 1.0)
                    for name, end in ends.items()
                ]
                errors.rows.clear()
                torch.autograd.grad(
                    list(ends.values()), [x], signs, retain_graph=i + 1 < num_directions, allow_unused=True
                )
                self._keep(errors)
        self._ends.clear()
        self._inputs.clear()

    def samples(self) -> dict[Source, Samples]:
        """`[K]` of each source, so that the mean square of any sum of them is its share of the outputs' power."""
        root = math.sqrt(self._signal / self._num_images) if self._signal else 1.0
        return {source: np.concatenate(rows) / root for source, rows in self._samples.items()}

    def _sources(self) -> Iterator[Source]:
        yield from (("tensor", name) for name in self._plan.grids)
        yield from (("weights", name) for name in self._layers)

    def _keep(self, errors: _Errors) -> None:
        """Sources that no gradient has reached have moved nothing."""
        for source in self._sources():
            row = errors.rows.get(source)
            self._samples.setdefault(source, []).append(np.zeros(errors.num_images) if row is None else row)

    def _note_signal(self, ends: Mapping[str, torch.Tensor], num_images: int) -> None:
        """Power of the targets. Each counts alike, whatever its unit: by its power in the first images."""
        powers = {name: float(end.detach().double().square().sum()) for name, end in ends.items()}
        if not self._scales:
            self._scales = {
                name: math.sqrt(num_images / (len(powers) * power)) if power else 1.0 for name, power in powers.items()
            }
        self._signal += sum(self._scales[name] ** 2 * power for name, power in powers.items())
        self._num_images += num_images

    def _changes(self, errors: _Errors) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
        names = {*self._plan.grids, *self._layers, *self._taken, *self._targets}
        return {name: self._change(name, errors) for name in names if name}

    def _change(self, name: str, errors: _Errors) -> Callable[[torch.Tensor], torch.Tensor]:
        layer, grid = self._layers.get(name), self._plan.grids.get(name)

        def change(x: torch.Tensor) -> torch.Tensor:
            if layer is not None:
                self._listen(x, ("weights", name), self._effect(layer), errors)
            if grid is not None:
                error = _rounding_error(x, grid)
                x = x + error  # straight through: the gradient is that of the unrounded value
                self._listen(x, ("tensor", name), error, errors)
            if name in self._taken:
                self._inputs[name] = x.detach()
            if name in self._targets:
                self._ends[name] = x
            return x

        return change

    @staticmethod
    def _listen(x: torch.Tensor, source: Source, error: torch.Tensor, errors: _Errors) -> None:
        if x.requires_grad:
            x.register_hook(  # type: ignore[no-untyped-call]  # torch's own
                lambda gradient: errors.add(source, gradient, error)
            )

    @torch.no_grad()
    def _effect(self, layer: GraphNode) -> torch.Tensor:
        """What the errors of its weights and bias, in which it is linear, add to a layer's output."""
        taken: list[torch.Tensor | None] = []
        for name in layer.inputs:
            if not name:
                taken.append(None)
            elif name in self._inputs:
                taken.append(self._inputs[name])
            elif name in self._weight_errors:
                taken.append(self._weight_errors[name])
            else:
                taken.append(torch.zeros_like(self._graph.weights[name]))
        return self._graph.compute(layer, taken)[0]

    def _find_targets(self) -> tuple[str, ...]:
        """Outputs with a gradient, and, before what has none (NonMaxSuppression, ArgMax, ...), what that takes."""
        flowing: dict[str, bool] = {}
        with torch.inference_mode(False), torch.enable_grad():
            shape = self._graph.probe.shapes[self._graph.input_name]
            self._graph.run(
                torch.zeros(shape).requires_grad_(), visit=lambda name, x: flowing.update({name: x.requires_grad})
            )
        found = {name: None for name in self._graph.output_names if flowing.get(name)}
        for node in self._graph.nodes:
            if node.operator not in _SHAPES_ALONE and not any(flowing.get(name) for name in node.outputs):
                found.update({name: None for name in node.inputs if flowing.get(name)})
        if not found:
            raise InputError(
                f"outputs {', '.join(self._graph.output_names)}: none depends on the image by operators that have a "
                "gradient, which sensitivities are made of",
                fix="cut the file after its last convolutions",
            )
        return tuple(found)


def _rounding_error(x: torch.Tensor, grid: Grid) -> torch.Tensor:
    with torch.no_grad():
        return fake_quantise(x, grid) - x
