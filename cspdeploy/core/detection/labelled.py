"""Pictures with labelled boxes: COCO json, YOLO txt, or Pascal VOC xml. What is read may come from anywhere.

Formats: `coco_labels`; AlexeyAB/darknet, README "How to train"; the VOC 2012 development kit, section 4.
Boxes become left, top, right, bottom in pixels of the picture as it is shown.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree as ET

import numpy as np

from cspdeploy.core.coco import label_key
from cspdeploy.core.detection.average_precision import TrueBoxes
from cspdeploy.core.detection.coco_labels import coco_files, read_coco, the_coco_file
from cspdeploy.core.detection.label_files import Row, inside, read_bytes, read_xml, require_box, shown, true_boxes
from cspdeploy.core.errors import InputError
from cspdeploy.core.preprocess import list_images

__all__ = ["NAME_FILES", "LabelledBoxes", "find_labels", "open_labelled"]

MAX_IMAGES = 1 << 20
MAX_CLASSES = 1 << 20
"""Of numbers of classes: the most that anybody has are tens of thousands."""
EDGE = 1e-3
"""How far a part of a side may lie outside of 0 to 1: labels are rounded to three digits and more."""
NAME_FILES = ("classes.txt", "labels.txt", "obj.names")
_JUDGED = ("val", "valid", "test")
"""Folders of what is meant for judging, the first that is there."""

Split = Literal["", "test"]
"""All that is there, or what is meant for judging where there are splits."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LabelledBoxes:
    """Pictures with what is in them.

    Attributes:
        labels: names of the classes; empty where the set has numbers alone.
        relative: boxes are parts of the sides (YOLO), and not pixels.
    """

    name: str
    labels: tuple[str, ...]
    paths: tuple[Path, ...]
    stored: tuple[TrueBoxes, ...]
    relative: bool = False

    def __len__(self) -> int:
        return len(self.paths)

    def truth(self, index: int, *, width: int, height: int) -> TrueBoxes:
        """What is in a picture of that size, in its pixels."""
        found = self.stored[index]
        if not self.relative:
            return found
        sides = np.array([width, height, width, height], np.float64)
        return TrueBoxes(boxes_M4=found.boxes_M4 * sides, classes_M=found.classes_M, ignored_M=found.ignored_M,
                         crowd_M=found.crowd_M)  # fmt: skip

    def in_order_of(self, labels: tuple[str, ...]) -> LabelledBoxes:
        """With classes numbered as a model numbers them. Only those that occur must be the model's.

        Names are the same where they are equal but for case, spaces and COCO's two spellings of six classes.

        Raises:
            InputError: a class that the model does not have.
        """
        occurring = {int(kind) for one in self.stored for kind in one.classes_M}
        if not self.labels:
            highest = max(occurring, default=-1)
            if highest >= len(labels):
                raise InputError(f"{self.name}: has class {highest}, the model has {len(labels)}",
                                 fix="label with the classes of the model, in its order")  # fmt: skip
            return self
        places = _places(self.labels, labels)
        missing = [self.labels[kind] for kind in sorted(occurring) if places[kind] < 0]
        if missing:
            raise InputError(
                f"{self.name}: its class '{shown(missing[0])}' is none of the model's ({', '.join(labels[:5])}"
                f"{', ...' if len(labels) > 5 else ''})", fix="rename it, or leave it out")  # fmt: skip
        order = np.array(places, np.int64)
        stored = tuple(
            TrueBoxes(boxes_M4=one.boxes_M4, classes_M=order[one.classes_M], ignored_M=one.ignored_M,
                      crowd_M=one.crowd_M)
            for one in self.stored
        )  # fmt: skip
        return LabelledBoxes(name=self.name, labels=labels, paths=self.paths, stored=stored, relative=self.relative)


def _places(own: tuple[str, ...], labels: tuple[str, ...]) -> list[int]:
    """Where each of the own labels is among the others: the same name before one spelt otherwise; -1 for none."""
    exact = {label: i for i, label in reversed(list(enumerate(labels)))}
    alike: dict[str, list[int]] = {}
    for label, i in exact.items():
        alike.setdefault(label_key(label), []).append(i)
    keyed = {key: found[0] for key, found in alike.items() if len(found) == 1}  # which of two is meant is not known
    return [exact.get(label, keyed.get(label_key(label), -1)) for label in own]


