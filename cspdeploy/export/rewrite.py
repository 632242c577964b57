"""Graph rewrites, one function each. A rewrite changes the form of a graph, not what it computes."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
from onnx import helper, numpy_helper

from cspdeploy.core.catalog import MAX_IR_VERSION
from cspdeploy.core.onnx_graph import read_onnx

__all__ = [
    "captured_names",
    "count_operators",
    "count_operators_of",
    "split_expansion_convolutions",
    "subgraphs_of",
    "without_weights",
    "write_model",
]

# Elementwise, without a parameter of the channel: they commute with a split along channels.
_ELEMENTWISE = frozenset({"LeakyRelu", "Relu", "Sigmoid", "Tanh", "Mish", "Clip", "HardSwish", "Elu", "Softplus"})
_CHANNEL_AXIS = 1
LARGE_BYTES = 1024
"""Weights below it may be shapes, axes or scales, whose values type inference reads."""


def write_model(model: onnx.ModelProto, path: Path) -> None:
    """Serialise in canonical order; the same model gives the same bytes."""
    model.ir_version = min(model.ir_version, MAX_IR_VERSION)
    path.write_bytes(model.SerializeToString(deterministic=True))


def count_operators(graph: onnx.GraphProto) -> dict[str, int]:
    """How many nodes of each operator the graph has, most frequent first; those of subgraphs are not counted."""
    return _most_frequent_first(node.op_type for node in graph.node)


def count_operators_of(path: Path) -> dict[str, int]:
    """The same of a file, without reading its weights.

    Raises:
        InputError: not an ONNX file.
    """
    return _most_frequent_first(node.operator for node in read_onnx(path).graph.nodes)


def _most_frequent_first(operators: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(operators).items(), key=lambda item: (-item[1], item[0])))


def without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its large initializers as inputs of their type: what type inference needs, without 100 MB."""
    light = onnx.ModelProto(ir_version=model.ir_version)
    light.opset_import.extend(model.opset_import)
    light.functions.extend(model.functions)
    graph = light.graph
    graph.name = model.graph.name
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    given = {value.name for value in graph.input}
    for tensor in model.graph.initializer:
        if tensor.ByteSize() < LARGE_BYTES:  # shapes, axes, scales: inference reads their values
            graph.initializer.append(tensor)
        elif tensor.name not in given:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    return light


def split_expansion_convolutions(source: Path, target: Path) -> int:
    """Turn `Conv [-> activation] -> Split` along channels into one convolution for each part.

    A CSP stage expands once and sends half of the channels through its blocks. ONNX Runtime's CPU kernels keep
    channels in blocks of 8 or 16 (NCHWc) and have no such form of Split, so each one costs two layout reorders of the
    whole map. The rows of the weight are dealt out among the new convolutions as they are: each output channel is the
    same sum of the same products.

        W [O, I, k, k], b [O]  ->  W[:s], b[:s]  and  W[s:], b[s:]

    Returns:
        How many were rewritten; `target` is written only if there was one.
    """
    model = onnx.load(source)
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    uses = Counter(name for node in graph.node for name in (*node.input, *captured_names(node)))
    uses.update(value.name for value in graph.output)
    new_nodes: dict[str, list[onnx.NodeProto]] = {}
    dropped: list[onnx.NodeProto] = []
    for split in graph.node:
        chain = _match(split, producers, uses, weights)
        if chain is not None:
            new_nodes[split.output[0]] = _expand(split, chain, weights, graph)
            dropped += [split, *chain]
    if not new_nodes:
        return 0
    gone = {node.output[0] for node in dropped}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        nodes += new_nodes.get(node.output[0], [] if node.output[0] in gone else [node])
    del graph.node[:]
    graph.node.extend(nodes)
    _drop_unused(graph)
    write_model(model, target)
    return len(new_nodes)


