"""How QuantizeLinear and DequantizeLinear lie in a graph, and which nodes break a rule on that.

A grid is a scale and what it is applied to; a product is a convolution or a matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from cspdeploy.core.errors import InputError
from cspdeploy.core.onnx_graph import DEFAULT_DOMAIN, Graph, Node, Tensor
from cspdeploy.core.targets import PatternRule

__all__ = ["QdqGraph", "broken_patterns"]

Q, DQ = "QuantizeLinear", "DequantizeLinear"
PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
ACTIVATIONS = frozenset({
    "Relu", "Clip", "LeakyRelu", "PRelu", "Sigmoid", "HardSigmoid", "HardSwish", "Mish", "Elu", "Selu", "Softplus",
    "Tanh", "Gelu", "Celu",
})  # fmt: skip
MOVERS = frozenset({
    "MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split", "DepthToSpace",
    "SpaceToDepth", "Identity",
})  # fmt: skip
"""Their outputs hold values of their first input and no others."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QdqGraph:
    """A graph by its tensors.

    Attributes:
        makers: the node that makes a tensor; takers: those that take it.
        constants: tensors that are known before the graph runs, where their values can be read.
        leading: indices of the nodes after which a product comes that is meant to be in integers.
    """

    graph: Graph
    makers: dict[str, Node]
    takers: dict[str, list[Node]]
    constants: dict[str, Tensor]
    leading: frozenset[int]

    @classmethod
    def of(cls, graph: Graph) -> QdqGraph | None:
        """None for a graph without pairs, of which there is nothing to say."""
        if not any(node.operator in (Q, DQ) and node.domain == DEFAULT_DOMAIN for node in graph.nodes):
            return None
        makers = {name: node for node in graph.nodes for name in node.outputs if name}
        takers: dict[str, list[Node]] = {}
        for node in graph.nodes:
            for name in node.inputs:
                takers.setdefault(name, []).append(node)
        constants = dict(graph.initializers)
        for node in graph.nodes:
            value = node.attributes.get("value")
            if node.operator == "Constant" and isinstance(value, Tensor):
                constants[node.outputs[0]] = value
        found = cls(graph=graph, makers=makers, takers=takers, constants=constants, leading=frozenset())
        wanted = {node.index for node in graph.nodes if found.is_meant(node)}
        leading: set[int] = set()
        for node in reversed(graph.nodes):
            after = [taker.index for name in node.outputs for taker in takers.get(name, [])]
            if any(index in wanted or index in leading for index in after):
                leading.add(node.index)
        return cls(graph=graph, makers=makers, takers=takers, constants=constants, leading=frozenset(leading))

    def maker(self, name: str, *operators: str) -> Node | None:
        """The node that makes a tensor, where it is one of these."""
        node = self.makers.get(name)
        return node if node is not None and node.operator in operators else None

    def grid(self, name: str) -> Node | None:
        """The DequantizeLinear that a tensor comes from, through nodes that only move values; of several the first."""
        node = self.makers.get(name)
        while node is not None and _moves(node):
            node = self.makers.get(node.inputs[0])
        if node is not None and node.operator == "Concat":
            return self.grid(node.inputs[0]) if all(map(self.grid, node.inputs)) else None
        return node if node is not None and node.operator == DQ else None

    def is_quantised(self, node: Node) -> bool:
        """A product with both inputs on grids."""
        return node.operator in PRODUCTS and len(node.inputs) > 1 and all(map(self.grid, node.inputs[:2]))

    def is_meant(self, node: Node) -> bool:
        """A product with one input on a grid at least."""
        return node.operator in PRODUCTS and any(map(self.grid, node.inputs[:2]))

    def product(self, name: str) -> Node | None:
        """The quantised product whose sums, or their activation, a tensor holds."""
        node = self.makers.get(name)
        if node is not None and node.operator in ACTIVATIONS:
            node = self.makers.get(node.inputs[0])
        return node if node is not None and self.is_quantised(node) else None

    def scale(self, node: Node) -> bytes | None:
        """Of a QuantizeLinear or DequantizeLinear, as bytes to be compared; None where it is not known."""
        values = self.values(node.inputs[1])
        return None if values is None else values.tobytes()

    def values(self, name: str) -> np.ndarray | None:
        """Of a constant tensor; None where they cannot be read."""
        tensor = self.constants.get(name)
        try:
            return None if tensor is None else tensor.array()
        except InputError:  # a type that numpy lacks
            return None

    def is_behind(self, name: str, operator: str) -> bool:
        """Whether all that take a tensor, one at least, are of that operator."""
        takers = self.takers.get(name, [])
        return bool(takers) and all(node.operator == operator for node in takers)


def broken_patterns(rule: PatternRule, graph: QdqGraph) -> Iterator[tuple[Node | None, str]]:
    """Nodes that break the rule, with what they have instead; None for the file as a whole."""
    return _CHECKS[rule.kind](graph)


def _moves(node: Node) -> bool:
    mode = node.attributes.get("mode", b"nearest")
    return node.operator in MOVERS or (node.operator == "Resize" and mode in (b"nearest", "nearest"))


def _scales(graph: QdqGraph) -> Iterator[tuple[Node | None, str]]:
    for node in _of(graph, Q, DQ):
        name = node.inputs[1]
        if name not in graph.constants:
            yield node, f"scale '{name}' is computed while it runs"
            continue
        values = graph.values(name)
        if values is not None and not (np.isfinite(values) & (values > 0)).all():
            yield node, f"a scale of {values[~(np.isfinite(values) & (values > 0))].flat[0]}"


