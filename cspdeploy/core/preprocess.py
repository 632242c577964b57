"""The one way from an image to the network's input. Training, calibration, golden images and prediction use it.

Shapes: N images, H height, W width, C channels (3).
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from cspdeploy.core.errors import InputError
from cspdeploy.core.spec import Preprocess

__all__ = ["ImageSource", "list_images", "load_image", "normalise", "preprocess", "resize_image"]

ImageSource = str | os.PathLike[str] | bytes | npt.NDArray[np.uint8]

# A 100-megapixel picture is 300 MB as RGB; larger ones are taken for decompression bombs.
MAX_IMAGE_PIXELS = 100_000_000
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})

# No others: Pillow hands EPS to Ghostscript, whatever the file is called.
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

LETTERBOX_GREY = 128
"""Darknet pads its floats with 0.5; this is the nearest byte, 0.002 above."""

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


def list_images(folder: Path) -> list[Path]:
    """All image files below `folder`, by suffix, in sorted order.

    Raises:
        InputError: `folder` is not a folder or holds no image.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: not a folder", fix="name a folder that holds images")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not paths:
        raise InputError(
            f"{folder}: holds no image, expected files named {', '.join(sorted(IMAGE_SUFFIXES))}",
            fix="name a folder with at least one image",
        )
    return paths


def load_image(source: ImageSource) -> Image.Image:
    """Decode one image to RGB, upright.

    EXIF rotation is applied; grey is replicated to three channels; palettes are expanded; transparency is dropped
    (the colour under it stays); 16-bit grey is scaled to 8 bits rather than clipped. Only the first frame is read.

    Args:
        source: a path, the bytes of a file, or an array `[H, W]`, `[H, W, 1]` or `[H, W, 3]` uint8.

    Raises:
        InputError: no such file, empty file, not an image, truncated, or more than 100 megapixels.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    name, data = _read_bytes(source)
    if not data:
        raise InputError(f"{name}: empty file (0 bytes), expected an image", fix="name an image file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own, stricter bound follows
            image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        if image.width * image.height > MAX_IMAGE_PIXELS:
            size = f"{image.width}x{image.height} px"
            raise InputError(f"{name}: got {size}, expected at most {MAX_IMAGE_PIXELS} pixels", fix="shrink the image")
        image.load()
        turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))  # not exif_transpose: it writes the EXIF anew
        upright = image.transpose(turn) if turn is not None else image
    except Image.DecompressionBombError as error:
        raise InputError(f"{name}: {error}", fix="shrink the image") from error
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all three on broken files
        raise InputError(f"{name}: not an image that Pillow can read", fix="name an image file") from error
    return _to_rgb(upright)


def _read_bytes(source: str | os.PathLike[str] | bytes) -> tuple[str, bytes]:
    if isinstance(source, bytes):
        return "image bytes", source
    try:
        return str(source), Path(source).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise InputError(f"{source}: {getattr(error, 'strerror', None) or error}", fix="name an image file") from error


def _from_array(array: npt.NDArray[np.uint8]) -> Image.Image:
    squeezed = array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array
    colour = squeezed.ndim == 3 and squeezed.shape[2] == 3
    if array.dtype != np.uint8 or not (squeezed.ndim == 2 or colour) or 0 in array.shape:
        raise InputError(
            f"image array: got {array.dtype} {list(array.shape)}, expected uint8 [H, W], [H, W, 1] or [H, W, 3]"
        )
    return Image.fromarray(np.ascontiguousarray(squeezed)).convert("RGB")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":  # Pillow's convert() clips at 255 instead of scaling
        grey = (np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def resize_image(image: Image.Image, contract: Preprocess) -> npt.NDArray[np.uint8]:
    """Resize and crop an RGB image: `[H, W, 3]` uint8, still RGB."""
    size = (contract.width_px, contract.height_px)
    resampling = _FILTERS[contract.interpolation]
    if contract.resize == "stretch":
        return np.asarray(image.resize(size, resampling))
    if contract.resize == "letterbox":
        return _letterbox(image, size, resampling)
    scale = max(
        int(contract.width_px / contract.crop_pct) / image.width,
        int(contract.height_px / contract.crop_pct) / image.height,
    )
    scaled = (max(size[0], round(image.width * scale)), max(size[1], round(image.height * scale)))
    if scaled[0] * scaled[1] > MAX_IMAGE_PIXELS:
        raise InputError(
            f"image of {image.width}x{image.height} px: too thin, scaled it has {scaled[0]}x{scaled[1]} px"
        )
    if scaled != image.size:
        image = image.resize(scaled, resampling)
    # Rounds as torchvision's CenterCrop does, so that published accuracies hold.
    left, top = round((image.width - size[0]) / 2), round((image.height - size[1]) / 2)
    return np.asarray(image.crop((left, top, left + size[0], top + size[1])))


def _letterbox(image: Image.Image, size: tuple[int, int], resampling: Image.Resampling) -> npt.NDArray[np.uint8]:
    """Darknet's letterbox_image: the longer side fits, the rest is grey. Sizes and offsets are cut to whole pixels."""
    width, height = size
    if width * image.height < height * image.width:
        inner = (width, max(1, image.height * width // image.width))
    else:
        inner = (max(1, image.width * height // image.height), height)
    canvas = Image.new("RGB", size, (LETTERBOX_GREY,) * 3)
    canvas.paste(image.resize(inner, resampling), ((width - inner[0]) // 2, (height - inner[1]) // 2))
    return np.asarray(canvas)


def normalise(images_NHWC: npt.NDArray[np.uint8], contract: Preprocess) -> npt.NDArray[np.float32]:
    """`[N, H, W, 3]` uint8 RGB to `[N, 3, H, W]` float32: channel order, /255, mean, std."""
    if contract.channel_order == "bgr":
        images_NHWC = images_NHWC[..., ::-1]
    # One multiply-add in float32, its constants rounded once from float64.
    std = np.asarray(contract.std, np.float64)
    gain = (1.0 / (255.0 * std)).astype(np.float32)
    offset = (-np.asarray(contract.mean, np.float64) / std).astype(np.float32)
    x_NHWC = images_NHWC.astype(np.float32) * gain + offset
    return np.ascontiguousarray(x_NHWC.transpose(0, 3, 1, 2))


def preprocess(sources: Sequence[ImageSource] | Iterable[ImageSource], contract: Preprocess) -> npt.NDArray[np.float32]:
    """Images to the network's input, `[N, 3, H, W]` float32.

    Raises:
        InputError: an image cannot be read, or there is none.
    """
    resized = [resize_image(load_image(source), contract) for source in sources]
    if not resized:
        raise InputError("no image given, expected at least one")
    return normalise(np.stack(resized), contract)
