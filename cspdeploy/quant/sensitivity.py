"""How much each layer's quantisation harms the outputs: one forward and one backward pass over a few images.

Errors are those that each rounding really adds in the quantised network, so that a tensor that arrives on its grid
already (after an activation or an Add that shares its step) is charged nothing. Noise is relative: the outputs' squared
error over their square, whose SQNR is -10 log10. Shapes: K samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from cspdeploy.check.macs import count_macs, mac_operator
from cspdeploy.core.onnx_graph import DEFAULT_DOMAIN, Node, node_module
from cspdeploy.quant.perturbation import Perturbation, Samples, layers_of
from cspdeploy.quant.plan import Floats, QuantPlan
from cspdeploy.quant.torch_graph import GraphNode, TorchGraph
from cspdeploy.quant.view import View, plain_view

__all__ = ["LayerDamage", "Sensitivity", "measure_sensitivity"]

Progress = Callable[[str, int, int], None]

NUM_DIRECTIONS = 2
"""Random directions for each image. The estimate's relative deviation is about sqrt(2 / K): 64 images give 0.5 dB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDamage:
    """Of a convolution or product: its weights, its bias, and the tensors up to the next layers.

    Attributes:
        node: first output.
        module: path of the torch module, or empty.
        damage: share of the layers' damages, which add up to 1.
        sqnr_db: of the outputs, if this layer alone added error; infinite for none.
        weights_share, activations_share: of the two by themselves; they add up to 1, or are 0 where there is no error.
        macs: for one image; 0 where shapes do not tell.
        num_values: elements of its output, for one image.
        takes_from: layers (first outputs) whose results it takes, with no other layer between.
    """

    node: str
    name: str
    module: str
    operator: str
    damage: float
    sqnr_db: float
    weights_share: float
    activations_share: float
    macs: int
    num_values: int
    takes_from: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sensitivity:
    """What each rounding of a plan adds to the error of the outputs.

    Attributes:
        layers: in graph order.
        tensors, weights: `[K]` float64: what a tensor's rounding, and that of a layer's weights (by the layer's first
            output), moves the outputs by, along random directions; the mean square is relative noise.
        carriers: of a tensor, those after it that share its step: if one of them stays quantised, so does its error.
        num_images: that it was measured on.
    """

    layers: tuple[LayerDamage, ...]
    tensors: Mapping[str, Samples]
    weights: Mapping[str, Samples]
    carriers: Mapping[str, frozenset[str]] = field(default_factory=dict)
    num_images: int

    def noise(self, *, tensors: Collection[str] | None = None, nodes: Collection[str] | None = None) -> float:
        """Relative noise predicted where these tensors and the weights of these layers alone are quantised.

        None: all that the plan quantised. Correlations between the errors are in it.
        """
        kept = self.tensors if tensors is None else tensors
        rows = [row for name, row in self.tensors.items() if name in kept or not self._carriers(name).isdisjoint(kept)]
        rows += [row for name, row in self.weights.items() if nodes is None or name in nodes]
        return _power(rows)

    def sqnr_db(self, *, tensors: Collection[str] | None = None, nodes: Collection[str] | None = None) -> float:
        """The same in dB; infinite for no noise."""
        return _decibels(self.noise(tensors=tensors, nodes=nodes))

    def _carriers(self, name: str) -> frozenset[str]:
        return self.carriers.get(name, frozenset())


def measure_sensitivity(
    graph: TorchGraph,
    plan: QuantPlan,
    batches: Iterable[Floats],
    *,
    groups: Sequence[frozenset[str]] = (),
    float_values: Mapping[str, Floats] | None = None,
    num_directions: int = NUM_DIRECTIONS,
    seed: int = 0,
    view: View = plain_view,
    progress: Progress = lambda what, done, total: None,
) -> Sensitivity:
    """Damage of every layer whose weights the plan quantises. Memory is flat in the number of images.

    Args:
        batches: real images `[N, 3, H, W]` float32; 64 of them give half a dB.
        groups: of tensors that share one step, as the layout has them.
        float_values: initializers of the float network, without what bias correction has added: then a correction
            that takes its layer's error away is credited to that layer. None: those of the plan.
        view: of the outputs: what damage is counted in.
        progress: is told the images done, of 0 in all where `batches` does not tell its length.

    Raises:
        InputError: no output can be differentiated with respect to the image.
        ValueError: no images.
    """
    pass_ = Perturbation(graph, plan, float_values, view=view)
    generator = torch.Generator().manual_seed(seed)
    for batch in batches:
        for part in pass_.chunks(batch):
            pass_.add(part, num_directions=num_directions, generator=generator)
            progress("sensitivity of each layer", pass_.num_images, 0)
    if not pass_.num_images:
        raise ValueError("no images to measure sensitivities on")
    samples = pass_.samples()
    tensors = {name: row for (kind, name), row in samples.items() if kind == "tensor"}
    weights = {name: row for (kind, name), row in samples.items() if kind == "weights"}
    layers = layers_of(graph, plan)
    return Sensitivity(
        layers=_describe(graph, layers, tensors, weights), tensors=tensors, weights=weights,
        carriers=_carriers(graph, {node.index for node in layers}, groups), num_images=pass_.num_images,
    )  # fmt: skip


