"""The little that must be known of an ONNX file before an engine opens it, read without the onnx package.

Protocol buffers' wire format: each field is a varint `number << 3 | type`; type 0 varint, 1 eight bytes, 2 length and
bytes, 5 four bytes. Field numbers are those of onnx.proto. Large payloads are skipped, not copied.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from cspdeploy.core.errors import InputError

__all__ = ["check_external_data", "count_nodes", "external_data_files"]

_GRAPH = 7  # ModelProto
_NODE, _INITIALIZER, _SPARSE = 1, 5, 15  # GraphProto.node, .initializer, .sparse_initializer
_FUNCTION, _FUNCTION_NODE = 25, 7
_ATTRIBUTE = 5  # NodeProto
_ATTRIBUTE_SPARSE, _SPARSE_TENSORS = (22, 23), (1, 2)  # AttributeProto.sparse_tensor(s); .values, .indices
_ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS = (5, 10), (6, 11)  # AttributeProto.t, .tensors; .g, .graphs
_EXTERNAL_DATA = 13  # TensorProto.external_data, entries of key = 1 and value = 2

Buffer = memoryview
T = TypeVar("T")


def external_data_files(path: Path) -> list[str]:
    """Locations that the tensors of an ONNX file name as their data, as written there, sorted.

    Raises:
        InputError: missing, empty, truncated or not a protocol buffer with a graph.
    """
    return sorted(_read(path, _model_locations))


def _read(path: Path, reader: Callable[[Buffer], T]) -> T:
    try:
        with path.open("rb") as file:
            # Not closed here: an error's traceback holds slices of the mapping, which goes with the last of them.
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return reader(memoryview(mapped))
    except (ValueError, IndexError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not an ONNX file, or a truncated one ({error})", fix="export it again") from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}", fix="name an .onnx file") from error


def count_nodes(path: Path) -> int:
    """Nodes of the main graph, without reading the weights.

    Raises:
        InputError: as `external_data_files`.
    """
    return sum(number == _NODE for graph in _read(path, _graphs) for number, _ in _fields(graph))


def check_external_data(path: Path) -> None:
    """Refuse a file whose tensors lie outside its folder, or in files that are not there.

    Raises:
        InputError: as above, naming the location.
    """
    for location in external_data_files(path):
        target = path.parent / location
        try:
            inside = target.resolve().is_relative_to(path.parent.resolve())
            present = target.is_file()
        except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, a NUL in it
            reason = f"{path}: external data '{location[:80]}' cannot be a file ({type(error).__name__})"
            raise InputError(reason, fix="do not use this file") from error
        if not location or Path(location).is_absolute() or not inside:
            raise InputError(f"{path}: external data '{location}' leaves the folder", fix="do not use this file")
        if not present:
            raise InputError(f"{target}: missing, {path.name} keeps its weights there", fix="copy both files")


def _graphs(model: Buffer) -> list[Buffer]:
    graphs = [value for number, value in _fields(model) if number == _GRAPH]
    if not graphs:
        raise ValueError("no graph in it")
    return graphs


def _model_locations(model: Buffer) -> set[str]:
    found = {location for graph in _graphs(model) for location in _graph_locations(graph)}
    for number, function in _fields(model):
        if number == _FUNCTION:
            for field, node in _fields(function):
                if field == _FUNCTION_NODE:
                    found.update(_node_locations(node))
    return found


def _graph_locations(graph: Buffer) -> Iterator[str]:
    for number, value in _fields(graph):
        if number == _INITIALIZER:
            yield from _tensor_locations(value)
        elif number == _SPARSE:
            yield from _sparse_locations(value)
        elif number == _NODE:
            yield from _node_locations(value)


def _node_locations(node: Buffer) -> Iterator[str]:
    for number, attribute in _fields(node):
        if number == _ATTRIBUTE:
            yield from _attribute_locations(attribute)


def _sparse_locations(sparse: Buffer) -> Iterator[str]:
    for number, tensor in _fields(sparse):
        if number in _SPARSE_TENSORS:
            yield from _tensor_locations(tensor)


def _attribute_locations(attribute: Buffer) -> Iterator[str]:
    for number, value in _fields(attribute):
        if number in _ATTRIBUTE_TENSORS:
            yield from _tensor_locations(value)
        elif number in _ATTRIBUTE_SPARSE:
            yield from _sparse_locations(value)
        elif number in _ATTRIBUTE_GRAPHS:
            yield from _graph_locations(value)


def _tensor_locations(tensor: Buffer) -> Iterator[str]:
    for number, entry in _fields(tensor):
        if number == _EXTERNAL_DATA:
            pair = {field: bytes(value).decode() for field, value in _fields(entry)}
            if pair.get(1) == "location":
                yield pair.get(2, "")


def _fields(data: Buffer) -> Iterator[tuple[int, Buffer]]:
    """Number and bytes of each length-delimited field; others are stepped over."""
    at, end = 0, len(data)
    while at < end:
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == 0:
            _, at = _varint(data, at)
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        elif wire == 2:
            size, at = _varint(data, at)
            if at + size > end:
                raise ValueError("a field is longer than the file")
            yield tag >> 3, data[at : at + size]
            at += size
        else:
            raise ValueError(f"wire type {wire}")


def _varint(data: Buffer, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
