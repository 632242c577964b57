from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from cspdeploy.core.errors import InputError
from cspdeploy.core.pixels import jpeg_progressive
from cspdeploy.core.pixels.jpeg_huffman import HuffmanTable
from cspdeploy.core.preprocess import read_pixels

SAMPLINGS = ["4:4:4", "4:2:2", "4:2:0"]
RESTARTS = [{}, {"restart_marker_blocks": 3}, {"restart_marker_rows": 1}]


def _resampled(data: bytes, old: int, new: int) -> bytes:
    """Another way to sample with as many blocks in an MCU: Pillow writes three ways, but reads all."""
    frame = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    assert data[frame + 11] == old
    return data[: frame + 11] + bytes([new]) + data[frame + 12 :]


@pytest.mark.parametrize("progressive", [False, True], ids=["sequential", "progressive"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("quality", [8, 50, 90, 100])
def test_pixels_are_libjpegs_bit_by_bit(
    quality: int, sampling: str, progressive: bool, picture: Callable, encode: Callable,
    same_as_pillow: Callable[[bytes], None],
) -> None:  # fmt: skip
    for size, restart in zip([(41, 66), (64, 48), (17, 130)], RESTARTS, strict=True):
        options = {"quality": quality, "subsampling": sampling, "progressive": progressive, **restart}
        same_as_pillow(encode(picture(*size), "JPEG", **options))


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_sizes_below_a_block_and_around_it(
    sampling: str, picture: Callable, encode: Callable, same_as_pillow: Callable[[bytes], None]
) -> None:
    for height, width in itertools.product((1, 3, 5, 8, 17), repeat=2):
        same_as_pillow(encode(picture(height, width), "JPEG", quality=85, subsampling=sampling))


@pytest.mark.parametrize("progressive", [False, True], ids=["sequential", "progressive"])
@pytest.mark.parametrize(("old", "new"), [(0x21, 0x12), (0x22, 0x41), (0x22, 0x14)], ids=["4:4:0", "4:1:1", "1x4"])
def test_other_samplings(
    old: int, new: int, progressive: bool, picture: Callable, encode: Callable, same_as_pillow: Callable[[bytes], None]
) -> None:
    data = encode(picture(64, 64), "JPEG", subsampling=1 if old == 0x21 else 2, progressive=progressive)
    same_as_pillow(_resampled(data, old, new))


@pytest.mark.parametrize("progressive", [False, True], ids=["sequential", "progressive"])
def test_colour_spaces(
    progressive: bool, picture: Callable, encode: Callable, same_as_pillow: Callable[[bytes], None]
) -> None:
    image = Image.fromarray(picture(40, 30))
    same_as_pillow(encode(image.convert("L"), "JPEG", progressive=progressive))
    same_as_pillow(encode(image, "JPEG", keep_rgb=True, progressive=progressive))
    inks = encode(image.convert("CMYK"), "JPEG", progressive=progressive)
    same_as_pillow(inks)
    transform = inks.index(b"Adobe") + 11
    same_as_pillow(inks[:transform] + b"\2" + inks[transform + 1 :])  # YCCK


@pytest.mark.slow
def test_a_photograph_longer_than_a_segment(
    picture: Callable, encode: Callable, same_as_pillow: Callable[[bytes], None]
) -> None:
    """Bits are made ready 256 KB at a time, and zeros of a refining scan 8,192 blocks at a time."""
    noisy = np.random.default_rng(0).integers(0, 256, (900, 1000, 3), np.uint8)
    for restart in RESTARTS:
        for progressive in (False, True):
            data = encode(noisy, "JPEG", quality=92, progressive=progressive, **restart)
            assert len(data) > 2 * (1 << 18)
            same_as_pillow(data)
    same_as_pillow(encode(picture(1200, 1600), "JPEG", progressive=True))


def test_a_file_longer_than_a_segment(encode: Callable, same_as_pillow: Callable[[bytes], None]) -> None:
    noisy = np.random.default_rng(0).integers(0, 256, (420, 560, 3), np.uint8)
    data = encode(noisy, "JPEG", quality=95, restart_marker_rows=1)
    assert len(data) > 1 << 18
    same_as_pillow(data)


@pytest.mark.parametrize("orientation", range(10))
def test_turned_upright_by_exif_and_by_xmp(
    orientation: int, picture: Callable, encode: Callable, same_as_pillow: Callable[[bytes], None]
) -> None:
    image = picture(9, 14)
    exif = Image.Exif()
    exif[0x0112] = orientation
    same_as_pillow(encode(image, "JPEG", exif=exif))
    same_as_pillow(encode(image, "JPEG", xmp=f'<x tiff:Orientation="{orientation}"/>'.encode()))


def test_every_cut_is_refused(picture: Callable, encode: Callable) -> None:
    for options in ({}, {"progressive": True}, {"restart_marker_blocks": 1}):
        data = encode(picture(24, 24), "JPEG", **options)
        for end in [*range(3, len(data) - 2, 61), len(data) - 2]:
            with pytest.raises(InputError):
                read_pixels(data[:end], by="built in")


def test_scans_left_out_are_refused_and_pillow_named(picture: Callable, encode: Callable) -> None:
    """libjpeg guesses at what they would have said; nobody should build on that unasked."""
    data = encode(picture(48, 48), "JPEG", progressive=True)
    with pytest.raises(InputError, match="without its last scans") as caught:
        read_pixels(data[: data.rindex(b"\xff\xda")] + b"\xff\xd9", by="built in")
    assert caught.value.fix == "pip install pillow"


def test_a_size_beyond_the_bits_is_refused_before_it_is_allocated(picture: Callable, encode: Callable) -> None:
    data = encode(picture(16, 16), "JPEG")
    size = data.index(b"\xff\xc0") + 5
    for claimed, reason in (
        (b"\x27\x0f\x27\x0f", "truncated"),
        (b"\xff\xff\xff\xff", "pixels"),
        (b"\0\0\0\x10", "16x0"),
    ):
        with pytest.raises(InputError, match=reason):
            read_pixels(data[:size] + claimed + data[size + 4 :], by="built in")


def test_a_coefficient_that_no_image_has_is_refused(picture: Callable, encode: Callable) -> None:
    data = encode(picture(16, 16), "JPEG", quality=100)
    table = data.index(b"\xff\xdb") + 5
    with pytest.raises(InputError, match="out of range"):
        read_pixels(data[:table] + b"\xff" * 64 + data[table + 64 :], by="built in")


@pytest.mark.parametrize("frame", [b"\xff\xc3", b"\xff\xc9"], ids=["lossless", "arithmetic"])
def test_what_is_not_built_in_names_pillow(frame: bytes, picture: Callable, encode: Callable) -> None:
    data = encode(picture(16, 16), "JPEG").replace(b"\xff\xc0", frame, 1)
    with pytest.raises(InputError, match="read by Pillow") as caught:
        read_pixels(data, by="built in")
    assert caught.value.fix == "pip install pillow"


def test_tables_that_no_scan_uses_are_not_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is 65,536 windows; a megabyte of them was ten seconds."""
    spread: list[int] = []
    real = HuffmanTable._windows

    def counted(self: HuffmanTable) -> object:
        spread.append(1)
        return real(self)

    monkeypatch.setattr(HuffmanTable, "_windows", counted)
    tables = (bytes([0, 1]) + bytes(15) + bytes([0])) * 3000
    with pytest.raises(InputError, match="truncated"):
        read_pixels(b"\xff\xd8\xff\xc4" + (2 + len(tables)).to_bytes(2, "big") + tables + b"\xff\xd9", by="built in")
    assert spread == []


def test_codes_are_gathered_once_a_segment_and_not_once_an_interval(
    picture: Callable, encode: Callable, same_as_pillow: Callable[[bytes], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("gather", "_store_first"):
        real = getattr(jpeg_progressive, name)

        def counted(*words: object, _real: Callable = real, _name: str = name, **options: object) -> object:
            calls.append(_name)
            return _real(*words, **options)

        monkeypatch.setattr(jpeg_progressive, name, counted)
    data = encode(picture(48, 64), "JPEG", progressive=True, restart_marker_blocks=1)
    assert data.count(b"\xff\xd0") > 10  # intervals there are
    same_as_pillow(data)
    scans = data.count(b"\xff\xda")
    assert 0 < len(calls) <= scans