def _power(rows: Sequence[Samples]) -> float:
    return float(np.mean(np.square(np.sum(rows, axis=0)))) if rows else 0.0


def _decibels(noise: float) -> float:
    return -10 * math.log10(noise) if noise > 0 else math.inf


def _describe(
    graph: TorchGraph, layers: tuple[GraphNode, ...], tensors: Mapping[str, Samples], weights: Mapping[str, Samples]
) -> tuple[LayerDamage, ...]:
    sources = _upstream(graph, layers)
    owned: dict[str, list[Samples]] = {}
    for name, row in tensors.items():  # what no layer comes before is the image, which the first layer takes
        owner = sources[name][-1] if sources.get(name) else layers[0].outputs[0] if layers else ""
        owned.setdefault(owner, []).append(row)
    found = []
    for node in layers:
        own = [weights[node.outputs[0]], *owned.get(node.outputs[0], [])]
        found.append((_power(own), _power(own[:1]), _power(own[1:])))
    total = sum(power for power, _, _ in found)
    return tuple(
        _layer(graph, node, powers, total=total, sources=sources) for node, powers in zip(layers, found, strict=True)
    )


def _layer(
    graph: TorchGraph,
    node: GraphNode,
    powers: tuple[float, float, float],
    *,
    total: float,
    sources: Mapping[str, tuple[str, ...]],
) -> LayerDamage:
    """`powers`: of all its errors together, of its weights', of its activations'."""
    power, by_weights, by_activations = powers
    proto = graph.model.graph.node[node.index]
    described = Node(
        index=node.index, name=node.name, operator=node.operator, domain=node.domain or DEFAULT_DOMAIN,
        inputs=node.inputs, outputs=node.outputs, attributes=dict(node.attributes),
        metadata={entry.key: entry.value for entry in getattr(proto, "metadata_props", ())},
    )  # fmt: skip
    shapes = {name: tuple(weight.shape) for name, weight in graph.weights.items()} | dict(graph.probe.shapes)
    operator = mac_operator(described)
    parts = by_weights + by_activations
    return LayerDamage(
        node=node.outputs[0], name=node.name, module=node_module(described), operator=node.operator,
        damage=power / total if total else 0.0, sqnr_db=_decibels(power),
        weights_share=by_weights / parts if parts else 0.0, activations_share=by_activations / parts if parts else 0.0,
        macs=(count_macs(described, operator, shapes) if operator else None) or 0,
        num_values=math.prod(shapes.get(node.outputs[0], ())),
        takes_from=tuple(dict.fromkeys(made for name in node.inputs for made in sources.get(name, ()))),
    )  # fmt: skip


def _upstream(graph: TorchGraph, layers: Iterable[GraphNode]) -> dict[str, tuple[str, ...]]:
    """Of each tensor, the layers that it comes from with no other layer between, in graph order."""
    order = {node.outputs[0]: node.index for node in layers}
    found: dict[str, tuple[str, ...]] = {}
    for node in graph.nodes:
        if node.outputs[0] in order:
            made: tuple[str, ...] = (node.outputs[0],)
        else:
            made = tuple(
                sorted({one for name in node.inputs for one in found.get(name, ())}, key=lambda one: order[one])
            )
        found.update({name: made for name in node.outputs if name})
    return found


def _carriers(
    graph: TorchGraph, layers: Collection[int], groups: Sequence[frozenset[str]]
) -> dict[str, frozenset[str]]:
    """Within each group, the tensors that each one leads to by nodes that are no layers."""
    found: dict[str, frozenset[str]] = {}
    for group in groups:
        for start in group:
            reached, front = set[str](), [start]
            while front:
                consumers = graph.consumers.get(front.pop(), ())
                made = {name for node, _ in consumers if node.index not in layers for name in node.outputs}
                new = (made & group) - reached
                reached |= new
                front += new
            found[start] = frozenset(reached)
    return found
