"""Labels of boxes, in three formats, good and broken."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cspdeploy.core.detection import label_files
from cspdeploy.core.detection.labelled import find_labels, open_labelled
from cspdeploy.core.errors import InputError

VOC = """<annotation><filename>{name}</filename><object><name>pear</name><difficult>1</difficult><bndbox><xmin>11</xmin>
<ymin>21</ymin><xmax>30</xmax><ymax>40</ymax></bndbox></object><object><name>apple</name><bndbox><xmin>1</xmin><ymin>1
</ymin><xmax>100</xmax><ymax>50</ymax></bndbox></object></annotation>"""


def picture(path: Path, *, width: int = 100, height: int = 50) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(path)


def coco(folder: Path, **changes: Any) -> Path:
    picture(folder / "images" / "a.png")
    picture(folder / "images" / "b.png")
    whole = {
        "images": [{"id": 7, "file_name": "a.png"}, {"id": 3, "file_name": "b.png"}],
        "categories": [{"id": 20, "name": "pear"}, {"id": 5, "name": "apple"}],
        "annotations": [
            {"image_id": 7, "category_id": 20, "bbox": [10, 20, 30, 5.5], "iscrowd": 0},
            {"image_id": 7, "category_id": 5, "bbox": [0, 0, 100, 50], "iscrowd": 1},
        ],
    }
    path = folder / "annotations.json"
    path.write_text(json.dumps(whole | changes))
    return path


@pytest.mark.parametrize("by_folder", [True, False])
def test_coco(tmp_path: Path, by_folder: bool) -> None:
    path = coco(tmp_path)
    data = open_labelled(str(tmp_path if by_folder else path))
    assert data.labels == ("apple", "pear")
    assert [path.name for path in data.paths] == ["a.png", "b.png"]
    truth = data.truth(0, width=100, height=50)
    assert truth.boxes_M4.tolist() == [[10, 20, 40, 25.5], [0, 0, 100, 50]]
    assert truth.classes_M.tolist() == [1, 0]
    assert truth.crowds.tolist() == truth.uncounted.tolist() == [False, True]
    assert len(data.truth(1, width=100, height=50)) == 0
    assert data.in_order_of(("pear", "plum", "apple")).stored[0].classes_M.tolist() == [0, 2]


def test_pictures_of_a_split_are_read_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        picture(tmp_path / "images" / "val" / f"{name}.png")
    (tmp_path / "labels" / "val").mkdir(parents=True)
    (tmp_path / "labels" / "val" / "a.txt").write_text("1 0.5 0.5 0.2 0.4\n")
    data = open_labelled(str(tmp_path))
    assert [path.name for path in data.paths] == ["a.png", "b.png"]
    assert [len(one) for one in data.stored] == [1, 0]


@pytest.mark.parametrize("apart", [True, False])
def test_yolo(tmp_path: Path, apart: bool) -> None:
    picture(tmp_path / ("images/a.png" if apart else "a.png"))
    picture(tmp_path / ("images/b.png" if apart else "b.png"))
    (tmp_path / "labels").mkdir()
    (tmp_path / ("labels/a.txt" if apart else "a.txt")).write_text("1 0.5 0.5 0.2 0.4\n\n0 0.25 0.5 0.5 1\n")
    data = open_labelled(str(tmp_path))
    assert len(data) == 2
    truth = data.truth(0, width=100, height=50)
    np.testing.assert_allclose(truth.boxes_M4, [[40, 15, 60, 35], [0, 0, 50, 50]])
    assert truth.classes_M.tolist() == [1, 0]
    with pytest.raises(InputError, match="has class 1, the model has 1"):
        data.in_order_of(("apple",))


def test_voc_counts_pixels_from_one(tmp_path: Path) -> None:
    picture(tmp_path / "JPEGImages" / "a.png")
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "Annotations" / "a.xml").write_text(VOC.format(name="a.png"))
    data = open_labelled(str(tmp_path))
    assert data.labels == ("apple", "pear")
    truth = data.truth(0, width=100, height=50)
    assert truth.boxes_M4.tolist() == [[10, 20, 30, 40], [0, 0, 100, 50]]
    assert truth.uncounted.tolist() == [True, False]
    with pytest.raises(InputError, match="'apple' is none of the model's"):
        data.in_order_of(("pear",))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"categories": 3}, "not COCO"),
        ({"annotations": [{"image_id": 7, "category_id": 20, "bbox": [1, 2, 3]}]}, r"annotations\[0\]"),
        ({"annotations": [{"image_id": 7, "category_id": 20, "bbox": [1, 2, -3, 4]}]}, "left <= right"),
        ({"annotations": [{"image_id": 7, "category_id": 20, "bbox": [1, 2, 1e300, 4]}]}, "in pixels"),
        ({"annotations": [{"image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 4]}]}, "category_id 1"),
        ({"annotations": [{"image_id": 1, "category_id": 20, "bbox": [1, 2, 3, 4]}]}, "image_id 1"),
        ({"annotations": []}, "not one labelled box"),
        ({"images": [{"id": 7, "file_name": "../../secret.png"}]}, "outside"),
        ({"images": [{"id": 7, "file_name": "gone.png"}], "annotations": []}, "not in"),
    ],
)
def test_broken_coco_is_one_line(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    picture(tmp_path / "secret.png")
    path = coco(tmp_path / "deep" / "set", **changes)
    if "images" in changes:
        data = json.loads(path.read_text())
        data["annotations"] = [{"image_id": 7, "category_id": 20, "bbox": [1, 2, 3, 4]}]
        path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=words) as caught:
        open_labelled(str(path))
    assert "\n" not in caught.value.message


def test_deep_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="not COCO"):
        open_labelled(str(tmp_path / "a.json"))


@pytest.mark.parametrize(
    "line", ["0 0.5 0.5 0.2", "x 0.5 0.5 0.2 0.2", "0 0.5 0.5 nan 0.2", "-1 0.5 0.5 0.2 0.2", "0 300 20 5 5"]
)
def test_broken_yolo_names_the_line(tmp_path: Path, line: str) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text(f"0 0.5 0.5 0.1 0.1\n{line}\n")
    with pytest.raises(InputError, match=r"a\.txt: line 2"):
        open_labelled(str(tmp_path))


BOMB = '<!DOCTYPE a [<!ENTITY x "ha"><!ENTITY y "&x;&x;&x;">]><annotation>&y;</annotation>'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "document type"),
        ('<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>', "document type"),
        ("<annotation>", "not XML"),
        (VOC.format(name="../a.png"), "outside"),
        (VOC.format(name="a.png").replace("<xmax>30</xmax>", ""), "object 1: expected bndbox"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_broken_voc_is_refused(tmp_path: Path, text: str, words: str, encoding: str) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "set" / "a.png")
    (tmp_path / "set" / "a.xml").write_bytes(text.encode(encoding))
    with pytest.raises(InputError, match=words):
        open_labelled(str(tmp_path / "set"))


def test_what_is_none_of_them(tmp_path: Path) -> None:
    assert find_labels(str(tmp_path)) == find_labels("fashion-mnist") == ""
    with pytest.raises(InputError, match="no labelled boxes"):
        open_labelled(str(tmp_path))


# --- classes ---

OFFICIAL = ("motorcycle", "airplane", "couch", "potted plant", "dining table", "tv", "Traffic  Light", "person")
DARKNET = ("motorbike", "aeroplane", "sofa", "pottedplant", "diningtable", "tvmonitor", "traffic light", "person")


def test_classes_have_cocos_names_or_darknets(tmp_path: Path) -> None:
    kinds = [{"id": i, "name": name} for i, name in enumerate(OFFICIAL, 1)]
    boxes = [{"image_id": 7, "category_id": i, "bbox": [i, 2, 3, 4]} for i in range(1, 9)]
    data = open_labelled(str(coco(tmp_path, categories=kinds, annotations=boxes)))
    assert data.in_order_of(DARKNET[::-1]).stored[0].classes_M.tolist() == list(range(7, -1, -1))
    with pytest.raises(InputError, match="'motorcycle' is none"):
        data.in_order_of(("Motorbike", "motorbike", *DARKNET[1:]))  # either might be meant


def test_category_that_no_box_uses_need_not_be_the_models(tmp_path: Path) -> None:
    kinds = [{"id": 0, "name": "fruits"}, {"id": 1, "name": "apple"}]
    boxes = [{"image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 4]}]
    data = open_labelled(str(coco(tmp_path, categories=kinds, annotations=boxes)))
    assert data.in_order_of(("pear", "apple")).stored[0].classes_M.tolist() == [1]
    with pytest.raises(InputError, match="'apple' is none"):
        data.in_order_of(("pear", "fruits"))


# --- splits ---


def split_coco(folder: Path, *names: str) -> None:
    """A json for each name, whose box is as wide as the name's place plus one."""
    for width, name in enumerate(names, 1):
        boxes = [{"image_id": 7, "category_id": 5, "bbox": [0, 0, width, 1]}]
        path = coco(folder, annotations=boxes)
        (folder / "annotations").mkdir(exist_ok=True)
        path.rename(folder / "annotations" / name)