def find_labels(name: str | Path) -> str:
    """What labels of boxes are there: "coco", "yolo" or "voc", "splits" with a set of these each; empty for none."""
    path = Path(name)
    if path.is_file():
        return "coco" if path.suffix.lower() == ".json" else ""
    if not path.is_dir():
        return ""
    if coco_files(path):
        return "coco"
    if next((path / "Annotations").glob("*.xml"), None) or next(path.glob("*.xml"), None):
        return "voc"
    if any(_yolo_file(path, picture).is_file() for picture in _yolo_pictures(path)):
        return "yolo"
    return "splits" if _judged_folder(path) else ""


def _judged_folder(folder: Path) -> Path | None:
    """Of a folder with a labelled set in a folder for each split, the one to judge by."""
    return next((folder / name for name in _JUDGED if (folder / name).is_dir() and find_labels(folder / name)), None)


def open_labelled(name: str | Path, *, split: Split = "") -> LabelledBoxes:
    """Read pictures and labels of one of three formats.

    COCO: the json, or a folder with one. YOLO: a txt for each picture, beside it or in labels/ for those in images/.
    VOC: Annotations/ and JPEGImages/, or an xml beside each picture.

    Args:
        split: "test": what is meant for judging, of splits val before test: of several json files, of the folders in
            images/, or of folders with a set each. The name of the result says which.

    Raises:
        InputError: none of these, a file that cannot be read, an entry that is wrong, or no box at all.
    """
    kind, path = find_labels(name), Path(name)
    judged = _judged_folder(path) if split and kind in ("yolo", "splits") else None
    if judged is not None:
        found = open_labelled(judged, split=split)
        labels = found.labels or _yolo_names(path)
        return dataclasses.replace(found, name=f"{path.name}/{judged.name}", labels=_fitting(found, labels, path))
    if kind not in ("coco", "yolo", "voc"):
        raise InputError(f"{name}: no labelled boxes, expected COCO json, YOLO txt or VOC xml",
                         fix="give the json, or the folder with pictures and labels")  # fmt: skip
    found = _read_voc(path) if kind == "voc" else _read(path, kind, split)
    if len(found) > MAX_IMAGES:
        raise InputError(f"{name}: {len(found)} pictures, expected at most {MAX_IMAGES}")
    if not any((~one.uncounted).any() for one in found.stored):
        raise InputError(f"{name}: not one labelled box in {len(found)} pictures", fix="label some objects")
    return found


def _read(path: Path, kind: str, split: Split) -> LabelledBoxes:
    if kind == "yolo":
        return _read_yolo(path, split)
    source = path if path.is_file() else the_coco_file(path, split=split)
    read = read_coco(source, root=None if path.is_file() else path)
    return LabelledBoxes(
        name=f"{source.parent.name}/{source.name}", labels=read.labels, paths=read.paths, stored=read.stored
    )


# --- YOLO ---


def _yolo_pictures(folder: Path) -> list[Path]:
    """Those in the folder or in images/, and in the folders below that, as splits are kept; each once."""
    try:
        return list_images(folder / "images" if (folder / "images").is_dir() else folder)
    except InputError:
        return []  # no picture at all


def _yolo_file(folder: Path, picture: Path) -> Path:
    if (folder / "images").is_dir() and (folder / "labels").is_dir():
        return folder / "labels" / picture.relative_to(folder / "images").with_suffix(".txt")
    return picture.with_suffix(".txt")


def _yolo_names(folder: Path) -> tuple[str, ...]:
    listed = next((folder / name for name in NAME_FILES if (folder / name).is_file()), None)
    if listed is None:
        return ()
    lines = read_bytes(listed).decode("utf-8", "replace").splitlines()
    return tuple(line.strip() for line in lines if line.strip())


