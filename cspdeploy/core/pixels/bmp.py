"""Windows bitmap: 24 and 32 bits, and palettes of 1, 4 and 8 bits, uncompressed. Source: BITMAPINFOHEADER."""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt

from cspdeploy.core.pixels.faults import BrokenImageError, UnsupportedImageError, check_size

__all__ = ["decode_bmp"]

Pixels = npt.NDArray[np.uint8]

_RAW, _BITFIELDS = 0, 3
_INFO_HEADERS = (40, 52, 56, 64, 108, 124)
# Masks of red, green and blue: where these bytes lie in a pixel. All 0 is what some writers leave of the usual order.
_BYTE_ORDER = {
    (0xFF0000, 0xFF00, 0xFF): (2, 1, 0),
    (0xFF000000, 0xFF0000, 0xFF00): (3, 2, 1),
    (0xFF000000, 0xFF00, 0xFF): (3, 1, 0),
    (0xFF, 0xFF00, 0xFF0000): (0, 1, 2),
    (0, 0, 0): (2, 1, 0),
}


def decode_bmp(data: bytes) -> Pixels:
    """`[H, W, 3]` uint8.

    Raises:
        BrokenImageError: truncated, or no sound header.
        UnsupportedImageError: compressed, or a depth that is not named above.
        OversizeImageError: too many pixels.
    """
    offset, header_size = struct.unpack_from("<10xLL", data)
    colours = 0
    if header_size == 12:
        width, height, _, bits = struct.unpack_from("<4H", data, 18)
        compression, entry_size = _RAW, 3
    elif header_size in _INFO_HEADERS:
        width, height, _, bits, compression, colours = struct.unpack_from("<LlHHL12xL", data, 18)
        entry_size = 4
    else:
        raise UnsupportedImageError(f"BMP header of {header_size} bytes")
    check_size(width, abs(height))
    palette_at = 14 + header_size
    if bits <= 8 and compression == _RAW and bits in (1, 4, 8):
        colours = colours or 1 << bits
        if colours > 1 << bits:
            raise BrokenImageError(f"BMP palette of {colours} colours at {bits} bits")
        rows = _rows(data, offset or palette_at + colours * entry_size, width, abs(height), bits)
        image = _from_palette(rows, data[palette_at : palette_at + colours * entry_size], width, bits, entry_size)
    elif bits in (24, 32) and compression in (_RAW, _BITFIELDS):
        order = (2, 1, 0)
        if compression == _BITFIELDS:
            order = _order(data, bits)
            palette_at += 12 if header_size == 40 else 0
        rows = _rows(data, offset or palette_at, width, abs(height), bits)
        image = rows[:, : width * bits // 8].reshape(len(rows), width, bits // 8)[:, :, list(order)]
    else:
        raise UnsupportedImageError(f"BMP of {bits} bits, compression {compression}")
    return np.ascontiguousarray(image[::-1] if height > 0 else image)


def _order(data: bytes, bits: int) -> tuple[int, int, int]:
    masks = struct.unpack_from("<3L", data, 54)
    if masks not in _BYTE_ORDER or (bits == 24 and masks != (0xFF0000, 0xFF00, 0xFF)):
        raise UnsupportedImageError(f"BMP with the masks {', '.join(f'{mask:#x}' for mask in masks)}")
    return _BYTE_ORDER[masks]


def _rows(data: bytes, offset: int, width: int, height: int, bits: int) -> Pixels:
    stride = (width * bits + 31) // 32 * 4
    if len(data) - offset < stride * height:
        raise BrokenImageError("truncated")
    return np.frombuffer(data, np.uint8, stride * height, offset).reshape(height, stride)


def _from_palette(rows: Pixels, palette: bytes, width: int, bits: int, entry_size: int) -> Pixels:
    per_byte = 8 // bits
    shifts = np.arange(per_byte - 1, -1, -1, dtype=np.uint8) * bits
    index = (rows[:, :, None] >> shifts & ((1 << bits) - 1)).reshape(len(rows), -1)[:, :width]
    colours = np.frombuffer(palette, np.uint8, len(palette) // entry_size * entry_size).reshape(-1, entry_size)
    if int(index.max()) >= len(colours):
        raise BrokenImageError(f"BMP colour {int(index.max())} of a palette of {len(colours)}")
    return np.asarray(colours[index][:, :, 2::-1])
