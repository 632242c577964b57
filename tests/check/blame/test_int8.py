"""INT8: an honest quantised file has no outlier; a wrong scale is named at its node, by what the node introduces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from cspdeploy.check.blame import BlameRequest, blame
from tests.check.blame.conftest import make_detector


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        rng = np.random.default_rng(1)
        self._inputs = iter([{"image": rng.standard_normal((1, 3, 32, 32)).astype(np.float32)} for _ in range(8)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._inputs, None)


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("int8")
    reference, target = folder / "reference.onnx", folder / "int8.onnx"
    onnx.save(make_detector(), reference)
    quantize_static(
        reference, target, _Reader(), quant_format=QuantFormat.QDQ, activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )  # fmt: skip
    return reference, target


def test_blames_nothing_in_an_honest_file(quantised: tuple[Path, Path]) -> None:
    reference, target = quantised
    report = blame(BlameRequest(artifact=target, against=str(reference)))
    assert (report.precision, report.verdict) == ("int8", "within")
    assert not any("than others of its kind" in note for note in report.notes)


def _scale(model: onnx.ModelProto, node: onnx.NodeProto, factor: float, *, name: str) -> None:
    """The node alone gets the wrong scale."""
    right = next(tensor for tensor in model.graph.initializer if tensor.name == node.input[1])
    values = numpy_helper.to_array(right) * np.float32(factor)
    model.graph.initializer.append(numpy_helper.from_array(values, name))
    node.input[1] = name


@pytest.mark.parametrize(("tensor", "factor"), [("a4", 0.1), ("a9", 12.0), ("a2", 0.15)])
def test_names_the_scale_of_an_activation(
    quantised: tuple[Path, Path], tmp_path: Path, tensor: str, factor: float
) -> None:
    reference, target = quantised
    model = onnx.load(target)
    nodes = [node for node in model.graph.node if node.input[0] in (tensor, f"{tensor}_QuantizeLinear_Output")]
    pair = [node for node in nodes if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(pair) >= 2
    for node in pair:
        _scale(model, node, factor, name=f"{node.output[0]}_wrong")
    faulty = tmp_path / "faulty.onnx"
    onnx.save(model, faulty)
    report = blame(BlameRequest(artifact=faulty, against=str(reference)))
    assert report.blamed is not None
    assert report.blamed.node == pair[0].name
    assert any("covers" in fact for fact in report.blamed.facts)


def test_names_the_scale_of_a_weight(quantised: tuple[Path, Path], tmp_path: Path) -> None:
    reference, target = quantised
    model = onnx.load(target)
    node = next(node for node in model.graph.node if node.input[0] == "w4_quantized")
    _scale(model, node, 1.5, name="wrong")
    faulty = tmp_path / "faulty.onnx"
    onnx.save(model, faulty)
    report = blame(BlameRequest(artifact=faulty, against=str(reference)))
    assert report.blamed is not None
    assert report.blamed.node == node.name