def _channel_axes(graph: QdqGraph) -> Iterator[tuple[Node | None, str]]:
    for node in _of(graph, Q, DQ):
        scale = graph.constants.get(node.inputs[1])
        if scale is None or int(np.prod(scale.shape, dtype=np.int64)) == 1:
            continue
        data = node.inputs[0]
        if data not in graph.constants and graph.maker(data, Q) is not None and (
            graph.maker(data, Q).inputs[0] in graph.constants  # type: ignore[union-attr]
        ):  # fmt: skip
            data = graph.makers[data].inputs[0]
        if data not in graph.constants:
            yield node, f"{scale.shape[0]} scales on an activation"
            continue
        axis = node.attributes.get("axis", 1)
        rank = len(graph.constants[data].shape)
        for taker in graph.takers.get(node.outputs[0], []):
            wanted = _axis_of(taker)
            if wanted is not None and isinstance(axis, int) and axis % max(rank, 1) != wanted:
                yield node, f"scales along axis {axis} of the weight of {taker.operator}"


def _axis_of(product: Node) -> int | None:
    """Of the output channels, in a weight."""
    if product.operator == "Gemm":
        return 0 if product.attributes.get("transB", 0) else 1
    return {"Conv": 0, "ConvTranspose": 1, "MatMul": 1}.get(product.operator)


def _pairs(graph: QdqGraph) -> Iterator[tuple[Node | None, str]]:
    for node in _of(graph, Q):
        others = [taker.operator for taker in graph.takers.get(node.outputs[0], []) if taker.operator != DQ]
        if others:
            yield node, f"{others[0]} on its integers"
    for node in _of(graph, DQ):
        maker = graph.makers.get(node.inputs[0])
        if maker is not None and maker.operator not in (Q, "Constant") and node.inputs[0] not in graph.constants:
            yield node, f"integers from {maker.operator}"


def _half_quantised(graph: QdqGraph) -> Iterator[tuple[Node | None, str]]:
    for node in _of(graph, *PRODUCTS):
        if len(node.inputs) > 1:
            data, weight = (graph.grid(name) is not None for name in node.inputs[:2])
            if data != weight:
                on, off = ("input", "weight") if data else ("weight", "input")
                yield node, f"its {on} on a grid, its {off} not"


def _activations(graph: QdqGraph) -> Iterator[tuple[Node | None, str]]:
    for node in _of(graph, *ACTIVATIONS):
        dequantised = graph.maker(node.inputs[0], DQ)
        quantised = None if dequantised is None else graph.maker(dequantised.inputs[0], Q)
        product = None if quantised is None else graph.maker(quantised.inputs[0], *PRODUCTS)
        if product is not None and len(graph.takers.get(product.outputs[0], [])) == 1:
            yield node, f"a pair between it and {product.operator}"


def _residuals(graph: QdqGraph) -> Iterator[tuple[Node | None, str]]:
    for node in _of(graph, "Add"):
        if node.index not in graph.leading or any(name in graph.constants for name in node.inputs):
            continue
        grids = [graph.grid(name) for name in node.inputs]
        if not any(grids) and all(map(graph.product, node.inputs)):
            yield node, "no pair on either branch"
        elif all(grids) and any(_is_own(graph, grid) for grid in grids if grid is not None):
            yield node, "a pair on the branch of the convolution"


def _is_own(graph: QdqGraph, dequantised: Node) -> bool:
    """Whether a pair stands between a quantised product and the one node that takes its sums."""
    quantised = graph.maker(dequantised.inputs[0], Q)
    if quantised is None or graph.product(quantised.inputs[0]) is None:
        return False
    made = (quantised.inputs[0], quantised.outputs[0], dequantised.outputs[0])
    return all(len(graph.takers.get(name, [])) == 1 for name in made)


def _concats(graph: QdqGraph) -> Iterator[tuple[Node | None, str]]:
    for node in _of(graph, "Concat"):
        grids = [graph.grid(name) for name in node.inputs if name]
        if node.index not in graph.leading or not any(grids) or graph.is_behind(node.outputs[0], Q):
            continue
        if not all(grids):
            yield node, f"{sum(grid is None for grid in grids)} of its {len(grids)} inputs without a grid"
            continue
        scales = {graph.scale(grid) for grid in grids if grid is not None}
        if len(scales) > 1:
            yield node, f"{len(scales)} scales"


def _kept_grids(graph: QdqGraph) -> Iterator[tuple[Node | None, str]]:
    for node in graph.graph.nodes:
        before = graph.maker(node.inputs[0], DQ) if node.inputs and _moves(node) else None
        if before is None:
            continue
        for taker in graph.takers.get(node.outputs[0], []):
            if taker.operator == Q and graph.scale(taker) != graph.scale(before):
                yield node, "another scale behind it than before it"


def _outputs(graph: QdqGraph) -> Iterator[tuple[Node | None, str]]:
    for value in graph.graph.outputs:
        node = graph.maker(value.name, DQ)
        if node is not None:
            yield node, f"output '{value.name}' rounded to 8 bits"


def _quantised_products(graph: QdqGraph) -> Iterator[tuple[Node | None, str]]:
    products = list(_of(graph, *PRODUCTS))
    num = sum(map(graph.is_quantised, products))
    if num:
        yield None, f"{num} of {len(products)} convolutions and matrix products between Q/DQ pairs"


def _of(graph: QdqGraph, *operators: str) -> Iterator[Node]:
    return (node for node in graph.graph.nodes if node.operator in operators and node.domain == DEFAULT_DOMAIN)


_CHECKS: dict[str, Callable[[QdqGraph], Iterator[tuple[Node | None, str]]]] = {
    "scale": _scales, "channel-axis": _channel_axes, "pair": _pairs, "half-quantised": _half_quantised,
    "activation": _activations, "residual": _residuals, "concat": _concats, "grid-kept": _kept_grids,
    "output": _outputs, "quantised-product": _quantised_products,
}  # fmt: skip
