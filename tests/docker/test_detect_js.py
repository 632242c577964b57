"""The boxes of JavaScript, in Node.js and in the page, against Python's. Needs Node.js and none of its packages."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cspdeploy.core.bundle import read_manifest
from cspdeploy.core.codec import to_json
from cspdeploy.core.detection.boxes import suppress, to_picture
from cspdeploy.core.detection.decode import decode_heads
from cspdeploy.core.detection.spec import Decode, Suppression
from tests.docker.node import DOCKER, node, run_module
from tests.edge.detectors import (
    ALL_DECODES,
    CONTRACT,
    LABELS,
    detection_of,
    outputs_of,
    raw_heads,
    write_detector,
)

_READ = """
const told = ({ dims, data, whole }) => ({
  dims, data: whole ? BigInt64Array.from(data, BigInt) : Float32Array.from(data, (one) => one ?? NaN),
});
const opened = (outputs) => Object.fromEntries(Object.entries(outputs).map(([name, one]) => [name, told(one)]));
"""

_BOXES = """
import { readFileSync } from "node:fs";
import { detectionFor, findBoxes, inPicture } from "$LIB/detect.js";
const { cases, labels } = JSON.parse(readFileSync(process.argv[1]));
const answer = ({ outputs, detection, decode, contract, image, asked }) => {
  try {
    const rule = detectionFor(detection, { decode, file: "spots.onnx" }, asked);
    return inPicture(findBoxes(opened(outputs), rule, decode), labels, contract, image);
  } catch (error) {
    return [error.name, error.message];
  }
};
console.log(JSON.stringify(cases.map(answer)));
"""

_JUDGE = """
import { readFileSync } from "node:fs";
import { judgeDetector } from "$LIB/prove.js";
const { cases, exact } = JSON.parse(readFileSync(process.argv[1]));
console.log(JSON.stringify(cases.map(({ outputs, detection, decode, precision, source }) => {
  const arrays = new Map(Object.entries(opened(exact[detection.decode === "raw" ? "raw" : "decoded"]))
    .flatMap(([name, { dims, data }]) => [64, 32].map((bits) => [`output_fp${bits}.${name}`, { shape: dims, data }])));
  const names = Array.from(arrays.keys()).flatMap((name) => name.startsWith("output_fp64.") ? [name.slice(12)] : []);
  const golden = { arrays, names, images: [0] };
  const artifact = { file: "spots.onnx", precision, decode, steps: [{ facts: { num_quantised: 9 } }] };
  const told = judgeDetector([opened(outputs)], artifact, golden, { detection, provenance: { source } });
  return [told.passed, told.boxes, told.judged ?? true];
})));
"""


def _listed(outputs: dict[str, np.ndarray]) -> dict[str, Any]:
    """As JSON, which has neither NaN, null here, nor infinity: a number beyond float32."""
    return {
        name: {
            "dims": list(array.shape),
            "whole": array.dtype == np.int64,
            "data": [None if np.isnan(one) else min(one, 1e39) for one in array.ravel().tolist()],
        }
        for name, array in outputs.items()
    }


def _run(code: str, given: object, folder: Path) -> Any:
    (folder / "given.json").write_text(json.dumps(given))
    return run_module(_READ + code, folder / "given.json")


def _case(decode: Decode, seed: int, *, new_coords: bool = False, **changes: Any) -> dict[str, Any]:
    detection = detection_of(decode, new_coords=new_coords, suppression=changes.pop("suppression", None))
    outputs = changes.pop("outputs", None) or outputs_of(raw_heads(seed, new_coords=new_coords), detection)
    return {
        "outputs": _listed(outputs), "detection": to_json(detection), "decode": decode, "contract": to_json(CONTRACT),
        "image": {"width": 90, "height": 60}, "asked": {},
    } | changes  # fmt: skip


def test_boxes_are_pythons_in_every_contract_and_place(tmp_path: Path) -> None:
    cases, expected = [], []
    for seed, decode in enumerate(ALL_DECODES * 3):
        resize = ("letterbox", "crop", "stretch")[seed % 3]
        contract = dataclasses.replace(CONTRACT, resize=resize, crop_pct=0.875)  # type: ignore[arg-type]
        width, height, new_coords = 40 + 31 * seed, 200 - 13 * seed, seed > 7
        rule = Suppression(score_threshold=0.1 + 0.05 * (seed % 4), iou_threshold=0.3, max_detections=7 + seed)
        cases.append(_case(
            decode, seed, new_coords=new_coords, contract=to_json(contract), suppression=rule,
            image={"width": width, "height": height},
        ))  # fmt: skip
        boxes, scores = decode_heads(
            raw_heads(seed, new_coords=new_coords), detection_of(decode, new_coords=new_coords)
        )  # fmt: skip
        expected.append(to_picture(suppress(boxes[0], scores[0], rule), contract, width=width, height=height))
    found = _run(_BOXES, {"cases": cases, "labels": LABELS}, tmp_path)
    for case, row, boxes in zip(cases, found, expected, strict=True):
        assert len(row) == len(boxes) > 3, case["decode"]
        assert [one["index"] for one in row] == boxes.classes_M.tolist()
        assert [one["label"] for one in row] == [LABELS[index] for index in boxes.classes_M]
        sides = [[one[side] for side in ("left", "top", "right", "bottom")] for one in row]
        # numpy's exponential and that of JavaScript round the last bit of float32 differently.
        np.testing.assert_allclose(sides, boxes.boxes_M4, atol=2e-3)
        np.testing.assert_allclose([one["score"] for one in row], boxes.scores_M, atol=1e-6)


def test_thousands_of_candidates_and_boxes_without_bounds(tmp_path: Path) -> None:
    """An untrained network gives a hundred thousand; all but the best are of one class and of nearly one score here."""
    generator = np.random.default_rng(5)
    corner = generator.uniform(0, 900, (1, 5000, 2)).astype(np.float32)
    boxes = np.concatenate([corner, corner + generator.uniform(1, 40, corner.shape).astype(np.float32)], -1)
    boxes[0, ::50, 2] = 1 << 21
    scores = np.zeros((1, 5000, 3), np.float32)
    scores[0, :, 1] = np.round(generator.uniform(0.5, 0.51, 5000), 4)
    scores[0, :40, 2] = 0.9
    rule = Suppression(max_detections=2000)
    outputs = {"boxes": boxes, "scores": scores}
    plain = dataclasses.replace(CONTRACT, resize="stretch")
    case = _case("decoded", 0, outputs=outputs, suppression=rule, contract=to_json(plain),
                 image={"width": 6400, "height": 3200})  # fmt: skip
    found = _run(_BOXES, {"cases": [case], "labels": LABELS}, tmp_path)[0]
    expected = to_picture(suppress(boxes[0], scores[0], rule), plain, width=6400, height=3200)
    assert len(found) == len(expected) > 900
    sides = [[one[side] for side in ("left", "top", "right", "bottom")] for one in found]
    np.testing.assert_array_equal(sides, expected.boxes_M4)
    assert [one["index"] for one in found] == expected.classes_M.tolist()


def test_bad_outputs_and_thresholds(tmp_path: Path) -> None:
    plain = {"boxes": np.zeros((1, 2, 4), np.float32), "scores": np.zeros((1, 2, 3), np.float32)}
    some = {**plain, "scores": np.array([[[np.nan, 0.5, 0.1]] * 2], np.float32)}
    none = {**plain, "scores": np.full((1, 2, 3), np.nan, np.float32)}
    wide = {**plain, "scores": np.full((1, 2, 4), 0.9, np.float32)}
    infinite = {"boxes": np.full((1, 1, 4), np.inf, np.float32), "scores": np.full((1, 1, 3), 0.9, np.float32)}
    cases = [
        _case("decoded", 0, outputs=plain), _case("decoded", 0, outputs=some), _case("decoded", 0, outputs=none),
        _case("decoded", 0, outputs=wide), _case("decoded", 0, outputs=infinite),
        _case("nms", 0, outputs=plain), _case("raw", 0) | {"decode": "trt"},
        _case("nms", 0, asked={"score_threshold": 0.1}), _case("decoded", 0, asked={"iou_threshold": 0}),
    ]  # fmt: skip
    found = _run(_BOXES, {"cases": cases, "labels": LABELS}, tmp_path)
    assert found[0] == found[4] == []
    assert [one["score"] for one in found[1]] == [0.5, 0.5]  # without an area they overlap nothing
    told = ["'scores' is NaN throughout", "a box of class 3 and 3 labels", "", "output 'detections' is missing",
            "a plugin of TensorRT", "has suppressed by score 0.25", "out of range"]  # fmt: skip
    for row, expected in zip(found[2:], told, strict=True):
        assert not expected or (row[0] == "InputError" and expected in row[1])


def test_the_proof_of_a_detector_finds_faults(tmp_path: Path) -> None:
    exact = {name: _listed(outputs_of(raw_heads(), detection_of(name))) for name in ("raw", "decoded")}  # type: ignore[arg-type]
    right = [
        _case(decode, 0) | {"precision": precision, "source": "user"}
        for decode in ALL_DECODES for precision in ("fp32", "int8")
    ]  # fmt: skip
    wrong = [
        _case(decode, 1) | {"precision": precision, "source": "user"}
        for decode in ALL_DECODES for precision in ("fp32", "int8")
    ]  # fmt: skip
    wrong += [_case(decode, 1) | {"precision": "fp32", "source": "random"} for decode in ("raw", "decoded")]  # type: ignore[arg-type]
    scaled = outputs_of(raw_heads(), detection_of("decoded"))
    scaled["boxes"] = scaled["boxes"] * np.float32(1.001)  # the same boxes, but not FP32's numbers
    wrong.append(_case("decoded", 0, outputs=scaled) | {"precision": "fp32", "source": "user"})
    found = _run(_JUDGE, {"cases": right + wrong, "exact": exact}, tmp_path)
    for case, (passed, boxes, _) in zip(right, found, strict=False):
        assert passed, case["decode"]
        assert boxes["matched"] == boxes["expected"] == boxes["found"] > 3
    for case, (passed, *_) in zip(wrong, found[len(right) :], strict=True):
        assert not passed, (case["decode"], case["precision"], case["source"])


def _rows(*boxes: tuple[float, ...]) -> dict[str, np.ndarray]:
    rows = np.zeros((1, 300, 6), np.float32)
    rows[0, : len(boxes)] = np.array(boxes, np.float32).reshape(-1, 6)
    return {"detections": rows, "num_detections": np.array([len(boxes)])}


def test_the_proof_judges_a_few_boxes_exactly(tmp_path: Path) -> None:
    """Two boxes and a background, whose size means nothing below FP32."""
    boxes = np.array([[[0, 0, 20, 20], [30, 0, 60, 20], [0, 0, 64, 32]]], np.float32)
    scores = np.array([[[0.9, 0, 0], [0, 0.6, 0], [0.001, 0, 0]]], np.float32)
    exact = {"decoded": _listed({"boxes": boxes, "scores": scores}), "raw": {}}
    one, two = (0, 0, 20, 20, 0.9, 0), (30, 0, 60, 20, 0.6, 1)
    yolo = np.concatenate([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2], scores], -1)
    yolo = yolo.transpose(0, 2, 1)
    larger = boxes.copy()
    larger[0, 2] *= 1.2
    grown = {"boxes": larger, "scores": scores}
    kinds: list[tuple[Decode, str, str, dict[str, np.ndarray], bool, bool]] = [
        ("nms", "fp32", "user", _rows(one, two), True, True),
        ("nms", "fp32", "user", _rows(one), False, True),
        ("nms", "fp32", "user", _rows((*one[:4], 0.7, 0), two), False, True),
        ("nms", "fp16", "user", _rows((*one[:4], 0.85, 0), two), False, True),
        ("nms", "int8", "user", _rows((*one[:4], 0.85, 0), two), True, True),
        ("nms", "int8", "user", _rows((*one[:4], 0.7, 0), (*two[:4], 0.4, 1)), False, True),
        *(("nms", precision, source, _rows(one, one, two), False, True)
          for precision in ("fp32", "fp16", "int8") for source in ("user", "random")),
        ("nms", "fp32", "random", _rows(), False, False),
        ("nms", "fp32", "random", _rows(one, two), False, False),
        ("ultralytics", "fp32", "random", {"output0": yolo}, True, True),
        ("ultralytics", "fp32", "random", {"output0": np.zeros_like(yolo)}, False, True),
        ("decoded", "fp32", "user", grown, False, True),
        ("decoded", "fp16", "user", grown, True, True),
        ("decoded", "int8", "user", grown, True, True),
        ("decoded", "fp16", "user", {"boxes": boxes, "scores": scores * np.float32(0.95)}, False, True),
    ]  # fmt: skip
    cases = [
        _case(decode, 0, outputs=outputs) | {"precision": precision, "source": source}
        for decode, precision, source, outputs, *_ in kinds
    ]  # fmt: skip
    found = _run(_JUDGE, {"cases": cases, "exact": exact}, tmp_path)
    for (decode, precision, source, _, passed, judged), told in zip(kinds, found, strict=True):
        assert (told[0], told[2]) == (passed, judged), (decode, precision, source, told)


_MANIFEST = """
import { readFileSync } from "node:fs";
import { parseManifest } from "$LIB/manifest.js";
const tried = (text) => {
  try { return parseManifest(text, "m").spec.name; } catch (error) { return error.message; }
};
console.log(JSON.stringify(JSON.parse(readFileSync(process.argv[1])).map(tried)));
"""


def test_a_broken_description_of_the_heads_is_refused(tmp_path: Path) -> None:
    folder = write_detector(tmp_path / "b")
    text = (folder / "manifest.json").read_text()
    assert read_manifest(folder).spec.task == "detect"
    faults: list[tuple[str, Any]] = [("heads", []), ("heads", [{}]), ("suppression", None),
                                     ("suppression", {"score_threshold": 2})]  # fmt: skip
    texts = [text]
    for name, value in faults:
        manifest = json.loads(text)
        manifest["spec"]["detection"][name] = value
        texts.append(json.dumps(manifest))
    found = _run(_MANIFEST, texts, tmp_path)
    assert found[0] == "spots"
    assert found[1:] == ["manifest.json: spec.detection broken"] * len(faults)


@pytest.mark.parametrize("name", ["score-threshold", "iou-threshold", "max-detections"])
def test_thresholds_are_for_detectors(tiny_bundle: Path, tmp_path: Path, name: str) -> None:
    done = node(DOCKER / "edge-node" / "app.mjs", tiny_bundle, "any.png", f"--{name}", "1")
    assert done.returncode == 2
    assert f"--{name}: tiny gives no boxes" in done.stderr
    done = node(DOCKER / "edge-node" / "app.mjs", write_detector(tmp_path / "b"), "any.png", f"--{name}", "much")
    assert f"--{name} much: expected a number" in done.stderr


def test_heads_that_are_none_are_refused(tmp_path: Path) -> None:
    good = to_json(detection_of("raw"))
    head = good["heads"][0]
    heads = (None, 3, "x", head | {"anchors": ["ab"]}, head | {"anchors": [None]}, head | {"output": None})
    code = """
import { readFileSync } from "node:fs";
import { checkDetection } from "$LIB/detect.js";
const judged = (one) => { try { checkDetection(one); return "fine"; } catch (error) { return error.name; } };
console.log(JSON.stringify(JSON.parse(readFileSync(process.argv[1])).map(judged)));
"""
    cases = [good, *(good | {"heads": [one]} for one in heads), None, good | {"suppression": None}]
    assert _run(code, cases, tmp_path) == ["fine", *["InputError"] * (len(cases) - 1)]
