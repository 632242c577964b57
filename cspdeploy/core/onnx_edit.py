"""Small edits to an ONNX file's bytes without the onnx package: expose tensors, cut a part out.

Protocol buffers merge the parts of a message that is given twice, so that what is appended to a file is added to it.
An output without a type is accepted by ONNX Runtime, which infers it. Field numbers are those of onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from cspdeploy.core.onnx_graph import Graph, Node
from cspdeploy.core.onnx_tensor import ELEMENT_TYPES
from cspdeploy.core.onnx_wire import Message

__all__ = ["SHAPE_SUFFIX", "cut_part", "with_metadata", "with_outputs", "with_shapes"]

_GRAPH, _NODE, _INITIALIZER, _SPARSE, _INPUT, _OUTPUT = 7, 1, 5, 15, 11, 12
_MODEL_KEPT = (1, 8, 25)  # ir_version, opset_import, functions
_METADATA = 14
_NODE_OUTPUT, _TENSOR_NAME, _SPARSE_VALUES = 2, 8, 1
_VARINT, _EIGHT_BYTES, _BYTES = 0, 1, 2
_CODES = {name: code for code, name in ELEMENT_TYPES.items()}

SHAPE_SUFFIX = "//shape"
"""Appended to a tensor's name, it names its shape. No exporter writes two slashes."""
_MADE_SUFFIX = "//made"


class _Field(NamedTuple):
    number: int
    wire: int
    start: int
    """Of the field with its tag."""
    value: int
    """Of its value."""
    end: int


def with_outputs(data: bytes, names: Iterable[str]) -> bytes:
    """The model with these tensors as further outputs."""
    return data + _bytes(_GRAPH, b"".join(_bytes(_OUTPUT, _text(1, name)) for name in names))


def with_shapes(data: bytes, names: Iterable[str]) -> bytes:
    """The model with the shapes of these tensors as further outputs, `SHAPE_SUFFIX` after the tensor's name.

    Their values are not kept by the engine, so that this costs no memory.
    """
    added = b""
    for name in names:
        shape = f"{name}{SHAPE_SUFFIX}"
        added += _bytes(_NODE, _text(1, name) + _text(2, shape) + _text(3, shape) + _text(4, "Shape"))
        added += _bytes(_OUTPUT, _text(1, shape))
    return data + _bytes(_GRAPH, added)


def with_metadata(data: bytes, entries: Mapping[str, str]) -> bytes:
    """The model with these `metadata_props`, in place of those that it has under the same keys.

    Raises:
        ValueError: the bytes are no message.
    """
    kept = b""
    at = 0
    for start, end in Message(data, (0, len(data))).spans(_METADATA):
        if Message(data, (start, end)).text(1) in entries:
            field = start - len(_encoded(_METADATA << 3 | _BYTES)) - len(_encoded(end - start))
            kept, at = kept + data[at:field], end
    added = (_bytes(_METADATA, _text(1, key) + _text(2, value)) for key, value in entries.items())
    return b"".join((kept, data[at:], *added))


def cut_part(
    data: bytes, graph: Graph, *, targets: Sequence[str], given: Mapping[str, str]
) -> tuple[bytes, tuple[str, ...], dict[str, str]]:
    """The part of a model that computes `targets` from `given`.

    Args:
        data: the file.
        graph: what `read_onnx` found in it.
        given: dtype by name of the tensors that become inputs, each with any shape.

    Returns:
        The smaller model; the inputs that it really takes, with those of the graph that it still needs; and for each
        target the output that holds it: another name where the target is given as well.
    """
    made_by = {name: node for node in graph.nodes for name in node.outputs if name}
    wanted = {node.index for node in _slice(graph, made_by, targets=targets, given=given)}
    inner = {value.name: value.dtype for value in graph.inputs}
    needed = {name for node in graph.nodes if node.index in wanted for name in needs(node)}
    taken = tuple(name for name in dict.fromkeys((*given, *inner)) if name in needed)
    renamed = {name: f"{name}{_MADE_SUFFIX}" for name in targets if name in given}
    whole = Message(data, (0, len(data)))
    parts = [_kept_nodes(data, whole, wanted, renamed), _kept_weights(data, whole, needed - set(given))]
    parts += [_bytes(_INPUT, _typed(name, given.get(name) or inner[name])) for name in taken]
    parts += [_bytes(_OUTPUT, _text(1, renamed.get(name, name))) for name in targets]
    kept = [data[item.start : item.end] for item in _fields(data, 0, len(data)) if item.number in _MODEL_KEPT]
    model = b"".join(kept) + _bytes(_GRAPH, b"".join(parts) + _text(2, "part"))
    return model, taken, {name: renamed.get(name, name) for name in targets}


