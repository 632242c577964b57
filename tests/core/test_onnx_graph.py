from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from cspdeploy.core.errors import InputError
from cspdeploy.core.onnx_graph import Graph, Node, Value, module_path, node_module, read_onnx, walk_nodes
from cspdeploy.core.spec import ModelSpec
from cspdeploy.nets.registry import build

FLOAT = TensorProto.FLOAT
HEADER = '<ir_version: 8, opset_import: ["" : 18, "com.example": 2]>'
NET = f"""{HEADER} net (float[N, 3, 8, 8] x) => (float[N, 4, 6, 6] y) {{
    c = Conv<pads = [0, 0, 0, 0], group = 1>(x, w, b)
    r = LeakyRelu<alpha = 0.125>(c)
    y = Clip(r, low)
}}"""
IF = f"""{HEADER} net (float[2] x, bool flag) => (float[2] y) {{
    outer = Relu(x)
    y = If(flag) <
        then_branch = then () => (float[2] t) {{ t = Neg(outer) }},
        else_branch = otherwise () => (float[2] e) {{ deeper = Abs(outer)  e = Add(deeper, k) }}
    >
}}"""


def _arrays() -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    return {
        "w": rng.normal(size=(4, 3, 3, 3)).astype(np.float32), "b": np.zeros(4, np.float32),
        "low": np.float32(0.0), "k": np.ones(2, np.float32),
    }  # fmt: skip


def _model(text: str, *weights: str) -> onnx.ModelProto:
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(_arrays()[name]), name) for name in weights)
    return model


@functools.cache
def _net() -> bytes:
    return bytes(_model(NET, "w", "b", "low").SerializeToString())


@pytest.fixture
def write(tmp_path: Path) -> Callable[[onnx.ModelProto | bytes], Path]:
    """`write(model)`: it as a file."""

    def save(model: onnx.ModelProto | bytes) -> Path:
        path = tmp_path / "net.onnx"
        path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
        return path

    return save


Write = Callable[[onnx.ModelProto | bytes], Path]


def _tensor_model(tensor: TensorProto) -> onnx.ModelProto:
    output = helper.make_tensor_value_info("y", FLOAT, [1])
    node = helper.make_node("Identity", [tensor.name], ["y"])
    return helper.make_model(helper.make_graph([node], "g", [], [output], [tensor]))


# --- what is read ---


def test_model_and_graph(write: Write) -> None:
    model = _model(NET, "w", "b", "low")
    model.producer_name, model.producer_version = "somebody", "1.2"
    model.metadata_props.add(key="author", value="me")
    path = write(model)
    found = read_onnx(path)
    assert (found.path, found.num_bytes) == (path, path.stat().st_size)
    assert (found.ir_version, found.producer) == (8, "somebody 1.2")
    assert found.opsets == {"ai.onnx": 18, "com.example": 2}
    assert found.metadata == {"author": "me"}
    assert (found.functions, found.external_data) == ((), ())
    graph = found.graph
    assert graph.name == "net"
    assert [node.operator for node in graph.nodes] == ["Conv", "LeakyRelu", "Clip"]
    assert graph.inputs == (Value(name="x", dtype="float32", shape=("N", 3, 8, 8)),)
    assert graph.outputs == (Value(name="y", dtype="float32", shape=("N", 4, 6, 6)),)
    assert graph.captured == ()


def test_node(write: Write) -> None:
    conv, leaky, clip = read_onnx(write(_net())).graph.nodes
    assert (conv.index, conv.domain, conv.inputs, conv.outputs) == (0, "ai.onnx", ("x", "w", "b"), ("c",))
    assert conv.attributes == {"pads": (0, 0, 0, 0), "group": 1}
    assert leaky.attributes == {"alpha": 0.125}
    assert clip.index == 2
    assert conv.subgraphs == ()


def test_every_kind_of_attribute(write: Write) -> None:
    tensor = numpy_helper.from_array(np.arange(3, dtype=np.int64), "t")
    given_ = {
        "i": -5, "f": 0.5, "s": "text", "ints": [-1, 0, 1 << 40], "floats": [0.5, -2.0], "strings": ["a", "b"],
        "raw": b"\xff\xfe", "t": tensor, "ts": [tensor, tensor], "none": [],
    }  # fmt: skip
    node = helper.make_node("Own", [], ["y"], domain="com.example")
    for name, value in given_.items():
        attribute = helper.make_attribute(name, value, attr_type=onnx.AttributeProto.INTS if value == [] else None)
        node.attribute.append(attribute)
    output = helper.make_tensor_value_info("y", FLOAT, [1])
    found = read_onnx(write(helper.make_model(helper.make_graph([node], "g", [], [output])))).graph.nodes[0]
    attributes: dict[str, Any] = dict(found.attributes)
    np.testing.assert_array_equal(attributes.pop("t").array(), [0, 1, 2])
    assert [item.shape for item in attributes.pop("ts")] == [(3,), (3,)]
    assert attributes == {
        "i": -5, "f": 0.5, "s": "text", "ints": (-1, 0, 1 << 40), "floats": (0.5, -2.0), "strings": ("a", "b"),
        "raw": b"\xff\xfe", "none": (),
    }  # fmt: skip


