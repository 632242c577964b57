"""Weights and biases that belong to one product each, with what scales them folded in."""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from cspdeploy.export.rewrite import captured_names

__all__ = ["fold_batch_norms", "own_weights"]

Array = npt.NDArray[np.generic]


def fold_batch_norms(graph: onnx.GraphProto) -> int:
    """BatchNormalization, as inference computes it, into the convolution whose output nobody else takes.

        W' = W * g / sqrt(v + eps)        b' = (b - m) * g / sqrt(v + eps) + beta,  one number for each output channel

    Returns:
        How many were folded.
    """
    weights = _weights_of(graph)
    producers = {name: node for node in graph.node for name in node.output}
    uses = _uses(graph)
    gone = []
    for norm in graph.node:
        conv = producers.get(norm.input[0]) if norm.op_type == "BatchNormalization" else None
        if conv is None or conv.op_type != "Conv" or uses[norm.input[0]] != 1 or any(norm.output[1:]):
            continue
        given = [*norm.input[1:5], *filter(None, conv.input[1:])]
        if not all(name in weights for name in given):
            continue
        gain, shift, mean, variance = (numpy_helper.to_array(weights[name]) for name in norm.input[1:5])
        epsilon = next((attribute.f for attribute in norm.attribute if attribute.name == "epsilon"), 1e-5)
        factor = gain / np.sqrt(variance + np.float32(epsilon))
        weight = numpy_helper.to_array(weights[conv.input[1]])
        bias = numpy_helper.to_array(weights[conv.input[2]]) if len(conv.input) > 2 and conv.input[2] else 0.0
        folded = weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
        _give(graph, conv, 1, folded.astype(np.float32))
        _give(graph, conv, 2, ((bias - mean) * factor + shift).astype(np.float32))
        conv.output[0] = norm.output[0]
        gone.append(norm.output[0])
        weights = weights | {tensor.name: tensor for tensor in graph.initializer[-2:]}
    kept = [node for node in graph.node if node.op_type != "BatchNormalization" or node.output[0] not in gone]
    del graph.node[:]
    graph.node.extend(kept)
    return len(gone)


def own_weights(graph: onnx.GraphProto) -> None:
    """Every Conv, Gemm and MatMul gets initializers that nothing else takes, and every Conv and Gemm a bias.

    A Gemm's alpha and beta go into its weight and bias.
    """
    weights, uses = _weights_of(graph), _uses(graph)
    for node in graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul") or node.input[1] not in weights:
            continue
        weight = numpy_helper.to_array(weights[node.input[1]])
        alpha = _take_factor(node, "alpha")
        if uses[node.input[1]] > 1 or alpha != 1:
            _give(graph, node, 1, weight if alpha == 1 else weight * np.float32(alpha))
        if node.op_type != "MatMul":
            _own_bias(graph, node, weights, uses, num_channels=_num_channels(node, weight))


def _own_bias(
    graph: onnx.GraphProto,
    node: onnx.NodeProto,
    weights: dict[str, onnx.TensorProto],
    uses: Counter[str],
    *,
    num_channels: int,
) -> None:
    name = node.input[2] if len(node.input) > 2 else ""
    if name and name not in weights:
        return
    beta = _take_factor(node, "beta")
    bias = numpy_helper.to_array(weights[name]) if name else np.zeros(num_channels, np.float32)
    if bias.size not in (1, num_channels) or (bias.size > 1 and bias.shape[-1] != num_channels):
        if beta != 1:
            _give(graph, node, 2, bias * np.float32(beta))
        return  # a Gemm may add a whole matrix
    if not name or uses[name] > 1 or beta != 1 or bias.shape != (num_channels,):
        _give(graph, node, 2, np.broadcast_to(bias.reshape(-1), (num_channels,)) * np.float32(beta))


def _num_channels(node: onnx.NodeProto, weight: Array) -> int:
    turned = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    rows = node.op_type == "Conv" or turned
    return int(weight.shape[0] if rows else weight.shape[1])


def _take_factor(node: onnx.NodeProto, name: str) -> float:
    """The value of a Gemm's factor, which is removed from the node."""
    found = next((attribute for attribute in node.attribute if attribute.name == name), None)
    if node.op_type != "Gemm" or found is None:
        return 1.0
    value = float(found.f)
    node.attribute.remove(found)
    return value


def _give(graph: onnx.GraphProto, node: onnx.NodeProto, position: int, value: Array) -> None:
    """A new initializer for one input of a node, named after its output."""
    taken = {tensor.name for tensor in graph.initializer} | {name for other in graph.node for name in other.output}
    name = f"{node.output[0]}/{'weight' if position == 1 else 'bias'}"
    while name in taken:
        name += "_"
    graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
    while len(node.input) <= position:
        node.input.append("")
    node.input[position] = name


def _weights_of(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in graph.initializer}


def _uses(graph: onnx.GraphProto) -> Counter[str]:
    """How often each tensor is taken; an output of the graph is taken once more."""
    uses = Counter(name for node in graph.node for name in (*node.input, *captured_names(node)))
    uses.update(value.name for value in graph.output)
    return uses
