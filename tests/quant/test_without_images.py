"""INT8 for those who have no images to calibrate on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest

from cspdeploy.core.types import StepRecord
from cspdeploy.quant.int8 import Int8Settings, quantise
from cspdeploy.quant.judge import Judge
from cspdeploy.quant.observations_cache import ObservationsCache
from cspdeploy.quant.placements import Placement
from tests.quant.int8_parts import calibration, quiet, write_source
from tests.quant.placed_graphs import ROWS


def make(folder: Path, mode: Any, *, placement: Placement = ROWS["ort-cpu"], **settings: Any) -> StepRecord:
    """Quantise to `folder / "out" / "net.onnx"`."""
    (folder / "out").mkdir(parents=True)
    return quantise(
        write_source(folder), folder / "out" / "net.onnx", calibration(8), placement=placement,
        settings=Int8Settings(mode=mode, **settings), cache=ObservationsCache(None), progress=quiet,
    )  # fmt: skip


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "out").iterdir())


@pytest.mark.usefixtures("int8_is_faster")
def test_dynamic_file_that_is_faster_is_shipped(tmp_path: Path) -> None:
    record = make(tmp_path, "dynamic")
    assert record.outcome == "done"
    assert record.detail.startswith("dynamic: ")
    assert " on ort-cpu (8 images); " in record.detail
    assert record.facts["operators"]["ConvInteger"] == 3
    assert json.loads(json.dumps(record.facts, allow_nan=False)) == record.facts
    onnx.checker.check_model(tmp_path / "out" / "net.onnx", full_check=True)
    assert left_in(tmp_path) == ["net.onnx"]


@pytest.mark.usefixtures("int8_is_slower")
def test_dynamic_file_that_is_slower_is_kept_back(tmp_path: Path) -> None:
    record = make(tmp_path, "dynamic")
    assert record.outcome == "kept"
    assert record.detail.startswith("no INT8 file: it is slower than FP32 on ort-cpu: 0.50x its speed")
    assert left_in(tmp_path) == []


@pytest.mark.usefixtures("int8_is_slower")
def test_weights_are_stored_for_their_size_and_each_time_alike(tmp_path: Path) -> None:
    records = [make(tmp_path / name, "weights") for name in ("a", "b")]
    assert records[0] == records[1]
    assert records[0].outcome == "done"
    assert records[0].detail.endswith(" of the size; made for its size, not for speed")
    assert records[0].facts["operators"]["DequantizeLinear"] == 4
    first, second = ((tmp_path / name / "out" / "net.onnx").read_bytes() for name in ("a", "b"))
    assert first == second


@pytest.mark.usefixtures("int8_is_slower")
@pytest.mark.parametrize(
    ("options", "reason"),
    [({"max_latency": "1x"}, "slower than FP32 on ort-cpu"), ({"max_drop": "149dB"}, "at least 149 dB were asked for")],
)
def test_budget_refuses_stored_weights_all_the_same(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    record = make(tmp_path, "weights", **options)
    assert record.outcome == "kept"
    assert reason in record.detail
    assert left_in(tmp_path) == []


@pytest.mark.usefixtures("int8_is_slower")
def test_another_engine_s_latency_refuses_nothing(tmp_path: Path) -> None:
    record = make(tmp_path, "dynamic", placement=ROWS["tensorrt"])
    assert record.outcome == "done"
    assert record.facts["runtime"] == "ort-cpu"
    assert record.detail.endswith("; not timed: tensorrt is not on this machine")


def test_ctrl_c_leaves_no_file_that_was_not_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []

    def interrupt(self: Judge, path: Path) -> None:
        seen.append(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(Judge, "judge", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, "weights")
    assert len(seen) == 1
    assert left_in(tmp_path) == []
