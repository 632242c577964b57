from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from cspdeploy.core.errors import InputError
from cspdeploy.train.detect_folder import open_boxes


@pytest.fixture
def folder(boxes_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(boxes_folder, tmp_path / "set"))


def _label(folder: Path) -> Path:
    return folder / "labels" / "train" / "000.txt"


def test_splits_classes_and_boxes(folder: Path) -> None:
    _label(folder).write_text("2 0.5 0.25 0.5 0.125\n\n0 0.1 0.1 0.2 0.2\n")
    training, testing = (open_boxes(folder, split=split) for split in ("train", "test"))
    assert (len(training), len(testing)) == (16, 6)
    assert training.labels == ("red", "green", "blue")
    assert training.name == "set/train"
    truth = training.truth(0, width=80, height=80)
    assert truth.boxes_M4 == pytest.approx(np.array([[20, 15, 60, 25], [0, 0, 16, 16]]))
    assert truth.classes_M.tolist() == [2, 0]


def test_other_layouts_hold_the_same(folder: Path, tmp_path: Path) -> None:
    expected = open_boxes(folder, split="train")
    turned, beside = tmp_path / "turned", tmp_path / "beside"
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            shutil.copytree(folder / kind / split, turned / split / kind)
            shutil.copytree(folder / kind / split, beside / split, dirs_exist_ok=True)
    for other in (turned, beside):
        shutil.copy(folder / "classes.txt", other / "obj.names")
        found = open_boxes(other, split="train")
        assert [one.boxes_M4.tolist() for one in found.stored] == [one.boxes_M4.tolist() for one in expected.stored]
        assert found.labels == expected.labels


def test_without_splits_every_tenth_picture_is_judged_by(folder: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    for kind in ("images", "labels"):
        shutil.copytree(folder / kind / "train", flat / kind)
    shutil.copy(folder / "classes.txt", flat)
    assert [path.stem for path in open_boxes(flat, split="test").paths] == ["009"]
    assert len(open_boxes(flat, split="train")) == 15


def test_coco_comes_with_a_json_for_each_split(folder: Path) -> None:
    kinds = [{"id": 5, "name": "red"}, {"id": 9, "name": "blue"}]
    (folder / "annotations").mkdir()
    shutil.rmtree(folder / "labels")
    for split, box in (("train", [1, 2, 30, 40]), ("val", [5, 6, 20, 10])):
        for path in (folder / "images" / split).iterdir():
            path.rename(folder / path.name) if path.stem == "000" and split == "train" else path.unlink()
        (folder / "images" / split).rmdir()
        images, entry = [{"id": 1, "file_name": "000.png"}], {"image_id": 1, "category_id": 9, "bbox": box}
        text = json.dumps({"categories": kinds, "images": images, "annotations": [entry]})
        (folder / "annotations" / f"instances_{split}2017.json").write_text(text)
    training, testing = (open_boxes(folder, split=split) for split in ("train", "test"))
    assert training.labels == ("red", "blue")
    assert training.truth(0, width=80, height=80).boxes_M4.tolist() == [[1, 2, 31, 42]]
    assert testing.truth(0, width=80, height=80).boxes_M4.tolist() == [[5, 6, 25, 16]]
    assert testing.stored[0].classes_M.tolist() == [1]


@pytest.mark.parametrize(("line", "match"), [
    ("0 0.9 0.5 0.4 0.2", r"000\.png: its box from 0\.7, 0\.4 to 1\.1, 0\.6 lies outside"),
    ("3 0.5 0.5 0.2 0.2", r"000\.txt: line 1: .* a class below 3"),
    ("-1 0.5 0.5 0.2 0.2", "a class below 3"),
    ("0.5 0.5 0.5 0.2 0.2", "expected class x y width height"),
    ("0 0.5 0.5 0.2", "expected class x y width height"),
    ("0 0.5 nan 0.2 0.2", "parts of the sides"),
    ("0 240 300 80 40", "parts of the sides"),
])  # fmt: skip
def test_a_label_that_does_not_hold(folder: Path, line: str, match: str) -> None:
    _label(folder).write_text(f"{line}\n")
    with pytest.raises(InputError, match=match):
        open_boxes(folder, split="train")


def test_digits_that_were_rounded_are_no_fault(folder: Path) -> None:
    _label(folder).write_text("0 0.9 0.5 0.2004 0.2\n")
    assert len(open_boxes(folder, split="train").stored[0]) == 1


def test_folder_that_holds_nothing(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a folder"):
        open_boxes(tmp_path / "none", split="train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no labelled boxes"):
        open_boxes(tmp_path / "empty", split="train")
    (folder / "classes.txt").unlink()
    with pytest.raises(InputError, match="no class names") as caught:
        open_boxes(folder, split="train")
    assert "classes.txt" in caught.value.fix


def test_pictures_without_any_label(folder: Path) -> None:
    shutil.rmtree(folder / "labels" / "train")
    with pytest.raises(InputError, match="no labelled box in 16 images of split 'train'"):
        open_boxes(folder, split="train")


def test_no_validation_split(folder: Path) -> None:
    shutil.rmtree(folder / "images" / "val")
    with pytest.raises(InputError, match="has train, but no val or valid or test"):
        open_boxes(folder, split="test")


@pytest.mark.parametrize("names", ["", "red\nred\nblue\n"])
def test_names_that_are_none(folder: Path, names: str) -> None:
    (folder / "classes.txt").write_text(names)
    with pytest.raises(InputError, match="class names"):
        open_boxes(folder, split="train")
