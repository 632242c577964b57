from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from cspdeploy.check.inspect import WeightSummary, inspect_onnx
from cspdeploy.core.errors import InputError
from cspdeploy.core.types import TensorInfo

NET = """<ir_version: 8, opset_import: ["" : 18]>
net (float[N, 3, 8, 8] input) => (float[N, 4, 6, 6] y, int64[4] s) {
    c = Conv(input, w, b)  r = Relu(c)  h = Cast<to = 1>(half)  y = Add(r, h)  s = Shape(y)
}"""


def _keep_outside(path: Path, location: str, *, length: int = 432) -> None:
    """Move the first weight's values to another file."""
    model = onnx.load(path)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    path.write_bytes(model.SerializeToString())
    if ".." not in location and not location.startswith("/"):
        path.with_name(location).write_bytes(bytes(length))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    model = parser.parse_model(NET)
    for name, array in (
        ("w", np.zeros((4, 3, 3, 3), np.float32)), ("b", np.zeros(4, np.float32)), ("half", np.float16([2.0])),
    ):  # fmt: skip
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    onnx.save(model, tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


def _edit(path: Path, change: Callable[[onnx.ModelProto], object]) -> None:
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)


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
    assert found.inputs == (TensorInfo(name="input", dtype="float32", shape=("N", 3, 8, 8)),)
    assert found.outputs == (
        TensorInfo(name="y", dtype="float32", shape=("N", 4, 6, 6)),
        TensorInfo(name="s", dtype="int64", shape=(4,)),
    )
    assert found.operators == {"Conv": 1, "Relu": 1, "Cast": 1, "Add": 1, "Shape": 1}
    assert found.weights == (
        WeightSummary(dtype="float32", num_tensors=2, num_values=4 * 3 * 3 * 3 + 4),
        WeightSummary(dtype="float16", num_tensors=1, num_values=1),
    )
    assert (found.external_data, found.functions) == ((), ())
    assert found.metadata == {"author": "me"}
    assert (found.audit.num_macs, found.audit.macs) == (6 * 6 * 4 * 27, {"fp32": 1.0})
    assert (found.audit.declared, found.audit.problem) == ("", "")


def test_name_and_option_say_what_it_should_be(file: Path) -> None:
    named = file.rename(file.with_name("net.int8.onnx"))
    assert inspect_onnx(named).audit.problem.startswith("named INT8, but 0 %")
    assert inspect_onnx(named, precision="fp32").audit.problem == ""
    assert inspect_onnx(named, precision="fp16").audit.declared == "fp16"


def test_weights_that_are_listed_as_inputs_are_no_inputs(file: Path) -> None:
    _edit(file, lambda model: model.graph.input.append(helper.make_tensor_value_info("b", TensorProto.FLOAT, [4])))
    assert [value.name for value in inspect_onnx(file).inputs] == ["input"]


def test_unknown_dimension_and_rank(file: Path) -> None:
    _edit(file, lambda model: model.graph.input[0].type.tensor_type.shape.dim[2].Clear())
    assert inspect_onnx(file).inputs[0].shape == ("N", 3, "?", 8)
    _edit(file, lambda model: model.graph.input[0].type.tensor_type.ClearField("shape"))
    found = inspect_onnx(file)
    assert found.inputs[0].shape == ("...",)
    assert found.audit.macs_unknown == "the file holds no shapes, not even that of its input 'input'"


def test_external_data_is_counted_but_not_read(file: Path) -> None:
    _keep_outside(file, "weights.bin")
    found = inspect_onnx(file)
    assert found.external_data == ("weights.bin",)
    assert found.num_bytes == file.stat().st_size + 432
    assert found.weights[0].num_values == 4 * 3 * 3 * 3 + 4


@pytest.mark.parametrize(
    ("location", "match"),
    [("../weights.bin", "leaves the folder"), ("/etc/hostname", "leaves the folder"),
     ("a/../../weights.bin", "leaves the folder"), ("short.bin", "has 9 bytes, its shape")],
)  # fmt: skip
def test_external_data_that_is_not_to_be_had(file: Path, location: str, match: str) -> None:
    file.parent.with_name("weights.bin").write_bytes(b"")
    _keep_outside(file, location, length=9)
    with pytest.raises(InputError, match=match):
        inspect_onnx(file)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"not an ONNX file at all", b"\x3a\x02\xff\xff"])
def test_garbage(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "garbage.onnx"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"garbage\.onnx") as caught:
        inspect_onnx(path)
    assert caught.value.fix


def test_a_scalar_is_one_value(file: Path) -> None:
    _edit(file, lambda model: model.graph.initializer.append(numpy_helper.from_array(np.float64(1.0), "scalar")))
    assert WeightSummary(dtype="float64", num_tensors=1, num_values=1) in inspect_onnx(file).weights


def test_needs_neither_onnx_nor_torch(file: Path, tmp_path: Path) -> None:
    import os
    import subprocess
    import sys

    import cspdeploy

    code = (
        "import sys; sys.modules.update(onnx=None, torch=None); from pathlib import Path;"
        "from cspdeploy.check.inspect import inspect_onnx; print(inspect_onnx(Path(sys.argv[1])).audit.found)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(cspdeploy.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.stdout.strip(), done.stderr) == ("fp32", "")
