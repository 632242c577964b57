"""From the planes of a JPEG to RGB: libjpeg-turbo's "fancy" upsampling and its integer colour tables, bit by bit.

Source: jdsample.c and jdcolor.c of libjpeg-turbo; CMYK to RGB as Pillow's Convert.c.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from cspdeploy.core.pixels.faults import UnsupportedImageError

__all__ = ["Space", "planes_to_rgb", "upsample"]

Pixels = npt.NDArray[np.uint8]
Sums = npt.NDArray[np.uint16]
Space = Literal["grey", "ycc", "rgb", "cmyk", "ycck"]

_STRIP_ROWS = 64

_LEVELS = np.arange(256) - 128
_HALF = 1 << 15
# Fixed point with 16 bits, as jdcolor.c rounds it; arithmetic shifts go down.
_RED_OF_CR = ((91881 * _LEVELS + _HALF) >> 16).astype(np.int16)
_BLUE_OF_CB = ((116130 * _LEVELS + _HALF) >> 16).astype(np.int16)
_GREEN_OF_CR = (-46802 * _LEVELS).astype(np.int32)
_GREEN_OF_CB = (-22554 * _LEVELS + _HALF).astype(np.int32)


def upsample(plane: Pixels, across: int, down: int) -> Pixels:
    """Enlarge `[h, w]` by whole factors. Factors of 2 weigh the nearer sample 3 to 1, unless the plane is too narrow.

    Raises:
        UnsupportedImageError: a factor is 0 or below; no such file is known.
    """
    if across < 1 or down < 1:
        raise UnsupportedImageError("JPEG with sampling factors that are no multiples of each other")
    if (across, down) == (1, 1):
        return plane
    if (across, down) == (1, 2):
        near, above, below = _rows(plane)
        return (_interleave(near + above + 1, near + below + 2, axis=0) >> 2).astype(np.uint8)
    if across == 2 and down <= 2 and plane.shape[1] > 2:
        if down == 1:
            return _widen(plane.astype(np.uint16), 1, 2, 2)
        near, above, below = _rows(plane)
        return _widen(_interleave(near + above, near + below, axis=0), 8, 7, 4)
    return np.repeat(np.repeat(plane, down, axis=0), across, axis=1)


def _rows(plane: Pixels) -> tuple[Sums, Sums, Sums]:
    """Three times each row, the row above and the row below; the outermost rows stand for what lies beyond."""
    wide = plane.astype(np.uint16)
    return wide * 3, np.concatenate([wide[:1], wide[:-1]]), np.concatenate([wide[1:], wide[-1:]])


def _widen(sums: Sums, left_bias: int, right_bias: int, shift: int) -> Pixels:
    near = sums * 3
    before = np.concatenate([sums[:, :1], sums[:, :-1]], axis=1)
    after = np.concatenate([sums[:, 1:], sums[:, -1:]], axis=1)
    return (_interleave(near + before + left_bias, near + after + right_bias, axis=1) >> shift).astype(np.uint8)


def _interleave(first: Sums, second: Sums, *, axis: int) -> Sums:
    made = np.stack([first, second], axis=axis + 1)
    shape = list(first.shape)
    shape[axis] *= 2
    return made.reshape(shape)


def planes_to_rgb(planes: list[Pixels], space: Space) -> Pixels:
    """Planes `[H, W]` of one size to `[H, W, 3]` uint8."""
    if space == "grey":
        return np.repeat(planes[0][:, :, None], 3, axis=2)
    if space == "rgb":
        return np.stack(planes, axis=2)
    height, width = planes[0].shape
    image = np.empty((height, width, 3), np.uint8)
    for first in range(0, height, _STRIP_ROWS):
        strip = [plane[first : first + _STRIP_ROWS] for plane in planes]
        out = image[first : first + _STRIP_ROWS]
        if space != "cmyk":
            _ycc_to_rgb(strip, out)
        else:
            out[...] = np.stack(strip[:3], axis=2)
        if len(strip) == 4:
            _ink_to_rgb(255 - out if space == "ycck" else out, strip[3], out)
    return image


def _ycc_to_rgb(planes: list[Pixels], out: Pixels) -> None:
    luma = planes[0].astype(np.int16)
    cb, cr = planes[1], planes[2]
    green = ((_GREEN_OF_CB[cb] + _GREEN_OF_CR[cr]) >> 16).astype(np.int16)
    for channel, difference in enumerate((_RED_OF_CR[cr], green, _BLUE_OF_CB[cb])):
        out[:, :, channel] = np.clip(luma + difference, 0, 255)


def _ink_to_rgb(inks: Pixels, black: Pixels, out: Pixels) -> None:
    """Adobe writes inks inverted: 255 is no ink. Colour is what the black lets through, less the ink's share of it."""
    through = black.astype(np.int32)[:, :, None]
    product = (255 - inks) * through + 128
    out[...] = np.clip(through - (((product >> 8) + product) >> 8), 0, 255)
