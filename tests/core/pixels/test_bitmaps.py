"""BMP and Netpbm."""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from cspdeploy.core.errors import InputError
from cspdeploy.core.preprocess import read_pixels


def test_bmp_as_pillow_writes_it(picture: Callable, encode: Callable, same_as_pillow: Callable[[bytes], None]) -> None:
    image = Image.fromarray(picture(33, 21))
    for mode in ("1", "L", "P", "RGB", "RGBA"):
        same_as_pillow(encode(image.convert(mode), "BMP"))
    for colours in (2, 9, 200):
        same_as_pillow(encode(image.quantize(colours), "BMP"))


@pytest.mark.parametrize("shift", [0, 8])
def test_bmp_of_32_bits_with_masks_and_from_the_top(shift: int, same_as_pillow: Callable[[bytes], None]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 4), np.uint8).tobytes()
    masks = struct.pack("<3L", *(mask << shift for mask in (0xFF0000, 0xFF00, 0xFF)))
    for height in (5, -5):
        header = struct.pack("<LllHHLLllLL", 40, 7, height, 1, 32, 3, len(pixels), 0, 0, 0, 0)
        same_as_pillow(b"BM" + struct.pack("<LHHL", 66 + len(pixels), 0, 0, 66) + header + masks + pixels)


@pytest.mark.parametrize("top", [1, 7, 100, 254, 255, 256, 1000, 65535])
@pytest.mark.parametrize(("magic", "channels"), [(b"P5", 1), (b"P6", 3)])
def test_netpbm_of_any_maximum(magic: bytes, channels: int, top: int, same_as_pillow: Callable[[bytes], None]) -> None:
    samples = np.random.default_rng(top).integers(0, top + 1, (5, 4, channels))
    body = samples.astype(">u2" if top > 255 else np.uint8).tobytes()
    same_as_pillow(magic + b"\n# made by hand\n4 5\n%d\n" % top + body)


def _bmp(header: bytes) -> bytes:
    return b"BM" + struct.pack("<LHHL", 0, 0, 0, 54) + header + b"\0" * 40


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"P6 4 4 255\n" + b"\0" * 47, "truncated"),
        (b"P6 4 4 0\n" + b"\0" * 48, "maximum 0"),
        (b"P6 4\n", "no Netpbm header"),
        (b"P6 99999 99999 255\n", "at most"),
        (_bmp(struct.pack("<LllHHL", 40, 9, 9, 1, 24, 0)), "truncated"),
        (_bmp(struct.pack("<LllHHL", 40, 9, 9, 1, 8, 1)), "compression 1"),
        (_bmp(struct.pack("<L", 41)), "header of 41"),
        (b"BM", "truncated"),
        (b"P5 1 100000000 255\n", "65535 px a side"),
    ],
)
def test_what_is_wrong_is_named(data: bytes, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        read_pixels(data, by="built in")
