from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from random import Random

import onnx
import pytest
from onnx import TensorProto, helper

from cspdeploy.core.errors import InputError
from cspdeploy.core.onnx_file import check_external_data, external_data_files

FLOAT4 = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])


def _tensor(location: str | None, name: str = "w") -> onnx.TensorProto:
    if location is None:
        return helper.make_tensor(name, TensorProto.FLOAT, [4], [1.0, 2.0, 3.0, 4.0])
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def _sparse(location: str) -> onnx.SparseTensorProto:
    indices = helper.make_tensor("i", TensorProto.INT64, [4], [0, 1, 2, 3])
    return helper.make_sparse_tensor(_tensor(location), indices, [8])


def _graph(
    *, nodes: list[onnx.NodeProto] | None = None, tensors: list[onnx.TensorProto] | None = None
) -> onnx.GraphProto:
    return helper.make_graph(nodes or [helper.make_node("Identity", ["w"], ["y"])], "g", [], [FLOAT4], tensors or [])


def _in_initializer(location: str) -> onnx.ModelProto:
    return helper.make_model(_graph(tensors=[_tensor(None, "v"), _tensor(location)]))


def _in_sparse_initializer(location: str) -> onnx.ModelProto:
    model = helper.make_model(_graph())
    model.graph.sparse_initializer.append(_sparse(location))
    return model


def _in_attribute(location: str) -> onnx.ModelProto:
    return helper.make_model(_graph(nodes=[helper.make_node("Constant", [], ["y"], value=_tensor(location))]))


def _in_attribute_list(location: str) -> onnx.ModelProto:
    node = helper.make_node("Custom", [], ["y"], domain="own", values=[_tensor(None), _tensor(location)])
    return helper.make_model(_graph(nodes=[node]))


def _in_sparse_attribute(location: str) -> onnx.ModelProto:
    return helper.make_model(_graph(nodes=[helper.make_node("Constant", [], ["y"], sparse_value=_sparse(location))]))


def _in_subgraph(location: str) -> onnx.ModelProto:
    inner = _graph(tensors=[_tensor(location)])
    outer = _graph(nodes=[helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=_graph())])
    return helper.make_model(_graph(nodes=[helper.make_node("If", ["c"], ["y"], then_branch=outer, else_branch=inner)]))


def _in_function(location: str) -> onnx.ModelProto:
    """ONNX Runtime inlines the body and reads the file that it names."""
    body = [helper.make_node("Constant", [], ["y"], value=_tensor(location))]
    function = helper.make_function("own", "F", [], ["y"], body, [helper.make_opsetid("", 18)])
    return helper.make_model(_graph(nodes=[helper.make_node("F", [], ["y"], domain="own")]), functions=[function])


Make = Callable[[str], onnx.ModelProto]

PLACES: list[Make] = [
    _in_initializer, _in_sparse_initializer, _in_attribute, _in_attribute_list, _in_sparse_attribute, _in_subgraph,
    _in_function,
]  # fmt: skip


def _write(path: Path, model: onnx.ModelProto) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def test_file_without_external_data(tmp_path: Path) -> None:
    path = _write(tmp_path / "m.onnx", helper.make_model(_graph(tensors=[_tensor(None)])))
    assert external_data_files(path) == []
    check_external_data(path)


@pytest.mark.parametrize("make", PLACES)
def test_location_is_found_wherever_a_tensor_can_be(tmp_path: Path, make: Make) -> None:
    path = _write(tmp_path / "m.onnx", make("weights.bin"))
    assert external_data_files(path) == ["weights.bin"]


@pytest.mark.parametrize("location", ["weights.bin", "sub/weights.bin", "./weights.bin"])
def test_data_inside_the_folder_is_taken(tmp_path: Path, location: str) -> None:
    (tmp_path / location).parent.mkdir(exist_ok=True)
    (tmp_path / location).write_bytes(bytes(16))
    check_external_data(_write(tmp_path / "m.onnx", _in_initializer(location)))


