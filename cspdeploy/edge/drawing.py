"""Pictures with their boxes drawn in, by Pillow. Never written over the picture that they were made of."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cspdeploy.core.errors import InputError
from cspdeploy.core.preprocess import load_image
from cspdeploy.core.text import one_line
from cspdeploy.edge.results import DetectedBox

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["draw_boxes", "drawn_paths"]

SUFFIX = ".boxes.png"
"""Of the file for "photo.jpg": "photo.boxes.png". Without loss, so that a box is where it is."""
GOLDEN_ANGLE = 0.618034
"""Of the circle of hues: neighbouring classes lie far apart, however many there are."""
LINE_SHARE, TEXT_SHARE = 0.004, 0.025
"""Of the picture's shorter side: to be seen in a photograph that is shown on a screen, at least two and ten pixels."""
MIN_LINE_PX, MIN_TEXT_PX = 2, 10
MAX_LABEL = 40


def drawn_paths(images: Sequence[Path], folder: Path) -> list[Path]:
    """Where the drawn picture of each image goes: a name of its own in `folder`, which is made.

    Raises:
        InputError: the folder cannot be made, or one of those files is an image that is to be read.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}", fix="--draw FOLDER: name a folder that can be made") from error
    taken: set[str] = set()
    found = []
    for image in images:
        name, number = f"{image.stem}{SUFFIX}", 2
        while name.casefold() in taken:  # of two folders, or of two formats
            name, number = f"{image.stem}-{number}{SUFFIX}", number + 1
        taken.add(name.casefold())
        found.append(folder / name)
    for path in found:
        if path.exists() and any(image.exists() and path.samefile(image) for image in images):
            raise InputError(f"{path}: is an image that is to be read", fix="--draw FOLDER: name another folder")
    return found


def draw_boxes(image: Path, boxes: Sequence[DetectedBox], target: Path) -> None:
    """Write the upright picture with its boxes, best on top, each with label and score.

    Raises:
        InputError: the image cannot be read, or the file not be written.
    """
    picture = load_image(image)
    draw_on(picture, boxes)
    try:
        picture.save(target)
    except OSError as error:
        raise InputError(f"{target}: {error.strerror or error}", fix="see that there is room and it may be written") \
            from error  # fmt: skip


def draw_on(picture: Image.Image, boxes: Sequence[DetectedBox]) -> None:
    """The same within a picture `RGB`."""
    from PIL import ImageDraw, ImageFont

    side = min(picture.size)
    line_px = max(MIN_LINE_PX, round(LINE_SHARE * side))
    font = ImageFont.load_default(max(MIN_TEXT_PX, round(TEXT_SHARE * side)))
    draw = ImageDraw.Draw(picture)
    for box in reversed(boxes):
        colour = _colour(box.index)
        draw.rectangle((box.left, box.top, max(box.left, box.right - 1), max(box.top, box.bottom - 1)),
                       outline=colour, width=line_px)  # fmt: skip
        text = f"{one_line(box.label)[:MAX_LABEL]} {box.score:.2f}"
        height = draw.textbbox((0, 0), text, font=font)[3] + line_px
        # Above the box; within it where there is no room above.
        corner = (box.left, box.top - height if box.top >= height else box.top)
        area = draw.textbbox(corner, text, font=font)
        draw.rectangle((area[0] - line_px, area[1] - line_px, area[2] + line_px, area[3] + line_px), fill=colour)
        draw.text(corner, text, fill=_readable(colour), font=font)


def _colour(index: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb((index * GOLDEN_ANGLE) % 1.0, 0.85, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def _readable(ground: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black on light colours and white on dark ones, by their luma."""
    red, green, blue = ground
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 128 else (255, 255, 255)
