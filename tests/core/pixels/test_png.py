from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cspdeploy.core.errors import InputError
from cspdeploy.core.preprocess import read_pixels

CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
KINDS = [(0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (2, 8), (2, 16), (3, 1), (3, 2), (3, 4), (3, 8), (4, 8), (4, 16),
         (6, 8), (6, 16)]  # fmt: skip
PASSES = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">L", len(body)) + kind + body + struct.pack(">L", zlib.crc32(kind + body))


def _png(width: int, height: int, colour: int, depth: int, *, interlaced: bool, packed: bytes | None = None) -> bytes:
    """Random bytes under random row filters are an image like any other, and reach every path of every filter."""
    rng = np.random.default_rng(width * 7 + height)
    raw = b""
    for y, x, dy, dx in PASSES if interlaced else ((0, 0, 1, 1),):
        rows, columns = -(-(height - y) // dy), -(-(width - x) // dx)
        if rows > 0 and columns > 0:
            lines = rng.integers(0, 256, (rows, 1 + (columns * CHANNELS[colour] * depth + 7) // 8), np.uint8)
            lines[:, 0] = rng.integers(0, 5, rows)
            raw += lines.tobytes()
    header = struct.pack(">LLBBBBB", width, height, depth, colour, 0, 0, interlaced)
    palette = rng.integers(0, 256, 3 << depth, np.uint8).tobytes() if colour == 3 else b""
    return (
        b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + (_chunk(b"PLTE", palette) if palette else b"")
        + _chunk(b"IDAT", zlib.compress(raw) if packed is None else packed) + _chunk(b"IEND", b"")
    )  # fmt: skip


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(("colour", "depth"), KINDS)
def test_every_kind_and_filter_is_what_pillow_reads(
    colour: int, depth: int, interlaced: bool, same_as_pillow: Callable[[bytes], None]
) -> None:
    for width, height in ((1, 1), (3, 2), (5, 9), (37, 23), (3, 1100)):  # 1,100 rows are three bands
        same_as_pillow(_png(width, height, colour, depth, interlaced=interlaced))


def test_as_pillow_writes_them(picture: Callable, encode: Callable, same_as_pillow: Callable[[bytes], None]) -> None:
    image = Image.fromarray(picture(70, 51))
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        same_as_pillow(encode(image.convert("L").convert(mode) if mode == "I;16" else image.convert(mode), "PNG"))
    same_as_pillow(encode(image.quantize(9), "PNG", transparency=3))
    same_as_pillow(encode(image, "PNG", transparency=(1, 2, 3)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_upright_by_exif_and_by_xmp(
    orientation: int, picture: Callable, encode: Callable, same_as_pillow: Callable[[bytes], None]
) -> None:
    image = Image.fromarray(picture(5, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    same_as_pillow(encode(image, "PNG", exif=exif))
    for packed in (False, True):
        text = PngInfo()
        text.add_itxt("XML:com.adobe.xmp", f'<x tiff:Orientation="{orientation}"/>', zip=packed)
        same_as_pillow(encode(image, "PNG", pnginfo=text))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (_png(4, 4, 2, 8, interlaced=False, packed=zlib.compress(b"\0" * 51)), "truncated"),
        (_png(4, 4, 2, 8, interlaced=False, packed=zlib.compress(b"\x05" * 52)), "filter 5"),
        (_png(4, 4, 2, 8, interlaced=False, packed=b"no deflate"), "header check"),
        (_png(4, 4, 2, 8, interlaced=False)[:-20] + b"\0" * 20, "checksum"),
        (_png(4, 4, 2, 4, interlaced=False), "4 bits, colour type 2"),
        (_png(0, 4, 2, 8, interlaced=False), "0x4"),
        (_png(20_000, 20_000, 2, 8, interlaced=False, packed=b""), "at most 100000000 pixels"),
    ],
    ids=["short", "filter", "deflate", "checksum", "depth", "no columns", "bomb"],
)
def test_what_is_wrong_is_named(data: bytes, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        read_pixels(data, by="built in")


def test_a_colour_beyond_the_palette_is_refused() -> None:
    data = _png(8, 8, 3, 8, interlaced=False)
    short = _chunk(b"PLTE", b"\1\2\3")
    start = data.index(b"PLTE") - 4
    with pytest.raises(InputError, match="palette of 1"):
        read_pixels(data[:start] + short + data[start + 12 + 768 :], by="built in")
