"""`verify --accuracy` on detectors, from labels on disk to the figure in the row."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
import detectors

from cspdeploy.core.bundle import read_manifest, write_manifest
from cspdeploy.core.detection.labelled import LabelledBoxes, open_labelled
from cspdeploy.core.detection.postprocess import find_boxes
from cspdeploy.core.errors import InputError
from cspdeploy.core.golden import read_golden
from cspdeploy.core.spec import Accuracy


def own_labels(bundle: Path, folder: Path, *, names: tuple[str, str] = ("apple", "pear")) -> LabelledBoxes:
    """The golden images, labelled with what the detector finds on them, as COCO."""
    folder.mkdir()
    golden, manifest = read_golden(bundle / "golden.npz"), read_manifest(bundle)
    detection = manifest.spec.detection
    assert detection is not None
    exact = {name: np.asarray(array, np.float32) for name, array in golden.outputs_fp64.items()}
    found = find_boxes(exact, detection, detection.network_decode)
    entries = []
    for i, (image, boxes) in enumerate(zip(golden.images, found, strict=True)):
        Image.fromarray(image).save(folder / f"{i}.png")
        for box, index in zip(np.clip(boxes.boxes_M4, 0, detectors.SIZE), boxes.classes_M, strict=True):
            left, top, right, bottom = (float(side) for side in box)
            entries.append({"image_id": i, "category_id": int(index), "bbox": [left, top, right - left, bottom - top]})
    whole = {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in range(len(found))],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names)], "annotations": entries,
    }  # fmt: skip
    (folder / "annotations.json").write_text(json.dumps(whole))
    return open_labelled(str(folder))


@pytest.mark.parametrize("decode", ["decoded", "nms", pytest.param("raw", marks=pytest.mark.slow)])
def test_a_detector_is_right_about_its_own_boxes(decode: Any, tmp_path: Path, ladder: Any) -> None:
    folder = detectors.make_bundle(tmp_path / "tiny", decode)
    data = own_labels(folder, tmp_path / "set")
    row = ladder.row(ladder.verify(folder, "ort-cpu", accuracy=data), "onnx", "ort-cpu")
    assert row.verdict == "pass"
    assert row.map50 > 0.9
    assert row.map > 0.9
    assert row.accuracy_images == len(data.paths) > 2
    assert ("thresholds of the graph" in row.note) == (decode == "nms")


def test_a_set_that_is_labelled_otherwise_scores_low(tmp_path: Path, ladder: Any) -> None:
    folder = detectors.make_bundle(tmp_path / "tiny", "decoded")
    data = own_labels(folder, tmp_path / "set", names=("pear", "apple"))
    row = ladder.row(ladder.verify(folder, "ort-cpu", accuracy=data), "onnx", "ort-cpu")
    assert row.map50 < 0.5


def test_a_recorded_figure_that_is_missed_fails(tmp_path: Path, ladder: Any) -> None:
    folder = detectors.make_bundle(tmp_path / "tiny", "decoded")
    data = own_labels(folder, tmp_path / "set")
    manifest = read_manifest(folder)
    recorded = Accuracy(dataset=data.name, num_images=len(data), map50=0.5, map=0.4)
    provenance = dataclasses.replace(manifest.spec.provenance, accuracy=recorded)
    write_manifest(
        folder, dataclasses.replace(manifest, spec=dataclasses.replace(manifest.spec, provenance=provenance))
    )
    row = ladder.row(ladder.verify(folder, "ort-cpu", accuracy=data), "onnx", "ort-cpu")
    assert row.verdict == "accuracy"
    assert "mAP50" in row.reason


def test_labels_that_do_not_fit_are_refused(tmp_path: Path, tiny_bundle: Path, ladder: Any) -> None:
    folder = detectors.make_bundle(tmp_path / "tiny", "decoded")
    other = own_labels(folder, tmp_path / "set", names=("apple", "plum"))
    with pytest.raises(InputError, match="'plum' is none of the model's"):
        ladder.verify(folder, "ort-cpu", accuracy=other)
    with pytest.raises(InputError, match="has boxes, and"):
        ladder.verify(tiny_bundle, "ort-cpu", accuracy=other)
