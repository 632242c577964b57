"""What is put behind a detector's heads, run by ONNX Runtime, against numpy; and what the files are."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from cspdeploy.check.lint import lint_file
from cspdeploy.core.detection.boxes import Boxes, suppress
from cspdeploy.core.detection.postprocess import candidates_of, find_boxes
from cspdeploy.core.detection.spec import DECODES, Decode, Detection, DetectionHead, Suppression
from cspdeploy.core.onnx_graph import read_onnx
from cspdeploy.core.targets import find_target
from cspdeploy.export.decode import add_decode
from cspdeploy.runtimes.ort import open_cpu_session

CLASSES, HEIGHT, WIDTH = 3, 64, 96
HEADS = (
    DetectionHead(output="head_s16", stride_px=16, anchors=((40, 50), (60, 35)), scale_x_y=2.0, new_coords=True),
    DetectionHead(output="head_s8", stride_px=8, anchors=((10, 20), (30, 15)), scale_x_y=1.2),
)
RULE = Suppression(score_threshold=0.3, iou_threshold=0.45, max_detections=20)
LABELS = ("ant", "it's", 'a "c"')
NUM_CANDIDATES = 2 * (4 * 6 + 8 * 12)

Raw = dict[str, np.ndarray]


def detection(decode: Decode, **rule: float) -> Detection:
    return Detection(heads=HEADS, decode=decode, suppression=dataclasses.replace(RULE, **rule))  # type: ignore[arg-type]


def write(folder: Path, asked: Detection, *, batch: int | str = "N", opset: int = 18, classes: int = CLASSES) -> Path:
    """A network whose heads are its input, cut in two, with the contract behind it."""
    sizes = {head.output: (HEIGHT // head.stride_px, WIDTH // head.stride_px) for head in HEADS}
    counts = [2 * (5 + classes) * height * width for height, width in sizes.values()]
    maps = {name: [batch, 2 * (5 + classes), *size] for name, size in sizes.items()}
    nodes = [helper.make_node("Split", ["input", "sizes"], ["part0", "part1"], axis=1)]
    nodes += [helper.make_node("Reshape", [f"part{index}", f"{name}/form"], [name]) for index, name in enumerate(maps)]
    constants = [helper.make_tensor("sizes", TensorProto.INT64, [2], counts)]
    constants += [helper.make_tensor(f"{name}/form", TensorProto.INT64, [4], [0, *maps[name][1:]]) for name in maps]
    graph = helper.make_graph(
        nodes, "network", [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, sum(counts)])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in maps.items()], constants,
    )  # fmt: skip
    source, target = folder / "raw.onnx", folder / f"{asked.decode}.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), source)
    add_decode(
        source, target, detection=asked, num_classes=classes, height_px=HEIGHT, width_px=WIDTH, labels=LABELS
    )  # fmt: skip
    return target


def raw_maps(num: int, *, spread: float = 1.0, shift: float = 0.0, seed: int = 0, classes: int = CLASSES) -> Raw:
    rng, found = np.random.default_rng(seed), {}
    for head in HEADS:
        shape = (num, 2 * (5 + classes), HEIGHT // head.stride_px, WIDTH // head.stride_px)
        values = rng.normal(size=shape) * spread + shift
        found[head.output] = np.asarray(1 / (1 + np.exp(-values)) if head.new_coords else values, np.float32)
    return found


def run(path: Path, raw: Raw) -> Mapping[str, np.ndarray]:
    num = len(next(iter(raw.values())))
    flat = np.concatenate([raw[head.output].reshape(num, -1) for head in HEADS], 1)
    return open_cpu_session(path).run({"input": flat})


def assert_alike(found: list[Boxes], expected: list[Boxes], *, exact: bool = False) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.classes_M.tolist() == other.classes_M.tolist()
        np.testing.assert_allclose(one.scores_M, other.scores_M, rtol=0 if exact else 1e-5)
        np.testing.assert_allclose(one.boxes_M4, other.boxes_M4, rtol=0, atol=0 if exact else 2e-4)


@pytest.mark.parametrize("decode", ["decoded", "ultralytics", "nms"])
@pytest.mark.parametrize(("batch", "num"), [(1, 1), (2, 2), ("N", 1), ("N", 3)])
def test_every_contract_gives_the_boxes_of_the_raw_heads(
    tmp_path: Path, decode: Decode, batch: int | str, num: int
) -> None:
    asked = detection(decode, max_detections=500)
    raw = raw_maps(num, spread=2)
    path = write(tmp_path, asked, batch=batch)
    found, expected = find_boxes(run(path, raw), asked, decode), find_boxes(raw, asked, "raw")
    assert min(len(one) for one in expected) > 20
    assert_alike(found, expected)


@pytest.mark.parametrize("decode", ["decoded", "ultralytics"])
def test_candidates_are_those_of_numpy(tmp_path: Path, decode: Decode) -> None:
    asked, raw = detection(decode), raw_maps(2)
    outputs = run(write(tmp_path, asked), raw)
    for found, expected in zip(
        candidates_of(outputs, asked, decode), candidates_of(raw, asked, "raw"), strict=True
    ):  # fmt: skip
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4, strict=True)


def both(
    folder: Path, raw: Raw, *, classes: int = CLASSES, **rule: float
) -> tuple[list[Boxes], list[Boxes], list[int]]:
    """Boxes of the graph, those of numpy from the graph's own candidates, and how many the graph says it has."""
    asked, decoded = detection("nms", **rule), detection("decoded", **rule)
    outputs = run(write(folder, asked, classes=classes), raw)
    boxes, scores = candidates_of(run(write(folder, decoded, classes=classes), raw), decoded, "decoded")
    expected = [suppress(*one, asked.suppression) for one in zip(boxes, scores, strict=True)]
    most = asked.suppression.max_detections
    assert outputs["detections"].shape == (len(boxes), most, 6)
    assert outputs["num_detections"].dtype == np.int64
    for rows, count in zip(outputs["detections"], outputs["num_detections"], strict=True):
        assert not rows[count:].any()
    return find_boxes(outputs, asked, "nms"), expected, outputs["num_detections"].tolist()


