from __future__ import annotations

import struct
import tracemalloc
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cspdeploy.core.errors import InputError
from cspdeploy.core.pixels import png
from cspdeploy.core.pixels.png import decode_png
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
        (_png(65_536, 1, 0, 1, interlaced=False), "at most 65535 px a side"),
        (_png(4, 4, 2, 8, interlaced=False)[:-14], "truncated"),
        (_png(4, 4, 2, 8, interlaced=False)[:20], "read: truncated$|truncated \\("),
    ],
    ids=["short", "filter", "deflate", "checksum", "depth", "no columns", "bomb", "long", "cut data", "cut header"],
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


def test_a_thin_image_is_refused_by_its_side_and_not_by_its_rows() -> None:
    """1x100,000,000 px has no more pixels than is allowed, and would have been half an hour of rows."""
    header = struct.pack(">LLBBBBB", 1, 100_000_000, 8, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", b"") + _chunk(b"IEND", b"")
    with pytest.raises(InputError, match="at most 65535 px a side") as caught:
        read_pixels(data, by="built in")
    assert caught.value.fix == "shrink the image"


@pytest.mark.parametrize("interlaced", [False, True])
def test_bands_of_few_rows_and_small_pieces_give_the_same(
    interlaced: bool, monkeypatch: pytest.MonkeyPatch, same_as_pillow: Callable[[bytes], None]
) -> None:
    monkeypatch.setattr(png, "_BAND_BYTES", 700)
    monkeypatch.setattr(png, "_PIECE_BYTES", 3)
    for colour, depth in KINDS:
        same_as_pillow(_png(37, 23, colour, depth, interlaced=interlaced))


def test_memory_is_that_of_the_image_and_a_band(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 bits and alpha are 8 bytes a pixel, of which 3 remain: all of them at once were 2.7 times the image."""
    monkeypatch.setattr(png, "_BAND_BYTES", 1 << 16)
    raw = zlib.compress(b"".join(bytes([row % 3]) + bytes(8 * 1000) for row in range(1500)), 1)
    header = struct.pack(">LLBBBBB", 1000, 1500, 16, 6, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", raw) + _chunk(b"IEND", b"")
    tracemalloc.start()
    try:
        assert decode_png(data).shape == (1500, 1000, 3)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * 1500 * 1000 * 3


def _with_chunk(kind: bytes, body: bytes) -> bytes:
    whole = _png(5, 9, 2, 8, interlaced=False)
    return whole[:33] + _chunk(kind, body) + whole[33:]


@pytest.mark.parametrize(
    "data",
    [
        _png(5, 9, 2, 8, interlaced=False)[:-12],
        _png(5, 9, 2, 8, interlaced=False)[:-5],
        _png(5, 9, 2, 8, interlaced=False)[:-1] + b"x",
        _with_chunk(b"zTXt", b"Raw profile type exif\0\0no deflate"),
        _with_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0no deflate"),
    ],
    ids=["no IEND", "half an IEND", "wrong checksum of IEND", "zTXt", "iTXt"],
)
def test_what_is_broken_beside_the_image_does_not_cost_it(data: bytes, same_as_pillow: Callable[[bytes], None]) -> None:
    same_as_pillow(data)


@pytest.mark.parametrize(
    "data",
    [
        _with_chunk(b"tEXt", b"Raw profile type exif\0\nexif\n  5\nzz"),
        _with_chunk(b"eXIf", b"MM\0*\0\0\xff\xff"),
        _png(5, 9, 2, 8, interlaced=False)[:-12] + b"\0\0\1\0tEXtcut",
    ],
    ids=["no hexadecimal number", "eXIf", "cut text"],
)
def test_where_pillow_warns_or_gives_up_the_image_is_there(data: bytes) -> None:
    np.testing.assert_array_equal(decode_png(data), decode_png(_png(5, 9, 2, 8, interlaced=False)))
