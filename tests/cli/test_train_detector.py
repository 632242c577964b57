from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cspdeploy.cli.train_detector import is_detector, train_boxes
from cspdeploy.core.errors import InputError
from cspdeploy.core.model_folder import read_spec
from cspdeploy.train.workers import NO_WORKERS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures to train on and one to judge by, each with two bright rectangles."""
    rng = np.random.default_rng(0)
    for split, num in (("train", 3), ("val", 1)):
        for kind in ("images", "labels"):
            (tmp_path / "set" / kind / split).mkdir(parents=True)
        for i in range(num):
            pixels = rng.integers(0, 99, (64, 64, 3), np.uint8)
            lines = []
            for index in range(2):
                width, height = (int(side) for side in rng.integers(8, 30, 2))
                pixels[2 : 2 + height, 32 * index : 32 * index + width] = 250
                lines.append(
                    f"{index} {(32 * index + width / 2) / 64} {(2 + height / 2) / 64} {width / 64} {height / 64}\n"
                )
            Image.fromarray(pixels).save(tmp_path / "set" / "images" / split / f"{i}.png")
            (tmp_path / "set" / "labels" / split / f"{i}.txt").write_text("".join(lines))
    (tmp_path / "set" / "classes.txt").write_text("left\nright\n")
    return tmp_path / "set"


def _train(folder: Path, models: Path, *, size_px: int = 32) -> int:
    return train_boxes(
        "yolov4-tiny", data=str(folder), models=models, recipe={"epochs": 1, "batch": 3}, size_px=size_px,
        command="cspdeploy train yolov4-tiny", resume=False, overwrite=False, workers=NO_WORKERS,
        progress=lambda what, done, total: None, json_=True,
    )  # fmt: skip


@pytest.mark.slow
def test_a_detector_is_trained_and_told(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _train(folder, tmp_path / "models") == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["anchors"]) == 6
    assert 0 <= report["accuracy"]["map"] <= report["accuracy"]["map50"] <= 1
    spec = read_spec(tmp_path / "models" / "yolov4-tiny")
    assert (spec.task, spec.num_classes, spec.preprocess.height_px) == ("detect", 2, 32)


def test_a_size_that_the_strides_do_not_divide(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--size 100: expected a multiple of 32 px") as caught:
        _train(folder, tmp_path / "models", size_px=100)
    assert caught.value.fix == "--size 96"


def test_which_networks_are_detectors() -> None:
    assert is_detector("yolov4-tiny")
    assert not is_detector("cspresnet50")
    with pytest.raises(InputError, match="unknown"):
        is_detector("yolov9000")


@pytest.mark.parametrize("name", ["fpn:resnet50", "fpn-resnet50"])
def test_a_segmenter_is_not_trained_here(folder: Path, tmp_path: Path, refuse: Callable[..., str], name: str) -> None:
    lines = refuse("train", name, "--data", folder, "--models", tmp_path / "models")
    assert f"model '{name}': a segmenter, expected a classifier or a detector" in lines
    assert "tests/benchmarks/train_segmenter.py" in lines
    assert not (tmp_path / "models").exists()
