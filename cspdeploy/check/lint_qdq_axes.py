"""Scales for each channel: only weights have them, along the channels of the output."""

from __future__ import annotations

from collections.abc import Iterator

from cspdeploy.check.lint_qdq_graph import DQ, PRODUCTS, Q, QdqGraph, input_of
from cspdeploy.core.onnx_graph import Node

__all__ = ["wrong_axes"]


def wrong_axes(graph: QdqGraph) -> Iterator[tuple[Node | None, str]]:
    """QuantizeLinear and DequantizeLinear with several scales on an activation, or along another axis of a weight.

    Scales for each block of a weight are no matter of axes and are stepped over.
    """
    for node in graph.of_kind(Q, DQ):
        scale = graph.scale(node)
        if scale is None or scale.size == 1 or node.attributes.get("block_size"):
            continue
        if input_of(node, 0) not in graph.known:
            yield node, f"{scale.size} scales on an activation"
            continue
        axis, rank = node.attributes.get("axis", 1), graph.rank(node.inputs[0])
        if not isinstance(axis, int) or (axis < 0 and rank is None) or rank in (0, 1):  # a bias has one axis only
            continue
        own = axis if rank is None else axis % rank
        for product, position, seen in _products(graph, node.outputs[0], own, rank=rank):
            wanted = _output_axis(product, position, rank=rank)
            if wanted is not None and seen != wanted:
                turned = f" (axis {seen} behind Transpose)" if seen != own else ""
                yield node, f"scales along axis {axis}{turned} of the weight of {product.operator}"


def _products(graph: QdqGraph, name: str, axis: int, *, rank: int | None) -> Iterator[tuple[Node, int, int]]:
    """Products that take a tensor, at which input, and where its axis lies there: past Identity and Transpose."""
    waiting = [(name, axis)]
    while waiting:
        name, axis = waiting.pop()
        for taker in graph.takers.get(name, []):
            if taker.operator in PRODUCTS:
                yield taker, taker.inputs.index(name), axis
            elif taker.operator == "Identity":
                waiting.append((taker.outputs[0], axis))
            elif taker.operator == "Transpose":
                order = taker.attributes.get("perm", tuple(reversed(range(rank or 0))))
                if isinstance(order, tuple) and axis in order:
                    waiting.append((taker.outputs[0], order.index(axis)))


def _output_axis(product: Node, position: int, *, rank: int | None) -> int | None:
    """Of the output channels in the weight that a product takes there; None where none is there, or it is not known."""
    if product.operator == "MatMul":  # a weight on the left has them along its rows
        return None if rank is None else rank - 2 + position
    if product.operator == "Gemm" and position < 2:
        transposed = product.attributes.get(("transA", "transB")[position], 0)
        return 1 - position if transposed else position
    return {"Conv": 0, "ConvTranspose": 1}[product.operator] if position == 1 else None