def test_attribute_of_an_old_file_without_its_type(write: Write) -> None:
    model = _model(NET, "w", "b", "low")
    for node in model.graph.node:
        for attribute in node.attribute:
            attribute.ClearField("type")
    conv, leaky, _ = read_onnx(write(model)).graph.nodes
    assert (conv.attributes["pads"], leaky.attributes) == ((0, 0, 0, 0), {"alpha": 0.125})


def test_zero_that_is_not_written_is_zero(write: Write) -> None:
    model = _model(NET, "w", "b", "low")
    model.graph.node[1].attribute[0].ClearField("f")
    assert read_onnx(write(model)).graph.nodes[1].attributes == {"alpha": 0.0}


@pytest.mark.parametrize(
    "dtype", ["float32", "float64", "float16", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64",
              "uint64", "bool", "complex64", "complex128"],
)  # fmt: skip
@pytest.mark.parametrize("raw", [True, False])
def test_array_of_every_type(write: Write, dtype: str, raw: bool) -> None:
    expected = np.array([[0, 1, 100], [3, 2, 1]]).astype(dtype)
    if expected.dtype.kind in "if":
        expected = -expected
    code = helper.np_dtype_to_tensor_dtype(expected.dtype)
    if raw:
        tensor = numpy_helper.from_array(expected, "t")
    else:
        tensor = helper.make_tensor("t", code, expected.shape, expected.flatten().tolist())
    found = read_onnx(write(_tensor_model(tensor))).graph.initializers["t"]
    assert (found.dtype, found.shape, found.num_values, found.num_bytes) == (dtype, (2, 3), 6, expected.nbytes)
    array = found.array()
    np.testing.assert_array_equal(array, expected, strict=True)
    array[0, 0] = 1  # a copy of one's own


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize(("code", "dtype"), [(TensorProto.INT4, "int4"), (TensorProto.UINT4, "uint4")])
def test_four_bits(write: Write, code: int, dtype: str, raw: bool) -> None:
    values = [-8, 7, -1] if dtype == "int4" else [0, 15, 8]
    tensor = helper.make_tensor("t", code, [3], values)
    if raw:
        data = bytes(tensor.int32_data)
        tensor.ClearField("int32_data")
        tensor.raw_data = data
    found = read_onnx(write(_tensor_model(tensor))).graph.initializers["t"]
    assert (found.dtype, found.num_bytes) == (dtype, 2)
    np.testing.assert_array_equal(found.array(), values)


def test_bfloat16_is_read_as_float32(write: Write) -> None:
    tensor = TensorProto(
        name="t", data_type=TensorProto.BFLOAT16, dims=[2], raw_data=struct.pack("<2H", 0x3F80, 0xC0A0)
    )
    array = read_onnx(write(_tensor_model(tensor))).graph.initializers["t"].array()
    np.testing.assert_array_equal(array, np.array([1.0, -5.0], np.float32), strict=True)


def test_strings(write: Write) -> None:
    tensor = helper.make_tensor("t", TensorProto.STRING, [2], [b"first", b"second"])
    found = read_onnx(write(_tensor_model(tensor))).graph.initializers["t"]
    assert found.array().tolist() == ["first", "second"]


def test_values_that_numpy_has_no_type_for(write: Write) -> None:
    tensor = TensorProto(name="t", data_type=TensorProto.FLOAT8E4M3FN, dims=[2], raw_data=b"\x38\x38")
    found = read_onnx(write(_tensor_model(tensor))).graph.initializers["t"]
    assert (found.dtype, found.num_bytes) == ("float8e4m3fn", 2)
    with pytest.raises(InputError, match="'t' is a tensor of float8e4m3fn"):
        found.array()


def test_sparse_initializer_is_known_but_not_read(write: Write) -> None:
    model = _tensor_model(numpy_helper.from_array(np.ones(2, np.float32), "t"))
    values, indices = (numpy_helper.from_array(array, "s") for array in (np.float32([1, 2]), np.array([3, 5])))
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [100]))
    found = read_onnx(write(model)).graph.initializers["s"]
    assert (found.shape, found.num_bytes) == ((100,), 8 + 16)
    with pytest.raises(InputError, match="a sparse tensor"):
        found.array()


