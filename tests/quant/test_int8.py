"""From a float32 file to an INT8 file, or to the reason why there is none."""

from __future__ import annotations

import json
import platform
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from cspdeploy.core.catalog import RangeMethod
from cspdeploy.core.datasets import LabelledImages
from cspdeploy.core.errors import InputError
from cspdeploy.core.types import StepRecord
from cspdeploy.quant.calibration import CalibrationSet, open_calibration
from cspdeploy.quant.decide import runs_here
from cspdeploy.quant.int8 import Int8Settings, quantise
from cspdeploy.quant.observations_cache import ObservationsCache
from cspdeploy.quant.placements import Placement
from tests.pictures import pictures
from tests.quant.int8_parts import CONTRACT, calibration, quiet, write_source
from tests.quant.placed_graphs import ROWS, chain, images, run_ort

TARGET = "out/net.int8.onnx"


@pytest.fixture
def x86(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU that most of these placements are made for, whatever the tests run on."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")


def make(
    folder: Path, *, placement: Placement = ROWS["tensorrt"], method: RangeMethod = "minmax",
    photos: CalibrationSet | None = None, cache: ObservationsCache | None = None, model: onnx.ModelProto | None = None,
    labelled: LabelledImages | None = None, progress: Any = quiet, **settings: Any,
) -> StepRecord:  # fmt: skip
    """Quantise to `folder / TARGET`. TensorRT is not here, so that nothing is timed by default."""
    (folder / TARGET).parent.mkdir(parents=True, exist_ok=True)
    return quantise(
        write_source(folder, model), folder / TARGET, photos or calibration(), placement=placement,
        settings=Int8Settings(method=method, **settings), labelled=labelled, cache=cache or ObservationsCache(None),
        progress=progress,
    )  # fmt: skip


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / TARGET).parent.iterdir())


# --- a file ---


@pytest.mark.usefixtures("int8_is_faster")
def test_file_is_judged_on_its_engine_and_proven(tmp_path: Path) -> None:
    placement = ROWS["arm64" if platform.machine().lower() in ("arm64", "aarch64") else "ort-cpu"]
    record = make(tmp_path, placement=placement)
    assert record.outcome == "done"
    assert left_in(tmp_path) == ["net.int8.onnx"]
    assert " agreement on ort-cpu (12 held-out images); 3 of 4 layers in INT8; placed for" in record.detail
    assert record.facts["operators_on_engine"]["QLinearConv"] == 3
    assert (record.facts["fell_back"], record.facts["unproven"]) == ([], "")
    assert (record.facts["num_images"], record.facts["num_held_out"]) == (36, 12)
    assert json.loads(json.dumps(record.facts, allow_nan=False)) == record.facts
    x = images(8)
    exact, got = run_ort(chain(), x)["y"], run_ort(tmp_path / TARGET, x)["y"]
    # Images unlike those of the calibration: 20 dB leaves no room for a wrong scale, order or bias.
    assert 10 * np.log10(np.square(exact).sum() / np.square(exact - got).sum()) > 20


@pytest.mark.parametrize("options", [{"method": "auto"}, {"effort": "high"}, {"power_of_two": True}])
def test_same_inputs_give_the_same_bytes(tmp_path: Path, options: dict[str, Any]) -> None:
    cache = ObservationsCache(tmp_path / "cache")  # the second one recalls what the first has seen
    records = [make(tmp_path / name, cache=cache, **options) for name in ("a", "b")]
    records.append(make(tmp_path / "c", **options))
    assert {record.outcome for record in records} == {"done"}
    assert records[0] == records[1] == records[2]
    assert len({(tmp_path / name / TARGET).read_bytes() for name in ("a", "b", "c")}) == 1


def test_what_is_recalled_is_of_the_same_images(tmp_path: Path) -> None:
    """The same set in another order has other images held out: what was observed of the first tells nothing of it."""
    cache = ObservationsCache(tmp_path / "cache")
    turned = pictures(48)[::-1].copy()
    make(tmp_path / "first", cache=cache)
    make(tmp_path / "warm", cache=cache, photos=open_calibration(turned, CONTRACT))
    make(tmp_path / "cold", photos=open_calibration(turned, CONTRACT))
    first, warm, cold = ((tmp_path / name / TARGET).read_bytes() for name in ("first", "warm", "cold"))
    assert warm == cold
    assert warm != first


def test_second_run_observes_nothing(tmp_path: Path) -> None:
    cache = ObservationsCache(tmp_path / "cache")
    said: list[str] = []
    for name in ("a", "b"):
        said.clear()
        make(tmp_path / name, cache=cache, progress=lambda what, done, total: said.append(what))
    assert "observing" not in said
    assert "trying minmax, equalised 0.75" in said


