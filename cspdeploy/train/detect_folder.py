"""The two splits of a set of pictures with labelled boxes, whatever its format (`cspdeploy.core.detection.labelled`).

Layouts: `images/train/` with `labels/train/`; `train/` and `val/` with a set each; COCO's
`annotations/instances_train*.json`. The other split is called val, valid or test. A folder without splits gives every
tenth picture to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from cspdeploy.core.detection.labelled import NAME_FILES, LabelledBoxes, open_labelled
from cspdeploy.core.errors import InputError

__all__ = ["open_boxes"]

SPLITS = {"train": ("train",), "test": ("val", "valid", "test")}
EVERY = tuple(name for names in SPLITS.values() for name in names)
EDGE = 1e-3  # of the sides: as far as labels rounded to three digits reach over the edge


def open_boxes(folder: Path, *, split: str) -> LabelledBoxes:
    """Read one split of a labelled folder; `name` is the folder's and the split's, such as "set/train".

    Args:
        split: "train" or "test".

    Raises:
        InputError: no such folder, no class names, no image, no label, or a label that does not hold; names the file.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: not a folder", fix="give a folder with images/train/ and labels/train/")
    found = _read(folder, split)
    labels = found.labels or _names(folder)
    if not labels:
        raise InputError(f"{folder}: no class names", fix=f"write them into {folder / NAME_FILES[0]}, one a line")
    if len(set(labels)) != len(labels):
        raise InputError(f"{folder}: got {len(labels)} class names, expected different ones", fix="mend the names")
    if not any((~one.uncounted).any() for one in found.stored):
        raise InputError(
            f"{folder}: no labelled box in {len(found)} images of split '{split}'",
            fix="put a YOLO txt of the same name into labels/, or beside each image",
        )
    _require_inside(found)
    return dataclasses.replace(found, labels=labels, name=f"{folder.name}/{split}")


def _read(folder: Path, split: str) -> LabelledBoxes:
    named = SPLITS[split]
    beside = [name for name in EVERY if (folder / name).is_dir()]
    below = [name for name in EVERY if (folder / "images" / name).is_dir()]
    listed = {name: next((folder / "annotations").glob(f"instances_{name}*.json"), None) for name in EVERY}
    have = beside or below or [name for name, path in listed.items() if path]
    name = next((name for name in named if name in have), None)
    if have and name is None:
        raise InputError(
            f"{folder}: has {', '.join(have)}, but no {' or '.join(named)}",
            fix=f"make {folder / 'images' / named[0]} and {folder / 'labels' / named[0]}",
        )
    if name is None:
        every = open_labelled(str(folder))
        return _part(every, [i for i in range(len(every)) if (i % 10 == 9) == (split == "test")] or range(len(every)))
    if name in beside:
        return open_labelled(str(folder / name))
    if listed[name] is not None:
        return open_labelled(str(listed[name]))
    every = open_labelled(str(folder))
    root = folder / "images" / name
    places = {path: i for i, path in enumerate(every.paths) if path.is_relative_to(root)}  # each picture once
    return _part(every, list(places.values()))


def _part(data: LabelledBoxes, indices: Sequence[int]) -> LabelledBoxes:
    return dataclasses.replace(
        data, paths=tuple(data.paths[i] for i in indices), stored=tuple(data.stored[i] for i in indices)
    )


def _names(folder: Path) -> tuple[str, ...]:
    """Those beside the splits, for a set that has numbers alone."""
    path = next((folder / name for name in NAME_FILES if (folder / name).is_file()), None)
    if path is None:
        return ()
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return tuple(line.strip() for line in lines if line.strip())


def _require_inside(data: LabelledBoxes) -> None:
    if not data.relative:
        return
    for path, truth in zip(data.paths, data.stored, strict=True):
        for left, top, right, bottom in truth.boxes_M4.tolist():
            if min(left, top) < -EDGE or max(right, bottom) > 1 + EDGE:
                raise InputError(
                    f"{path}: its box from {left:g}, {top:g} to {right:g}, {bottom:g} lies outside the picture, "
                    "expected 0 to 1",
                    fix="label the part inside: class, centre x, centre y, width, height in parts of the sides",
                )