@pytest.mark.parametrize(
    ("names", "width"),
    [
        (("instances_train2017.json", "instances_val2017.json"), 2),
        (("instances_test.json", "instances_train.json"), 1),
        (("instances_test.json", "instances_train.json", "instances_valid.json"), 3),
        (("instances_train2017.json",), 1),
        (("captions_val2017.json", "instances_val2017.json"), 2),
        (("instances_interval.json", "instances_train.json"), 0),
        (("instances_val2014.json", "instances_val2017.json"), 0),
    ],
)
def test_json_of_the_split_to_judge_by(tmp_path: Path, names: tuple[str, ...], width: int) -> None:
    split_coco(tmp_path, *names)
    if width:
        data = open_labelled(tmp_path, split="test")
        assert data.stored[0].boxes_M4.tolist() == [[0, 0, width, 1]]
        assert data.name == f"annotations/{names[width - 1]}"
        return
    with pytest.raises(InputError, match=", ".join(names)) as caught:
        open_labelled(tmp_path, split="test")
    assert str(tmp_path / "annotations" / names[0]) in caught.value.fix


def test_several_json_are_never_guessed_from_where_all_is_asked_for(tmp_path: Path) -> None:
    split_coco(tmp_path, "instances_train.json", "instances_val.json")
    with pytest.raises(InputError, match="2 COCO files"):
        open_labelled(tmp_path)


