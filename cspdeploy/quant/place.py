"""Which tensors of a graph get a grid, for one engine, and which nodes then compute in INT8.

A node after which no convolution or matrix product comes is head and stays in float: scores and boxes are not rounded.
A mover (MaxPool, Reshape, ...) has no grid of its own: what it gives lies on the grid of what it takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cspdeploy.quant.place_rules import (
    ABSORBED,
    ACTIVATIONS,
    JOINS,
    is_mover,
    is_product,
    unquantisable,
    weight_axis,
)
from cspdeploy.quant.placements import Placement
from cspdeploy.quant.torch_graph import GraphNode, TorchGraph

__all__ = ["Layout", "lay_out"]

LAST_PRODUCT = "gives the network's outputs: an INT8 kernel would round them"
LAST_MATRIX = "the last matrix product: it costs little, and its outputs are the network's"
EXCLUDED = "kept in float as asked"
NARROW = "faster in float than in INT8: its input has few channels"
NARROW_CHANNELS = 4
"""The INT8 kernel multiplies rows of (channels * kernel area) values in blocks of 64, the float one has a form of its
own for the image. Measured on CSPDarknet53 at 256x256: the whole file takes 0.96 of the time with the first convolution
in float."""
_HOMOGENEOUS = frozenset({"LeakyRelu", "Relu"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The decisions that need no image: where grids lie, which of them share a step, what is stored in integers.

    Attributes:
        tensors: that get a grid, in graph order.
        groups: sets of tensors that share one step, so that the operators between them are exact on the grid. Sets of
            one are left out.
        followed_by: tensor before LeakyRelu -> tensor after it, where nobody else takes the first.
        nodes: first outputs of nodes that compute in INT8.
        float_nodes: reason by first output of each convolution and matrix product that stays in float.
        weights: axis of the output channels by initializer that is stored in INT8.
        biases: input tensor (that has a grid) and weight, by initializer that is stored in INT32.
    """

    tensors: tuple[str, ...]
    groups: tuple[frozenset[str], ...]
    followed_by: Mapping[str, str]
    nodes: frozenset[str]
    float_nodes: Mapping[str, str]
    weights: Mapping[str, int]
    biases: Mapping[str, tuple[str, str]]


def lay_out(graph: TorchGraph, placement: Placement, *, exclude: frozenset[str] = frozenset()) -> Layout:
    """Place grids.

    Args:
        graph: as `prepare_float` leaves it: a product has a weight and a bias of its own.
        exclude: first outputs of nodes to keep in float.
    """
    return _Layouter(graph, placement, exclude).layout()


