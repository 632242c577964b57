"""COCO's json of labelled boxes: which file of a set, and what is in it. What is read may come from anywhere.

Format: cocodataset.org/#format-data.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cspdeploy.core.detection.average_precision import TrueBoxes
from cspdeploy.core.detection.label_files import (
    Row,
    inside,
    place_of,
    read_bytes,
    require_box,
    shown,
    true_boxes,
)
from cspdeploy.core.errors import InputError

__all__ = ["CocoBoxes", "coco_files", "read_coco", "the_coco_file"]

_FILES = ("annotations.json", "_annotations.coco.json", "instances*.json", "annotations/instances*.json",
          "annotations/*.json")  # fmt: skip
_JUDGED = ("val|valid|validation", "test")
"""Words of a name that say what is meant for judging, the first that is there."""
_SUBFOLDER = "annotations"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CocoBoxes:
    """What a json holds: classes in the order of their ids, and each picture with its boxes in pixels."""

    labels: tuple[str, ...]
    paths: tuple[Path, ...]
    stored: tuple[TrueBoxes, ...]


def coco_files(folder: Path) -> list[Path]:
    """The json files there that go by one of COCO's names: all of the first kind of name that is found."""
    return next((found for pattern in _FILES if (found := sorted(folder.glob(pattern)))), [])


def the_coco_file(folder: Path, *, split: str) -> Path:
    """The one to read: of several, with split "test", that of val or else of test.

    Raises:
        InputError: none, or several that nothing tells apart.
    """
    found = coco_files(folder)
    if len(found) > 1 and split == "test":
        for words in _JUDGED:
            judged = [path for path in found if re.search(rf"(?<![a-z])({words})(?![a-z])", path.stem.lower())]
            if judged:
                found = judged
                break
    if len(found) != 1:
        listed = ", ".join(path.name for path in found[:5]) + (", ..." if len(found) > 5 else "")
        raise InputError(f"{folder}: {len(found)} COCO files{': ' if found else ''}{listed}, expected one",
                         fix=f"name it: {found[0]}" if found else "give the json")  # fmt: skip
    return found[0]


def read_coco(source: Path, *, root: Path | None) -> CocoBoxes:
    """Read one json.

    Args:
        root: the folder that was given, outside of which no picture is read; None where the json itself was, and then
            its folder counts, or the one above for a json in `annotations/`.

    Raises:
        InputError: not COCO, an id that is there twice, an entry that is wrong, or a picture that is not there.
    """
    try:
        data = json.loads(read_bytes(source))
        names = _by_id(data["categories"], "name")
        pictures = _by_id(data["images"], "file_name")
        entries = list(data["annotations"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        why = shown(f"{type(error).__name__}: {error}")
        raise InputError(f"{source}: not COCO ({why}), expected images, annotations, categories") from error
    rows: dict[int, list[Row]] = {image: [] for image in pictures}
    for index, entry in enumerate(entries):
        image, row = _row(entry, names, source=source, where=f"annotations[{index}]")
        if image not in rows:
            raise InputError(f"{source}: annotations[{index}]: image_id {image} is none of its images")
        rows[image].append(row)
    classes: dict[str | int, int] = {kind: index for index, kind in enumerate(sorted(names))}
    folder = _folder(source, root, next(iter(pictures.values()), ""))
    return CocoBoxes(
        labels=tuple(names[kind] for kind in sorted(names)),
        paths=tuple(inside(folder, name, source=source) for name in pictures.values()),
        stored=tuple(true_boxes(rows[image], classes) for image in pictures),
    )


def _by_id(entries: Iterable[Mapping[str, Any]], field: str) -> dict[int, str]:
    found: dict[int, str] = {}
    for one in entries:
        key = _whole(one["id"])
        if key in found:
            raise ValueError(f"id {key} is there twice, as {shown(found[key])} and {shown(str(one[field]))}")
        found[key] = str(one[field])
    return found


def _whole(value: Any) -> int:
    """An id; 1.5 is none, and no other's either."""
    if isinstance(value, float) and not value.is_integer():
        raise ValueError(f"id {value}, expected a whole number")
    return int(value)


def _row(entry: Any, names: Mapping[int, str], *, source: Path, where: str) -> tuple[int, Row]:
    try:
        left, top, width, height = (float(value) for value in entry["bbox"])
        image, kind, crowd = _whole(entry["image_id"]), _whole(entry["category_id"]), bool(entry.get("iscrowd", 0))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        why = shown(f"{type(error).__name__}: {error}")
        raise InputError(f"{source}: {where}: {why}, expected image_id, category_id and bbox of 4 numbers") from error
    if kind not in names:
        raise InputError(f"{source}: {where}: category_id {kind} is none of its categories")
    box = require_box((left, top, left + width, top + height), source=source, where=where)
    return image, (kind, box, crowd or not (width and height), crowd)


def _folder(source: Path, root: Path | None, first: str) -> Path:
    """Where the pictures are: beside the json, in images/, in the folder of COCO's own split; all inside the root."""
    near = source.parent
    apart = near.name == _SUBFOLDER and (root is None or near.resolve() != root.resolve())
    bases: Sequence[Path] = (near, near.parent) if apart else (near,)
    split = source.stem.removeprefix("instances_")
    places = [place for base in bases for place in (base, base / "images", base / split, base / "images" / split)]
    top = bases[-1].resolve()
    known = (place for place in places if place.resolve().is_relative_to(top))
    return next((place for place in known if first and place_of(place, first) is not None), near)
