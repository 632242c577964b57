"""The one way from an image to the network's input. Training, calibration, golden images and prediction use it.

Files are decoded and pixels resized by Pillow where it is installed, else by `cspdeploy.core.pixels`, which gives the
same pixels of PNG, JPEG, BMP and Netpbm files with numpy alone. `decoder` says which of the two it is.

Shapes: N images, H height, W width, C channels (3).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from cspdeploy.core.errors import InputError
from cspdeploy.core.pixels.faults import MAX_IMAGE_PIXELS
from cspdeploy.core.pixels.fit import LETTERBOX_GREY, fit_image
from cspdeploy.core.pixels.resample import resample
from cspdeploy.core.spec import Preprocess

if TYPE_CHECKING:
    from PIL import Image  # imported where it is used: it takes a tenth of a device's cold start

__all__ = [
    "LETTERBOX_GREY",
    "MAX_IMAGE_PIXELS",
    "Decoder",
    "ImageSource",
    "decoder",
    "list_images",
    "load_image",
    "normalise",
    "preprocess",
    "read_pixels",
    "resize_image",
    "resize_pixels",
]

ImageSource = str | os.PathLike[str] | bytes | npt.NDArray[np.uint8]
Decoder = Literal["auto", "pillow", "built in"]
"""auto: Pillow where it is installed."""

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})


def decoder() -> str:
    """Who decodes and resizes here: "Pillow 12.1.0", or "built in"."""
    if not _has_pillow():
        return "built in"
    from PIL import __version__

    return f"Pillow {__version__}"


@functools.cache
def _has_pillow() -> bool:
    """Found out once, by importing it: an empty folder called PIL is a package to Python, too."""
    try:
        import PIL.Image  # noqa: F401
    except (ImportError, OSError):  # OSError: a library that it needs is missing or not for this system
        return False
    return True


def _use_pillow(by: Decoder) -> bool:
    if by == "pillow" and not _has_pillow():
        raise InputError("Pillow is not installed", fix="pip install pillow")
    return by == "pillow" or (by == "auto" and _has_pillow())


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


def read_pixels(source: ImageSource, *, by: Decoder = "auto") -> npt.NDArray[np.uint8]:
    """Decode one image to `[H, W, 3]` uint8 RGB, upright.

    EXIF rotation is applied; grey is replicated to three channels; palettes are expanded; transparency is dropped
    (the colour under it stays); 16-bit grey is scaled to 8 bits rather than clipped. Only the first frame is read.

    Args:
        source: a path, the bytes of a file, or an array `[H, W]`, `[H, W, 1]` or `[H, W, 3]` uint8.
        by: who decodes.

    Raises:
        InputError: no such file, empty file, not an image, truncated, more than 100 megapixels, or a format that only
            Pillow reads where it is not installed.
    """
    if isinstance(source, np.ndarray):
        return _check_array(source)
    name, data = _read_bytes(source)
    if not _use_pillow(by):
        from cspdeploy.core.pixels.decode import decode_image

        return decode_image(data, name=name)
    from cspdeploy.core.pixels.pillow import decode_with_pillow

    return np.asarray(decode_with_pillow(data, name=name))


def load_image(source: ImageSource) -> Image.Image:
    """As `read_pixels`, to an RGB image of Pillow, which must be installed."""
    _use_pillow("pillow")
    from cspdeploy.core.pixels.pillow import array_to_image, decode_with_pillow

    if isinstance(source, np.ndarray):
        return array_to_image(_check_array(source))
    name, data = _read_bytes(source)
    return decode_with_pillow(data, name=name)


def _read_bytes(source: str | os.PathLike[str] | bytes) -> tuple[str, bytes]:
    if isinstance(source, bytes):
        name, data = "image bytes", source
    else:
        try:
            name, data = str(source), Path(source).read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{source}: {reason}", fix="name an image file") from error
    if not data:
        raise InputError(f"{name}: empty file (0 bytes), expected an image", fix="name an image file")
    return name, data


def _check_array(array: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    squeezed = array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array
    colour = squeezed.ndim == 3 and squeezed.shape[2] == 3
    if array.dtype != np.uint8 or not (squeezed.ndim == 2 or colour) or 0 in array.shape:
        raise InputError(
            f"image array: got {array.dtype} {list(array.shape)}, expected uint8 [H, W], [H, W, 1] or [H, W, 3]"
        )
    return squeezed if colour else np.repeat(squeezed[:, :, None], 3, axis=2)


def resize_image(image: Image.Image, contract: Preprocess) -> npt.NDArray[np.uint8]:
    """Resize and crop an RGB image of Pillow: `[H, W, 3]` uint8, still RGB.

    Raises:
        InputError: the image is too thin for the contract, or too large for the memory here.
    """
    from cspdeploy.core.pixels.pillow import resize_with_pillow

    fit = fit_image(contract, width=image.width, height=image.height)
    size = (contract.width_px, contract.height_px)
    with _enough_memory(image.width, image.height):
        return resize_with_pillow(image, fit, size=size, interpolation=contract.interpolation)


def resize_pixels(
    image_HWC: npt.NDArray[np.uint8], contract: Preprocess, *, by: Decoder = "auto"
) -> npt.NDArray[np.uint8]:
    """Resize and crop `[H, W, 3]` uint8 RGB to the contract's size. An image that has it already may come back itself.

    Raises:
        InputError: the image is too thin for the contract, or too large for the memory here.
    """
    with _enough_memory(image_HWC.shape[1], image_HWC.shape[0]):
        return _resized(image_HWC, contract, by)


@contextmanager
def _enough_memory(width: int, height: int) -> Iterator[None]:
    try:
        yield
    except MemoryError as error:
        raise InputError(
            f"image of {width}x{height} px: too large to be resized in the memory here", fix="shrink the image"
        ) from error


def _resized(image_HWC: npt.NDArray[np.uint8], contract: Preprocess, by: Decoder) -> npt.NDArray[np.uint8]:
    height, width = image_HWC.shape[:2]
    fit = fit_image(contract, width=width, height=height)
    size = (contract.width_px, contract.height_px)
    if fit.scaled_px != (width, height) and _use_pillow(by):
        from cspdeploy.core.pixels.pillow import array_to_image, resize_with_pillow

        image = array_to_image(image_HWC)
        return resize_with_pillow(image, fit, size=size, interpolation=contract.interpolation)
    # The part of the scaled image that the window shows, and where in the window it lies.
    left, top = max(0, fit.left_px), max(0, fit.top_px)
    right, bottom = min(fit.scaled_px[0], fit.left_px + size[0]), min(fit.scaled_px[1], fit.top_px + size[1])
    window = (left, top, right, bottom)
    made = resample(image_HWC, fit.scaled_px, interpolation=contract.interpolation, window=window)
    if (right - left, bottom - top) == size:
        return made
    canvas = np.full((size[1], size[0], 3), LETTERBOX_GREY, np.uint8)
    canvas[top - fit.top_px : bottom - fit.top_px, left - fit.left_px : right - fit.left_px] = made
    return canvas


def normalise(images_NHWC: npt.NDArray[np.uint8], contract: Preprocess) -> npt.NDArray[np.float32]:
    """`[N, H, W, 3]` uint8 RGB to `[N, 3, H, W]` float32: channel order, /255, mean, std."""
    if contract.channel_order == "bgr":
        images_NHWC = images_NHWC[..., ::-1]
    # One multiply-add in float32, its constants rounded once from float64.
    std = np.asarray(contract.std, np.float64)
    gain = (1.0 / (255.0 * std)).astype(np.float32)
    offset = (-np.asarray(contract.mean, np.float64) / std).astype(np.float32)
    num, height, width, _ = images_NHWC.shape
    x_NCHW = np.empty((num, 3, height, width), np.float32)
    for channel in range(3):  # plane by plane: numpy takes five times as long over an inner axis of 3
        plane = x_NCHW[:, channel]
        np.multiply(images_NHWC[..., channel], gain[channel], out=plane, dtype=np.float32, casting="unsafe")
        plane += offset[channel]
    return x_NCHW


def preprocess(
    sources: Sequence[ImageSource] | Iterable[ImageSource], contract: Preprocess, *, by: Decoder = "auto"
) -> npt.NDArray[np.float32]:
    """Images to the network's input, `[N, 3, H, W]` float32.

    Args:
        by: who decodes and resizes; the result is the same.

    Raises:
        InputError: an image cannot be read, or there is none.
    """
    resized = [_prepare(source, contract, by) for source in sources]
    if not resized:
        raise InputError("no image given, expected at least one")
    return normalise(np.stack(resized), contract)


def _prepare(source: ImageSource, contract: Preprocess, by: Decoder) -> npt.NDArray[np.uint8]:
    if isinstance(source, np.ndarray) or not _use_pillow(by):
        return resize_pixels(read_pixels(source, by=by), contract, by=by)
    return resize_image(load_image(source), contract)
