"""`verify` on detectors: every contract, every precision, and every way in which a file may be wrong."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

sys.path.insert(0, str(Path(__file__).parent))
import detectors

from cspdeploy.check.regression import compare_bundles
from cspdeploy.check.settings import VerifySettings
from cspdeploy.core.detection.spec import DECODES

FILES = {"fp32": "onnx", "fp16": "onnx-fp16", "int8": "onnx-int8"}


@pytest.fixture
def row_of(tmp_path: Path, ladder: Any) -> Callable[..., Any]:
    """`row_of(decode, precision, harm)`: the row on ONNX Runtime of a file that `harm(path)` has changed."""

    def make(decode: str, precision: str = "fp32", harm: Callable[[Path], None] | None = None, **how: Any) -> Any:
        folder = detectors.make_bundle(tmp_path / "tiny", decode, precision=precision, **how)  # type: ignore[arg-type]
        if harm is not None:
            harm(next(folder.glob("*.onnx")))
            ladder.rehash(folder)
        return ladder.row(ladder.verify(folder, "ort-cpu"), FILES[precision], "ort-cpu")

    return make


slow = pytest.mark.slow
QUICK = {("decoded", "fp32"), ("nms", "fp32"), ("decoded", "int8"), ("nms", "int8")}
"""The rest of the table goes with the slow tests."""


def table(*decodes: str) -> Any:
    return pytest.mark.parametrize(
        ("decode", "precision"),
        [pytest.param(decode, precision, marks=() if (decode, precision) in QUICK else slow)
         for decode in decodes for precision in FILES],
    )  # fmt: skip


@table(*DECODES)
def test_sound_file_passes(decode: str, precision: str, row_of: Any) -> None:
    row = row_of(decode, precision)
    assert (row.verdict, row.reason) == ("pass", "")
    if decode == "trt":  # the boxes are the plugin's, which is not run
        assert (row.box_recall, row.box_precision, row.num_boxes) == (None, None, None)
    else:
        assert (row.box_recall, row.box_precision) == (1.0, 1.0)
        assert row.num_boxes > 20
    assert (row.rel_l2 is None) == (decode == "nms")


def test_plugin_is_named_as_not_run(row_of: Any) -> None:
    assert "EfficientNMS_TRT itself is not run" in row_of("trt").note


SCORES = {"decoded": "scores", "nms": "detections", "ultralytics": "output0", "raw": "head_s16"}


@table("decoded", "ultralytics", "raw")
@pytest.mark.parametrize("factor", [0.5, pytest.param(100.0, marks=slow), pytest.param(0.0, marks=slow)])
def test_scaled_scores_fail(decode: str, precision: str, factor: float, row_of: Any) -> None:
    row = row_of(decode, precision, lambda path: detectors.scale(path, SCORES[decode], factor))
    assert row.verdict == "numeric"


@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp16", marks=slow), "int8"])
@pytest.mark.parametrize("factor", [0.8, 1.3])
def test_scaled_scores_of_rows_fail(precision: str, factor: float, row_of: Any) -> None:
    factors = np.array([1, 1, 1, 1, factor, 1], np.float32)
    row = row_of("nms", precision, lambda path: detectors.damage(path, "detections", multiply, by=factors))
    assert row.verdict in ("numeric", "decision")


@table("decoded", "nms", "ultralytics")
def test_boxes_off_by_5_px_fail(decode: str, precision: str, row_of: Any) -> None:
    def harm(path: Path) -> None:
        if decode == "decoded":
            detectors.shift(path, "boxes", 5.0)
            return
        # Corners of what is left; a centre of each candidate. A factor would leave the zeros after the last row alone,
        # a sum would not: of rows the boxes are moved by a share of themselves.
        if decode == "nms":
            factors = np.array([1.1, 1.1, 1.1, 1.1, 1.0, 1.0], np.float32)
            detectors.damage(path, "detections", multiply, by=factors)
            return
        offsets = np.zeros((1, 4 + detectors.CLASSES, 1), np.float32)
        offsets[:, :2] = 5.0
        detectors.damage(path, "output0", add, by=offsets)

    assert row_of(decode, precision, harm).verdict in ("numeric", "decision")


def multiply(taken: str, given: str) -> onnx.NodeProto:
    return helper.make_node("Mul", [taken, "by"], [given])


def add(taken: str, given: str) -> onnx.NodeProto:
    return helper.make_node("Add", [taken, "by"], [given])


def test_a_small_shift_of_suppressed_boxes_is_numeric(row_of: Any) -> None:
    """No match is lost by a hundredth, but float32 does not round like that."""
    factors = np.array([1.003, 1.003, 1.003, 1.003, 1.0, 1.0], np.float32)
    row = row_of("nms", harm=lambda path: detectors.damage(path, "detections", multiply, by=factors))
    assert row.verdict == "numeric"
    assert row.box_recall == 1.0
    assert "px" in row.reason


@pytest.mark.parametrize(("factor", "verdict"), [(-1.0, "order"), (0.5, "decision")])
def test_order_and_classes_of_rows_are_checked(factor: float, verdict: str, row_of: Any) -> None:
    column = {"order": 4, "decision": 5}[verdict]
    factors = np.ones(6, np.float32)
    factors[column] = factor
    row = row_of("nms", harm=lambda path: detectors.damage(path, "detections", multiply, by=factors))
    assert row.verdict == verdict


@pytest.mark.parametrize(
    "decode", ["decoded", "nms", pytest.param("ultralytics", marks=slow), pytest.param("raw", marks=slow)]
)
def test_nan_is_named(decode: str, row_of: Any) -> None:
    row = row_of(decode, harm=lambda path: detectors.scale(path, SCORES[decode], float("nan")))
    assert row.verdict == "nan"


@pytest.mark.parametrize("precision", ["int8", *(pytest.param(one, marks=slow) for one in ("fp32", "fp16"))])
def test_boxes_of_other_images_are_named(precision: str, row_of: Any) -> None:
    row = row_of("decoded", precision, lambda path: detectors.reverse_images(path, "boxes", "scores"))
    assert row.verdict in ("order", "numeric")


@pytest.mark.parametrize("precision", ["int8", *(pytest.param(one, marks=slow) for one in ("fp32", "fp16"))])
def test_suppressed_boxes_of_other_images_fail(precision: str, row_of: Any) -> None:
    row = row_of("nms", precision, lambda path: detectors.reverse_images(path, "detections", "num_detections"))
    # Two of the wrong boxes may happen to match, a good way off.
    assert row.verdict in ("decision", "numeric")
    assert row.box_recall < 0.5


@pytest.mark.parametrize(
    ("decode", "precision"),
    [("nms", "fp32"), ("decoded", "int8"), pytest.param("trt", "int8", marks=slow),
     pytest.param("ultralytics", "fp16", marks=slow), pytest.param("nms", "int8", marks=slow)],
)  # fmt: skip
def test_wrong_anchors_fail(decode: str, precision: str, row_of: Any) -> None:
    swapped = detectors.detection_of(decode, anchors=((31, 18), (20, 26)))  # type: ignore[arg-type]
    assert row_of(decode, precision, built_with=swapped).verdict in ("numeric", "decision")


def test_another_threshold_in_the_graph_fails(row_of: Any) -> None:
    detection = detectors.detection_of("nms")
    lower = dataclasses.replace(detection.suppression, score_threshold=0.1)
    row = row_of("nms", built_with=dataclasses.replace(detection, suppression=lower))
    assert row.verdict == "decision"
    assert "new" in row.reason
    assert row.box_recall == 1.0
    assert row.box_precision < 1.0


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_suppression_that_is_switched_off_fails(precision: str, trained: bool, row_of: Any) -> None:
    detection = detectors.detection_of("nms")
    none = dataclasses.replace(detection.suppression, iou_threshold=1.0)
    row = row_of(
        "nms", precision, built_with=dataclasses.replace(detection, suppression=none), trained=trained
    )  # fmt: skip
    assert row.verdict == "decision"
    assert "overlap by" in row.reason


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_sound_untrained_suppression_passes(precision: str, row_of: Any) -> None:
    assert row_of("nms", precision, trained=False).verdict == "pass"


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_untrained_rows_must_be_there(precision: str, row_of: Any) -> None:
    nothing = np.zeros(6, np.float32)

    def harm(path: Path) -> None:
        detectors.damage(path, "detections", multiply, by=nothing)
        detectors.damage(path, "num_detections", multiply_count, by_count=np.array(0, np.int64))

    row = row_of("nms", precision, harm, trained=False)
    assert row.verdict == "decision"


def multiply_count(taken: str, given: str) -> onnx.NodeProto:
    return helper.make_node("Mul", [taken, "by_count"], [given])


def test_what_was_not_compared_is_said(row_of: Any, ladder: Any, tmp_path: Path) -> None:
    assert "origin were judged" in row_of("nms", "int8", trained=False).note
    high = dataclasses.replace(detectors.detection_of("nms").suppression, score_threshold=0.999)
    detection = dataclasses.replace(detectors.detection_of("nms"), suppression=high)
    folder = detectors.make_bundle(tmp_path / "none", "nms", built_with=detection)
    ladder.edit(folder, lambda data: data["spec"]["detection"]["suppression"].update(score_threshold=0.999))
    row = ladder.row(ladder.verify(folder, "ort-cpu"), "onnx", "ort-cpu")
    assert (row.verdict, row.num_boxes) == ("pass", 0)
    assert "nothing could be compared" in row.note


@pytest.mark.parametrize(
    ("name", "value"),
    [("score_threshold", 0.5), ("iou_threshold", 0.9), ("max_output_boxes", 7), ("background_class", 0),
     ("box_coding", 1), ("score_activation", 1), ("class_agnostic", 1), ("iou_threshold", None)],
)  # fmt: skip
def test_attributes_of_the_plugin_are_judged(name: str, value: float | None, row_of: Any) -> None:
    def harm(path: Path) -> None:
        model = onnx.load(path)
        node = next(node for node in model.graph.node if node.op_type == "EfficientNMS_TRT")
        kept = [one for one in node.attribute if one.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, *([] if value is None else [helper.make_attribute(name, value)])])
        onnx.save(model, path)

    row = row_of("trt", harm=harm)
    assert row.verdict == "decision"
    assert name in row.reason
    assert row.box_recall is None


@pytest.mark.parametrize("fault", ["outputs", "inputs"])
def test_wiring_of_the_plugin_is_judged(fault: str, row_of: Any) -> None:
    def harm(path: Path) -> None:
        model = onnx.load(path)
        node = next(node for node in model.graph.node if node.op_type == "EfficientNMS_TRT")
        ends, first = (node.output, 1) if fault == "outputs" else (node.input, 0)
        ends[first], ends[first + 1] = ends[first + 1], ends[first]
        onnx.save(model, path)

    assert row_of("trt", harm=harm).verdict == ("decision" if fault == "outputs" else "shape")


@pytest.mark.parametrize(("precision", "verdict"), [("fp32", "numeric"), ("fp16", "pass"), ("int8", "pass")])
def test_sizes_of_the_background_are_judged_in_fp32_alone(precision: str, verdict: str, row_of: Any) -> None:
    def harm(path: Path) -> None:
        model = onnx.load(path)
        low = helper.make_node("ReduceMax", ["scores"], ["best"], axes=[2], keepdims=1)
        model.graph.node.extend([low])
        onnx.save(model, path)
        detectors.damage(
            path, "boxes",
            lambda a, b: helper.make_node("Where", ["is_low", f"{a}/larger", a], [b]),
        )  # fmt: skip
        model = onnx.load(path)
        last = model.graph.node.pop()
        taken = last.input[2]
        model.graph.node.extend([
            helper.make_node("Less", ["best", "least"], ["is_low"]),
            helper.make_node("Mul", [taken, "more"], [f"{taken}/larger"]), last,
        ])  # fmt: skip
        model.graph.initializer.extend([
            onnx.numpy_helper.from_array(np.array(0.01, np.float32), "least"),
            onnx.numpy_helper.from_array(np.array(1.2, np.float32), "more"),
        ])  # fmt: skip
        onnx.save(model, path)

    row = row_of("decoded", precision, harm)
    assert (row.verdict, row.box_recall, row.box_precision) == (verdict, 1.0, 1.0)


@pytest.fixture
def regression_of(tmp_path: Path, ladder: Any) -> Callable[..., Any]:
    """`regression_of(decode, harm)`: of two bundles of the same weights, of which `harm(path)` has changed the new."""

    def make(decode: str, harm: Callable[[Path], None] | None = None) -> Any:
        folders = [detectors.make_bundle(tmp_path / name / "tiny", decode) for name in ("old", "new")]  # type: ignore[arg-type]
        for folder in folders:
            ladder.edit(folder, lambda data: data["spec"]["provenance"].update(weights_sha256="0" * 64))
        if harm is not None:
            harm(next(folders[1].glob("*.onnx")))
            ladder.rehash(folders[1])
        rows = [ladder.verify(folder, "ort-cpu").rows for folder in folders]
        settings = VerifySettings(runtimes=("ort-cpu",), latency=None, isolate=False)
        found = compare_bundles(*folders, old_rows=rows[0], new_rows=rows[1], settings=settings)
        assert len(found) == 1
        return found[0]

    return make


@pytest.mark.parametrize("decode", ["nms", "trt", *(pytest.param(one, marks=slow) for one in ("raw", "ultralytics"))])
def test_against_an_equal_bundle(decode: str, regression_of: Callable[..., Any]) -> None:
    found = regression_of(decode)
    assert (found.verdict, found.reason, found.same_boxes) == ("same", "", 1.0)
    assert (found.rel_l2 is None) == (decode == "nms")


def test_against_a_bundle_with_other_boxes(regression_of: Callable[..., Any]) -> None:
    factors = np.array([1.2, 1.2, 1.2, 1.2, 1.0, 1.0], np.float32)
    found = regression_of("nms", lambda path: detectors.damage(path, "detections", multiply, by=factors))
    assert found.verdict == "worse"
    assert "clear boxes" in found.reason
    assert found.same_boxes < 0.5


@pytest.mark.parametrize("other", ["letterbox", "crop"])
def test_another_way_into_the_square_is_seen(other: str, tmp_path: Path, ladder: Any) -> None:
    """The network is fed what it was made with; what an application would do by the manifest is another picture."""
    folder = detectors.make_bundle(tmp_path / "tiny", "decoded", picture_shape=(48, 96))
    assert ladder.row(ladder.verify(folder, "ort-cpu"), "preprocess", "shared").verdict == "pass"
    ladder.edit(folder, lambda data: data["spec"]["preprocess"].update(resize=other))
    row = ladder.row(ladder.verify(folder, "ort-cpu"), "preprocess", "shared")
    assert row.verdict == "numeric"
