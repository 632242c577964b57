"""What is no ONNX graph is refused, each for its own reason; whatever the bytes, a graph or an InputError."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto

from cspdeploy.core.errors import InputError
from cspdeploy.core.onnx_graph import Graph, Node, read_onnx, walk_nodes
from tests.core.small_files import FLOAT, IF, NET, Write, model_of, net, tensor_model

# --- what is refused, each for its own reason ---


def _refused(path: Path, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        read_onnx(path)
    assert str(path.parent) in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.fix


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "an empty file, expected an ONNX file"),
        (b"not an ONNX file at all", "not an ONNX file"),
        (b"\x08\x08", "no graph in it"),
        (b"\x3a\x02\xff\xff", "not an ONNX file, or a truncated one"),
        (bytes(1000), "field number 0"),
        (b"PK\x03\x04" + bytes(100), "a zip archive such as TorchScript"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"\x14\x00\x00\x00ORTM" + bytes(20), "in ONNX Runtime's own format"),
    ],
    ids=["empty", "text", "no graph", "cut number", "zeros", "zip", "lfs", "ort"],
)
def test_what_is_no_onnx_file(write: Write, content: bytes, match: str) -> None:
    _refused(write(content), match)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    _refused(tmp_path / "none.onnx", "No such file")
    (tmp_path / "folder.onnx").mkdir()
    _refused(tmp_path / "folder.onnx", "Is a directory")


def test_truncated(write: Write) -> None:
    _refused(write(net()[:200]), "not an ONNX file, or a truncated one")


def test_cycle_is_shown(write: Write) -> None:
    model = model_of(NET, "w", "b", "low")
    for node, name in zip(model.graph.node, ("first", "second", "third"), strict=True):
        node.name = name
    model.graph.node[0].input[2] = "r"
    _refused(write(model), "cyclic graph, '(first' -> 'second' -> 'first|second' -> 'first' -> 'second)'")


def test_node_that_takes_its_own_output(write: Write) -> None:
    model = model_of(NET, "w", "b", "low")
    model.graph.node[1].input[0] = "r"
    model.graph.node[1].name = "self"
    _refused(write(model), "cyclic graph, 'self' -> 'self'")


def test_cycle_through_a_subgraph(write: Write) -> None:
    model = model_of(IF, "k")
    model.graph.node[0].input[0] = "y"
    _refused(write(model), "cyclic graph")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda graph: graph.node[1].output.__setitem__(0, "c"), "two tensors are called 'c': of node"),
        (lambda graph: graph.node[1].output.__setitem__(0, "w"), "two tensors are called 'w': of an input or init"),
        (lambda graph: graph.initializer.append(graph.initializer[0]), "two inputs or two initializers .* 'w'"),
        (lambda graph: graph.input.append(graph.input[0]), "two inputs or two initializers are called 'x'"),
    ],
    ids=["nodes", "initializer", "initializers", "inputs"],
)
def test_duplicate_names(write: Write, change: Callable[[onnx.GraphProto], None], match: str) -> None:
    model = model_of(NET, "w", "b", "low")
    change(model.graph)
    _refused(write(model), match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda graph: graph.node[0].input.__setitem__(1, "gone"),
            r"nothing makes the tensor 'gone', which node 'Conv 0",
        ),
        (
            lambda graph: graph.output[0].__setattr__("name", "gone"),
            "the tensor 'gone', which the graph's output takes",
        ),
    ],
    ids=["input", "output"],
)
def test_undefined_tensor(write: Write, change: Callable[[onnx.GraphProto], None], match: str) -> None:
    model = model_of(NET, "w", "b", "low")
    change(model.graph)
    _refused(write(model), match)


def test_undefined_tensor_in_a_subgraph(write: Write) -> None:
    _refused(write(model_of(IF)), "nothing makes the tensor 'k', which node 'If 1' takes")


def test_optional_input_that_is_left_out(write: Write) -> None:
    model = model_of(NET, "w", "b", "low")
    model.graph.node[0].input[2] = ""
    assert read_onnx(write(model)).graph.nodes[0].inputs == ("x", "w", "")


@pytest.mark.parametrize(
    ("dims", "values", "match"),
    [
        ([1 << 40, 1 << 20], "raw", "has 16 bytes, its shape .* of float32 wants"),
        ([1 << 40], "typed", "has 16 bytes, its shape"),
        ([5], "raw", r"has 16 bytes, its shape \[5\] of float32 wants 20"),
        ([3], "raw", "has 16 bytes, its shape"),
        ([-1, 4], "raw", "expected no negative dimension"),
        ([4], "none", "has 0 bytes"),
    ],
)
def test_shape_that_the_values_do_not_fill(write: Write, dims: list[int], values: str, match: str) -> None:
    tensor = TensorProto(name="t", data_type=FLOAT, dims=dims)
    if values == "raw":
        tensor.raw_data = bytes(16)
    elif values == "typed":
        tensor.float_data.extend([0.0] * 4)
    _refused(write(tensor_model(tensor)), match)


@pytest.mark.parametrize("data_type", [TensorProto.INT64, TensorProto.INT32, TensorProto.FLOAT16])
def test_fewer_integers_than_the_shape_wants(write: Write, data_type: int) -> None:
    tensor = TensorProto(name="t", data_type=data_type, dims=[1 << 50])
    (tensor.int64_data if data_type == TensorProto.INT64 else tensor.int32_data).extend([1] * 4)
    _refused(write(tensor_model(tensor)), "has 4 bytes, its shape")


def test_more_bytes_but_fewer_integers(write: Write) -> None:
    """Large integers take several bytes each; their number shows when they are read."""
    tensor = TensorProto(name="t", data_type=TensorProto.INT64, dims=[3], int64_data=[1 << 60, 1 << 60])
    found = read_onnx(write(tensor_model(tensor))).graph.initializers["t"]
    with pytest.raises(InputError, match=r"has 2 values, its shape \[3\] wants 3"):
        found.array()


def test_unknown_element_type(write: Write) -> None:
    _refused(write(tensor_model(TensorProto(name="t", data_type=99, dims=[1], raw_data=b"0"))), "element type 99")


def test_file_that_changes_between_reading_and_use(write: Write) -> None:
    path = write(net())
    weights = read_onnx(path).graph.initializers["w"]
    path.write_bytes(b"short")
    with pytest.raises(InputError, match="tensor 'w' has 0 bytes"):
        weights.array()
    path.unlink()
    with pytest.raises(InputError, match="No such file"):
        weights.array()


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({"location": "../weights.bin"}, "leaves the folder"),
        ({"location": "gone.bin"}, r"gone\.bin: missing, net\.onnx keeps its weights there"),
        ({"location": "weights.bin", "length": "8"}, "has 8 bytes, its shape"),
        ({"location": "weights.bin", "offset": "12"}, "has 4 bytes, its shape"),
        ({"location": "weights.bin", "offset": "-4"}, "negative offset"),
        ({"location": "weights.bin", "offset": "much"}, "not an ONNX file"),
    ],
    ids=["outside", "missing", "short", "past the end", "negative", "word"],
)
def test_external_data_that_is_not_there(write: Write, tmp_path: Path, entries: dict[str, str], match: str) -> None:
    (tmp_path / "weights.bin").write_bytes(bytes(16))
    tensor = TensorProto(name="t", data_type=FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    _refused(write(tensor_model(tensor)), match)


def test_subgraphs_without_end(write: Write) -> None:
    graph = onnx.GraphProto(name="g")
    data = graph.SerializeToString()
    for _ in range(3000):
        data = _nest(data)
    _refused(write(b"\x08\x08" + b"\x3a" + _length(data) + data), "not an ONNX file")


def _length(data: bytes) -> bytes:
    size, found = len(data), b""
    while size > 0x7F:
        found, size = found + bytes([size & 0x7F | 0x80]), size >> 7
    return found + bytes([size])


def _nest(graph: bytes) -> bytes:
    """A graph with one node, whose attribute is `graph`: fields 6, 5 and 1, each with its length."""
    for tag in (b"\x32", b"\x2a", b"\x0a"):
        graph = tag + _length(graph) + graph
    return graph


# --- whatever the bytes, a graph or an InputError ---


@functools.cache
def _victims() -> tuple[bytes, ...]:
    return net(), bytes(model_of(IF, "k").SerializeToString())


@given(st.integers(0, 1), st.lists(st.tuples(st.integers(0), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_changed_byte(tmp_path_factory: pytest.TempPathFactory, which: int, changes: list[tuple[int, int]]) -> None:
    data = bytearray(_victims()[which])
    for at, value in changes:
        data[at % len(data)] = value
    _read_or_refuse(tmp_path_factory.getbasetemp() / "fuzz.onnx", bytes(data))


@given(st.integers(0, 1), st.integers(0), st.integers(0, 30))
def test_any_cut(tmp_path_factory: pytest.TempPathFactory, which: int, at: int, gone: int) -> None:
    data = _victims()[which]
    start = at % len(data)
    path = tmp_path_factory.getbasetemp() / "fuzz.onnx"
    _read_or_refuse(path, data[:start])
    _read_or_refuse(path, data[:start] + data[start + gone :])


def _read_or_refuse(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    message = ""
    try:
        graph: Graph = read_onnx(path).graph
        nodes: list[Node] = list(walk_nodes(graph))
        assert all(isinstance(node.operator, str) for node in nodes)
        for tensor in graph.initializers.values():
            tensor.array()
    except InputError as error:
        message = error.message
    assert message.isprintable()
