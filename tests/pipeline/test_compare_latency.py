"""The speed of two models beside each other: what is exported and timed, and who is called faster."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cspdeploy.check.latency import Measured, measure_latency, summarise
from cspdeploy.core.codec import from_json, to_json
from cspdeploy.core.errors import InputError
from cspdeploy.core.model_folder import read_spec, write_calibration, write_spec
from cspdeploy.core.spec import ModelSpec
from cspdeploy.export import simplify
from cspdeploy.pipeline import pair_latency
from cspdeploy.pipeline.compare import CompareReport
from cspdeploy.pipeline.pair_latency import LatencyRow, find_images, judge_pair
from cspdeploy.pipeline.sides import find_side
from tests.pipeline.conftest import quantities

# --- latency ---


@pytest.fixture
def quick_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the unsimplified graph: onnxsim takes longer to import than all else together."""
    monkeypatch.setattr(simplify, "_CHILD", ["false"])


@pytest.mark.usefixtures("quick_export")
def test_models_are_exported_and_timed(compare: Callable[..., CompareReport], models: Path) -> None:
    (models / "plain" / "model.safetensors").unlink()
    (models / "tiny" / "calibration.npz").unlink()  # it takes the other side's
    report = compare("tiny", "plain", latency=True, batches=(1, 3, 1), runtimes=("torch-cpu", "ort-cpu"))
    found = {(row.runtime, row.artifact, row.batch): row for row in report.latency}
    # FP16 on this runtime is computed in float32: its time would say nothing.
    assert list(found) == [
        ("torch-cpu", "eager", 1), ("torch-cpu", "eager", 3), ("ort-cpu", "onnx", 1), ("ort-cpu", "onnx", 3),
    ]  # fmt: skip
    for row in report.latency:
        assert row.reason == ""
        assert row.a is not None
        assert row.b is not None
        assert len(row.a.samples_ms) >= 5
        assert row.ratio == 1 / row.b.ratio  # of times, where that of the timing is of speeds
        assert row.engine
    sizes = quantities(report)
    assert {"torchscript file", "onnx file", "onnx-fp16 file"} <= sizes.keys()
    assert sizes["onnx-fp16 file"][0] < sizes["onnx file"][0]
    assert (report.a.untrained, report.b.untrained, report.b.weights) == (False, True, "random, UNTRAINED")
    assert any("UNTRAINED" in note for note in report.notes)
    assert report.regime.environment["cpu"]
    data = json.loads(json.dumps(to_json(report)))
    assert from_json(CompareReport, data) == report


def test_bundles_are_timed_as_they_are(compare: Callable[..., CompareReport], tiny_bundle: Path, bundle: Path) -> None:
    runtimes = ("ort-cpu", "torchscript-cpu")
    report = compare(str(tiny_bundle), str(bundle), latency=True, batches=(1, 2), runtimes=runtimes)
    assert report.regime.size_px == (32, 32)
    found = {(row.artifact, row.batch): row for row in report.latency}
    assert found["onnx", 1].ratio is not None
    assert found["torchscript", 2].ratio is not None
    assert (found["onnx", 2].verdict, found["onnx", 2].ratio) == ("not-measured", None)
    assert found["onnx", 2].reason == "A is exported for a batch of 1"
    assert [report.a.untrained, report.b.untrained] == [False, False]


