from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import numpy_helper

from cspdeploy.core.errors import InputError
from cspdeploy.core.metrics import relative_l2
from cspdeploy.core.types import StepRecord
from cspdeploy.export import adopt
from cspdeploy.export.adopt import adopt_onnx
from cspdeploy.runtimes.ort import open_cpu_session

RNG = np.random.default_rng(0)
X_NCHW = RNG.normal(size=(1, 3, 8, 8)).astype(np.float32)
W = RNG.normal(size=(4, 3, 3, 3)).astype(np.float32)
SHAPES: dict[str, tuple[int | str, ...]] = {"image": (1, 3, 8, 8), "y": (1, 4, 6, 6)}
NODES = "c = Conv(image, w)  m = Mish(c)  y = Mul(m, two)"


def _save(
    path: Path, nodes: str = NODES, *, opset: int = 18, ir: int = 8, shape: str = "N, 3, h, v", **save: Any
) -> Path:
    text = f"""<ir_version: {ir}, opset_import: ["": {opset}]> graph (float[{shape}] image) => (float[N, 4, a, b] y)
        {{ {nodes} }}"""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(numpy_helper.from_array(W, "w"))
    model.graph.initializer.append(numpy_helper.from_array(np.float32([2.0]), "two"))
    onnx.save(model, path, **save)
    return path


def _adopt(source: Path, **options: Any) -> tuple[onnx.ModelProto, StepRecord]:
    target = source.with_name("adopted.onnx")
    record = adopt_onnx(source, target, sha256="ab" * 32, shapes=SHAPES, **options)
    model = onnx.load(target, load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    expected, got = (open_cpu_session(path).run({"image": X_NCHW})["y"] for path in (source, target))
    assert relative_l2(got, expected) < 1e-6  # type: ignore[arg-type]
    return model, record


def _opset(model: onnx.ModelProto) -> int:
    return int(model.opset_import[0].version)


def test_shapes_are_written_and_nodes_get_names(tmp_path: Path) -> None:
    model, record = _adopt(_save(tmp_path / "mine.onnx"))
    for value, name in ((model.graph.input[0], "image"), (model.graph.output[0], "y")):
        assert value.name == name
        assert tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim) == SHAPES[name]
    assert [node.name for node in model.graph.node] == ["Conv_0", "Mish_1", "Mul_2"]
    assert record.detail == "copied from mine.onnx (SHA-256 abababababab), opset 18"
    assert record.facts["operators_before"] == record.facts["operators_after"] == {"Conv": 1, "Mish": 1, "Mul": 1}


def test_new_names_of_nodes_are_not_those_of_others(tmp_path: Path) -> None:
    source = _save(tmp_path / "mine.onnx")
    model = onnx.load(source)
    model.graph.node[0].name = "Mul_2"
    onnx.save(model, source)
    assert [node.name for node in _adopt(source)[0].graph.node] == ["Mul_2", "Mish_1", "Mul_2_"]


def test_same_file_gives_the_same_bytes(tmp_path: Path) -> None:
    source = _save(tmp_path / "mine.onnx")
    _adopt(source, opset=17, operators=frozenset({"Mish"}))
    first = (tmp_path / "adopted.onnx").read_bytes()
    _adopt(source, opset=17, operators=frozenset({"Mish"}))
    assert (tmp_path / "adopted.onnx").read_bytes() == first


def test_free_batch_stays_free(tmp_path: Path) -> None:
    source = _save(tmp_path / "mine.onnx")
    adopt_onnx(source, tmp_path / "free.onnx", sha256="", shapes={"image": ("N", 3, 8, 8), "y": ("N", 4, 6, 6)})
    assert open_cpu_session(tmp_path / "free.onnx").inputs == {"image": ("N", 3, 8, 8)}


@pytest.mark.parametrize("opset", [12, 13, 17, 20])
def test_converted_to_another_opset(tmp_path: Path, opset: int) -> None:
    """Down to 12 the converter itself gives up: it knows no Mul of an opset before 14."""
    model, record = _adopt(_save(tmp_path / "mine.onnx"), opset=opset, operators=frozenset({"Mish"}))
    assert _opset(model) == record.facts["opset"] == opset
    assert (record.facts["opset_before"], record.facts["decomposed"]) == (18, {"Mish": 1})
    assert "converted from 18, 1 Mish in older operators" in record.detail


def test_conversion_that_cannot_be(tmp_path: Path) -> None:
    source = _save(tmp_path / "mine.onnx")
    with pytest.raises(InputError, match="has opset 18, cannot be converted to 15: at 17 ") as caught:
        adopt_onnx(source, tmp_path / "target.onnx", sha256="", shapes=SHAPES, opset=15)  # Mish is there
    assert "\n" not in caught.value.message
    assert not (tmp_path / "target.onnx").exists()


def test_weights_of_other_files_come_in(tmp_path: Path) -> None:
    source = _save(tmp_path / "mine.onnx", save_as_external_data=True, location="mine.data", size_threshold=0)
    model, record = _adopt(source)
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    assert record.facts["external_data"] == ["mine.data"]
    assert "weights of other files inside" in record.detail


def test_more_than_a_file_can_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _save(tmp_path / "mine.onnx", save_as_external_data=True, location="mine.data", size_threshold=0)
    monkeypatch.setattr(adopt, "MAX_FILE_BYTES", 500)
    with pytest.raises(InputError, match="in 1 other files, an ONNX file holds 2 GB"):
        adopt_onnx(source, tmp_path / "target.onnx", sha256="", shapes=SHAPES)


def test_weights_that_are_listed_as_inputs_too(tmp_path: Path) -> None:
    source = _save(tmp_path / "mine.onnx", "c = Conv(image, w)  y = Mul(c, two)", opset=8, ir=3)
    model = onnx.load(source)
    for tensor in model.graph.initializer:
        value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
        model.graph.input.append(value)
    onnx.save(model, source)
    adopted, _ = _adopt(source)
    assert [value.name for value in adopted.graph.input] == ["image"]
    assert adopted.ir_version == 4


def test_functions_of_the_file_are_written_out(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["": 18, "mine": 1]>
        graph (float[N, 3, 8, 8] image) => (float[N, 4, 6, 6] y) { c = Conv(image, w)  y = mine.twice(c) }
        <opset_import: ["": 18], domain: "mine"> twice (x) => (z) { z = Add(x, x) }"""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(numpy_helper.from_array(W, "w"))
    onnx.save(model, tmp_path / "mine.onnx")
    adopted, _ = _adopt(tmp_path / "mine.onnx")
    assert [node.op_type for node in adopted.graph.node] == ["Conv", "Add"]
    assert not adopted.functions


def test_newer_ir_version_is_lowered(tmp_path: Path) -> None:
    model, _ = _adopt(_save(tmp_path / "mine.onnx", ir=12 if onnx.IR_VERSION >= 12 else onnx.IR_VERSION))
    assert model.ir_version == 10


def test_values_of_the_weights_are_those_of_the_file(tmp_path: Path) -> None:
    model, _ = _adopt(_save(tmp_path / "mine.onnx"), opset=17, operators=frozenset({"Mish"}))
    found: dict[str, npt.NDArray[Any]] = {
        tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer
    }
    np.testing.assert_array_equal(found["w"], W)
