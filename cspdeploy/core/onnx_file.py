"""The little that must be known of an ONNX file before an engine opens it, read without the onnx package.

Field numbers are those of onnx.proto. Weights are stepped over, not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cspdeploy.core.errors import InputError
from cspdeploy.core.onnx_wire import Message, printable, read_message

__all__ = ["check_external_data", "check_locations", "data_locations", "external_data_files"]

_GRAPH, _TRAINING, _FUNCTION = 7, 20, 25  # ModelProto
_TRAINING_GRAPHS = (1, 2)  # TrainingInfoProto.initialization, .algorithm
_NODE, _INITIALIZER, _SPARSE = 1, 5, 15  # GraphProto.node, .initializer, .sparse_initializer
_FUNCTION_NODE, _FUNCTION_ATTRIBUTE = 7, 11
_ATTRIBUTE = 5  # NodeProto
_ATTRIBUTE_SPARSE, _SPARSE_TENSORS = (22, 23), (1, 2)  # AttributeProto.sparse_tensor(s); .values, .indices
_ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS = (5, 10), (6, 11)  # AttributeProto.t, .tensors; .g, .graphs
_EXTERNAL_DATA = 13  # TensorProto.external_data, entries of key = 1 and value = 2


def external_data_files(path: Path) -> list[str]:
    """Locations that the tensors of an ONNX file name as their data, as written there, sorted.

    Raises:
        InputError: missing, empty, truncated or not a protocol buffer with a graph.
    """
    return sorted(read_message(path, data_locations))


def check_external_data(path: Path) -> None:
    """Refuse a file whose tensors lie outside its folder, or in files that are not there.

    Raises:
        InputError: as above, naming the location.
    """
    check_locations(path, external_data_files(path))


def check_locations(path: Path, locations: list[str]) -> None:
    """The same for locations that were read from the file already.

    Raises:
        InputError: a location that leaves the folder, or is no file.
    """
    for location in locations:
        target = path.parent / location
        try:
            inside = target.resolve().is_relative_to(path.parent.resolve())
            present = target.is_file()
        except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, a NUL in it
            reason = f"{path}: external data '{printable(location)}' cannot be a file ({type(error).__name__})"
            raise InputError(reason, fix="do not use this file") from error
        if not location or Path(location).is_absolute() or not inside:
            raise InputError(
                f"{path}: external data '{printable(location)}' leaves the folder", fix="do not use this file"
            )
        if not present:
            raise InputError(f"{target}: missing, {path.name} keeps its weights there", fix="copy both files")


def data_locations(model: Message) -> set[str]:
    """Every location that any tensor of a model names, in functions and subgraphs too, whether it is used or not.

    Raises:
        ValueError: not a model with a graph.
    """
    found = set(_graph_locations(_graph(model)))
    for function in model.messages(_FUNCTION):
        for node in function.messages(_FUNCTION_NODE):
            found.update(_node_locations(node))
        for attribute in function.messages(_FUNCTION_ATTRIBUTE):
            found.update(_attribute_locations(attribute))
    for training in model.messages(_TRAINING):
        for number in _TRAINING_GRAPHS:
            for graph in training.messages(number):
                found.update(_graph_locations(graph))
    return found


def _graph(model: Message) -> Message:
    graph = model.message(_GRAPH)
    if graph is None:
        raise ValueError("no graph in it")
    return graph


def _graph_locations(graph: Message) -> Iterator[str]:
    for tensor in graph.messages(_INITIALIZER):
        yield from _tensor_locations(tensor)
    for sparse in graph.messages(_SPARSE):
        yield from _sparse_locations(sparse)
    for node in graph.messages(_NODE):
        yield from _node_locations(node)


def _node_locations(node: Message) -> Iterator[str]:
    for attribute in node.messages(_ATTRIBUTE):
        yield from _attribute_locations(attribute)


def _sparse_locations(sparse: Message) -> Iterator[str]:
    for number in _SPARSE_TENSORS:
        for tensor in sparse.messages(number):
            yield from _tensor_locations(tensor)


def _attribute_locations(attribute: Message) -> Iterator[str]:
    for number in _ATTRIBUTE_TENSORS:
        for tensor in attribute.messages(number):
            yield from _tensor_locations(tensor)
    for number in _ATTRIBUTE_SPARSE:
        for sparse in attribute.messages(number):
            yield from _sparse_locations(sparse)
    for number in _ATTRIBUTE_GRAPHS:
        for graph in attribute.messages(number):
            yield from _graph_locations(graph)


def _tensor_locations(tensor: Message) -> Iterator[str]:
    for entry in tensor.messages(_EXTERNAL_DATA):
        if entry.text(1) == "location":
            yield entry.text(2)
