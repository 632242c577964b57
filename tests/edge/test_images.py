from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from cspdeploy.core.errors import EXIT_USAGE, InputError
from cspdeploy.core.spec import Preprocess
from cspdeploy.core.types import Frontend
from cspdeploy.edge.images import Feed, require_channel_order

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)


@pytest.fixture
def feed(tiny_contract: Preprocess) -> Feed:
    return Feed(contract=tiny_contract)


@pytest.mark.parametrize(
    ("array", "told", "fix"),
    [
        (PIXELS / 255.0, "float64 in 0..1, expected uint8 0..255", "(image * 255)"),
        ((PIXELS / 255).astype(np.float32), "float32 in 0..1, expected uint8 0..255", "(image * 255)"),
        (PIXELS.astype(np.float32), "float32 in 0..255, expected uint8", "image.round()"),
        (PIXELS.astype(np.int64), "int64 in 0..255, expected uint8", "image.round()"),
        (PIXELS / 127.5 - 1.0, "float64 from -1 to 1, expected uint8", "predictor.raw"),
        (PIXELS.astype(np.uint16) * 256, "uint16 from 0 to 6.528e+04, expected uint8", "scale it"),
        (np.full((4, 4, 3), np.nan), "NaN", ""),
        (PIXELS > 7, "bool", "* 255"),
        (np.array([["a"]]), "<U1", ""),
        (PIXELS.transpose(2, 0, 1), "channels first", "transpose(1, 2, 0)"),
        (np.concatenate([PIXELS, PIXELS[..., :1]], 2), "with transparency", "image[:, :, :3]"),
        (PIXELS[None], "a batch", "predictor.predict"),
        (PIXELS[0, 0], "uint8 [3]", ""),
        (PIXELS[:, :, :2], "uint8 [20, 24, 2]", ""),
        (PIXELS[:0], "without pixels", ""),
        ((PIXELS / 255).astype(np.uint8) | (PIXELS == 255), "uint8 that holds 0 and 1 alone", "(image * 255)"),
    ],
)
def test_array_that_is_no_image_is_told_what_it_seems_to_be(feed: Feed, array: np.ndarray, told: str, fix: str) -> None:
    with pytest.raises(InputError) as caught:
        feed.prepare(array)
    assert told in caught.value.message
    assert fix in caught.value.fix
    assert caught.value.exit_code == EXIT_USAGE
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "told", "fix"),
    [
        (Image.fromarray(PIXELS), "got PIL.Image", "numpy.asarray(image.convert('RGB'))"),
        ([PIXELS, PIXELS], "got builtins.list", "predictor.predict(images)"),
        (None, "got builtins.NoneType", ""),
        (7, "got builtins.int", ""),
    ],
)
def test_what_is_no_image_at_all(feed: Feed, source: object, told: str, fix: str) -> None:
    with pytest.raises(InputError) as caught:
        feed.prepare(source)  # type: ignore[arg-type]
    assert told in caught.value.message
    assert fix in caught.value.fix


def test_arrays_of_opencv_are_turned_and_files_are_not(tiny_contract: Preprocess, tmp_path: object) -> None:
    rgb, bgr = (Feed(contract=tiny_contract, channel_order=order) for order in ("rgb", "bgr"))
    assert np.array_equal(rgb.prepare(PIXELS), bgr.prepare(PIXELS[:, :, ::-1]))
    assert not np.array_equal(rgb.prepare(PIXELS), bgr.prepare(PIXELS))
    path = f"{tmp_path}/photo.png"
    Image.fromarray(PIXELS).save(path)
    assert np.array_equal(rgb.prepare(path), bgr.prepare(path))
    with pytest.raises(InputError, match="channel_order 'gbr': unknown, expected 'rgb' or 'bgr'"):
        require_channel_order("gbr")


@pytest.mark.parametrize("resize", [False, True])
@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_graph_with_preprocessing_gets_bytes(tiny_contract: Preprocess, order: str, resize: bool) -> None:
    frontend = Frontend(channel_order=order, resize=resize)  # type: ignore[arg-type]
    made = Feed(contract=tiny_contract, frontend=frontend).prepare(PIXELS)
    assert made.dtype == np.uint8
    assert made.flags.c_contiguous
    assert made.shape == ((1, 20, 24, 3) if resize else (1, 32, 32, 3))
    if resize:
        assert np.array_equal(made[0], PIXELS if order == "rgb" else PIXELS[:, :, ::-1])


@pytest.mark.parametrize("level", [0, 1])
def test_frame_of_one_level_is_an_image(feed: Feed, level: int) -> None:
    """A camera with its cap on."""
    feed.prepare(np.full((32, 32, 3), level, np.uint8))


def test_raw_bytes_of_floats_that_were_cast(tiny_contract: Preprocess) -> None:
    raw = Feed(contract=tiny_contract, frontend=Frontend())
    x = np.stack([np.full((32, 32, 3), 9, np.uint8), np.eye(32, dtype=np.uint8)[:, :, None] + np.zeros(3, np.uint8)])
    raw.check_raw(x[:1], shape=("N", 32, 32, 3))
    with pytest.raises(InputError, match="raw input: got uint8 that holds 0 and 1 alone"):
        raw.check_raw(x, shape=("N", 32, 32, 3))


@pytest.mark.parametrize("resize", [False, True])
@pytest.mark.parametrize("order", ["rgb", "bgr"])
@pytest.mark.parametrize("size", [(32, 32), (20, 24)])
def test_nothing_of_the_callers_array_is_kept(
    tiny_contract: Preprocess, order: str, resize: bool, size: tuple[int, int]
) -> None:
    frontend = Frontend(channel_order=order, resize=resize)  # type: ignore[arg-type]
    for given in ("rgb", "bgr"):
        buffer = np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8)
        made = Feed(contract=tiny_contract, frontend=frontend, channel_order=given).prepare(buffer)  # type: ignore[arg-type]
        kept = made.copy()
        buffer[:] = 0
        assert np.array_equal(made, kept)


SHAPE = (1, 3, 32, 32)


@pytest.mark.parametrize(
    ("x", "told"),
    [
        (np.zeros(SHAPE), "got float64, expected float32"),
        (np.zeros(SHAPE, np.uint8), "got uint8, expected float32"),
        ([0.0], "got list"),
        (np.zeros((3, 32, 32), np.float32), "expected [1, 3, 32, 32]"),
        (np.zeros((1, 3, 32, 31), np.float32), "expected [1, 3, 32, 32]"),
        (np.zeros((4, 3, 32, 32), np.float32), "got 4 images, this artifact takes exactly 1 a call"),
        (np.full(SHAPE, 128, np.float32), "values from 128 to 128, expected -2"),
        (np.full(SHAPE, np.nan, np.float32), "NaN"),
    ],
)
def test_raw_input_that_is_not_the_artifacts_own(feed: Feed, x: object, told: str) -> None:
    with pytest.raises(InputError) as caught:
        feed.check_raw(x, shape=SHAPE)
    assert told in caught.value.message


@pytest.mark.parametrize("value", [-2.0, 0.0, 2.0])
def test_raw_input_within_the_range_of_pixels(feed: Feed, value: float) -> None:
    feed.check_raw(np.full(SHAPE, value, np.float32), shape=SHAPE)
    feed.check_raw(np.full((5, *SHAPE[1:]), value, np.float32), shape=("N", 3, 32, 32))
