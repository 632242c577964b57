"""Files judged on ONNX Runtime, in processes of their own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from cspdeploy.check.latency import LatencySettings
from cspdeploy.core.datasets import LabelledImages
from cspdeploy.core.errors import InputError
from cspdeploy.core.spec import Preprocess
from cspdeploy.quant.budget import Budget, earns_its_place
from cspdeploy.quant.judge import Judge, Labelled
from cspdeploy.quant.plan import Floats

QUICK = LatencySettings(min_runs=6, min_seconds=0.0, min_rounds=6, warmup_seconds=0.0, max_warmup_seconds=0.0,
                        max_wall_seconds=2.0, lead_in_seconds=0.0)  # fmt: skip
CLASSES = 5
RNG = np.random.default_rng(0)
WEIGHT = RNG.normal(size=(CLASSES, 3, 3, 3)).astype(np.float32)
X_NCHW = RNG.normal(size=(7, 3, 8, 8)).astype(np.float32)


def write(path: Path, *, weight: Floats = WEIGHT, batch: str = "N", then: str = "Identity(f)") -> Path:
    """Convolution, pooling, flatten, and one node more."""
    nodes = f"c = Conv(x, w) p = GlobalAveragePool(c) f = Flatten(p) y = {then}"
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 18]> agraph (float[{batch}, 3, 8, 8] x) => (float[{batch}, {CLASSES}] y)'
        f" {{ {nodes} }}"
    )
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    onnx.save(model, path)
    return path


def batches() -> Iterator[Floats]:
    yield X_NCHW[:4]
    yield X_NCHW[4:]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("judge") / "source.onnx")


@pytest.fixture(scope="module")
def judge(source: Path) -> Iterator[Judge]:
    with Judge(source, batches, runtime="ort-cpu", latency=None) as made:
        yield made


def test_same_file_is_judged_equal(judge: Judge, source: Path) -> None:
    found = judge.judge(source)
    assert found.sqnr_db == math.inf
    assert found.agreement == 1.0
    assert found.num_images == 7
    assert found.runtime == "ort-cpu"
    assert sum(found.operators.values()) >= 1
    assert (found.latency_ms, found.speed, found.verdict) == (None, None, "")


def test_scaled_outputs_are_noise_although_no_class_changes(judge: Judge, tmp_path: Path) -> None:
    found = judge.judge(write(tmp_path / "scaled.onnx", weight=0.9 * WEIGHT))
    assert found.sqnr_db == pytest.approx(20.0, abs=0.01)
    assert found.agreement == 1.0


def test_classes_that_change_are_counted(judge: Judge, tmp_path: Path) -> None:
    found = judge.judge(write(tmp_path / "negated.onnx", weight=-WEIGHT))
    assert found.agreement == 0.0
    assert not earns_its_place(found, Budget(min_sqnr_db=10.0))[0]


def test_outputs_that_are_not_finite_are_never_good(judge: Judge, tmp_path: Path) -> None:
    found = judge.judge(write(tmp_path / "nan.onnx", weight=np.full_like(WEIGHT, np.nan)))
    assert found.sqnr_db == -math.inf
    assert found.agreement == 0.0
    assert not earns_its_place(found, Budget())[0]


def test_outputs_of_another_shape_are_refused(judge: Judge, tmp_path: Path) -> None:
    path = write(tmp_path / "shape.onnx", then="Concat<axis=1>(f, f)")
    with pytest.raises(InputError, match=r"shape \[4, 10\], expected \[4, 5\]"):
        judge.judge(path)


def test_file_that_fixes_its_batch_gets_as_many_at_a_time(tmp_path: Path, judge: Judge) -> None:
    weight = WEIGHT + np.float32(0.05)
    free = judge.judge(write(tmp_path / "free.onnx", weight=weight))
    source = write(tmp_path / "two.onnx", batch="2")
    with Judge(source, batches, runtime="ort-cpu", latency=None) as made:
        fixed = made.judge(write(tmp_path / "other.onnx", weight=weight, batch="2"))
    assert fixed.num_images == 7
    assert fixed.sqnr_db == pytest.approx(free.sqnr_db, abs=1e-3)
    assert fixed.agreement == free.agreement


def test_latency_and_labelled_accuracy(source: Path, tmp_path: Path, tiny_contract: Preprocess) -> None:
    labelled = LabelledImages(
        name="toy", labels=tuple(map(str, range(CLASSES))), classes=np.zeros(20, np.int64),
        stored=RNG.integers(0, 256, (20, 8, 8), np.uint8),
    )  # fmt: skip
    contract = dataclasses.replace(tiny_contract, height_px=8, width_px=8)
    first = np.zeros((CLASSES, 1, 1, 1), np.float32)
    first[0] = 1.0
    # Grey images: the class whose weights add up to most, or to least, wins everywhere.
    zero = np.ones_like(WEIGHT) * first
    told: list[str] = []
    with Judge(
        source, batches, runtime="ort-cpu", latency=QUICK, labelled=Labelled(images=labelled, contract=contract),
        progress=lambda what, done, total: told.append(what),
    ) as made:  # fmt: skip
        found = made.judge(write(tmp_path / "zero.onnx", weight=zero, then="Abs(f)"))
    assert found.top1 == 1.0
    assert found.num_labelled == 20
    assert found.top1_fp32 is not None
    assert found.top1_drop_points == pytest.approx(100 * (found.top1_fp32 - 1.0))
    assert found.latency_ms is not None
    assert found.fp32_latency_ms is not None
    assert found.verdict in ("faster", "slower", "indistinguishable")
    assert found.speed_low is not None
    assert found.speed_high is not None
    assert found.speed_low <= (found.speed or 0) <= found.speed_high
    assert found.ratio_to_fp32 == pytest.approx(1 / (found.speed or 1))
    assert {"latency", "top-1 of the FP32 file", "top-1 of the INT8 file", "INT8 against FP32"} <= set(told)


def test_nothing_to_judge_on_is_refused(source: Path) -> None:
    with (
        Judge(source, lambda: iter(()), runtime="ort-cpu", latency=None) as made,
        pytest.raises(InputError, match="no held-out images"),
    ):
        made.judge(source)


def test_unknown_runtime_is_refused(source: Path) -> None:
    with pytest.raises(InputError, match="ort-gpu"):
        Judge(source, batches, runtime="ort-gpu")
