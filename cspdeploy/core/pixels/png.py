"""PNG: all colour types, depths and interlace. Source: W3C PNG, third edition. Transparency is dropped.

Row filters that look back along the row (average, Paeth) are undone for many rows at once, along diagonals: a byte
depends on its left, upper and upper left neighbours alone, so that all bytes of one diagonal can be had together.
A 12-megapixel RGB image takes 1.4 s on one core of a server. Rows are unpacked and turned into RGB band by band, so
that the memory needed is that of the RGB image and some 300 MB, whatever its depth and its alpha.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cspdeploy.core.pixels.faults import BrokenImageError, check_size
from cspdeploy.core.pixels.orientation import read_orientation, turn_upright

__all__ = ["PNG_SIGNATURE", "decode_png"]

Pixels = npt.NDArray[np.uint8]

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GREY, _RGB, _PALETTE, _GREY_ALPHA, _RGBA = 0, 2, 3, 4, 6
_CHANNELS = {_GREY: 1, _RGB: 3, _PALETTE: 1, _GREY_ALPHA: 2, _RGBA: 4}
_DEPTHS = {
    _GREY: (1, 2, 4, 8, 16), _RGB: (8, 16), _PALETTE: (1, 2, 4, 8), _GREY_ALPHA: (8, 16), _RGBA: (8, 16),
}  # fmt: skip
# Adam7: first row, first column, row step, column step of the seven passes.
_ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))

# Rows that are unfiltered together. Longer diagonals spread the cost of a step, the square of it is memory:
# 512 rows of a 4,000 pixel photograph are 14 MB.
_BAND_ROWS = 512
# Fewer where rows are long: the sums of a band take twice its bytes. An image of 65,535 px a row with 8 bytes a pixel
# has bands of 128 rows.
_BAND_BYTES = 64 << 20
# Packed bytes that are unpacked at a time: what is left of them is copied at every band.
_PIECE_BYTES = 1 << 20

# XMP is a few kilobytes; what unpacks to more than this is not read.
_MAX_TEXT_BYTES = 1 << 20
_XMP_KEY = b"XML:com.adobe.xmp"


@dataclass(slots=True)
class _Chunks:
    width: int = 0
    height: int = 0
    depth: int = 0
    colour: int = 0
    interlaced: bool = False
    palette: bytes = b""
    packed: list[bytes] = field(default_factory=list)
    exif: bytes = b""
    xmp: bytes = b""


def decode_png(data: bytes) -> Pixels:
    """`[H, W, 3]` uint8, upright.

    Raises:
        BrokenImageError: truncated, a wrong checksum, or not by the rules.
        OversizeImageError: too many pixels.
    """
    chunks = _read_chunks(data)
    bits = _CHANNELS[chunks.colour] * chunks.depth
    passes = _ADAM7 if chunks.interlaced else ((0, 0, 1, 1),)
    shapes = [(-(-(chunks.height - y) // dy), -(-(chunks.width - x) // dx)) for y, x, dy, dx in passes]
    shapes = [(rows, columns) if rows > 0 and columns > 0 else (0, 0) for rows, columns in shapes]
    inflater = _Inflater(chunks.packed)
    image = np.empty((chunks.height, chunks.width, 3), np.uint8)
    for (y, x, dy, dx), (rows, columns) in zip(passes, shapes, strict=True):
        if rows:
            _read_pass(inflater, image[y::dy, x::dx], -(-columns * bits // 8), max(1, bits // 8), chunks)
    return turn_upright(image, read_orientation(chunks.exif, chunks.xmp))


def _read_pass(inflater: _Inflater, out: Pixels, row_bytes: int, step: int, chunks: _Chunks) -> None:
    """Fill `[rows, columns, 3]` band by band; `step` bytes lie between a byte and its left."""
    rows, columns = out.shape[:2]
    above = np.zeros(row_bytes, np.uint8)
    band_rows = min(_BAND_ROWS, max(1, _BAND_BYTES // row_bytes))
    for first in range(0, rows, band_rows):
        count = min(band_rows, rows - first)
        lines = np.frombuffer(inflater.read(count * (1 + row_bytes)), np.uint8).reshape(count, -1)
        plain = _unfilter(lines[:, 0], lines[:, 1:], above, step)
        out[first : first + count] = _to_rgb(plain, columns, chunks)
        above = plain[-1]


class _Inflater:
    """Unpacks image data a few rows at a time, never more than was asked for."""

    def __init__(self, packed: list[bytes]) -> None:
        self._pieces = (
            part[at : at + _PIECE_BYTES] for part in packed for at in range(0, len(part), _PIECE_BYTES)
        )  # fmt: skip
        self._engine = zlib.decompressobj()

    def read(self, count: int) -> bytes:
        """The next bytes.

        Raises:
            BrokenImageError: there are fewer.
        """
        made: list[bytes] = []
        while count:
            piece = self._engine.unconsumed_tail or next(self._pieces, b"")
            part = self._engine.decompress(piece, count)  # of no piece: what it still holds back
            if not part and not piece:
                raise BrokenImageError("truncated")
            made.append(part)
            count -= len(part)
        return b"".join(made)


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and body of each chunk. What follows the image data may be broken or missing, as for Pillow."""
    at = len(PNG_SIGNATURE)
    complete = False
    while True:
        if len(data) < at + 12:
            if complete:
                return
            raise BrokenImageError("truncated")
        length, kind = struct.unpack_from(">L4s", data, at)
        if len(data) < at + 12 + length:
            if complete and kind != b"IDAT":
                return
            raise BrokenImageError("truncated")
        body = data[at + 8 : at + 8 + length]
        (checksum,) = struct.unpack_from(">L", data, at + 8 + length)
        if checksum != zlib.crc32(body, zlib.crc32(kind)):
            if complete and kind != b"IDAT":
                return
            raise BrokenImageError(f"wrong checksum of {kind.decode('latin-1')!r}")
        yield kind, body
        if kind == b"IEND":
            return
        complete = complete or kind == b"IDAT"
        at += 12 + length


