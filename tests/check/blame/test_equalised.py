"""An equalised INT8 file is compared inside with the network that it was made from, channel scales and all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from cspdeploy.check.blame import BlameRequest, blame, layer_curve
from cspdeploy.core.channel_factors import FACTORS_KEY
from cspdeploy.core.errors import InputError
from cspdeploy.quant.equalise import equalise
from cspdeploy.quant.place import lay_out
from cspdeploy.quant.prepare import prepare_float
from cspdeploy.quant.torch_graph import TorchGraph
from cspdeploy.quant.write import write_qdq
from tests.check.blame.conftest import make_detector
from tests.quant.placed_graphs import ROWS, plan_by_extremes

Edit = Callable[[onnx.ModelProto], None]


def _unequal(model: onnx.ModelProto) -> None:
    """Output channels of the inner convolutions differ by up to 30 times."""
    spread = np.geomspace(1, 30, 24, dtype=np.float32)
    for tensor in model.graph.initializer:
        if tensor.name in ("w1", "w2", "w3", "w4", "w6"):
            value = numpy_helper.to_array(tensor)
            along = spread[: len(value)].reshape(-1, *[1] * (value.ndim - 1))
            tensor.CopyFrom(numpy_helper.from_array(value / along, tensor.name))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("equalised")
    reference, target = folder / "reference.onnx", folder / "net.int8.onnx"
    model = make_detector()
    _unequal(model)
    onnx.save(model, reference)
    x_NCHW = np.random.default_rng(1).standard_normal((8, 3, 32, 32)).astype(np.float32)
    ready = prepare_float(model, placement=ROWS["ort-cpu"])
    magnitudes: dict[str, np.ndarray] = {}
    graph = TorchGraph(ready)
    with torch.inference_mode():
        graph.run(torch.from_numpy(x_NCHW), visit=lambda name, value: magnitudes.update({name: _largest(value)}))
    equalised = equalise(graph, magnitudes)
    assert equalised.largest_factor > 4
    for tensor in ready.graph.initializer:
        if tensor.name in equalised.values:
            tensor.CopyFrom(numpy_helper.from_array(equalised.values[tensor.name], tensor.name))
    scaled = TorchGraph(ready)
    plan = plan_by_extremes(scaled, lay_out(scaled, ROWS["ort-cpu"]), ROWS["ort-cpu"], x_NCHW)
    onnx.save(write_qdq(ready, dataclasses.replace(plan, factors=equalised.factors)), target)
    return reference, target


def _largest(value: torch.Tensor) -> np.ndarray:
    """Of each channel."""
    found: np.ndarray = value.abs().transpose(0, 1).flatten(1).amax(1).numpy()
    return found


def _edited(source: Path, target: Path, edit: Edit) -> Path:
    model = onnx.load(source)
    edit(model)
    onnx.save(model, target)
    return target


def _forget(model: onnx.ModelProto) -> None:
    del model.metadata_props[:]


def test_every_tensor_has_a_counterpart(pair: tuple[Path, Path], tmp_path: Path) -> None:
    reference, target = pair
    report = blame(BlameRequest(artifact=target, against=str(reference)))
    assert (report.verdict, report.num_compared) == ("within", report.num_tensors)
    silent = blame(BlameRequest(artifact=_edited(target, tmp_path / "silent.onnx", _forget), against=str(reference)))
    assert silent.num_compared < 0.7 * report.num_tensors


def test_the_curve_has_every_layer(pair: tuple[Path, Path]) -> None:
    reference, target = pair
    curve = layer_curve(BlameRequest(artifact=target, against=str(reference)))
    assert sum(layer.operator == "Conv" for layer in curve.layers) == 6
    assert min(layer.sqnr_db for layer in curve.layers) > 20


def test_another_int8_file_is_a_reference_too(pair: tuple[Path, Path]) -> None:
    _, target = pair
    report = blame(BlameRequest(artifact=target, against="itself"))
    assert (report.verdict, report.num_compared) == ("within", report.num_tensors)


def test_names_a_wrong_weight_behind_the_factors(pair: tuple[Path, Path], tmp_path: Path) -> None:
    def spoil(model: onnx.ModelProto) -> None:
        scale = next(tensor for tensor in model.graph.initializer if tensor.name == "w4/scale")
        scale.CopyFrom(numpy_helper.from_array(1.5 * numpy_helper.to_array(scale), scale.name))

    reference, target = pair
    report = blame(BlameRequest(artifact=_edited(target, tmp_path / "faulty.onnx", spoil), against=str(reference)))
    assert report.blamed is not None
    assert report.blamed.node == "w4/DequantizeLinear"


def test_refuses_factors_that_cannot_be_read(pair: tuple[Path, Path], tmp_path: Path) -> None:
    def spoil(model: onnx.ModelProto) -> None:
        entry = next(entry for entry in model.metadata_props if entry.key == FACTORS_KEY)
        entry.value = entry.value[:-20]

    reference, target = pair
    spoilt = _edited(target, tmp_path / "spoilt.onnx", spoil)
    with pytest.raises(InputError, match=r"spoilt\.onnx: cspdeploy\.channel_factors: cannot be read"):
        blame(BlameRequest(artifact=spoilt, against=str(reference)))
