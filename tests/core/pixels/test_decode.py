from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cspdeploy.core.errors import InputError
from cspdeploy.core.pixels.decode import decode_image

# A place where damage does no harm: checksums leave few to a PNG.
TEXT = PngInfo()
TEXT.add_text("comment", "x" * 600)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP"])
def test_formats_that_only_pillow_reads_name_it(kind: str, picture: Callable, encode: Callable) -> None:
    with pytest.raises(InputError, match=rf"a\.x: {kind} is read by Pillow") as caught:
        decode_image(encode(picture(8, 8), kind), name="a.x")
    assert caught.value.fix == "pip install pillow"


@pytest.mark.parametrize("data", [b"not a picture", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\0"])
def test_anything_else_is_not_an_image(data: bytes) -> None:
    with pytest.raises(InputError, match=r"a\.x: not an image"):
        decode_image(data, name="a.x")


def _with_checksums(data: bytes) -> bytes:
    """A PNG whose chunks are broken inside, and sound outside."""
    at, out = 8, data[:8]
    while at + 8 <= len(data):
        (length,) = struct.unpack_from(">L", data, at)
        if at + 12 + length > len(data):
            return data
        out += data[at : at + 8 + length] + struct.pack(">L", zlib.crc32(data[at + 4 : at + 8 + length]))
        at += 12 + length
    return out


def _mutate(data: bytes, rng: np.random.Generator) -> bytes:
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(len(out)))
        kind = int(rng.integers(4))
        if kind == 0:
            out[at] = int(rng.integers(256))
        elif kind == 1:  # headers and tables lie at the front
            out[min(at, int(rng.integers(700)))] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            del out[at : at + int(rng.integers(1, 9))]
        else:
            out[at:at] = rng.integers(0, 256, int(rng.integers(1, 4)), np.uint8).tobytes()
    return bytes(out)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {}), ("JPEG", {"progressive": True}), ("JPEG", {"restart_marker_blocks": 2, "subsampling": 0}),
     ("JPEG", {"progressive": True, "restart_marker_blocks": 3}), ("PNG", {"pnginfo": TEXT}), ("BMP", {}), ("PPM", {})],
    ids=["sequential", "progressive", "restarts", "progressive restarts", "png", "bmp", "ppm"],
)  # fmt: skip
def test_a_damaged_file_gives_an_image_or_an_error_that_says_so(
    kind: str, options: dict[str, object], picture: Callable, encode: Callable, read_or_refuse: Callable
) -> None:
    """Where damage goes unseen (a changed sample, a wrong code) both decoders see the same, or Pillow refuses."""
    rng = np.random.default_rng(0)
    whole = encode(picture(33, 29), kind, **options)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(60):
        damaged = _mutate(whole, rng)
        damaged = _with_checksums(damaged) if kind == "PNG" else damaged
        made = read_or_refuse(damaged)
        outcomes["refused" if made is None else "read"] += 1
        if made is not None:
            assert made.dtype == np.uint8
            assert made.shape[2] == 3
            expected = read_or_refuse(damaged, by="pillow")
            assert expected is None or np.array_equal(made, expected)
    assert min(outcomes.values()) > 0, outcomes


def test_the_pixels_of_palettes_are_damaged_alike(
    picture: Callable, encode: Callable, read_or_refuse: Callable
) -> None:
    rng = np.random.default_rng(1)
    for kind in ("PNG", "BMP"):
        whole = encode(Image.fromarray(picture(20, 20)).quantize(40), kind)
        for _ in range(40):
            damaged = _mutate(whole, rng)
            made = read_or_refuse(_with_checksums(damaged) if kind == "PNG" else damaged)
            assert made is None or made.shape[2] == 3
