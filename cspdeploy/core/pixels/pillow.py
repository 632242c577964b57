"""The reference: decoding and resizing by Pillow. Imported only where Pillow is used."""

from __future__ import annotations

import io
import warnings

import numpy as np
import numpy.typing as npt
from PIL import Image, __version__

from cspdeploy.core.errors import InputError
from cspdeploy.core.pixels.faults import MAX_IMAGE_PIXELS
from cspdeploy.core.pixels.fit import LETTERBOX_GREY, Fit
from cspdeploy.core.pixels.resample import Interpolation, is_rows_first, resample

__all__ = ["array_to_image", "decode_with_pillow", "resize_with_pillow"]

# No others: Pillow hands EPS to Ghostscript, whatever the file is called.
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

# Older releases resize the width first in every case, and round some pixels otherwise: those cases are done without
# them, so that the pixels of a model do not depend on the release that a machine has.
PILLOW_MAJOR = int(__version__.partition(".")[0])
_ROWS_FIRST_SINCE = 13

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
}


def decode_with_pillow(data: bytes, *, name: str) -> Image.Image:
    """The first frame of an image file, RGB, upright.

    Args:
        name: what errors call the file.

    Raises:
        InputError: not an image, truncated, more than 100 megapixels, or too large for the memory here.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own, stricter bound follows
            image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        if image.width * image.height > MAX_IMAGE_PIXELS:
            size = f"{image.width}x{image.height} px"
            raise InputError(f"{name}: got {size}, expected at most {MAX_IMAGE_PIXELS} pixels", fix="shrink the image")
        image.load()
        turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))  # not exif_transpose: it writes the EXIF anew
        return _to_rgb(image.transpose(turn) if turn is not None else image)
    except MemoryError as error:
        raise InputError(f"{name}: too large for the memory here", fix="shrink the image") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{name}: {error}", fix="shrink the image") from error
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all three on broken files
        raise InputError(f"{name}: not an image that Pillow can read", fix="name an image file") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":  # Pillow's convert() clips at 255 instead of scaling
        grey = (np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def array_to_image(array_HWC: npt.NDArray[np.uint8]) -> Image.Image:
    """`[H, W, 3]` uint8 as an image of Pillow."""
    return Image.fromarray(np.ascontiguousarray(array_HWC))


def _resize(image: Image.Image, scaled: tuple[int, int], interpolation: Interpolation) -> Image.Image:
    if PILLOW_MAJOR < _ROWS_FIRST_SINCE and interpolation != "nearest" and is_rows_first(image.size, scaled):
        return array_to_image(resample(np.asarray(image), scaled, interpolation=interpolation))
    return image.resize(scaled, _FILTERS[interpolation])


def resize_with_pillow(
    image: Image.Image, fit: Fit, *, size: tuple[int, int], interpolation: Interpolation
) -> npt.NDArray[np.uint8]:
    """Scale an RGB image to its fit and lay it under the window of `size` (width, height): `[H, W, 3]` uint8."""
    if fit.scaled_px != image.size:
        image = _resize(image, fit.scaled_px, interpolation)
    if min(fit.left_px, fit.top_px) < 0 or fit.scaled_px[0] < size[0] or fit.scaled_px[1] < size[1]:
        canvas = Image.new("RGB", size, (LETTERBOX_GREY,) * 3)
        canvas.paste(image, (-fit.left_px, -fit.top_px))
        return np.asarray(canvas)
    return np.asarray(image.crop((fit.left_px, fit.top_px, fit.left_px + size[0], fit.top_px + size[1])))