class _Layouter:
    """One pass over the graph in its order.

    `grids`: tensors with a grid; `integer`: first outputs of INT8 nodes; `near`: tensors whose values come from an INT8
    product by steps that the engine computes along with it.
    """

    def __init__(self, graph: TorchGraph, placement: Placement, exclude: frozenset[str]) -> None:
        self._graph, self._placement, self._exclude = graph, placement, exclude
        self._float_nodes: dict[str, str] = {}
        products = [node for node in graph.nodes if is_product(node)]
        followed = _leading_to(graph, {node.index for node in products})
        for node in products:
            reason = self._why_float(node, last=node.index not in followed)
            if reason:
                self._float_nodes[node.outputs[0]] = reason
        self._products = [node for node in products if node.outputs[0] not in self._float_nodes]
        self._integer: set[str] = set()
        self._live = _leading_to(graph, {node.index for node in self._products})
        self._grids = {self._source(node.inputs[0]) for node in self._products}
        self._near: set[str] = set()
        self._followed_by: dict[str, str] = {}
        self._shared = _Sets()

    def layout(self) -> Layout:
        products = {node.index for node in self._products}
        for node in self._graph.nodes:
            if node.index in products:
                self._made(node)
            elif node.outputs[0] not in self._exclude and node.domain in ("", "ai.onnx"):
                self._place(node)
        order = [self._graph.input_name, *(name for node in self._graph.nodes for name in node.outputs)]
        biased = [node for node in self._products if len(node.inputs) > 2 and node.inputs[2]]
        return Layout(
            tensors=tuple(name for name in order if name in self._grids),
            groups=self._shared.sets(self._grids),
            followed_by=self._followed_by,
            nodes=frozenset(self._integer),
            float_nodes=self._float_nodes,
            weights={node.inputs[1]: weight_axis(node) for node in self._products},
            biases={node.inputs[2]: (self._source(node.inputs[0]), node.inputs[1]) for node in biased}
            if self._placement.integer_bias else {},
        )  # fmt: skip

    def _why_float(self, node: GraphNode, *, last: bool) -> str:
        if node.outputs[0] in self._exclude:
            return EXCLUDED
        reason = unquantisable(self._graph, node)
        if not reason and self._placement.narrow_in_float and self._is_narrow(node):
            return NARROW
        if reason or not last:
            return reason
        if node.operator != "Conv":
            return LAST_MATRIX
        return LAST_PRODUCT if self._placement.before_activation else ""

    def _is_narrow(self, node: GraphNode) -> bool:
        return node.operator == "Conv" and self._graph.weights[node.inputs[1]].shape[1] <= NARROW_CHANNELS and (
            node.attributes.get("group", 1) == 1
        )  # fmt: skip

    def _place(self, node: GraphNode) -> None:
        """What is not a product."""
        if is_mover(node):
            if self._source(node.inputs[0]) in self._grids:
                self._integer.add(node.outputs[0])
        elif node.operator in JOINS:
            if self._placement.joins and node.index in self._live and self._all_near(node):
                self._join(node)
        elif node.operator in self._placement.kernels:
            self._unary(node)
        elif not self._placement.before_activation and node.operator in ACTIVATIONS and self._all_near(node):
            self._near.add(node.outputs[0])

    def _made(self, node: GraphNode) -> str:
        """An INT8 kernel that gives integers, or leaves its sums to the activation. Returns where the grid is."""
        self._integer.add(node.outputs[0])
        name = node.outputs[0]
        self._near.add(name)
        if not self._placement.before_activation:
            return name
        takers = self._takers(name)
        if len(takers) == 1 and takers[0].operator in ABSORBED and takers[0].outputs[0] not in self._exclude:
            name = takers[0].outputs[0]
            self._integer.add(name)
        self._grids.add(name)
        return name

    def _unary(self, node: GraphNode) -> None:
        before, after = self._source(node.inputs[0]), node.outputs[0]
        homogeneous = node.operator in _HOMOGENEOUS
        if before not in self._grids or not (homogeneous or node.index in self._live):
            return  # a pool in the head stays in float
        self._integer.add(after)
        self._grids.add(after)
        if homogeneous:
            self._shared.join((before, after))
            if before == node.inputs[0] and len(self._takers(before)) == 1:
                self._followed_by[before] = after

    def _join(self, node: GraphNode) -> None:
        taken = [self._source(name) for name in self._taken(node)]
        if self._placement.residual_only and node.operator == "Add":
            ends = [name for name in taken if name not in self._grids and len(self._takers(name)) == 1]
            self._grids.update(name for name in taken if name not in ends[-1:])
            self._near.add(node.outputs[0])
            return
        self._grids.update(taken)
        made = self._made(node)
        self._grids.add(made)
        self._shared.join((*taken, made))

    def _taken(self, node: GraphNode) -> list[str]:
        return [name for name in node.inputs if name]

    def _all_near(self, node: GraphNode) -> bool:
        """Whether everything that a node takes lies on a grid or comes straight from an INT8 product."""
        sources = map(self._source, self._taken(node))
        return all(name in self._grids or name in self._near for name in sources)

    def _takers(self, name: str) -> list[GraphNode]:
        """Nodes that take a tensor; an output of the graph is taken by one more."""
        takers = [node for node, _ in self._graph.consumers.get(name, [])]
        return takers + takers[:1] if name in self._graph.output_names else takers

    def _source(self, name: str) -> str:
        """The tensor on whose grid this one lies: back through movers."""
        node = self._graph.producers.get(name)
        while node is not None and is_mover(node) and node.outputs[0] not in self._exclude:
            name = node.inputs[0]
            node = self._graph.producers.get(name)
        return name


def _leading_to(graph: TorchGraph, wanted: set[int]) -> set[int]:
    """Indices of the nodes after which one of `wanted` comes."""
    found: set[int] = set()
    for node in reversed(graph.nodes):
        takers = [taker.index for name in node.outputs for taker, _ in graph.consumers.get(name, [])]
        if any(index in wanted or index in found for index in takers):
            found.add(node.index)
    return found


class _Sets:
    """Union of sets that meet."""

    def __init__(self) -> None:
        self._parents: dict[str, str] = {}

    def join(self, names: Iterable[str]) -> None:
        roots = [self._root(name) for name in names]
        for root in roots[1:]:
            self._parents[self._root(root)] = self._root(roots[0])

    def sets(self, names: Iterable[str]) -> tuple[frozenset[str], ...]:
        """Sets of two and more of `names`, ordered by their names."""
        found: dict[str, set[str]] = {}
        for name in names:
            found.setdefault(self._root(name), set()).add(name)
        return tuple(frozenset(group) for group in sorted(map(sorted, found.values())) if len(group) > 1)

    def _root(self, name: str) -> str:
        self._parents.setdefault(name, name)
        while self._parents[name] != name:
            name = self._parents[name]
        return name
