"""INT8 of a detector: judged by its boxes and scores, not by its raw maps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from cspdeploy.core.types import StepRecord
from cspdeploy.quant.int8 import Int8Settings, quantise
from cspdeploy.quant.judge import Judge
from cspdeploy.quant.observations_cache import ObservationsCache
from cspdeploy.quant.placements import Placement
from tests.quant.detector_parts import DETECTION, calibration, detector
from tests.quant.int8_parts import quiet, write_source
from tests.quant.placed_graphs import ROWS


def make(folder: Path, *, placement: Placement = ROWS["tensorrt"], **settings: Any) -> StepRecord:
    target = folder / "out" / "net.int8.onnx"
    target.parent.mkdir(parents=True, exist_ok=True)
    settings = {"method": "minmax", **settings}
    return quantise(
        write_source(folder, detector()), target, calibration(), placement=placement,
        settings=Int8Settings(**settings), detection=DETECTION, cache=ObservationsCache(None), progress=quiet,
    )  # fmt: skip


def scaled(folder: Path, factor: float) -> Path:
    """The same with the objectness of the first anchor weighed otherwise."""
    model = detector()
    for tensor in model.graph.initializer:
        if tensor.name == "w4":
            weight = numpy_helper.to_array(tensor).copy()
            weight[4] *= np.float32(factor)
            tensor.CopyFrom(numpy_helper.from_array(weight, "w4"))
    path = folder / f"scaled{factor}.onnx"
    onnx.save(model, path)
    return path


@pytest.mark.usefixtures("int8_is_faster")
def test_record_says_how_many_boxes_are_the_same(tmp_path: Path) -> None:
    record = make(tmp_path, placement=ROWS["ort-cpu"])
    assert record.outcome == "done"
    boxes = record.facts["boxes"]
    assert (boxes["score"], boxes["iou"]) == (0.25, 0.9)
    assert boxes["expected"] > 10
    assert 0.9 <= boxes["recall"] == round(boxes["matched"] / boxes["expected"], 4)
    assert f"{100 * boxes['matched'] / boxes['expected']:.1f} % of {boxes['expected']} boxes matched" in record.detail
    assert record.facts["agreement"] is None
    assert json.loads(json.dumps(record.facts, allow_nan=False)) == record.facts


def test_boxes_are_simulated_where_the_engine_is_not_here(tmp_path: Path) -> None:
    record = make(tmp_path, max_drop="30%")
    assert record.outcome == "done"
    assert record.facts["boxes"]["expected"] > 10
    assert " boxes matched" in record.detail
    assert " simulated " in record.detail


def test_head_is_in_float_unless_that_was_measured_to_be_harmless(tmp_path: Path) -> None:
    """OpenVINO's last convolution could be INT8; TensorRT's too."""
    record = make(tmp_path)
    tried = [one["scheme"] for one in record.facts["tried"]]
    assert any("1 layers in float" in scheme for scheme in tried)
    assert any("in float" not in scheme for scheme in tried)  # the whole network, beside it
    levels = {one["scheme"]: one["sqnr_db"] for one in record.facts["tried"]}
    chosen = record.facts["scheme"]
    assert levels[chosen] >= max(levels.values()) - 0.2
    floats = {one["node"]: one["reason"] for one in record.facts["float_layers"]}
    if "in float" in chosen:
        assert floats["node6"].startswith("gives a detector's boxes and scores")
        assert "heads in INT8: " in record.detail
        assert ", not kept" in record.detail
    else:
        assert "node6" not in floats


def test_judge_counts_boxes_on_the_engine(tmp_path: Path) -> None:
    images = calibration()
    source = write_source(tmp_path, detector())
    with Judge(
        source, lambda: images.batches(8), runtime="ort-cpu", detection=DETECTION, latency=None
    ) as judge:  # fmt: skip
        same = judge.judge(source)
        worse = judge.judge(scaled(tmp_path, 0.4))
    assert same.boxes is not None
    assert worse.boxes is not None
    assert same.boxes.expected == same.boxes.matched > 20
    assert same.changed_percent == 0.0
    assert worse.boxes.recall < 0.9
    assert worse.changed_percent is not None
    assert worse.changed_percent > 10
    assert worse.sqnr_db < 20 < same.sqnr_db
    assert worse.agreement is None