def test_external_data(write: Write, tmp_path: Path) -> None:
    tensor = TensorProto(name="t", data_type=FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "weights.bin"), ("offset", "4"), ("length", "8")):
        tensor.external_data.add(key=key, value=value)
    (tmp_path / "weights.bin").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    found = read_onnx(write(_tensor_model(tensor)))
    assert found.external_data == ("weights.bin",)
    weights = found.graph.initializers["t"]
    assert (weights.external, weights.num_bytes) == ("weights.bin", 8)
    np.testing.assert_array_equal(weights.array(), np.float32([1, 2]))


def test_external_data_of_four_gigabytes_is_not_opened(write: Write, tmp_path: Path) -> None:
    tensor = TensorProto(name="t", data_type=FLOAT, dims=[1 << 30], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="weights.bin")
    with (tmp_path / "weights.bin").open("wb") as file:
        file.truncate(1 << 32)  # a hole: takes no room on the disk
    found = read_onnx(write(_tensor_model(tensor))).graph.initializers["t"]
    assert found.num_bytes == 1 << 32


def test_subgraphs_may_use_names_of_the_graph_around_them(write: Write) -> None:
    graph = read_onnx(write(_model(IF, "k"))).graph
    assert [node.operator for node in walk_nodes(graph)] == ["Relu", "If", "Abs", "Add", "Neg"] or [
        node.operator for node in walk_nodes(graph)
    ] == ["Relu", "If", "Neg", "Abs", "Add"]
    captured = {subgraph.name: subgraph.captured for subgraph in graph.nodes[1].subgraphs}
    assert captured == {"then": ("outer",), "otherwise": ("outer", "k")}
    assert graph.nodes[1].attributes == {}


def test_functions_are_named(write: Write) -> None:
    text = f"""{HEADER} g (float[2] x) => (float[2] y) {{ y = com.example.twice(x) }}
    <domain: "com.example", opset_import: ["" : 18]> twice (a) => (b) {{ b = Add(a, a) }}"""
    assert read_onnx(write(onnx.parser.parse_model(text))).functions == ("com.example.twice",)


def test_weights_that_are_listed_as_inputs_are_no_inputs(write: Write) -> None:
    model = _model(NET, "w", "b", "low")
    model.graph.input.append(helper.make_tensor_value_info("b", FLOAT, [4]))
    graph = read_onnx(write(model)).graph
    assert [value.name for value in graph.inputs] == ["x"]
    assert set(graph.values) == {"x", "y", "b"}


def test_no_inputs_at_all(write: Write) -> None:
    graph = read_onnx(write(_tensor_model(numpy_helper.from_array(np.ones(1, np.float32), "t")))).graph
    assert (graph.inputs, [node.operator for node in graph.nodes]) == ((), ["Identity"])


def test_unknown_dimension_rank_and_type(write: Write) -> None:
    model = _model(NET, "w", "b", "low")
    model.graph.input[0].type.tensor_type.shape.dim[2].Clear()
    model.graph.value_info.extend([helper.make_tensor_value_info("r", FLOAT, None), onnx.ValueInfoProto(name="c")])
    model.graph.value_info.append(helper.make_tensor_sequence_value_info("list", FLOAT, [1]))
    graph = read_onnx(write(model)).graph
    assert graph.inputs[0].shape == ("N", 3, "?", 8)
    assert graph.values["r"] == Value(name="r", dtype="float32", shape=None)
    assert graph.values["c"] == Value(name="c", dtype="undefined", shape=None)
    assert graph.values["list"].dtype == "sequence"


def test_scalar_has_a_shape(write: Write) -> None:
    model = _model(NET, "w", "b", "low")
    model.graph.value_info.append(helper.make_tensor_value_info("r", FLOAT, []))
    assert read_onnx(write(model)).graph.values["r"].shape == ()


def test_nodes_in_another_order_are_put_in_order(write: Write) -> None:
    """ONNX forbids it, ONNX Runtime takes it."""
    model = _model(NET, "w", "b", "low")
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([nodes[2], nodes[0], nodes[1]])
    found = read_onnx(write(model)).graph.nodes
    assert [(node.operator, node.index) for node in found] == [("Conv", 1), ("LeakyRelu", 2), ("Clip", 0)]


def test_a_graph_in_two_parts_is_one(write: Write) -> None:
    """As protocol buffers have it: messages that follow each other are merged."""
    extra = onnx.ModelProto(graph=onnx.GraphProto(output=[onnx.ValueInfoProto(name="c")]))
    graph = read_onnx(write(_net() + extra.SerializeToString())).graph
    assert [value.name for value in graph.outputs] == ["y", "c"]
    assert len(graph.nodes) == 3


