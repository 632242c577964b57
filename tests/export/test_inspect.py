from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from cspdeploy.core.errors import InputError
from cspdeploy.core.types import TensorInfo
from cspdeploy.export.inspect import WeightSummary, inspect_onnx

Make = Callable[..., Path]


def _keep_outside(path: Path, location: str) -> None:
    """Move the first weight's values to another file."""
    model = onnx.load(path)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    path.write_bytes(model.SerializeToString())


@pytest.fixture
def file(make_onnx: Make) -> Path:
    return make_onnx(
        "(float[N, 3, 8, 8] input) => (float[N, 4, 6, 6] y, int64[4] s) {"
        "  c = Conv(input, w, b)  r = Relu(c)  h = Cast<to = 1>(half)  y = Add(r, h)  s = Shape(y) }",
        w=np.zeros((4, 3, 3, 3), np.float32), b=np.zeros(4, np.float32), half=np.float16([2.0]),
    )  # fmt: skip


def test_fields(file: Path) -> None:
    model = onnx.load(file)
    model.producer_name, model.producer_version = "somebody", "1.2"
    model.metadata_props.add(key="author", value="me")
    model.opset_import.add(domain="com.example", version=3)
    onnx.save(model, file)
    found = inspect_onnx(file)
    assert (found.file, found.num_bytes) == (str(file), file.stat().st_size)
    assert (found.ir_version, found.opsets) == (8, {"ai.onnx": 18, "com.example": 3})
    assert found.producer == "somebody 1.2"
    assert found.inputs == (TensorInfo(name="input", dtype="float", shape=("N", 3, 8, 8)),)
    assert found.outputs == (
        TensorInfo(name="y", dtype="float", shape=("N", 4, 6, 6)),
        TensorInfo(name="s", dtype="int64", shape=(4,)),
    )
    assert found.operators == {"Conv": 1, "Relu": 1, "Cast": 1, "Add": 1, "Shape": 1}
    assert found.weights == (
        WeightSummary(dtype="float", num_tensors=2, num_values=4 * 3 * 3 * 3 + 4),
        WeightSummary(dtype="float16", num_tensors=1, num_values=1),
    )
    assert found.external_data == ()
    assert found.metadata == {"author": "me"}


def test_weights_that_are_listed_as_inputs_are_no_inputs(file: Path) -> None:
    model = onnx.load(file)
    model.graph.input.append(onnx.helper.make_tensor_value_info("b", TensorProto.FLOAT, [4]))
    onnx.save(model, file)
    assert [value.name for value in inspect_onnx(file).inputs] == ["input"]


def test_unknown_dimension(file: Path) -> None:
    model = onnx.load(file)
    model.graph.input[0].type.tensor_type.shape.dim[2].Clear()
    onnx.save(model, file)
    assert inspect_onnx(file).inputs[0].shape == ("N", 3, "?", 8)


def test_external_data_is_named_and_counted_but_not_opened(file: Path) -> None:
    _keep_outside(file, "weights.bin")
    file.with_name("weights.bin").write_bytes(b"too short")
    found = inspect_onnx(file)
    assert found.external_data == ("weights.bin",)
    assert found.weights[0].num_values == 4 * 3 * 3 * 3 + 4


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/hostname", "a/../../weights.bin"])
def test_external_data_outside_the_folder(file: Path, location: str) -> None:
    file.parent.with_name("weights.bin").write_bytes(b"")
    _keep_outside(file, location)
    with pytest.raises(InputError, match="leaves the folder"):
        inspect_onnx(file)


def test_external_data_that_is_missing(file: Path) -> None:
    _keep_outside(file, "weights.bin")
    with pytest.raises(InputError, match=r"weights\.bin: missing"):
        inspect_onnx(file)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"not an ONNX file at all",
        b"\x3a\x00\x02\x00",  # an empty graph, then a field of number 0, which protocol buffers do not have
        b"\x3a\x02\xff\xff",  # a graph that ends in the middle of a number
        bytes(1000),
    ],
)
def test_garbage(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "garbage.onnx"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"garbage\.onnx") as caught:
        inspect_onnx(path)
    assert caught.value.fix


def test_every_cut_is_refused_or_read(file: Path) -> None:
    whole = file.read_bytes()
    for end in range(0, len(whole), 7):
        file.write_bytes(whole[:end])
        try:
            inspect_onnx(file)
        except InputError:
            continue


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file") as caught:
        inspect_onnx(tmp_path / "none.onnx")
    assert caught.value.fix


def test_values_of_a_tensor_are_counted_by_its_shape(make_onnx: Make) -> None:
    path = make_onnx("(float[2] input) => (float[2] y) { y = Add(input, k) }", k=np.float32(1.0))
    model = onnx.load(path)
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((0, 3), np.float32), "none"))
    onnx.save(model, path)
    assert inspect_onnx(path).weights == (WeightSummary(dtype="float", num_tensors=2, num_values=1),)