def _match(
    split: onnx.NodeProto,
    producers: dict[str, onnx.NodeProto],
    uses: Counter[str],
    weights: dict[str, onnx.TensorProto],
) -> list[onnx.NodeProto] | None:
    """The nodes before `split`, nearest first, ending with the convolution; None where the pattern does not hold."""
    axis = next((attribute.i for attribute in split.attribute if attribute.name == "axis"), 0)
    if split.op_type != "Split" or axis != _CHANNEL_AXIS:
        return None
    if len(split.input) > 1 and split.input[1] not in weights:
        return None
    chain: list[onnx.NodeProto] = []
    name = split.input[0]
    while name in producers and uses[name] == 1:
        node = producers[name]
        chain.append(node)
        if node.op_type == "Conv":
            group = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
            known = all(part in weights for part in node.input[1:])
            return chain if group == 1 and known else None
        if node.op_type not in _ELEMENTWISE or len([part for part in node.input if part]) != 1:
            return None
        name = node.input[0]
    return None


def _expand(
    split: onnx.NodeProto, chain: list[onnx.NodeProto], weights: dict[str, onnx.TensorProto], graph: onnx.GraphProto
) -> list[onnx.NodeProto]:
    conv, activations = chain[-1], chain[-2::-1]
    arrays = [numpy_helper.to_array(weights[name]) for name in conv.input[1:]]
    sizes = _split_sizes(split, weights, arrays[0].shape[0])
    known = {value.name: value.type for value in graph.value_info}
    nodes = []
    start = 0
    for part, (size, output) in enumerate(zip(sizes, split.output, strict=True)):
        inputs = [conv.input[0]]
        for name, array in zip(conv.input[1:], arrays, strict=True):
            inputs.append(f"{conv.output[0]}/{name}/part{part}")  # convolutions may share a weight
            graph.initializer.append(numpy_helper.from_array(array[start : start + size].copy(), inputs[-1]))
        start += size
        for i, old in enumerate([conv, *activations]):
            node = onnx.NodeProto()
            node.CopyFrom(old)
            last = i == len(activations)
            node.name, node.input[:], node.output[:] = (
                f"{old.name}/part{part}", inputs, [output if last else f"{old.output[0]}/part{part}"],
            )  # fmt: skip
            inputs = [node.output[0]]
            nodes.append(node)
            if not last and old.output[0] in known:  # the same map with fewer channels
                value = onnx.ValueInfoProto(name=node.output[0], type=known[old.output[0]])
                if value.type.tensor_type.HasField("shape"):
                    value.type.tensor_type.shape.dim[_CHANNEL_AXIS].dim_value = size
                graph.value_info.append(value)
    return nodes


def _split_sizes(split: onnx.NodeProto, weights: dict[str, onnx.TensorProto], num_channels: int) -> list[int]:
    if len(split.input) > 1:
        return [int(size) for size in numpy_helper.to_array(weights[split.input[1]])]
    given = next((list(attribute.ints) for attribute in split.attribute if attribute.name == "split"), None)
    if given:  # up to opset 12
        return given
    share = -(-num_channels // len(split.output))  # equal parts, the last one may be smaller
    return [min(share, num_channels - i * share) for i in range(len(split.output))]


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Weights that no node takes, and what is known of tensors that no node makes."""
    used = {name for node in graph.node for name in (*node.input, *captured_names(node))}
    used |= {value.name for value in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    shapes = {name for node in graph.node for name in node.output}
    values = [value for value in graph.value_info if value.name in shapes]
    del graph.initializer[:], graph.value_info[:]
    graph.initializer.extend(kept)
    graph.value_info.extend(values)


def subgraphs_of(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Bodies of If, Loop and Scan."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def _names_in(graph: onnx.GraphProto) -> Iterable[str]:
    own = (name for node in graph.node for name in node.input)
    below = (_names_in(subgraph) for node in graph.node for subgraph in subgraphs_of(node))
    return itertools.chain(own, (value.name for value in graph.output), *below)


def captured_names(node: onnx.NodeProto) -> set[str]:
    """Names that the subgraphs of `node` use; those of the outer graph are among them."""
    return {name for subgraph in subgraphs_of(node) for name in _names_in(subgraph)}