def test_what_torch_exports(tiny_bundle: Path) -> None:
    path = tiny_bundle / "tiny.onnx"
    found, expected = read_onnx(path), onnx.load(path)
    for tensor in expected.graph.initializer:
        np.testing.assert_array_equal(
            found.graph.initializers[tensor.name].array(), numpy_helper.to_array(tensor), strict=True
        )
    for node, theirs in zip(found.graph.nodes, expected.graph.node, strict=True):
        assert (node.name, node.operator, list(node.inputs)) == (theirs.name, theirs.op_type, list(theirs.input))
        for attribute in theirs.attribute:
            value = helper.get_attribute_value(attribute)
            value = value.decode() if isinstance(value, bytes) else tuple(value) if isinstance(value, list) else value
            assert node.attributes[attribute.name] == value


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("/stages/stages.0/conv1/conv/Conv", "stages.0.conv1.conv"),
        ("/stages/stages.3/blocks/blocks.12/Add", "stages.3.blocks.12"),
        ("/features/features.0/features.0.1/Relu_2", "features.0.1"),
        ("/blocks.1/conv2/conv/Conv", "blocks.1.conv2.conv"),
        ("/stages/stages.0/conv_exp/conv/Conv/part0", "stages.0.conv_exp.conv"),
        ("/Mixed_5b/branch1x1/conv/Conv_quant", "Mixed_5b.branch1x1.conv"),
        ("/Flatten", ""),
        ("Conv_12", ""),
        ("input/fp16/cast", ""),
        ("", ""),
    ],
)
def test_module_path(name: str, module: str) -> None:
    assert module_path(name) == module


def test_module_that_the_newer_exporter_writes_beside_a_node(write: Write) -> None:
    model = _model(NET, "w", "b", "low")
    scopes = "['', 'stages.0', 'stages.0.conv', 'conv2d']"
    model.graph.node[0].metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
    model.graph.node[1].metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'relu']")
    model.graph.node[2].name = "/head/Clip"
    assert [node_module(node) for node in read_onnx(write(model)).graph.nodes] == ["stages.0.conv", "", "head"]


def test_module_paths_are_modules(tiny_bundle: Path, tiny_spec: ModelSpec) -> None:
    known = {name for name, _ in build(tiny_spec).named_modules()}
    found = {module_path(node.name) for node in read_onnx(tiny_bundle / "tiny.onnx").graph.nodes}
    assert len(found) > 10
    assert found <= known


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
    _refused(write(_net()[:200]), "not an ONNX file, or a truncated one")


def test_cycle_is_shown(write: Write) -> None:
    model = _model(NET, "w", "b", "low")
    for node, name in zip(model.graph.node, ("first", "second", "third"), strict=True):
        node.name = name
    model.graph.node[0].input[2] = "r"
    _refused(write(model), "cyclic graph, '(first' -> 'second' -> 'first|second' -> 'first' -> 'second)'")


def test_node_that_takes_its_own_output(write: Write) -> None:
    model = _model(NET, "w", "b", "low")
    model.graph.node[1].input[0] = "r"
    model.graph.node[1].name = "self"
    _refused(write(model), "cyclic graph, 'self' -> 'self'")


def test_cycle_through_a_subgraph(write: Write) -> None:
    model = _model(IF, "k")
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
    model = _model(NET, "w", "b", "low")
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
    model = _model(NET, "w", "b", "low")
    change(model.graph)
    _refused(write(model), match)


def test_undefined_tensor_in_a_subgraph(write: Write) -> None:
    _refused(write(_model(IF)), "nothing makes the tensor 'k', which node 'If 1' takes")


def test_optional_input_that_is_left_out(write: Write) -> None:
    model = _model(NET, "w", "b", "low")
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
    _refused(write(_tensor_model(tensor)), match)


@pytest.mark.parametrize("data_type", [TensorProto.INT64, TensorProto.INT32, TensorProto.FLOAT16])
def test_fewer_integers_than_the_shape_wants(write: Write, data_type: int) -> None:
    tensor = TensorProto(name="t", data_type=data_type, dims=[1 << 50])
    (tensor.int64_data if data_type == TensorProto.INT64 else tensor.int32_data).extend([1] * 4)
    _refused(write(_tensor_model(tensor)), "has 4 bytes, its shape")


def test_more_bytes_but_fewer_integers(write: Write) -> None:
    """Large integers take several bytes each; their number shows when they are read."""
    tensor = TensorProto(name="t", data_type=TensorProto.INT64, dims=[3], int64_data=[1 << 60, 1 << 60])
    found = read_onnx(write(_tensor_model(tensor))).graph.initializers["t"]
    with pytest.raises(InputError, match=r"has 2 values, its shape \[3\] wants 3"):
        found.array()


def test_unknown_element_type(write: Write) -> None:
    _refused(write(_tensor_model(TensorProto(name="t", data_type=99, dims=[1], raw_data=b"0"))), "element type 99")


def test_file_that_changes_between_reading_and_use(write: Write) -> None:
    path = write(_net())
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
    _refused(write(_tensor_model(tensor)), match)


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
    return _net(), bytes(_model(IF, "k").SerializeToString())


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