@pytest.mark.parametrize("layout", ["images/{split}", "{split}/images", "{split}"])
@pytest.mark.parametrize("judged", ["val", "valid", "test"])
def test_pictures_of_the_split_to_judge_by(tmp_path: Path, layout: str, judged: str) -> None:
    root = tmp_path / "set"
    for split in {"train", "test", judged}:
        place = root / layout.format(split=split)
        picture(place / f"{split}.png")
        label = Path(str(place).replace("images", "labels")) / f"{split}.txt"
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text("1 0.5 0.5 0.2 0.4\n")
    (root / "classes.txt").write_text("pear\napple\n")
    data = open_labelled(root, split="test")
    assert (data.name, data.labels) == (f"set/{judged}", ("pear", "apple"))
    assert [path.stem for path in data.paths] == [judged]
    (root / "classes.txt").write_text("pear\n")
    with pytest.raises(InputError, match="class"):
        open_labelled(root, split="test")


def test_label_of_the_last_picture_is_found(tmp_path: Path) -> None:
    picture(tmp_path / "000.png")
    for i in range(1, 101):
        (tmp_path / f"{i:03}.png").write_bytes((tmp_path / "000.png").read_bytes())
    (tmp_path / "100.txt").write_text("0 0.5 0.5 0.2 0.4\n")
    assert len(open_labelled(tmp_path)) == 101


# --- what anybody may have written ---