def _read_chunks(data: bytes) -> _Chunks:
    found = _Chunks()
    ended = False  # image data lies in one run of chunks; what comes later is none
    for kind, body in _chunks(data):
        if (kind == b"IHDR") != (found.width == 0):
            raise BrokenImageError("the header is not first, or there are two")
        ended = ended or (bool(found.packed) and kind != b"IDAT")
        if kind == b"IHDR":
            _read_header(body, found)
        elif kind == b"PLTE":
            found.palette = body
        elif kind == b"IDAT" and not ended:
            found.packed.append(body)
        elif kind == b"eXIf":
            found.exif = body
        elif kind in (b"iTXt", b"tEXt", b"zTXt"):
            with suppress(zlib.error, ValueError):  # a text that cannot be read costs the text, not the image
                _read_text(kind, body, found)
    return found


def _read_header(body: bytes, found: _Chunks) -> None:
    width, height, depth, colour, compression, filters, interlace = struct.unpack(">LLBBBBB", body)
    check_size(width, height)
    if depth not in _DEPTHS.get(colour, ()) or compression or filters:
        raise BrokenImageError(f"PNG of {depth} bits, colour type {colour}")
    found.width, found.height, found.depth, found.colour = width, height, depth, colour
    found.interlaced = bool(interlace)


def _read_text(kind: bytes, body: bytes, found: _Chunks) -> None:
    """EXIF and XMP where ImageMagick and Adobe put them."""
    key, _, rest = body.partition(b"\0")
    if kind == b"iTXt" and key == _XMP_KEY and len(rest) > 2:
        text = rest[2:].split(b"\0", 2)[-1]
        found.xmp = zlib.decompressobj().decompress(text, _MAX_TEXT_BYTES) if rest[0] else text
    elif kind != b"iTXt" and key == b"Raw profile type exif" and not found.exif:
        text = zlib.decompressobj().decompress(rest[1:], _MAX_TEXT_BYTES) if kind == b"zTXt" else rest
        found.exif = bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii"))


def _unfilter(kinds: Pixels, lines: Pixels, above: Pixels, step: int) -> Pixels:
    """Undo the row filters of a band.

    Args:
        kinds: `[rows]`.
        lines: `[rows, bytes]`.
        above: `[bytes]`, the row before the band.
        step: how many bytes lie between a byte and its left.
    """
    if int(kinds.max()) > 4:
        raise BrokenImageError(f"PNG row filter {int(kinds.max())}")
    if (kinds > 2).any():
        return _unfilter_diagonals(kinds, lines, above, step)
    out = np.empty(lines.shape, np.uint8)
    _unfilter_rows(kinds, lines, above, step, out)
    return out


