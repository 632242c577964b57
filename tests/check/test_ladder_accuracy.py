"""Labelled accuracy in `verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cspdeploy.core.datasets import LabelledImages, open_dataset
from cspdeploy.core.golden import read_golden
from cspdeploy.core.metrics import top_k
from cspdeploy.edge import Predictor


def _photos(folder: Path, predictor: Predictor) -> Path:
    """A folder of 20 random images under the class that the model itself gives; every fourth under another one."""
    images = np.random.default_rng(5).integers(0, 256, (20, 32, 32, 3), np.uint8)
    answers = top_k(predictor.logits(*images), 1)[:, 0]
    for index in range(10):
        (folder / "test" / f"label {index}").mkdir(parents=True)
    for i, answer in enumerate(answers):
        index = (answer + 1) % 10 if i % 4 == 0 else answer
        Image.fromarray(images[i]).save(folder / "test" / f"label {index}" / f"{i}.png")
    for index in range(10):  # no class folder may be empty: a picture of each class that is told apart by nothing
        Image.new("RGB", (32, 32)).save(folder / "test" / f"label {index}" / "black.png")
    return folder


def _record_accuracy(ladder: Any, folder: Path, **accuracy: Any) -> None:
    ladder.edit(folder, lambda data: data["spec"]["provenance"].update(accuracy=accuracy))


def test_accuracy_on_a_labelled_folder(bundle: Path, tmp_path: Path, ladder: Any) -> None:
    data = open_dataset(str(_photos(tmp_path / "photos", Predictor.open(bundle))), split="test")
    report = ladder.verify(bundle, "ort-cpu", "torchscript-cpu", accuracy=data)
    assert report.verdict == "pass"
    for row in report.rows[1:]:
        assert row.accuracy_images == 30
        assert row.top5 is not None
    for artifact, runtime in (("torchscript", "torchscript-cpu"), ("onnx", "ort-cpu")):
        row = ladder.row(report, artifact, runtime)
        assert row.top1 == pytest.approx(16 / 30)  # 15 of the 20, and one of the black ones

    _record_accuracy(ladder, bundle, dataset="photos/test", num_images=30, top1=16 / 30, top5=1.0)
    assert ladder.verify(bundle, "torchscript-cpu", accuracy=data).verdict == "pass"


@pytest.mark.parametrize("recorded", [0.9, 0.7])
def test_accuracy_out_of_budget_either_way(bundle: Path, recorded: float, ladder: Any) -> None:
    data = _own_answers(bundle, num_right=16)
    _record_accuracy(ladder, bundle, dataset="own/test", num_images=20, top1=recorded, top5=1.0)
    report = ladder.verify(bundle, "torchscript-cpu", accuracy=data)
    row = ladder.row(report, "torchscript", "torchscript-cpu")
    assert row.verdict == "accuracy"
    assert row.top1 == 0.8
    assert "80.00 %" in row.reason
    assert "0.05 points" in row.reason
    assert report.verdict == "fail"
    assert "torchscript on torchscript-cpu" in report.first_break


@pytest.mark.parametrize("recorded", [0.1005, 0.0995])
def test_accuracy_at_the_edge_of_the_budget_passes(bundle: Path, recorded: float, ladder: Any) -> None:
    """0.0005 is 5 of 10,000 images; whether 0.1005 - 0.1 is more than that must not hang on the last bit."""
    data = _own_answers(bundle, num_right=2)
    _record_accuracy(ladder, bundle, dataset="own/test", num_images=20, top1=recorded, top5=1.0)
    assert (
        ladder.row(ladder.verify(bundle, "torchscript-cpu", accuracy=data), "torchscript", "torchscript-cpu").verdict
        == "pass"
    )


@pytest.mark.parametrize(
    "recorded", [{"dataset": "other/test", "num_images": 20}, {"dataset": "own/test", "num_images": 9}]
)
def test_accuracy_on_other_images_is_told_but_not_judged(bundle: Path, recorded: dict[str, Any], ladder: Any) -> None:
    data = _own_answers(bundle, num_right=16)
    _record_accuracy(ladder, bundle, **recorded, top1=0.1, top5=0.1)
    row = ladder.row(ladder.verify(bundle, "torchscript-cpu", accuracy=data), "torchscript", "torchscript-cpu")
    assert row.verdict == "pass"
    assert row.top1 == 0.8


def _own_answers(folder: Path, *, num_right: int) -> LabelledImages:
    """The golden images, `num_right` of them under the class that the original gives."""
    golden = read_golden(folder / "golden.npz")
    classes = top_k(golden.outputs_fp64["logits"], 1)[:, 0]
    classes[num_right:] = (classes[num_right:] + 1) % 10
    assert len(classes) == 20
    return LabelledImages(
        name="own/test", labels=tuple(f"label {i}" for i in range(10)), classes=classes, stored=golden.images
    )


def test_accuracy_of_a_broken_artifact_is_not_measured(bundle: Path, ladder: Any) -> None:
    ladder.edit_convolution(bundle / "tiny.onnx", ladder.negate_largest)
    ladder.rehash(bundle)
    row = ladder.row(ladder.verify(bundle, "ort-cpu", accuracy=_own_answers(bundle, num_right=20)), "onnx", "ort-cpu")
    assert row.verdict == "numeric"
    assert row.top1 is None