PEAR, APPLE = {"id": 20, "name": "pear"}, {"id": 5, "name": "apple"}


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"id": 7', '"id": 1e999', "id inf, expected a whole number"),
        ('"id": 7', '"id": 7.5', "whole number"),
        ('"id": 7', '"id": NaN', "not COCO"),
        ('"id": 7', f'"id": {"7" * 5000}', "not COCO"),
        ('"id": 7', '"id": 3', "id 3 is there twice, as a.png and b.png"),
        ('"id": 20', '"id": 5', "id 5 is there twice, as pear and apple"),
        ('"id": 20', '"id": [1]', "not COCO"),
        ('"image_id": 7', '"image_id": 1e999', r"annotations\[0\]: .* whole number"),
        ('"category_id": 20', '"category_id": -1e999', r"annotations\[0\]: .* whole number"),
        ("[10,", f"[1{'0' * 400},", r"annotations\[0\]: OverflowError"),
        ("a.png", "a\\u0000.png", r"'a\\x00\.png', which no file can be called"),
        ("a.png", "\\ud800.jpg", r"'\\ud800\.jpg', which no file can be called"),
        ("a.png", "a" * 5000, r"aaa\.\.\.', which"),
        ("a.png", "a\\n\\u001b[31m.png", r"'a\\n\\x1b\[31m\.png', which is not in"),
        ("a.png", "/etc/hostname", "outside"),
    ],
    ids=lambda value: value[:24],
)
def test_strange_values_of_coco_are_one_line(tmp_path: Path, old: str, new: str, words: str) -> None:
    path = coco(tmp_path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(InputError, match=words) as caught:
        open_labelled(path)
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 400 + len(str(path))


def test_strange_name_of_a_class_is_one_line(tmp_path: Path) -> None:
    data = open_labelled(coco(tmp_path, categories=[PEAR | {"name": "\ud800\n" + "x" * 5000}, APPLE]))
    with pytest.raises(InputError, match="none of the model's") as caught:
        data.in_order_of(("pear", "apple"))
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 300


@pytest.mark.parametrize("line", ["9" * 30 + " 0.5 0.5 0.2 0.2", "0 0.5 0.5 0.2 1e999", "0 -0.01 0.5 0.2 0.2",
                                  "0 0.5 0.5 -0.0001 0.2", "0 0.5 0.5 0.2 1.002", "\x1b[31m" + "0" * 999])  # fmt: skip
def test_strange_values_of_yolo_are_one_line(tmp_path: Path, line: str) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text(f"{line}\n")
    with pytest.raises(InputError, match=r"a\.txt: line 1") as caught:
        open_labelled(tmp_path)
    assert caught.value.message.isprintable()


def test_rounded_values_of_yolo_are_clipped(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("0 0.5 0.5 1.000001 1.0005\n0 -0.0005 0.5 0.5 0.5\n")
    assert open_labelled(tmp_path).stored[0].boxes_M4.tolist() == [[0, 0, 1, 1], [-0.25, 0.25, 0.25, 0.75]]


def test_no_picture_outside_the_given_folder_is_read(tmp_path: Path) -> None:
    """A json in annotations/ is of the folder above, where that was given or the json itself; no other is."""
    picture(tmp_path / "other" / "s.png")
    path = coco(tmp_path / "data", images=[{"id": 7, "file_name": "other/s.png"}])
    for given in (path, path.parent):
        with pytest.raises(InputError, match="not in"):
            open_labelled(given)
    (tmp_path / "annotations").mkdir()
    path = path.rename(tmp_path / "annotations" / "instances_val.json")
    assert [open_labelled(given).paths for given in (path, tmp_path)] == [(tmp_path / "other" / "s.png",)] * 2
    (path.parent / path.name).rename(path.parent / "annotations.json")
    with pytest.raises(InputError, match="not in"):
        open_labelled(path.parent)


def test_json_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = coco(tmp_path)
    assert label_files.MAX_LABEL_BYTES["json"] > 470e6  # instances_train2017.json
    monkeypatch.setitem(label_files.MAX_LABEL_BYTES, "json", path.stat().st_size - 1)
    with pytest.raises(InputError, match="more than"):
        open_labelled(path)