def _unfilter_rows(kinds: Pixels, lines: Pixels, above: Pixels, step: int, out: Pixels) -> None:
    """None, sub and up: whole rows at a time, in bytes that wrap."""
    for row, kind in enumerate(kinds):
        if kind == 1:
            np.add.accumulate(lines[row].reshape(-1, step), axis=0, dtype=np.uint8, out=out[row].reshape(-1, step))
        elif kind == 2:
            np.add(lines[row], above, out=out[row])
        else:
            out[row] = lines[row]
        above = out[row]


def _unfilter_diagonals(kinds: Pixels, lines: Pixels, above: Pixels, step: int) -> Pixels:
    """All five filters.

    With the neighbours that a filter does not look at set to 0, Paeth's choice is the left byte for "sub", the upper
    one for "up" and 0 for "none"; "average" is worked out beside it.
    """
    rows, length = lines.shape
    columns = length // step
    # skewed[x + r, r] is pixel x of row r; row 0 is the one above the band. A zero lies before each row.
    skewed = np.zeros((columns + rows + 1, rows + 1, step), np.int16)
    across, down, within = skewed.strides
    upright = np.lib.stride_tricks.as_strided(skewed[1:], (rows + 1, columns, step), (across + down, across, within))
    upright[0] = above.reshape(columns, step)
    upright[1:] = lines.reshape(rows, columns, step)
    use_a, use_b, use_c = (np.isin(kinds, of).astype(np.int16)[:, None] for of in ((1, 3, 4), (2, 3, 4), (4,)))
    is_average = (kinds == 3)[:, None]
    any_average = bool(is_average.any())
    for diagonal in range(1, columns + rows):
        # Row r (from 1) holds pixel `diagonal - r`.
        low, high = max(1, diagonal - columns + 1), min(rows, diagonal) + 1
        here, masks = slice(low, high), slice(low - 1, high - 1)
        a = skewed[diagonal, here] * use_a[masks]
        b = skewed[diagonal, masks] * use_b[masks]
        c = skewed[diagonal - 1, masks] * use_c[masks]
        to_a, to_b = b - c, a - c
        to_c = np.abs(to_a + to_b)
        np.abs(to_a, out=to_a)
        np.abs(to_b, out=to_b)
        guess = np.where(to_b <= to_c, b, c)
        np.copyto(guess, a, where=(to_a <= to_b) & (to_a <= to_c))
        if any_average:
            np.copyto(guess, (a + b) >> 1, where=is_average[masks])
        target = skewed[diagonal + 1, here]
        target += guess
        target &= 255
    return upright[1:].reshape(rows, length).astype(np.uint8)


def _to_rgb(lines: Pixels, width: int, chunks: _Chunks) -> Pixels:
    """`[rows, bytes]` as unfiltered to `[rows, width, 3]`; of 16 bits the high byte is kept."""
    if chunks.depth < 8:
        per_byte = 8 // chunks.depth
        shifts = np.arange(per_byte - 1, -1, -1, dtype=np.uint8) * chunks.depth
        parts = np.asarray(lines[:, :, None] >> shifts & np.uint8((1 << chunks.depth) - 1), np.uint8)
        samples = parts.reshape(len(lines), -1)[:, :width, None]
    else:
        samples = lines.reshape(len(lines), width, -1)[:, :, :: chunks.depth // 8]
    if chunks.colour == _PALETTE:
        colours = np.frombuffer(chunks.palette, np.uint8, len(chunks.palette) // 3 * 3).reshape(-1, 3)
        if int(samples.max()) >= len(colours):
            raise BrokenImageError(f"PNG colour {int(samples.max())} of a palette of {len(colours)}")
        return np.asarray(colours[samples[:, :, 0]])
    if chunks.colour in (_RGB, _RGBA):
        return samples[:, :, :3]
    full = 255 // ((1 << min(8, chunks.depth)) - 1)
    return np.repeat(samples[:, :, :1] * np.uint8(full), 3, axis=2)
