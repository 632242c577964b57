"""Netpbm: binary grey (P5) and colour (P6), up to 16 bits. Source: pgm(5), ppm(5); scaling as Pillow's PpmDecoder."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt

from cspdeploy.core.pixels.faults import BrokenImageError, check_size

__all__ = ["decode_netpbm"]

Pixels = npt.NDArray[np.uint8]

_GAP = rb"(?:[ \t\n\v\f\r]|#[^\r\n]*[\r\n])+"
_HEADER = re.compile(rb"P([56])" + _GAP + rb"(\d{1,10})" + _GAP + rb"(\d{1,10})" + _GAP + rb"(\d{1,10})[ \t\n\v\f\r]")


def decode_netpbm(data: bytes) -> Pixels:
    """`[H, W, 3]` uint8.

    Raises:
        BrokenImageError: no sound header, or fewer samples than it announces.
        OversizeImageError: too many pixels.
    """
    header = _HEADER.match(data)
    if header is None:
        raise BrokenImageError("no Netpbm header")
    colour = header[1] == b"6"
    width, height, top = (int(header[i]) for i in (2, 3, 4))
    check_size(width, height)
    if not 0 < top < 65536:
        raise BrokenImageError(f"Netpbm maximum {top}, expected 1 to 65535")
    channels = 3 if colour else 1
    dtype = np.dtype(np.uint8 if top < 256 else ">u2")
    count = width * height * channels
    if len(data) - header.end() < count * dtype.itemsize:
        raise BrokenImageError("truncated")
    samples = np.frombuffer(data, dtype, count, header.end())
    made = _to_bytes(samples, top, colour=colour).reshape(height, width, channels)
    return np.ascontiguousarray(made if colour else np.repeat(made, 3, axis=2))


def _to_bytes(samples: npt.NDArray[Any], top: int, *, colour: bool) -> Pixels:
    """To 0..255 through a table of every value. 16-bit grey goes by way of 16 bits, of which the high byte is kept."""
    if top == 255:
        return samples.astype(np.uint8)
    values = np.arange(256 if top < 256 else 65536)
    wide = top > 255 and not colour
    full = 65535 if wide else 255
    table = np.minimum(full, np.rint(values / top * full)).astype(np.int64)  # rint and round() both go to even
    return np.asarray((table >> 8 if wide else table).astype(np.uint8)[samples])