@pytest.mark.parametrize(
    ("rule", "counts"),
    [
        ({}, [20, 20]),  # more than are wanted
        ({"max_detections": 1}, [1, 1]),
        ({"max_detections": 2000, "score_threshold": 0.0, "iou_threshold": 1.0}, [720, 720]),  # all there are
        ({"score_threshold": 0.99}, [0, 0]),
    ],
)
def test_suppression_in_the_graph_is_that_of_numpy(tmp_path: Path, rule: dict[str, float], counts: list[int]) -> None:
    """To the bit, for both have the same candidates."""
    found, expected, told = both(tmp_path, raw_maps(2), **rule)
    assert told == counts
    assert_alike(found, expected, exact=True)


def test_images_of_a_batch_know_nothing_of_each_other(tmp_path: Path) -> None:
    """One without a box, one with a few, one with a crowd."""
    parts = [raw_maps(1, shift=-9), raw_maps(1, shift=-1.5, seed=1), raw_maps(1, spread=3, seed=2)]
    raw = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    found, expected, told = both(tmp_path, raw, max_detections=40)
    assert told[0] == 0 < told[1] < told[2] == 40
    assert_alike(found, expected, exact=True)


def test_equal_scores_come_by_candidate_and_then_by_class(tmp_path: Path) -> None:
    raw = {name: np.zeros_like(values) for name, values in raw_maps(1).items()}
    raw["head_s16"][:] = 0.5
    found, expected, told = both(tmp_path, raw, score_threshold=0.2, max_detections=30)
    assert told == [30]
    assert found[0].classes_M.tolist()[:6] == [0, 1, 2, 0, 1, 2]
    assert_alike(found, expected, exact=True)


def test_one_class(tmp_path: Path) -> None:
    found, expected, told = both(tmp_path, raw_maps(2, classes=1), classes=1)
    assert told == [20, 20]
    assert_alike(found, expected, exact=True)


def test_nan_and_infinite_candidates_are_none(tmp_path: Path) -> None:
    """A class that is NaN takes no other class with it; a size that overflows takes the box."""
    raw = raw_maps(2, spread=2)
    maps = raw["head_s8"].reshape(2, 2, 5 + CLASSES, 8, 12)
    maps[0, 0, 4:] = 5.0
    maps[0, 0, 5, 2] = np.nan
    maps[0, 1, 4:7], maps[0, 1, 2] = 5.0, 200.0
    found, expected, _ = both(tmp_path, raw, max_detections=300)
    assert all(np.isfinite(one.boxes_M4).all() and np.isfinite(one.scores_M).all() for one in found)
    assert len(expected[0]) > 20
    assert_alike(found, expected, exact=True)


@pytest.mark.parametrize("opset", [13, 18, 20])
@pytest.mark.parametrize("decode", DECODES)
def test_files_are_valid(tmp_path: Path, decode: Decode, opset: int) -> None:
    path = write(tmp_path, detection(decode), opset=opset)
    onnx.checker.check_model(path, full_check=True)
    added = {node.name for node in onnx.load(path).graph.node if node.name}
    assert all(name.startswith("decode/") for name in added)
    assert bool(added) == (decode != "raw")
    if decode != "trt":
        assert run(path, raw_maps(1))


def test_ultralytics_metadata(tmp_path: Path) -> None:
    path = write(tmp_path, detection("ultralytics"), batch=2)
    found = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert ast.literal_eval(found["names"]) == dict(enumerate(LABELS))
    assert ast.literal_eval(found["imgsz"]) == [HEIGHT, WIDTH]
    assert (found["task"], found["stride"], found["batch"]) == ("detect", "16", "2")
    (output,) = read_onnx(path).graph.outputs
    assert (output.name, output.shape) == ("output0", (2, 4 + CLASSES, NUM_CANDIDATES))


def test_the_plugin_of_tensorrt(tmp_path: Path) -> None:
    path = write(tmp_path, detection("trt"), batch=1)
    node = next(node for node in onnx.load(path).graph.node if node.op_type == "EfficientNMS_TRT")
    found = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    assert found.pop("score_threshold") == pytest.approx(0.3)
    assert found.pop("iou_threshold") == pytest.approx(0.45)
    assert found == {
        "plugin_version": b"1", "max_output_boxes": 20, "background_class": -1, "score_activation": 0,
        "class_agnostic": 0, "box_coding": 0,
    }  # fmt: skip
    assert [(value.name, value.shape) for value in read_onnx(path).graph.outputs] == [
        ("num_dets", (1, 1)), ("det_boxes", (1, 20, 4)), ("det_scores", (1, 20)), ("det_classes", (1, 20)),
    ]  # fmt: skip
    verdicts = {name: lint_file(path, [find_target(name)]).targets[0].verdict for name in ("tensorrt-10", "ort-1.16")}
    assert verdicts == {"tensorrt-10": "pass", "ort-1.16": "fail"}
    with pytest.raises(Exception, match="EfficientNMS_TRT"):  # ONNX Runtime's own error
        open_cpu_session(path)
