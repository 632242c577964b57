"""Any image file to pixels, without Pillow: PNG, JPEG, BMP and Netpbm, told apart by their first bytes."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from cspdeploy.core.errors import InputError
from cspdeploy.core.pixels.bmp import decode_bmp
from cspdeploy.core.pixels.faults import BrokenImageError, OversizeImageError, UnsupportedImageError
from cspdeploy.core.pixels.jpeg import JPEG_SIGNATURE, decode_jpeg
from cspdeploy.core.pixels.netpbm import decode_netpbm
from cspdeploy.core.pixels.png import PNG_SIGNATURE, decode_png

__all__ = ["decode_image"]

_DECODERS: tuple[tuple[bytes, Callable[[bytes], npt.NDArray[np.uint8]]], ...] = (
    (PNG_SIGNATURE, decode_png),
    (JPEG_SIGNATURE, decode_jpeg),
    (b"BM", decode_bmp),
    (b"P5", decode_netpbm),
    (b"P6", decode_netpbm),
)
# Formats that Pillow reads and this does not.
_OTHERS = ((b"GIF8", "GIF"), (b"II*\0", "TIFF"), (b"MM\0*", "TIFF"), (b"RIFF", "WEBP"))

_INSTALL = "pip install pillow"
MAX_REASON = 120
"""Letters of a reason that may come from a library, which may tell of the file's contents."""


def decode_image(data: bytes, *, name: str) -> npt.NDArray[np.uint8]:
    """The pixels of an image file, `[H, W, 3]` uint8 RGB, upright.

    Args:
        name: what errors call the file.

    Raises:
        InputError: not an image, truncated, more than 100 megapixels or 65,535 px a side, a format that only Pillow
            reads, or too large for the memory here.
    """
    decoder = next((decoder for signature, decoder in _DECODERS if data.startswith(signature)), None)
    if decoder is None:
        other = next((kind for signature, kind in _OTHERS if data.startswith(signature)), None)
        if other:
            raise InputError(f"{name}: {other} is read by Pillow, which is not installed", fix=_INSTALL)
        raise InputError(f"{name}: not an image, expected PNG, JPEG, BMP or PPM", fix="name an image file")
    try:
        return decoder(data)
    except OversizeImageError as error:
        raise InputError(f"{name}: {error}", fix="shrink the image") from error
    except UnsupportedImageError as error:
        raise InputError(f"{name}: {error}: read by Pillow, which is not installed", fix=_INSTALL) from error
    except MemoryError as error:
        raise InputError(f"{name}: too large for the memory here", fix="shrink the image") from error
    except (struct.error, IndexError) as error:  # how the standard library says that a file ends too early
        raise InputError(f"{name}: not an image that can be read: truncated", fix="name an image file") from error
    except (BrokenImageError, zlib.error, ValueError) as error:
        reason = str(error)[:MAX_REASON]
        raise InputError(f"{name}: not an image that can be read: {reason}", fix="name an image file") from error
