"""A graph by its tensors, with the grids that they lie on: what the rules on QuantizeLinear and DequantizeLinear ask.

A grid is a scale and what it is applied to; a product is a convolution or a matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt

from cspdeploy.check.lint_scope import known_tensors
from cspdeploy.core.errors import InputError
from cspdeploy.core.onnx_graph import DEFAULT_DOMAIN, Graph, Node, Tensor

__all__ = ["ACTIVATIONS", "DQ", "PRODUCTS", "Q", "QdqGraph", "input_of", "moves"]

Constant = Tensor | npt.NDArray[np.generic]

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
_NUMBERS = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
"""Attributes of Constant that hold numbers without a tensor, from opset 12 on."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QdqGraph:
    """A graph by its tensors.

    Attributes:
        makers: the node that makes a tensor; takers: those that take it.
        constants: tensors that the file holds, also behind an Identity.
        known: tensors that are known before the graph runs, also by computing with constants.
        grids: the DequantizeLinear that a tensor comes from, through nodes that only move values; of several that a
            Concat joins the first. What is on no grid is not in it.
        leading: indices of the nodes after which a product comes that is meant to be in integers.
    """

    graph: Graph
    makers: Mapping[str, Node]
    takers: Mapping[str, list[Node]]
    constants: Mapping[str, Constant]
    known: frozenset[str]
    grids: Mapping[str, Node]
    leading: frozenset[int]

    @classmethod
    def of(cls, graph: Graph) -> QdqGraph | None:
        """None for a graph without pairs, of which there is nothing to say."""
        if not any(node.operator in (Q, DQ) and node.domain == DEFAULT_DOMAIN for node in graph.nodes):
            return None
        takers: dict[str, list[Node]] = {}
        for node in graph.nodes:
            for name in node.inputs:
                takers.setdefault(name, []).append(node)
        grids = _find_grids(graph)
        return cls(
            graph=graph, makers={name: node for node in graph.nodes for name in node.outputs if name}, takers=takers,
            constants=_find_constants(graph), known=known_tensors(graph), grids=grids,
            leading=_find_leading(graph, takers, grids),
        )  # fmt: skip

    def of_kind(self, *operators: str) -> Iterator[Node]:
        """The nodes of these operators of ONNX, in graph order."""
        return (node for node in self.graph.nodes if node.operator in operators and node.domain == DEFAULT_DOMAIN)

    def maker(self, name: str, *operators: str) -> Node | None:
        """The node that makes a tensor, where it is one of these."""
        node = self.makers.get(name)
        return node if node is not None and node.operator in operators else None

    def grid(self, name: str) -> Node | None:
        """As `grids`; None where it is on none."""
        return self.grids.get(name)

    def is_quantised(self, node: Node) -> bool:
        """A product with both inputs on grids."""
        return node.operator in PRODUCTS and len(node.inputs) > 1 and all(map(self.grid, node.inputs[:2]))

    def product(self, name: str) -> Node | None:
        """The quantised product whose sums, or their activation, a tensor holds."""
        node = self.makers.get(name)
        if node is not None and node.operator in ACTIVATIONS:
            node = self.makers.get(input_of(node, 0))
        return node if node is not None and self.is_quantised(node) else None

    def scale(self, node: Node) -> npt.NDArray[np.floating] | None:
        """Of a QuantizeLinear or DequantizeLinear, flat; None where it cannot be read."""
        values = self.values(input_of(node, 1))
        if values is None or not np.issubdtype(values.dtype, np.floating):
            return None
        return cast("npt.NDArray[np.floating]", values.ravel())

    def differ(self, first: Node, second: Node) -> bool:
        """Whether two of them have scales that are known and not the same, in the narrower of their types."""
        one, other = self.scale(first), self.scale(second)
        if one is None or other is None:
            return False
        narrow = min(one.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
        return not np.array_equal(one.astype(narrow), other.astype(narrow), equal_nan=True)

    def values(self, name: str) -> npt.NDArray[np.generic] | None:
        """Of a constant tensor; None where they cannot be read."""
        tensor = self.constants.get(name)
        try:
            return tensor.array() if isinstance(tensor, Tensor) else tensor
        except InputError:  # a type that numpy lacks
            return None

    def rank(self, name: str) -> int | None:
        """How many dimensions a tensor has; None where the file does not tell."""
        while name:
            if name in self.constants:
                return len(self.constants[name].shape)
            value = self.graph.values.get(name)
            if value is not None and value.shape is not None:
                return len(value.shape)
            node = self.maker(name, "Identity", "Transpose", Q, DQ)
            name = "" if node is None else input_of(node, 0)
        return None

    def is_behind(self, name: str, operator: str) -> bool:
        """Whether all that take a tensor, one at least, are of that operator."""
        takers = self.takers.get(name, [])
        return bool(takers) and all(node.operator == operator for node in takers)


def input_of(node: Node, position: int) -> str:
    """The name of an input; empty where the node has none there."""
    return node.inputs[position] if position < len(node.inputs) else ""


def moves(node: Node) -> bool:
    """Whether its first output holds values of its first input and no others."""
    mode = node.attributes.get("mode", b"nearest")
    return node.operator in MOVERS or (node.operator == "Resize" and mode in (b"nearest", "nearest"))


def _find_constants(graph: Graph) -> dict[str, Constant]:
    found: dict[str, Constant] = dict(graph.initializers)
    for node in graph.nodes:  # in the order in which they run
        if node.operator == "Identity" and input_of(node, 0) in found:
            found[node.outputs[0]] = found[node.inputs[0]]
        for name, value in node.attributes.items() if node.operator == "Constant" else ():
            if isinstance(value, Tensor):
                found[node.outputs[0]] = value
            elif name in _NUMBERS:
                found[node.outputs[0]] = np.array(value, _NUMBERS[name])
    return found


def _find_grids(graph: Graph) -> dict[str, Node]:
    """One pass in the order in which the nodes run: a network may nest as many Concats as it likes."""
    grids: dict[str, Node] = {}
    for node in graph.nodes:
        grid = node if node.operator == DQ else grids.get(input_of(node, 0))
        joined = node.operator == "Concat" and all(name in grids for name in node.inputs)
        if grid is not None and (node.operator == DQ or joined or moves(node)):
            grids.update(dict.fromkeys(filter(None, node.outputs), grid))
    return grids


def _find_leading(graph: Graph, takers: Mapping[str, list[Node]], grids: Mapping[str, Node]) -> frozenset[int]:
    """A product with one input on a grid at least is meant to be in integers."""
    meant = {
        node.index for node in graph.nodes
        if node.operator in PRODUCTS and any(name in grids for name in node.inputs[:2])
    }  # fmt: skip
    leading: set[int] = set()
    for node in reversed(graph.nodes):
        after = [taker.index for name in node.outputs for taker in takers.get(name, [])]
        if any(index in meant or index in leading for index in after):
            leading.add(node.index)
    return frozenset(leading)