@pytest.mark.parametrize("make", PLACES)
@pytest.mark.parametrize(
    "location", ["../secret.bin", "sub/../../secret.bin", "{absolute}", "", "link.bin", "loop.bin", "."]
)
def test_data_outside_the_folder_is_refused(tmp_path: Path, make: Make, location: str) -> None:
    secret = tmp_path / "secret.bin"
    secret.write_bytes(bytes(16))
    folder = tmp_path / "bundle"
    (folder / "sub").mkdir(parents=True)
    (folder / "link.bin").symlink_to(secret)
    (folder / "loop.bin").symlink_to("loop.bin")
    path = _write(folder / "m.onnx", make(location.replace("{absolute}", str(secret))))
    with pytest.raises(InputError, match=r"m\.onnx"):
        check_external_data(path)


@pytest.mark.parametrize("location", ["a\0b", "x" * 5000, "missing.bin"])
def test_data_that_cannot_be_there_is_refused(tmp_path: Path, location: str) -> None:
    path = _write(tmp_path / "m.onnx", _in_initializer(location))
    with pytest.raises(InputError):
        check_external_data(path)


def test_absolute_location_inside_the_folder_is_refused_too(tmp_path: Path) -> None:
    """It would break as soon as the folder moves to the device."""
    (tmp_path / "weights.bin").write_bytes(bytes(16))
    path = _write(tmp_path / "m.onnx", _in_initializer(str(tmp_path / "weights.bin")))
    with pytest.raises(InputError, match="leaves the folder"):
        check_external_data(path)


def test_packed_dimensions_of_a_sparse_tensor_are_numbers_not_a_tensor(tmp_path: Path) -> None:
    """Writers built from onnx.proto3 pack repeated numbers; 3 and 4 would pass for wire types 3 and 4."""
    model = helper.make_model(_graph())
    sparse = _sparse("weights.bin")
    del sparse.dims[:]
    packed = sparse.SerializeToString() + b"\x1a\x02\x03\x04"  # field 3, two bytes: dims [3, 4]
    initializer = b"\x7a" + bytes([len(packed)]) + packed  # GraphProto.sparse_initializer
    graph = model.graph.SerializeToString() + initializer
    model.ClearField("graph")
    size = bytes([len(graph) & 0x7F | 0x80, len(graph) >> 7])
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString() + b"\x3a" + size + graph)
    assert external_data_files(tmp_path / "m.onnx") == ["weights.bin"]


def test_missing_empty_and_garbage(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    with pytest.raises(InputError, match="No such file"):
        external_data_files(path)
    for content in (b"", b"not a protocol buffer at all", bytes(100), b"\xff" * 100, b"\x08\x08"):
        path.write_bytes(content)
        with pytest.raises(InputError):
            external_data_files(path)
    with pytest.raises(InputError):
        external_data_files(tmp_path)


def test_truncated_file_is_an_input_error_at_every_length(tmp_path: Path) -> None:
    whole = _in_subgraph("weights.bin").SerializeToString()
    path = tmp_path / "m.onnx"
    graph_at = whole.index(b"\x3a")  # field 7: nothing before it is a model
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        try:
            found = external_data_files(path)
        except InputError:
            continue
        assert size > graph_at
        assert found == ["weights.bin"]  # the cut fell between two fields behind the graph


def test_changed_bytes_never_crash_the_reader(tmp_path: Path) -> None:
    whole = _in_subgraph("weights.bin").SerializeToString()
    random = Random(0)
    for _ in range(300):
        changed = bytearray(whole)
        for _ in range(random.choice([1, 3])):
            changed[random.randrange(len(changed))] = random.randrange(256)
        (tmp_path / "m.onnx").write_bytes(changed)
        with contextlib.suppress(InputError):
            external_data_files(tmp_path / "m.onnx")


def test_graphs_nested_without_end_are_refused(tmp_path: Path) -> None:
    data = b""
    for _ in range(3000):  # a graph whose node's attribute is a graph whose node's ...
        for tag in (b"\x32", b"\x2a", b"\x0a"):  # AttributeProto.g, NodeProto.attribute, GraphProto.node
            size, length = len(data), b""
            while size > 0x7F:
                length, size = length + bytes([size & 0x7F | 0x80]), size >> 7
            data = tag + length + bytes([size]) + data
    model = onnx.ModelProto()
    length = len(data)
    head = b"\x3a" + bytes([length & 0x7F | 0x80, length >> 7 & 0x7F | 0x80, length >> 14])
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString() + head + data)
    with pytest.raises(InputError):
        external_data_files(tmp_path / "m.onnx")
