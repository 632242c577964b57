"""Which nodes break a rule on how QuantizeLinear and DequantizeLinear lie in a graph: one function a kind of rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from cspdeploy.check.lint_qdq_axes import wrong_axes
from cspdeploy.check.lint_qdq_graph import ACTIVATIONS, DQ, PRODUCTS, Q, QdqGraph, input_of, moves
from cspdeploy.core.onnx_graph import Node, Tensor
from cspdeploy.core.targets import PatternRule

__all__ = ["broken_patterns"]


def broken_patterns(rule: PatternRule, graph: QdqGraph) -> Iterator[tuple[Node | None, str]]:
    """Nodes that break the rule, with what they have instead; None for the file as a whole."""
    return _CHECKS[rule.kind](graph)


def _scales(graph: QdqGraph) -> Iterator[tuple[Node | None, str]]:
    for node in graph.of_kind(Q, DQ):
        name = input_of(node, 1)
        if not name:
            yield node, "no scale"
            continue
        if name not in graph.known:
            yield node, f"scale '{name}' is computed while it runs"
            continue
        values = graph.scale(node)
        if values is not None and not (np.isfinite(values) & (values > 0)).all():
            yield node, f"a scale of {values[~(np.isfinite(values) & (values > 0))].flat[0]}"


def _pairs(graph: QdqGraph) -> Iterator[tuple[Node | None, str]]:
    for node in graph.of_kind(Q):
        takers = graph.takers.get(node.outputs[0], [])
        others = [taker.operator for taker in takers if taker.operator != DQ]
        if others:
            yield node, f"{others[0]} on its integers"
        for other in takers:
            if other.operator == DQ and graph.differ(node, other):
                yield node, f"{_scale_words(graph, node)}, the DequantizeLinear behind it {_scale_words(graph, other)}"
    for node in graph.of_kind(DQ):
        name = input_of(node, 0)
        maker = graph.makers.get(name)
        if maker is not None and maker.operator != Q and name not in graph.known:
            yield node, f"integers from {maker.operator}"


def _scale_words(graph: QdqGraph, node: Node) -> str:
    values = graph.scale(node)
    if values is None or values.size != 1:
        return "other scales" if values is None else f"{values.size} scales"
    return f"a scale of {values[0]:.6g}"


def _half_quantised(graph: QdqGraph) -> Iterator[tuple[Node | None, str]]:
    """In a file where weights alone are on grids, they are so to be small, and computing in float is what is meant."""
    weights_only = all(input_of(node, 0) in graph.known for node in graph.of_kind(DQ))
    for node in graph.of_kind(*PRODUCTS):
        if len(node.inputs) < 2:
            continue
        data, weight = (graph.grid(name) for name in node.inputs[:2])
        grid = data or weight
        if grid is None or (data and weight) or weights_only or _is_packed(graph, grid):
            continue
        on, off = ("input", "weight") if data else ("weight", "input")
        yield node, f"its {on} on a grid, its {off} not"


def _is_packed(graph: QdqGraph, grid: Node) -> bool:
    """A constant in a form that only weights have: less than 8 bits, or a scale for each block."""
    constant = graph.constants.get(input_of(grid, 0))
    narrow = isinstance(constant, Tensor) and constant.dtype in ("int4", "uint4", "int2", "uint2", "float4e2m1")
    return narrow or (bool(grid.attributes.get("block_size")) and input_of(grid, 0) in graph.known)


def _activations(graph: QdqGraph) -> Iterator[tuple[Node | None, str]]:
    for node in graph.of_kind(*ACTIVATIONS):
        dequantised = graph.maker(input_of(node, 0), DQ)
        quantised = None if dequantised is None else graph.maker(input_of(dequantised, 0), Q)
        product = None if quantised is None else graph.maker(input_of(quantised, 0), *PRODUCTS)
        if product is not None and len(graph.takers.get(product.outputs[0], [])) == 1:
            yield node, f"a pair between it and {product.operator}"


def _residuals(graph: QdqGraph) -> Iterator[tuple[Node | None, str]]:
    for node in graph.of_kind("Add"):
        if node.index not in graph.leading or any(name in graph.constants for name in node.inputs):
            continue
        grids = [graph.grid(name) for name in node.inputs]
        if not any(grids) and all(map(graph.product, node.inputs)):
            yield node, "no pair on either branch"
        elif all(grids) and any(_is_own(graph, grid) for grid in grids if grid is not None):
            yield node, "a pair on the branch of the convolution"


def _is_own(graph: QdqGraph, dequantised: Node) -> bool:
    """Whether a pair stands between a quantised product and the one node that takes its sums."""
    quantised = graph.maker(input_of(dequantised, 0), Q)
    if quantised is None or graph.product(input_of(quantised, 0)) is None:
        return False
    made = (quantised.inputs[0], quantised.outputs[0], dequantised.outputs[0])
    return all(len(graph.takers.get(name, [])) == 1 for name in made)


def _concats(graph: QdqGraph) -> Iterator[tuple[Node | None, str]]:
    for node in graph.of_kind("Concat"):
        grids = [graph.grid(name) for name in node.inputs if name]
        if node.index not in graph.leading or not any(grids) or graph.is_behind(node.outputs[0], Q):
            continue
        if not all(grids):
            yield node, f"{sum(grid is None for grid in grids)} of its {len(grids)} inputs without a grid"
            continue
        scales = {scale.tobytes() for grid in grids if grid is not None and (scale := graph.scale(grid)) is not None}
        if len(scales) > 1:
            yield node, f"{len(scales)} scales"


def _kept_grids(graph: QdqGraph) -> Iterator[tuple[Node | None, str]]:
    for node in graph.graph.nodes:
        before = graph.maker(input_of(node, 0), DQ) if moves(node) else None
        if before is None:
            continue
        for taker in graph.takers.get(node.outputs[0], []):
            if taker.operator == Q and graph.differ(taker, before):
                yield node, "another scale behind it than before it"


def _outputs(graph: QdqGraph) -> Iterator[tuple[Node | None, str]]:
    """Also where nodes that only move values lie between the pair and the output."""
    for value in graph.graph.outputs:
        node = graph.grid(value.name)
        if node is not None and value.name not in graph.known:
            yield node, f"output '{value.name}' rounded to 8 bits"


def _quantised_products(graph: QdqGraph) -> Iterator[tuple[Node | None, str]]:
    products = list(graph.of_kind(*PRODUCTS))
    num = sum(map(graph.is_quantised, products))
    if num:
        yield None, f"{num} of {len(products)} convolutions and matrix products between Q/DQ pairs"


_CHECKS: dict[str, Callable[[QdqGraph], Iterator[tuple[Node | None, str]]]] = {
    "scale": _scales, "channel-axis": wrong_axes, "pair": _pairs, "half-quantised": _half_quantised,
    "activation": _activations, "residual": _residuals, "concat": _concats, "grid-kept": _kept_grids,
    "output": _outputs, "quantised-product": _quantised_products,
}  # fmt: skip