def test_two_copies_of_one_network_cannot_be_told_apart(
    compare: Callable[..., CompareReport], tiny_bundle: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that runs by a millisecond a call."""
    ticks = iter(range(10**9))
    monkeypatch.setattr(
        pair_latency, "measure_latency",
        lambda calls, settings: measure_latency(calls, settings, clock=lambda: 1e-3 * next(ticks)),
    )  # fmt: skip
    report = compare(str(tiny_bundle), str(bundle), latency=True, batches=(1,))
    cpu = [row for row in report.latency if row.runtime.endswith("-cpu")]
    assert {row.artifact for row in cpu} == {"eager", "torchscript", "onnx"}
    assert {(row.verdict, round(row.ratio or 0, 9)) for row in cpu} == {("indistinguishable", 1.0)}
    assert all(row.ratio_low == pytest.approx(1) == row.ratio_high for row in cpu)


def test_bundle_decides_the_size(compare: Callable[..., CompareReport], bundle: Path, models: Path) -> None:
    spec = read_spec(models / "plain")
    write_spec(models / "plain", dataclasses.replace(spec, preprocess=spec.preprocess.with_size(64, 64)))
    assert compare(str(bundle), "plain").regime.size_px == (64, 64)  # counts can be had at any size
    for fields in ({"size_px": (64, 64)}, {"size_px": (32, 48)}):
        with pytest.raises(InputError, match="is exported for 32x32 px") as caught:
            compare(str(bundle), "plain", latency=True, **fields)
        assert "--no-latency" in caught.value.fix


def test_nothing_to_time(compare: Callable[..., CompareReport], bundle: Path) -> None:
    with pytest.raises(InputError, match="nothing to time"):
        compare(str(bundle), str(bundle), latency=True, runtimes=("fp16-rounding",))


ROW = LatencyRow(
    runtime="ort-cpu", artifact="onnx", precision="fp32", batch=1, engine="", verdict="not-measured"
)  # fmt: skip


def _judge(a: list[float], b: list[float]) -> LatencyRow:
    """As `measure_latency` would have timed them."""
    rounds = {name: tuple((value,) for value in samples) for name, samples in (("A", a), ("B", b))}
    found = summarise(
        {name: Measured(rounds_ms=samples, num_warmups=0, stable=True) for name, samples in rounds.items()}
    )
    return judge_pair(ROW, found["A"], found["B"])


@settings(max_examples=15)
@given(samples=st.lists(st.tuples(st.floats(1.0, 10.0), st.floats(1.0, 10.0)), min_size=5, max_size=30))
def test_swapped_sides_give_the_opposite_verdict_or_none(samples: list[tuple[float, float]]) -> None:
    a, b = ([pair[i] for pair in samples] for i in (0, 1))
    forward, backward = _judge(a, b), _judge(b, a)
    assert {forward.verdict, backward.verdict} != {"faster"}
    assert {forward.verdict, backward.verdict} != {"slower"}
    assert forward.ratio == pytest.approx(1 / (backward.ratio or 0))
    assert (forward.verdict == "faster") <= ((forward.ratio_high or 0) < 1)
    assert (forward.verdict == "slower") <= ((forward.ratio_low or 0) > 1)
    same = _judge(a, a)
    assert same.verdict == "indistinguishable"
    assert (same.ratio_low or 0) <= 1 <= (same.ratio_high or 0)


def test_verdict_is_of_b_and_the_ratio_of_times() -> None:
    row = _judge([10.0] * 9, [5.0] * 9)
    assert (row.verdict, row.ratio, row.ratio_low, row.ratio_high) == ("faster", *[pytest.approx(0.5)] * 3)
    row = _judge([5.0] * 9, [10.0] * 9)
    assert (row.verdict, row.ratio) == ("slower", pytest.approx(2.0))


# --- images to export with ---


def test_images_come_from_the_other_side(models: Path) -> None:
    network, tiny = (find_side(name, models=models) for name in ("darknet17", "tiny"))
    images = np.full((3, 8, 8), 7, np.uint8)
    write_calibration(models / "tiny" / "calibration.npz", images)
    found = find_images((network, tiny), None)
    assert found is not None
    np.testing.assert_array_equal(found, images)
    assert find_images((tiny, tiny), None) is None  # each brings its own
    (models / "tiny" / "model.safetensors").unlink()
    assert find_images((tiny, tiny), None) is not None  # a folder of its own is made for random weights


def test_no_images_anywhere(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_latency, "FASHION_MNIST_FOLDER", tmp_path / "none")
    network = find_side("darknet17", models=models)
    with pytest.raises(InputError, match="no real images") as caught:
        find_images((network, network), None)
    assert "--calib" in caught.value.fix
    assert "--no-latency" in caught.value.fix


@pytest.mark.slow
def test_networks_are_exported_with_random_weights(
    compare: Callable[..., CompareReport], models: Path, tiny_spec: ModelSpec
) -> None:
    report = compare("cs3darknet_focus_s", "tiny", latency=True, size_px=(64, 64), batches=(1,))
    assert report.a.untrained
    assert {row.artifact for row in report.latency if row.ratio} >= {"eager", "torchscript", "onnx"}