def needs(node: Node) -> list[str]:
    """Tensors that a node takes, with those that its subgraphs capture."""
    return [*filter(None, node.inputs), *(name for graph in node.subgraphs for name in graph.captured)]


def _slice(
    graph: Graph, made_by: Mapping[str, Node], *, targets: Sequence[str], given: Mapping[str, str]
) -> list[Node]:
    """Nodes between what is given and the targets."""
    found: dict[int, Node] = {}
    open_ = [made_by[name] for name in targets if name in made_by]
    while open_:
        node = open_.pop()
        if node.index not in found:
            found[node.index] = node
            open_ += [made_by[name] for name in needs(node) if name in made_by and name not in given]
    return [node for node in graph.nodes if node.index in found]


def _kept_nodes(data: bytes, whole: Message, wanted: set[int], renamed: Mapping[str, str]) -> bytes:
    """The wanted ones in the file's order, outputs renamed."""
    spans = _graph_spans(whole, _NODE)
    return b"".join(
        _bytes(_NODE, _with_names(data, *spans[index], renamed=renamed)) for index in range(len(spans))
        if index in wanted
    )  # fmt: skip


def _kept_weights(data: bytes, whole: Message, needed: set[str]) -> bytes:
    found = []
    for number in (_INITIALIZER, _SPARSE):
        for span in _graph_spans(whole, number):
            tensor = Message(data, span)
            named = (tensor.message(_SPARSE_VALUES) or tensor) if number == _SPARSE else tensor
            if named.text(_TENSOR_NAME) in needed:
                found.append(_bytes(number, data[slice(*span)]))
    return b"".join(found)


def _graph_spans(whole: Message, number: int) -> tuple[tuple[int, int], ...]:
    graph = whole.message(_GRAPH)
    return graph.spans(number) if graph else ()


def _with_names(data: bytes, start: int, end: int, *, renamed: Mapping[str, str]) -> bytes:
    """A node with its outputs renamed."""
    parts = []
    for item in _fields(data, start, end):
        name = data[item.value : item.end].decode() if item.number == _NODE_OUTPUT else ""
        parts.append(_text(_NODE_OUTPUT, renamed[name]) if name in renamed else data[item.start : item.end])
    return b"".join(parts)


def _typed(name: str, dtype: str) -> bytes:
    """A value of that type and of any shape."""
    return _text(1, name) + _bytes(2, _bytes(1, _number(1, _CODES[dtype])))


def _fields(data: bytes, at: int, end: int) -> Iterator[_Field]:
    """The fields of a message in their order; `Message` has read it before, so that it is known to be one."""
    while at < end:
        start = at
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == _BYTES:
            size, at = _varint(data, at)
            value, at = at, at + size
        else:
            value = at
            at = _varint(data, at)[1] if wire == _VARINT else at + (8 if wire == _EIGHT_BYTES else 4)
        yield _Field(number, wire, start, value, at)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while data[at] >= 0x80:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return value | data[at] << shift, at + 1


def _bytes(number: int, value: bytes) -> bytes:
    return _encoded(number << 3 | _BYTES) + _encoded(len(value)) + value


def _text(number: int, value: str) -> bytes:
    return _bytes(number, value.encode())


def _number(number: int, value: int) -> bytes:
    return _encoded(number << 3 | _VARINT) + _encoded(value)


def _encoded(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])
