"""The graph of an ONNX file, read without the onnx package: a device has an engine and nothing else.

Weights are stepped over, and read one tensor at a time where asked for; external data of any size is not opened.
Field numbers are those of onnx.proto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cspdeploy.core.onnx_file import check_locations, data_locations
from cspdeploy.core.onnx_scope import NodeNames, check_captured, order_nodes
from cspdeploy.core.onnx_tensor import ELEMENT_TYPES, Tensor, read_sparse_tensor, read_tensor
from cspdeploy.core.onnx_wire import Message, read_message

__all__ = [
    "DEFAULT_DOMAIN", "Graph", "Node", "OnnxModel", "Tensor", "Value", "module_path", "node_module", "read_onnx",
    "walk_nodes",
]  # fmt: skip

DEFAULT_DOMAIN = "ai.onnx"
"""Of ONNX's own operators; files write it as the empty string, or so."""

AttributeValue = int | float | str | bytes | tuple[int | float | str | bytes | Tensor, ...] | Tensor

# AttributeProto: name 1, f 2, i 3, s 4, t 5, g 6, floats 7, ints 8, strings 9, tensors 10, graphs 11, type 20,
# sparse_tensor 22, sparse_tensors 23. AttributeProto.AttributeType has its own numbers:
_FIELD_OF_TYPE = {1: 2, 2: 3, 3: 4, 4: 5, 5: 6, 6: 7, 7: 8, 8: 9, 9: 10, 10: 11, 11: 22, 12: 23}
_TYPE_FIELDS = {1: "tensor", 4: "sequence", 5: "map", 7: "opaque", 8: "sparse_tensor", 9: "optional"}  # TypeProto


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """What passes between nodes. `shape` is None where the file does not tell; a free dimension is a name or "?".

    `dtype`: as numpy spells it; "undefined" where the file does not tell; "sequence", "map", ... for what is no tensor.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """An operator at its place.

    Attributes:
        index: its place in the file's list, in its own graph.
        domain: "ai.onnx" for ONNX's own operators.
        inputs, outputs: names of tensors; an optional one that is left out is "".
        attributes: by name; those that are graphs are `subgraphs` instead. Types have no value here and are left out.
        metadata: that exporters add, such as the module that the node came from.
    """

    index: int
    name: str
    operator: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, AttributeValue]
    subgraphs: tuple[Graph, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """Nodes and what flows between them.

    Attributes:
        nodes: each after those whose outputs it takes. That is their order in the file, which must be so by ONNX's
            rules; engines that sort by themselves take others too, and so does this.
        initializers: weights by name.
        inputs: without those that are the names of initializers, as files before IR version 4 have them.
        values: all that the file says of any value of this graph, by name.
        captured: names that are not of this graph but of the one around it.
    """

    name: str
    nodes: tuple[Node, ...]
    initializers: dict[str, Tensor]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    values: dict[str, Value]
    captured: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxModel:
    """An ONNX file.

    Attributes:
        num_bytes: of the file alone, without external data.
        opsets: version by domain, "ai.onnx" for ONNX's own.
        functions: of the model, as "domain.Name"; their bodies are not read.
        external_data: files that hold tensors, as written in this one, relative to its folder, sorted.
    """

    path: Path
    num_bytes: int
    ir_version: int
    opsets: dict[str, int]
    producer: str
    graph: Graph
    metadata: dict[str, str]
    functions: tuple[str, ...]
    external_data: tuple[str, ...]


def read_onnx(path: Path) -> OnnxModel:
    """Read the structure of an ONNX file.

    Raises:
        InputError: missing, truncated or no ONNX file; external data outside its folder, missing or too short; a
            cyclic graph; two tensors of one name; a tensor that nothing makes; values that do not fill their shape.
    """
    return read_message(path, lambda message: _model(message, path=path))


def walk_nodes(graph: Graph) -> Iterator[Node]:
    """Every node in order, those of subgraphs after the node that holds them."""
    for node in graph.nodes:
        yield node
        for subgraph in node.subgraphs:
            yield from walk_nodes(subgraph)


def module_path(node_name: str) -> str:
    """The torch module that a node came from, as `named_modules` spells it; empty where the name does not tell.

    torch's exporter joins the names of the modules that are running with "/", ends with the operator, and gives the
    child of a Sequential or ModuleList the list's name again: "/stages/stages.0/conv1/conv/Conv" is an operator of
    stages.0.conv1.conv. What rewrites append to that ("/Conv/part0", "/Conv_quant") is left out.
    """
    if not node_name.startswith("/"):
        return ""
    parts = node_name.split("/")[1:]
    operators = [index for index, part in enumerate(parts) if re.fullmatch(r"[A-Z][A-Za-z0-9]*(_\w+)?", part)]
    if not operators:
        return ""
    modules: list[str] = []
    for part in parts[: operators[-1]]:
        if modules and part.startswith(modules[-1] + "."):
            modules[-1] = part
        else:
            modules.append(part)
    return ".".join(modules)


def node_module(node: Node) -> str:
    """The same of a node, from its name or from what torch's newer exporter writes beside it; empty for neither.

    That is "['', 'stages.0', 'stages.0.conv', 'conv2d']": the modules that are running, then the operator.
    """
    scopes = re.findall(r"'([^']*)'", node.metadata.get("pkg.torch.onnx.name_scopes", ""))
    return scopes[-2] if len(scopes) > 1 else module_path(node.name)


def _model(message: Message, *, path: Path) -> OnnxModel:
    locations = sorted(data_locations(message))
    check_locations(path, locations)
    found = message.message(7)
    if found is None:
        raise ValueError("no graph in it")
    graph = _graph(found, path=path)
    check_captured(graph.captured, nodes=[_names(node) for node in graph.nodes], path=path)
    producer = f"{message.text(2)} {message.text(3)}".strip()
    opsets = {entry.text(1) or DEFAULT_DOMAIN: entry.integer(2) for entry in message.messages(8)}
    return OnnxModel(
        path=path, num_bytes=path.stat().st_size, ir_version=message.integer(1), opsets=opsets, producer=producer,
        graph=graph, metadata=_pairs(message.messages(14)),
        functions=tuple(f"{made.text(10) or DEFAULT_DOMAIN}.{made.text(1)}" for made in message.messages(25)),
        external_data=tuple(locations),
    )  # fmt: skip


def _graph(message: Message, *, path: Path) -> Graph:
    tensors = [read_tensor(tensor, path=path) for tensor in message.messages(5)]
    tensors += [read_sparse_tensor(tensor, path=path) for tensor in message.messages(15)]
    inputs, outputs, inner = (tuple(map(_value, message.messages(number))) for number in (11, 12, 13))
    names = [tensor.name for tensor in tensors]
    nodes = [_node(node, index=index, path=path) for index, node in enumerate(message.messages(1))]
    given = (*names, *(value.name for value in inputs if value.name not in names))
    order, captured = order_nodes(
        [_names(node) for node in nodes], given=given, outputs=[value.name for value in outputs], path=path
    )
    return Graph(
        name=message.text(2), nodes=tuple(nodes[index] for index in order),
        initializers={tensor.name: tensor for tensor in tensors},
        inputs=tuple(value for value in inputs if value.name not in names), outputs=outputs,
        values={value.name: value for value in (*inner, *inputs, *outputs)}, captured=captured,
    )  # fmt: skip


def _node(message: Message, *, index: int, path: Path) -> Node:
    attributes: dict[str, AttributeValue] = {}
    subgraphs: list[Graph] = []
    for attribute in message.messages(5):
        graphs = [*attribute.messages(6), *attribute.messages(11)]
        subgraphs += [_graph(graph, path=path) for graph in graphs]
        value = None if graphs else _attribute(attribute, path=path)
        if value is not None:
            attributes[attribute.text(1)] = value
    return Node(
        index=index, name=message.text(3), operator=message.text(4), domain=message.text(7) or DEFAULT_DOMAIN,
        inputs=message.texts(1), outputs=message.texts(2), attributes=attributes, subgraphs=tuple(subgraphs),
        metadata=_pairs(message.messages(9)),
    )  # fmt: skip


def _names(node: Node) -> NodeNames:
    """What its subgraphs capture it takes."""
    captured = [name for graph in node.subgraphs for name in graph.captured]
    return node.name or f"{node.operator} {node.index}", [*filter(None, node.inputs), *captured], node.outputs


def _attribute(message: Message, *, path: Path) -> AttributeValue | None:
    """The value of the field that the type names; where a file of old gives no type, of the field that is there."""
    number = _FIELD_OF_TYPE.get(message.integer(20)) or next(filter(message.has, _FIELD_OF_TYPE.values()), 0)
    if number in (2, 3):
        return message.float32(number) if number == 2 else message.integer(number)
    if number in (7, 8):
        return message.floats(number) if number == 7 else message.integers(number)
    if number in (4, 9):
        texts = tuple(map(_text, message.blobs(number)))
        return texts if number == 9 else texts[-1] if texts else ""
    if number in (5, 10, 22, 23):
        read = read_tensor if number in (5, 10) else read_sparse_tensor
        tensors = tuple(read(tensor, path=path) for tensor in message.messages(number))
        return tensors if number in (10, 23) else tensors[-1] if tensors else None
    return None


def _text(data: bytes) -> str | bytes:
    """Strings are bytes in ONNX; nearly all are text."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _value(message: Message) -> Value:
    name, kind = message.text(1), message.message(2)
    if kind is None:
        return Value(name=name, dtype="undefined", shape=None)
    number = next(filter(kind.has, _TYPE_FIELDS), 0)
    tensor = kind.message(number) if number in (1, 8) else None
    if tensor is None:
        return Value(name=name, dtype=_TYPE_FIELDS.get(number, "undefined"), shape=None)
    dtype = ELEMENT_TYPES.get(tensor.integer(1), "undefined") if number == 1 else "sparse_tensor"
    shape = tensor.message(2)
    return Value(name=name, dtype=dtype, shape=_dims(shape) if tensor.has(2) else None)


def _dims(shape: Message | None) -> tuple[int | str, ...]:
    dims = shape.messages(1) if shape else []
    return tuple(dim.integer(1) if dim.has(1) else dim.text(2) or "?" for dim in dims)


def _pairs(entries: list[Message]) -> dict[str, str]:
    return {entry.text(1): entry.text(2) for entry in entries}
