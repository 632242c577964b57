"""Pictures for training detectors: mosaics, mirrored, scaled, shifted, recoloured, their boxes moved with them.

All of it is one operation, a scaled picture seen through a window of the canvas, so that boxes are exact by the same
two numbers. Shapes: H height and W width of the network's input, M boxes.
Source: YOLOv4, arXiv 2004.10934, section 3.4 (mosaic); AlexeyAB/darknet, src/data.c.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from cspdeploy.core.pixels.fit import LETTERBOX_GREY

__all__ = ["BoxedImage", "augment_one", "make_mosaic", "mirror", "place", "recolour"]

MIN_LEFT = 0.25  # of a box's area that must be left inside the window: less of an object cannot be told
MIN_SIDE_PX = 3.0  # smaller boxes are below what a stride of 16 can place
CENTRE = (0.3, 0.7)  # of a mosaic, in parts of the sides: each picture keeps some room
MOSAIC_SCALE = (0.5, 1.1)
SINGLE_SCALE = (0.7, 1.3)
HUE, SATURATION, EXPOSURE = 0.1, 1.5, 1.5  # of yolov4.cfg

UInt8Array = npt.NDArray[np.uint8]
Window = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BoxedImage:
    """A picture at the network's input size, and what it shows.

    Attributes:
        pixels_HWC: uint8 RGB.
        boxes_M4: left, top, right, bottom in its pixels, float64.
        classes_M: int64; `cspdeploy.train.detect_loss.IGNORED` where there need not be anything.
    """

    pixels_HWC: UInt8Array
    boxes_M4: npt.NDArray[np.float64]
    classes_M: npt.NDArray[np.int64]


def place(
    canvas_HWC: UInt8Array, image: BoxedImage, *, window: Window, scale: float, left: int, top: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Lay a scaled picture under a window of the canvas; its boxes `[M, 4]` and classes `[M]` as they are seen there.

    Args:
        canvas_HWC: written to, inside the window only.
        window: left, top, right, bottom on the canvas.
        scale: of the picture; its sides are rounded to whole pixels, and the boxes follow those.
        left: of the scaled picture on the canvas; may be negative.
        top: likewise.
    """
    height, width = image.pixels_HWC.shape[:2]
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    pixels = image.pixels_HWC
    if size != (width, height):
        pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))
    seen = (max(window[0], left), max(window[1], top), min(window[2], left + size[0]), min(window[3], top + size[1]))
    if seen[0] >= seen[2] or seen[1] >= seen[3]:
        return np.zeros((0, 4)), np.zeros(0, np.int64)
    canvas_HWC[seen[1] : seen[3], seen[0] : seen[2]] = pixels[
        seen[1] - top : seen[3] - top, seen[0] - left : seen[2] - left
    ]
    factors = np.array([size[0] / width, size[1] / height] * 2)
    moved = image.boxes_M4 * factors + np.array([left, top, left, top])
    cut = np.concatenate(
        [np.maximum(moved[:, :2], seen[:2]), np.minimum(moved[:, 2:], seen[2:])], axis=1
    )  # fmt: skip
    sides = np.clip(cut[:, 2:] - cut[:, :2], 0, None)
    whole = (moved[:, 2:] - moved[:, :2]).prod(1)
    keep = (sides.prod(1) >= MIN_LEFT * whole) & (sides.min(1, initial=np.inf) >= MIN_SIDE_PX)
    return cut[keep], image.classes_M[keep]


def mirror(image: BoxedImage) -> BoxedImage:
    """Left becomes right."""
    width = image.pixels_HWC.shape[1]
    boxes = image.boxes_M4.copy()
    boxes[:, 0], boxes[:, 2] = width - image.boxes_M4[:, 2], width - image.boxes_M4[:, 0]
    return BoxedImage(pixels_HWC=image.pixels_HWC[:, ::-1], boxes_M4=boxes, classes_M=image.classes_M)


def recolour(pixels_HWC: UInt8Array, rng: np.random.Generator) -> UInt8Array:
    """Another hue, saturation and exposure."""
    hue = int(rng.uniform(-HUE, HUE) * 255)
    saturation, exposure = (limit ** rng.uniform(-1, 1) for limit in (SATURATION, EXPOSURE))
    levels = np.arange(256)
    table = [(levels + hue) % 256, np.clip(levels * saturation, 0, 255), np.clip(levels * exposure, 0, 255)]
    shifted = Image.fromarray(pixels_HWC).convert("HSV").point(np.concatenate(table).astype(int).tolist())
    return np.asarray(shifted.convert("RGB"))


def augment_one(image: BoxedImage, rng: np.random.Generator) -> BoxedImage:
    """One picture, perhaps mirrored, larger or smaller, shifted and recoloured."""
    height, width = image.pixels_HWC.shape[:2]
    image = mirror(image) if rng.integers(2) else image
    scale = float(rng.uniform(*SINGLE_SCALE))
    room = [extent - round(extent * scale) for extent in (width, height)]
    left, top = (int(rng.integers(min(0, free), max(0, free) + 1)) for free in room)
    canvas = np.full((height, width, 3), LETTERBOX_GREY, np.uint8)
    boxes, classes = place(canvas, image, window=(0, 0, width, height), scale=scale, left=left, top=top)
    return BoxedImage(pixels_HWC=recolour(canvas, rng), boxes_M4=boxes, classes_M=classes)


def make_mosaic(images: Sequence[BoxedImage], rng: np.random.Generator) -> BoxedImage:
    """Four pictures around a random centre, each in its quarter and touching the centre with its nearest corner."""
    height, width = images[0].pixels_HWC.shape[:2]
    x, y = (round(extent * float(rng.uniform(*CENTRE))) for extent in (width, height))
    windows = ((0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height))
    canvas = np.full((height, width, 3), LETTERBOX_GREY, np.uint8)
    found = []
    for index, (given, window) in enumerate(zip(images, windows, strict=True)):
        image = mirror(given) if rng.integers(2) else given
        scale = float(rng.uniform(*MOSAIC_SCALE))
        left = x - max(1, round(width * scale)) if index % 2 == 0 else x
        top = y - max(1, round(height * scale)) if index < 2 else y
        found.append(place(canvas, image, window=window, scale=scale, left=left, top=top))
    boxes, classes = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return BoxedImage(pixels_HWC=recolour(canvas, rng), boxes_M4=boxes, classes_M=classes)