def test_steps_are_powers_of_two_where_asked(tmp_path: Path) -> None:
    make(tmp_path, power_of_two=True)
    model = onnx.load(tmp_path / TARGET)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    scales = [arrays[node.input[1]] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert scales
    assert {float(np.log2(scale)) % 1 for scale in scales} == {0.0}


def test_few_images_are_said_to_judge_themselves(tmp_path: Path) -> None:
    record = make(tmp_path, photos=calibration(4))
    assert "4 images, the same that ranges were fitted to: too few to hold any out" in record.detail
    assert record.facts["num_held_out"] == 0


# --- an engine that is not here ---


def test_placement_without_an_engine_here_is_unproven(tmp_path: Path) -> None:
    record = make(tmp_path)
    assert record.outcome == "done"
    assert " simulated (12 held-out images); " in record.detail
    assert "(not proven: nothing here runs tensorrt; where it is: cspdeploy verify" in record.detail
    assert (record.facts["runtime"], record.facts["operators_on_engine"]) == ("", {})
    assert record.facts["unproven"].startswith("nothing here runs tensorrt; ")


@pytest.mark.usefixtures("x86")
def test_file_for_another_cpu_is_not_judged_by_this_one(tmp_path: Path) -> None:
    assert runs_here(ROWS["ort-cpu"])
    assert not runs_here(ROWS["arm64"])
    record = make(tmp_path, placement=ROWS["arm64"])
    assert record.facts["runtime"] == ""
    assert "simulated" in record.detail
    assert "not proven: made for another CPU than this x86_64" in record.detail


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_latency": "0.5x"}, "--max-latency: tensorrt cannot be timed on this machine"),
        ({"max_latency": "3", "mode": "weights"}, "--max-latency: tensorrt cannot be timed on this machine"),
        ({"max_drop": "0.5"}, "--max-drop 0.5: top-1 is counted on tensorrt, which this machine has not"),
    ],
)
def test_budget_that_nothing_here_can_measure_is_not_met_by_default(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        make(tmp_path, **options)
    assert caught.value.fix
    assert left_in(tmp_path) == []


# --- no file ---


@pytest.mark.usefixtures("int8_is_slower", "x86")
def test_file_that_is_slower_is_kept_back(tmp_path: Path) -> None:
    record = make(tmp_path, placement=ROWS["ort-cpu"], time_limit_s=0.01)
    assert record.outcome == "kept"
    assert record.detail.startswith("no INT8 file that is not slower than FP32: the best, ")
    assert "it is slower than FP32 on ort-cpu: 0.50x its speed" in record.detail
    assert left_in(tmp_path) == []


def test_budget_that_is_not_met_ends_with_the_front(tmp_path: Path) -> None:
    record = make(tmp_path, max_drop="149dB")
    assert record.outcome == "kept"
    assert record.detail.startswith("no INT8 file with at least 149 dB: the best, ")
    search = record.facts["search"]
    assert search["stopped"] == "exhausted"
    assert search["evaluations"] > 1
    levels = [point["sqnr_db"] for point in search["front"]]
    assert levels == sorted(set(levels))  # fastest first, and each next one more accurate
    assert not any(point["meets"] for point in search["front"])
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_named(tmp_path: Path, value: float) -> None:
    model = chain()
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.name == "w2")
    array = numpy_helper.to_array(weight).copy()
    array[3, 2] = value
    weight.CopyFrom(numpy_helper.from_array(array, "w2"))
    with pytest.raises(InputError, match=r"'c2'.*NaN or infinite"):
        make(tmp_path, model=model)
    assert left_in(tmp_path) == []


# --- the search ---


def _level(folder: Path) -> float:
    """SQNR without a budget, in dB."""
    level: float = make(folder).facts["sqnr_db"]
    return level


def test_layers_are_left_in_float_until_the_budget_is_met(tmp_path: Path) -> None:
    wanted = _level(tmp_path / "first") + 3
    record = make(tmp_path / "second", max_drop=f"{wanted:.1f}dB")
    assert record.outcome == "done"
    assert record.facts["sqnr_db"] >= wanted
    assert record.facts["search"]["stopped"] == "found"
    excluded = [one for one in record.facts["float_layers"] if one["reason"] == "kept in float as asked"]
    assert excluded
    assert f"; chosen by the search: {record.facts['scheme']}" in record.detail
    assert f"{len(excluded)} layers in float" in record.facts["scheme"]


def test_ctrl_c_in_a_search_keeps_the_best_so_far(tmp_path: Path) -> None:
    wanted = _level(tmp_path / "first") + 3
    said: list[str] = []

    def interrupt(what: str, done: int, total: int) -> None:
        said.append(what)
        level = re.search(r" layers in float: ([\d.]+) dB", what)
        if level is not None and float(level[1]) >= wanted:
            raise KeyboardInterrupt

    record = make(tmp_path / "second", max_drop=f"{wanted:.1f}dB", progress=interrupt)
    assert record.outcome == "done"
    assert record.facts["search"]["stopped"] == "interrupted"
    assert record.facts["sqnr_db"] >= wanted
    assert " layers in float: " in said[-1]
    onnx.checker.check_model(tmp_path / "second" / TARGET, full_check=True)
    assert left_in(tmp_path / "second") == ["net.int8.onnx"]


def test_ctrl_c_before_the_budget_is_met_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if " layers in float: " in what:
            raise KeyboardInterrupt

    record = make(tmp_path, max_drop="149dB", progress=interrupt)
    assert record.outcome == "kept"
    assert record.detail.endswith("; the search was interrupted")
    assert record.facts["search"]["evaluations"] == 1
    assert left_in(tmp_path) == []


def test_ctrl_c_before_the_search_ends_the_run(tmp_path: Path) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if what.startswith("trying "):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, progress=interrupt)
    assert left_in(tmp_path) == []
