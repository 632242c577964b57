"""What is read of an ONNX file without onnx."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cspdeploy.core.errors import InputError
from cspdeploy.core.onnx_graph import Value, module_path, node_module, read_onnx, walk_nodes
from cspdeploy.core.spec import ModelSpec
from cspdeploy.nets.registry import build
from tests.core.small_files import FLOAT, HEADER, IF, NET, Write, model_of, net, tensor_model

# --- what is read ---


def test_model_and_graph(write: Write) -> None:
    model = model_of(NET, "w", "b", "low")
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
    conv, leaky, clip = read_onnx(write(net())).graph.nodes
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
    model = model_of(NET, "w", "b", "low")
    for node in model.graph.node:
        for attribute in node.attribute:
            attribute.ClearField("type")
    conv, leaky, _ = read_onnx(write(model)).graph.nodes
    assert (conv.attributes["pads"], leaky.attributes) == ((0, 0, 0, 0), {"alpha": 0.125})


def test_zero_that_is_not_written_is_zero(write: Write) -> None:
    model = model_of(NET, "w", "b", "low")
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
    found = read_onnx(write(tensor_model(tensor))).graph.initializers["t"]
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
    found = read_onnx(write(tensor_model(tensor))).graph.initializers["t"]
    assert (found.dtype, found.num_bytes) == (dtype, 2)
    np.testing.assert_array_equal(found.array(), values)


def test_bfloat16_is_read_as_float32(write: Write) -> None:
    tensor = TensorProto(
        name="t", data_type=TensorProto.BFLOAT16, dims=[2], raw_data=struct.pack("<2H", 0x3F80, 0xC0A0)
    )
    array = read_onnx(write(tensor_model(tensor))).graph.initializers["t"].array()
    np.testing.assert_array_equal(array, np.array([1.0, -5.0], np.float32), strict=True)


def test_strings(write: Write) -> None:
    tensor = helper.make_tensor("t", TensorProto.STRING, [2], [b"first", b"second"])
    found = read_onnx(write(tensor_model(tensor))).graph.initializers["t"]
    assert found.array().tolist() == ["first", "second"]


def test_values_that_numpy_has_no_type_for(write: Write) -> None:
    tensor = TensorProto(name="t", data_type=TensorProto.FLOAT8E4M3FN, dims=[2], raw_data=b"\x38\x38")
    found = read_onnx(write(tensor_model(tensor))).graph.initializers["t"]
    assert (found.dtype, found.num_bytes) == ("float8e4m3fn", 2)
    with pytest.raises(InputError, match="'t' is a tensor of float8e4m3fn"):
        found.array()


def test_sparse_initializer_is_known_but_not_read(write: Write) -> None:
    model = tensor_model(numpy_helper.from_array(np.ones(2, np.float32), "t"))
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
    found = read_onnx(write(tensor_model(tensor)))
    assert found.external_data == ("weights.bin",)
    weights = found.graph.initializers["t"]
    assert (weights.external, weights.num_bytes) == ("weights.bin", 8)
    np.testing.assert_array_equal(weights.array(), np.float32([1, 2]))


def test_external_data_of_four_gigabytes_is_not_opened(write: Write, tmp_path: Path) -> None:
    tensor = TensorProto(name="t", data_type=FLOAT, dims=[1 << 30], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="weights.bin")
    with (tmp_path / "weights.bin").open("wb") as file:
        file.truncate(1 << 32)  # a hole: takes no room on the disk
    found = read_onnx(write(tensor_model(tensor))).graph.initializers["t"]
    assert found.num_bytes == 1 << 32


def test_subgraphs_may_use_names_of_the_graph_around_them(write: Write) -> None:
    graph = read_onnx(write(model_of(IF, "k"))).graph
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
    model = model_of(NET, "w", "b", "low")
    model.graph.input.append(helper.make_tensor_value_info("b", FLOAT, [4]))
    graph = read_onnx(write(model)).graph
    assert [value.name for value in graph.inputs] == ["x"]
    assert set(graph.values) == {"x", "y", "b"}


def test_no_inputs_at_all(write: Write) -> None:
    graph = read_onnx(write(tensor_model(numpy_helper.from_array(np.ones(1, np.float32), "t")))).graph
    assert (graph.inputs, [node.operator for node in graph.nodes]) == ((), ["Identity"])


def test_unknown_dimension_rank_and_type(write: Write) -> None:
    model = model_of(NET, "w", "b", "low")
    model.graph.input[0].type.tensor_type.shape.dim[2].Clear()
    model.graph.value_info.extend([helper.make_tensor_value_info("r", FLOAT, None), onnx.ValueInfoProto(name="c")])
    model.graph.value_info.append(helper.make_tensor_sequence_value_info("list", FLOAT, [1]))
    graph = read_onnx(write(model)).graph
    assert graph.inputs[0].shape == ("N", 3, "?", 8)
    assert graph.values["r"] == Value(name="r", dtype="float32", shape=None)
    assert graph.values["c"] == Value(name="c", dtype="undefined", shape=None)
    assert graph.values["list"].dtype == "sequence"


def test_scalar_has_a_shape(write: Write) -> None:
    model = model_of(NET, "w", "b", "low")
    model.graph.value_info.append(helper.make_tensor_value_info("r", FLOAT, []))
    assert read_onnx(write(model)).graph.values["r"].shape == ()


def test_nodes_in_another_order_are_put_in_order(write: Write) -> None:
    """ONNX forbids it, ONNX Runtime takes it."""
    model = model_of(NET, "w", "b", "low")
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([nodes[2], nodes[0], nodes[1]])
    found = read_onnx(write(model)).graph.nodes
    assert [(node.operator, node.index) for node in found] == [("Conv", 1), ("LeakyRelu", 2), ("Clip", 0)]


def test_a_graph_in_two_parts_is_one(write: Write) -> None:
    """As protocol buffers have it: messages that follow each other are merged."""
    extra = onnx.ModelProto(graph=onnx.GraphProto(output=[onnx.ValueInfoProto(name="c")]))
    graph = read_onnx(write(net() + extra.SerializeToString())).graph
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
    model = model_of(NET, "w", "b", "low")
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