def _fitting(found: LabelledBoxes, labels: tuple[str, ...], folder: Path) -> tuple[str, ...]:
    highest = max((int(one.classes_M.max()) for one in found.stored if len(one)), default=-1)
    if labels and highest >= len(labels):
        raise InputError(f"{folder}: has class {highest}, and names for {len(labels)}", fix="name all classes")
    return labels


def _read_yolo(folder: Path, split: Split) -> LabelledBoxes:
    labels, pictures, name = _yolo_names(folder), _yolo_pictures(folder), folder.name
    judged = next((one for one in _JUDGED if split and (folder / "images" / one).is_dir()), None)
    if judged is not None:
        chosen = [picture for picture in pictures if picture.is_relative_to(folder / "images" / judged)]
        pictures, name = (chosen, f"{name}/{judged}") if chosen else (pictures, name)
    stored = []
    for picture in pictures:
        source = _yolo_file(folder, picture)
        # A picture without a file has nothing in it: so Darknet reads it.
        rows = list(_yolo_rows(source, len(labels))) if source.is_file() else []
        stored.append(true_boxes(rows, {kind: int(kind) for kind, _, _, _ in rows}))
    return LabelledBoxes(name=name, labels=labels, paths=tuple(pictures), stored=tuple(stored), relative=True)


def _yolo_rows(source: Path, num_labels: int) -> Iterator[Row]:
    for number, line in enumerate(read_bytes(source).decode("utf-8", "replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            first, *numbers = line.split()
            kind, (x, y, width, height) = int(first), (float(value) for value in numbers)
        except ValueError as error:
            raise InputError(
                f"{source}: line {number}: '{shown(line, 60)}', expected class x y width height"
            ) from error
        sides, most = (x, y, width, height), num_labels or MAX_CLASSES
        fits = all(low <= side <= 1 + EDGE for side, low in zip(sides, (-EDGE, -EDGE, 0, 0), strict=True))
        if not fits or not 0 <= kind < most:
            raise InputError(
                f"{source}: line {number}: '{shown(line, 60)}', expected a class below {most} and parts of the sides, "
                "0 to 1"
            )
        x, y, width, height = (min(max(side, 0.0), 1.0) for side in sides)
        yield kind, (x - width / 2, y - height / 2, x + width / 2, y + height / 2), not (width and height), False


# --- VOC ---


def _read_voc(folder: Path) -> LabelledBoxes:
    root = folder / "Annotations" if (folder / "Annotations").is_dir() else folder
    pictures = folder / "JPEGImages" if (folder / "JPEGImages").is_dir() else folder
    if root != folder and not (folder / "JPEGImages").is_dir() and (folder / "images").is_dir():
        pictures = folder / "images"
    paths: list[Path] = []
    found: list[list[Row]] = []
    for source in sorted(root.glob("*.xml")):
        tree = read_xml(source)
        paths.append(inside(pictures, tree.findtext("filename", "").strip(), source=source))
        found.append([_voc_row(item, source=source, where=f"object {i}")
                      for i, item in enumerate(tree.findall("object"), 1)])  # fmt: skip
    labels = tuple(sorted({str(kind) for rows in found for kind, _, _, _ in rows}))
    index: dict[str | int, int] = {label: i for i, label in enumerate(labels)}
    stored = tuple(true_boxes(rows, index) for rows in found)
    return LabelledBoxes(name=folder.name, labels=labels, paths=tuple(paths), stored=stored)


def _voc_row(item: ET.Element, *, source: Path, where: str) -> Row:
    name = item.findtext("name", "").strip()
    try:
        sides = [float(item.findtext(f"bndbox/{side}", "")) for side in ("xmin", "ymin", "xmax", "ymax")]
    except ValueError as error:
        raise InputError(f"{source}: {where}: expected bndbox with xmin, ymin, xmax, ymax") from error
    if not name:
        raise InputError(f"{source}: {where}: expected a name")
    # VOC counts pixels from 1, and the last one is inside.
    box = require_box((sides[0] - 1, sides[1] - 1, sides[2], sides[3]), source=source, where=where)
    return name, box, item.findtext("difficult", "0").strip() == "1", False
