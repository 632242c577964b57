"""Operators that some targets lack, written with older ones. Each rewrite is the operator's definition in ONNX.

Source: the function bodies in docs/Operators.md of onnx/onnx. The graphs are float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from cspdeploy.export.rewrite import subgraphs_of

__all__ = ["DECOMPOSITIONS", "decompose"]

AXES_ARE_INPUTS = 18
"""Opset from which the reductions take their axes as an input."""
CHANNEL_SCALES = 21
"""Opset from which GroupNormalization has a scale for each channel instead of each group."""


class _Writer:
    """The nodes that stand for one node, and the constants that they need."""

    def __init__(self, node: onnx.NodeProto, opset: int, weights: dict[str, onnx.TensorProto]) -> None:
        self.node, self.opset, self._weights = node, opset, weights
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def attribute(self, name: str, default: Any) -> Any:
        found = next((item for item in self.node.attribute if item.name == name), None)
        return default if found is None else helper.get_attribute_value(found)

    def dims(self, name: str) -> list[int] | None:
        """Of a weight; None for anything else."""
        return list(self._weights[name].dims) if name in self._weights else None

    def constant(self, value: npt.ArrayLike, what: str, dtype: type[np.generic] = np.float32) -> str:
        name = f"{self.node.output[0]}/{what}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def add(self, operator: str, inputs: Iterable[str], what: str = "", **attributes: Any) -> str:
        """Append a node and give its output; the last one, without `what`, makes the output of the old node."""
        old = self.node
        output = f"{old.output[0]}/{what}" if what else old.output[0]
        name = f"{old.name or old.output[0]}/{what or operator}"
        self.nodes.append(helper.make_node(operator, list(inputs), [output], name=name, **attributes))
        return output

    def mean(self, name: str, axes: list[int], what: str) -> str:
        if self.opset < AXES_ARE_INPUTS:
            return self.add("ReduceMean", [name], what, axes=axes, keepdims=1)
        axes_name = self.constant(axes, f"{what}_axes", np.int64)
        return self.add("ReduceMean", [name, axes_name], what, keepdims=1)


def _mish(writer: _Writer) -> bool:
    x = writer.node.input[0]
    soft = writer.add("Softplus", [x], "softplus")
    writer.add("Mul", [x, writer.add("Tanh", [soft], "tanh")])
    return True


def _hard_swish(writer: _Writer) -> bool:
    x = writer.node.input[0]
    gate = writer.add("HardSigmoid", [x], "hard_sigmoid", alpha=1.0 / 6.0, beta=0.5)
    writer.add("Mul", [x, gate])
    return True


def _gelu(writer: _Writer) -> bool:
    x = writer.node.input[0]
    if writer.attribute("approximate", b"none") == b"tanh":
        cube = writer.add("Mul", [writer.add("Mul", [x, x], "square"), x], "cube")
        bent = writer.add("Mul", [cube, writer.constant(0.044715, "bend")], "bent")
        gain = writer.constant(math.sqrt(2 / math.pi), "gain")
        inner = writer.add("Mul", [writer.add("Add", [x, bent], "sum"), gain], "inner")
        curve = writer.add("Tanh", [inner], "tanh")
    else:
        curve = writer.add("Erf", [writer.add("Div", [x, writer.constant(math.sqrt(2), "root")], "scaled")], "erf")
    gate = writer.add("Add", [curve, writer.constant(1.0, "one")], "gate")
    writer.add("Mul", [writer.add("Mul", [x, writer.constant(0.5, "half")], "halved"), gate])
    return True


def _layer_normalization(writer: _Writer) -> bool:
    x, scale, *rest = writer.node.input
    axis, dims = writer.attribute("axis", -1), writer.dims(scale)
    if axis >= 0 and dims is None:  # the rank is not known, nor so how many axes there are
        return False
    axes = list(range(axis if axis < 0 else -len(dims or ()), 0))
    centred = writer.add("Sub", [x, writer.mean(x, axes, "mean")], "centred")
    variance = writer.mean(writer.add("Mul", [centred, centred], "square"), axes, "variance")
    epsilon = writer.constant(writer.attribute("epsilon", 1e-5), "epsilon")
    deviation = writer.add("Sqrt", [writer.add("Add", [variance, epsilon], "shifted")], "deviation")
    normal = writer.add("Div", [centred, deviation], "normal")
    bias = rest[0] if rest and rest[0] else ""
    scaled = writer.add("Mul", [normal, scale], "scaled" if bias else "")
    if bias:
        writer.add("Add", [scaled, bias])
    return True


def _group_normalization(writer: _Writer) -> bool:
    x, scale, bias = writer.node.input
    groups, epsilon = int(writer.attribute("num_groups", 0)), writer.attribute("epsilon", 1e-5)
    dims = writer.dims(scale)
    by_channel = writer.opset >= CHANNEL_SCALES
    if not groups or (by_channel and dims is None):
        return False
    flat = writer.add("Reshape", [x, writer.constant([0, groups, -1], "grouped_shape", np.int64)], "grouped")
    if by_channel:
        ones, zeros = writer.constant(np.ones(groups), "ones"), writer.constant(np.zeros(groups), "zeros")
        normal = writer.add("InstanceNormalization", [flat, ones, zeros], "normal", epsilon=epsilon)
        channels = dims[0] if dims else 0
        rows = writer.constant([0, channels, -1], "channel_shape", np.int64)
        column = writer.constant([channels, 1], "column_shape", np.int64)
        scaled = writer.add("Mul", [writer.add("Reshape", [normal, rows], "channels"),
                                    writer.add("Reshape", [scale, column], "scale")], "scaled")  # fmt: skip
        flat = writer.add("Add", [scaled, writer.add("Reshape", [bias, column], "bias")], "shifted")
    else:
        flat = writer.add("InstanceNormalization", [flat, scale, bias], "normal", epsilon=epsilon)
    writer.add("Reshape", [flat, writer.add("Shape", [x], "shape")])
    return True


DECOMPOSITIONS: dict[str, Callable[[_Writer], bool]] = {
    "Mish": _mish, "HardSwish": _hard_swish, "Gelu": _gelu, "LayerNormalization": _layer_normalization,
    "GroupNormalization": _group_normalization,
}  # fmt: skip
"""By operator; each appends what stands for the node, or gives False where the graph does not tell enough."""


def decompose(model: onnx.ModelProto, operators: frozenset[str]) -> dict[str, int]:
    """Write the nodes of these operators with older ones, in place, subgraphs included.

    Returns:
        How many of each were written so. A node stays as it is where it has outputs that the older form does not give,
        or where shapes that the form needs are not in the file.
    """
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)
    counts: dict[str, int] = {}
    _decompose_graph(model.graph, operators, opset, {}, counts)
    return dict(sorted(counts.items()))


def _decompose_graph(
    graph: onnx.GraphProto,
    operators: frozenset[str],
    opset: int,
    outer: dict[str, onnx.TensorProto],
    counts: dict[str, int],
) -> None:
    weights = {**outer, **{tensor.name: tensor for tensor in graph.initializer}}
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []
    for node in graph.node:
        for subgraph in subgraphs_of(node):
            _decompose_graph(subgraph, operators, opset, weights, counts)
        writer = _Writer(node, opset, weights)
        known = node.domain in ("", "ai.onnx") and node.op_type in operators and not any(node.output[1:])
        if known and node.op_type in DECOMPOSITIONS and DECOMPOSITIONS[node.op_type](writer):
            nodes += writer.nodes
            constants += writer.constants
            counts[node.op_type] = counts.get(node.op_type, 0) + 1
        else:
            nodes.append(node)
    kept = [_copy(node) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)
    graph.initializer.extend(constants)


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    """Out of its graph, which is about to be emptied."""
    copied = onnx.NodeProto()
    copied.CopyFrom(node)
    return copied
