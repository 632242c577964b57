from __future__ import annotations

import contextlib
import dataclasses
import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cspdeploy.core.errors import InputError
from cspdeploy.core.preprocess import (
    MAX_IMAGE_PIXELS,
    list_images,
    load_image,
    normalise,
    preprocess,
    resize_image,
)  # fmt: skip
from cspdeploy.core.spec import Preprocess

Pixels = npt.NDArray[np.uint8]

CONTRACT = Preprocess(
    height_px=8, width_px=8, resize="crop", crop_pct=1.0, interpolation="nearest", channel_order="rgb",
    mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
)  # fmt: skip
STRETCH = dataclasses.replace(CONTRACT, resize="stretch")


def _file(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _noise(height: int, width: int) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def _png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


# --- decoding ---


def test_rgb_from_path_text_bytes_and_array_are_one_image(tmp_path: Path) -> None:
    pixels = _noise(5, 7)
    path = tmp_path / "a.png"
    path.write_bytes(_file(Image.fromarray(pixels)))
    for source in (path, str(path), path.read_bytes(), pixels):
        assert np.array_equal(np.asarray(load_image(source)), pixels)


def test_grey_is_replicated() -> None:
    grey = _noise(4, 4)[..., 0]
    for source in (_file(Image.fromarray(grey)), grey, grey[:, :, None]):
        assert np.array_equal(np.asarray(load_image(source)), np.stack([grey] * 3, axis=2))


def test_black_and_white_is_0_and_255() -> None:
    image = Image.fromarray(np.array([[True, False]]))
    assert np.asarray(load_image(_file(image)))[..., 0].tolist() == [[255, 0]]


@pytest.mark.parametrize("transparency", [None, 1, bytes([0, 128])])
def test_palette_is_expanded_and_transparency_dropped(transparency: int | bytes | None) -> None:
    image = Image.fromarray(np.array([[0, 1]], np.uint8))
    image = image.convert("P")
    image.putpalette([10, 20, 30, 200, 150, 100])
    data = _file(image) if transparency is None else _file(image, transparency=transparency)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.asarray(load_image(data)).tolist() == [[[10, 20, 30], [200, 150, 100]]]


@pytest.mark.parametrize("alpha", [0, 128, 255])
def test_colour_under_transparency_stays(alpha: int) -> None:
    rgba = np.array([[[10, 20, 30, alpha]]], np.uint8)
    assert np.asarray(load_image(_file(Image.fromarray(rgba)))).tolist() == [[[10, 20, 30]]]
    la = Image.fromarray(np.array([[[77, alpha]]], np.uint8))
    assert np.asarray(load_image(_file(la))).tolist() == [[[77, 77, 77]]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_not_clipped(kind: str) -> None:
    image = Image.fromarray(np.array([[0, 256, 0x8000, 0xFFFF]], np.uint16))
    assert np.asarray(load_image(_file(image, kind)))[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize(("orientation", "quarter_turns"), [(1, 0), (3, 2), (6, -1), (8, 1)])
def test_exif_rotation_is_applied(orientation: int, quarter_turns: int) -> None:
    pixels = _noise(3, 5)
    exif = Image.Exif()
    exif[0x0112] = orientation
    loaded = np.asarray(load_image(_file(Image.fromarray(pixels), exif=exif)))
    assert np.array_equal(loaded, np.rot90(pixels, quarter_turns))


def test_only_the_first_frame_is_read() -> None:
    red, blue = Image.new("RGB", (2, 2), "red"), Image.new("RGB", (2, 2), "blue")
    data = _file(red, "GIF", save_all=True, append_images=[blue])
    assert np.asarray(load_image(data))[0, 0].tolist() == [255, 0, 0]


# --- what is not an image ---


def test_zero_bytes(tmp_path: Path) -> None:
    path = tmp_path / "empty.jpg"
    path.touch()
    for source in (path, b""):
        with pytest.raises(InputError, match="empty file"):
            load_image(source)


def test_missing_file_folder_and_impossible_name(tmp_path: Path) -> None:
    for source in (tmp_path / "none.png", tmp_path, "a\0b.png"):
        with pytest.raises(InputError):
            load_image(source)


def test_text_is_not_an_image(tmp_path: Path) -> None:
    path = tmp_path / "notes.png"
    path.write_text("not a picture")
    with pytest.raises(InputError, match=r"notes\.png: not an image"):
        load_image(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_truncated_file(kind: str) -> None:
    whole = _file(Image.fromarray(_noise(40, 40)), kind)
    for share in (0.1, 0.5, 0.9):
        with pytest.raises(InputError):
            load_image(whole[: int(len(whole) * share)])


@pytest.mark.parametrize("tag", [b"\x01\x00", b"\x01\x1a", b"\x01\x54"], ids=["width", "resolution", "sample value"])
def test_text_where_exif_expects_a_number_is_no_crash(tag: bytes) -> None:
    """Pillow reads such a value, but cannot write it back, as it does when it turns the image upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "maker"
    data = _file(Image.fromarray(_noise(9, 7)), "JPEG", exif=exif)
    assert data.count(b"\x01\x0f\x00\x02") == 1  # tag 271, type 2: text
    with contextlib.suppress(InputError):
        assert load_image(data.replace(b"\x01\x0f\x00\x02", tag + b"\x00\x02")).size == (9, 7)


@pytest.mark.parametrize(("width", "height"), [(10_001, 10_000), (20_000, 20_000), (2**31 - 1, 2**31 - 1)])
def test_more_than_100_megapixels_is_refused_from_the_header(width: int, height: int) -> None:
    with pytest.raises(InputError, match=r"pixels|bomb"):
        load_image(_png_header(width, height))


@pytest.mark.parametrize(
    "array",
    [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 4), np.uint8), np.zeros(4, np.uint8), np.zeros((0, 4), np.uint8),
     np.zeros((1, 4, 4, 3), np.uint8)],
    ids=["float", "four channels", "one axis", "no rows", "batch"],
)  # fmt: skip
def test_other_arrays_are_refused(array: npt.NDArray[Any]) -> None:
    with pytest.raises(InputError, match="image array"):
        load_image(array)


# --- geometry ---


def _white_left_quarter(height: int, width: int) -> Image.Image:
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 4] = 255
    return Image.fromarray(pixels)


def test_stretch_keeps_every_part_and_crop_keeps_the_ratio() -> None:
    image = _white_left_quarter(20, 40)
    stretched = resize_image(image, STRETCH)
    assert (stretched[:, :2] == 255).all()
    assert (stretched[:, 2:] == 0).all()
    assert (resize_image(image, CONTRACT) == 0).all()  # 16x8 after scaling, 4 columns cut from each side
    upright = image.transpose(Image.Transpose.ROTATE_270)
    assert (resize_image(upright, STRETCH)[:2] == 255).all()
    assert (resize_image(upright, CONTRACT) == 0).all()


def test_crop_into_a_wide_input() -> None:
    wide = dataclasses.replace(CONTRACT, width_px=16)
    out = resize_image(_white_left_quarter(20, 40), wide)
    assert out.shape == (8, 16, 3)
    assert (out[:, :4] == 255).all()
    assert (out[:, 4:] == 0).all()


def test_image_of_the_right_size_is_left_as_it_is() -> None:
    pixels = _noise(8, 8)
    for contract in (CONTRACT, STRETCH, dataclasses.replace(CONTRACT, interpolation="bicubic")):
        assert np.array_equal(resize_image(Image.fromarray(pixels), contract), pixels)


def test_imagenet_evaluation_is_288_shorter_side_then_the_centre_256() -> None:
    contract = dataclasses.replace(CONTRACT, height_px=256, width_px=256, crop_pct=0.887, interpolation="bilinear")
    pixels = _noise(288, 400)  # its shorter side needs no scaling, so the crop can be seen alone
    assert np.array_equal(resize_image(Image.fromarray(pixels), contract), pixels[16:272, 72:328])


def test_shrinking_antialiases() -> None:
    checks = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    out = resize_image(load_image(checks), dataclasses.replace(STRETCH, interpolation="bilinear"))
    assert np.abs(out.astype(int) - 127).max() <= 2


@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.sampled_from([0.5, 0.887, 1.0]),
    st.sampled_from(["crop", "stretch"]), st.sampled_from(["bilinear", "bicubic", "nearest"]),
)  # fmt: skip
def test_every_image_comes_out_at_the_size_of_the_contract(
    height: int, width: int, out_height: int, out_width: int, crop_pct: float, resize: Any, interpolation: Any
) -> None:
    contract = dataclasses.replace(
        CONTRACT.with_size(out_height, out_width), crop_pct=crop_pct, resize=resize, interpolation=interpolation
    )
    x_NCHW = preprocess([np.full((height, width), 200, np.uint8)], contract)
    assert x_NCHW.shape == (1, 3, out_height, out_width)
    assert x_NCHW.dtype == np.float32
    expected = (200 / 255 - np.array(CONTRACT.mean)) / np.array(CONTRACT.std)
    # A flat image stays flat to the rounding of the filter: no black border slips in.
    assert np.abs(x_NCHW - expected[None, :, None, None]).max() < 0.02


def test_a_hairline_image_is_not_blown_up_to_gigabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """1x8000 px has its shorter side brought to 256: half a gigapixel, of which all but the centre is cut off."""
    resize = Image.Image.resize

    def bounded(self: Image.Image, size: tuple[int, int], *args: Any, **options: Any) -> Image.Image:
        assert size[0] * size[1] <= MAX_IMAGE_PIXELS, f"{size[0]}x{size[1]} px"
        return resize(self, size, *args, **options)

    monkeypatch.setattr(Image.Image, "resize", bounded)
    with contextlib.suppress(InputError):
        assert resize_image(Image.new("RGB", (1, 8000)), CONTRACT.with_size(256, 256)).shape == (256, 256, 3)


# --- normalisation ---


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_formula_in_float64(order: Any) -> None:
    images_NHWC = np.random.default_rng(1).integers(0, 256, (2, 8, 8, 3), np.uint8)
    images_NHWC[0, 0, 0], images_NHWC[0, 0, 1] = 0, 255
    contract = dataclasses.replace(CONTRACT, channel_order=order)
    ordered = images_NHWC if order == "rgb" else images_NHWC[..., ::-1]
    expected_NHWC = (ordered / 255.0 - np.array(contract.mean)) / np.array(contract.std)
    x_NCHW = normalise(images_NHWC, contract)
    assert x_NCHW.flags.c_contiguous
    assert np.abs(x_NCHW.transpose(0, 2, 3, 1) - expected_NHWC).max() < 1e-6


def test_mean_and_std_of_bgr_are_in_bgr_order() -> None:
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    contract = dataclasses.replace(CONTRACT, channel_order="bgr", mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 0.5))
    assert preprocess([red], contract)[0, :, 0, 0].tolist() == pytest.approx([-0.1, -0.2, 1.4])


def test_no_image_is_an_error() -> None:
    with pytest.raises(InputError, match="no image"):
        preprocess([], CONTRACT)


# --- folders ---


def test_images_of_a_folder_by_suffix_in_order(tmp_path: Path) -> None:
    for name in ("b/2.PNG", "b/1.jpeg", "a.webp", "notes.txt", "b/c/x.Jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    found = [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path)]
    assert found == ["a.webp", "b/1.jpeg", "b/2.PNG", "b/c/x.Jpg"]


def test_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="holds no image"):
        list_images(tmp_path)
    for place in (tmp_path / "none", tmp_path / "notes.txt"):
        with pytest.raises(InputError, match="not a folder"):
            list_images(place)


def test_eps_is_refused_whatever_the_file_is_called(tmp_path: Path) -> None:
    """Pillow would hand it to Ghostscript."""
    path = tmp_path / "photo.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(InputError, match="not an image"):
        load_image(path)


# --- letterbox ---


@pytest.mark.parametrize(
    ("height", "width", "inner"),
    [(8, 16, (4, 8, 2, 0)), (16, 8, (8, 4, 0, 2)), (8, 8, (8, 8, 0, 0)), (1, 100, (1, 8, 3, 0)), (3, 4, (6, 8, 1, 0))],
)
def test_letterbox_keeps_the_ratio_and_centres_on_grey(
    height: int, width: int, inner: tuple[int, int, int, int]
) -> None:
    white = Image.fromarray(np.full((height, width, 3), 255, np.uint8))
    made = resize_image(white, dataclasses.replace(CONTRACT, resize="letterbox"))
    rows, columns, top, left = inner
    expected = np.full((8, 8, 3), 128, np.uint8)
    expected[top : top + rows, left : left + columns] = 255
    assert np.array_equal(made, expected)
