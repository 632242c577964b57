from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cspdeploy.core.pixels.resample import Interpolation, resample

FILTERS: dict[Interpolation, Image.Resampling] = {
    "bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC, "nearest": Image.Resampling.NEAREST,
}  # fmt: skip
INTERPOLATIONS = st.sampled_from(list(FILTERS))
SIDE = st.one_of(st.integers(1, 6), st.integers(1, 150))


def _image(height: int, width: int, seed: int, *, hard: bool) -> np.ndarray:
    made = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return np.where(made > 127, np.uint8(255), np.uint8(0)) if hard else made  # hard edges overshoot in bicubic


@given(SIDE, SIDE, SIDE, SIDE, INTERPOLATIONS, st.booleans(), st.integers(0, 9))
def test_any_size_to_any_size_is_pillows_resize_bit_by_bit(
    height: int, width: int, out_height: int, out_width: int, interpolation: Interpolation, hard: bool, seed: int
) -> None:
    image = _image(height, width, seed, hard=hard)
    expected = np.asarray(Image.fromarray(image).resize((out_width, out_height), FILTERS[interpolation]))
    made = resample(image, (out_width, out_height), interpolation=interpolation)
    assert made.dtype == np.uint8
    np.testing.assert_array_equal(made, expected)


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize(
    ("size", "out"),
    [((300, 400), (96, 128)), ((37, 501), (256, 256)), ((28, 28), (256, 256)), ((400, 9), (64, 31)),
     ((9, 400), (5, 64)),
     ((100, 50), (50, 25)), ((101, 50), (50, 25)), ((50, 64), (25, 64)), ((64, 50), (64, 99)), ((1, 1), (300, 2))],
)  # fmt: skip
def test_sizes_of_photographs_and_both_orders_of_the_passes(
    size: tuple[int, int], out: tuple[int, int], interpolation: Interpolation
) -> None:
    image = _image(*size, 1, hard=False)
    expected = np.asarray(Image.fromarray(image).resize(out[::-1], FILTERS[interpolation]))
    np.testing.assert_array_equal(resample(image, out[::-1], interpolation=interpolation), expected)


@given(SIDE, SIDE, INTERPOLATIONS, st.data())
def test_a_window_is_that_part_of_the_whole(
    height: int, width: int, interpolation: Interpolation, data: st.DataObject
) -> None:
    out_height, out_width = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 90))
    left, top = data.draw(st.integers(0, out_width - 1)), data.draw(st.integers(0, out_height - 1))
    right, bottom = data.draw(st.integers(left + 1, out_width)), data.draw(st.integers(top + 1, out_height))
    image = _image(height, width, 2, hard=False)
    whole = resample(image, (out_width, out_height), interpolation=interpolation)
    window = (left, top, right, bottom)
    made = resample(image, (out_width, out_height), interpolation=interpolation, window=window)
    np.testing.assert_array_equal(made, whole[top:bottom, left:right])
    assert made.flags.c_contiguous
