"""What readers of labels share: bounded reading of files, paths that stay inside, boxes that are boxes, plain XML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree as ET
from xml.parsers import expat

import numpy as np

from cspdeploy.core.detection.average_precision import TrueBoxes
from cspdeploy.core.errors import InputError

__all__ = ["Row", "inside", "place_of", "read_bytes", "read_xml", "require_box", "shown", "true_boxes"]

MAX_LABEL_BYTES = {"json": 600 << 20, "txt": 1 << 24, "xml": 1 << 22}
"""Of one file: COCO's largest, instances_train2017.json, has 470 MB, and Python makes several times as much of it;
a picture with ten thousand boxes has 1 MB."""
MAX_SIDE = float(1 << 20)
"""Of a coordinate, in pixels."""

Row = tuple[str | int, tuple[float, float, float, float], bool, bool]
"""Class, box, ignored, crowd."""


def true_boxes(rows: Sequence[Row], index: Mapping[str | int, int]) -> TrueBoxes:
    """Rows of one picture; `index` numbers their classes."""
    return TrueBoxes(
        boxes_M4=np.array([box for _, box, _, _ in rows], np.float64).reshape(-1, 4),
        classes_M=np.array([index[kind] for kind, _, _, _ in rows], np.int64),
        ignored_M=np.array([ignored for _, _, ignored, _ in rows], bool),
        crowd_M=np.array([crowd for _, _, _, crowd in rows], bool),
    )


def read_bytes(path: Path) -> bytes:
    """All of a file of labels; a file without a suffix, or of names, counts as txt."""
    most = MAX_LABEL_BYTES.get(path.suffix.lower().lstrip("."), MAX_LABEL_BYTES["txt"])
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}", fix="check the path and its permissions") from error
    if len(data) > most:
        raise InputError(f"{path}: more than {most} bytes, expected at most that")
    return data


def place_of(folder: Path, name: str) -> Path | None:
    """The file of that name inside the folder, whatever the name is; None where there is none. Looks nowhere else."""
    try:
        path = folder / name
        return path if path.resolve().is_relative_to(folder.resolve()) and path.is_file() else None
    except (OSError, ValueError):  # too long; a NUL, or what no file system can encode
        return None


def inside(folder: Path, name: object, *, source: Path) -> Path:
    """A picture that labels name: inside the folder, whatever they say."""
    path = place_of(folder, str(name))
    if path is not None:
        return path
    try:
        outside = not (folder / str(name)).resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError) as error:
        raise InputError(f"{source}: names '{shown(str(name))}', which no file can be called",
                         fix="name the picture by its path in the folder") from error  # fmt: skip
    if outside:
        raise InputError(f"{source}: names '{shown(str(name))}', which lies outside {folder}",
                         fix="keep pictures in the folder")  # fmt: skip
    raise InputError(f"{source}: names '{shown(str(name))}', which is not in {folder}", fix="put the picture there")


def shown(text: str, most: int = 100) -> str:
    """Of what somebody else wrote, as much as fits in one line, in characters that can be printed."""
    cut = text if len(text) <= most else f"{text[:most]}..."
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in cut)


def require_box(values: tuple[float, ...], *, source: Path, where: str) -> tuple[float, float, float, float]:
    """Four sides as they are, if they are a box."""
    left, top, right, bottom = values
    if not all(math.isfinite(value) and abs(value) <= MAX_SIDE for value in values) or right < left or bottom < top:
        listed = ", ".join(f"{value:g}" for value in values)
        raise InputError(f"{source}: {where}: box [{listed}], expected left <= right and top <= bottom, in pixels")
    return left, top, right, bottom


def read_xml(path: Path) -> ET.Element:
    """The tree of a file without a document type: entities are how a small file becomes a large one."""
    builder = ET.TreeBuilder()
    parser = expat.ParserCreate()

    def refuse(*_: object) -> None:
        raise InputError(f"{path}: has a document type, expected plain XML", fix="remove the <!DOCTYPE ...>")

    def start(tag: str, attributes: dict[str, str]) -> None:
        builder.start(tag, attributes)

    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(read_bytes(path), True)
        return builder.close()
    except (expat.ExpatError, AssertionError, LookupError, ValueError) as error:
        raise InputError(f"{path}: not XML ({error})") from error
