from __future__ import annotations

import numpy as np
import pytest

from cspdeploy.core.pixels.fit import LETTERBOX_GREY
from cspdeploy.train import detect_augment
from cspdeploy.train.detect_augment import BoxedImage, augment_one, make_mosaic, mirror, place

SIDE = 64
COLOURS = ((250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0))


def _scene(seed: int, index: int = 0) -> BoxedImage:
    """A black picture with one rectangle in the colour of its class, of sides that are multiples of 8."""
    rng = np.random.default_rng(seed)
    width, height = (int(side) * 8 for side in rng.integers(2, 5, 2))
    left, top = (int(rng.integers(0, (SIDE - side) // 8 + 1)) * 8 for side in (width, height))
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    pixels[top : top + height, left : left + width] = COLOURS[index]
    boxes = np.array([[left, top, left + width, top + height]], np.float64)
    return BoxedImage(pixels_HWC=pixels, boxes_M4=boxes, classes_M=np.array([index]))


def _seen(image: np.ndarray, index: int = 0) -> list[int]:
    """Left, top, right, bottom of that colour, by half of its brightness: where a scaled edge lies."""
    return _bounds(((image > 125) == (np.array(COLOURS[index]) > 125)).all(-1))


def _bounds(mask: np.ndarray) -> list[int]:
    rows, columns = np.nonzero(mask)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


@pytest.fixture
def plain_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The colours say which rectangle is which."""
    monkeypatch.setattr(detect_augment, "recolour", lambda pixels, rng: pixels)


def test_a_mirrored_box_is_where_its_pixels_are() -> None:
    image = mirror(_scene(3))
    assert image.boxes_M4[0].tolist() == _seen(image.pixels_HWC)


@pytest.mark.parametrize(("scale", "left", "top"), [(1.0, 0, 0), (1.0, 9, -3), (0.5, 20, 4), (2.0, -50, -40)])
def test_a_placed_box_is_where_its_pixels_are(scale: float, left: int, top: int) -> None:
    canvas = np.full((SIDE, SIDE, 3), LETTERBOX_GREY, np.uint8)
    image = _scene(1)
    boxes, classes = place(canvas, image, window=(0, 0, SIDE, SIDE), scale=scale, left=left, top=top)
    assert classes.tolist() == [0]
    assert boxes[0] == pytest.approx(_seen(canvas), abs=1.0 if scale != 1 else 0)  # a scaled edge is blurred


def test_nothing_is_painted_outside_the_window() -> None:
    canvas = np.full((SIDE, SIDE, 3), LETTERBOX_GREY, np.uint8)
    place(canvas, _scene(0), window=(10, 20, 40, 50), scale=1.0, left=0, top=0)
    outside = np.ones((SIDE, SIDE), bool)
    outside[20:50, 10:40] = False
    assert (canvas[outside] == LETTERBOX_GREY).all()


@pytest.mark.parametrize(("left", "kept"), [(0, 1), (-14, 1), (-16, 0), (-40, 0), (70, 0), (-70, 0)])
def test_a_box_of_which_too_little_is_seen_goes(left: int, kept: int) -> None:
    """20 px wide: at -14 six of them are left, three tenths; at -16 a fifth."""
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    image = BoxedImage(pixels_HWC=pixels, boxes_M4=np.array([[0.0, 0, 20, 20]]), classes_M=np.array([1]))
    boxes, classes = place(pixels.copy(), image, window=(0, 0, SIDE, SIDE), scale=1.0, left=left, top=0)
    assert (len(boxes), len(classes)) == (kept, kept)
    assert (boxes >= 0).all()


@pytest.mark.parametrize("seed", range(12))
def test_boxes_of_a_mosaic_are_exact(seed: int, plain_colours: None) -> None:
    images = [_scene(10 * seed + i, i) for i in range(4)]
    mosaic = make_mosaic(images, np.random.default_rng(seed))
    assert mosaic.pixels_HWC.shape == (SIDE, SIDE, 3)
    assert (mosaic.boxes_M4 >= 0).all()
    assert (mosaic.boxes_M4 <= SIDE).all()
    for box, index in zip(mosaic.boxes_M4, mosaic.classes_M.tolist(), strict=True):
        assert box == pytest.approx(_seen(mosaic.pixels_HWC, index), abs=1.0)


def test_a_mosaic_shows_four_pictures_in_their_quarters(plain_colours: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect_augment, "MIN_LEFT", 0.0)
    full = [
        BoxedImage(pixels_HWC=np.full((SIDE, SIDE, 3), value, np.uint8), boxes_M4=np.array([[0.0, 0, SIDE, SIDE]]),
                   classes_M=np.array([value]))
        for value in (1, 2, 3, 4)
    ]  # fmt: skip
    mosaic = make_mosaic(full, np.random.default_rng(0))
    assert mosaic.classes_M.tolist() == [1, 2, 3, 4]
    for box, value in zip(mosaic.boxes_M4, (1, 2, 3, 4), strict=True):
        assert _bounds(mosaic.pixels_HWC[..., 0] == value) == box.tolist()


@pytest.mark.parametrize("seed", range(12))
def test_boxes_of_a_single_picture_are_exact(seed: int, plain_colours: None) -> None:
    found = augment_one(_scene(seed), np.random.default_rng(seed))
    if len(found.boxes_M4):
        assert found.boxes_M4[0] == pytest.approx(_seen(found.pixels_HWC), abs=1.0)


def test_colours_change_and_places_do_not() -> None:
    image = _scene(2)
    image.pixels_HWC[image.pixels_HWC[..., 0] > 0] = (180, 180, 90)
    rng = np.random.default_rng(0)
    made = [detect_augment.recolour(image.pixels_HWC, rng) for _ in range(8)]
    assert len({one.tobytes() for one in made}) == 8
    for one in made:
        assert _bounds(one.max(-1) > 60) == image.boxes_M4[0].tolist()


def test_the_same_random_numbers_give_the_same_picture() -> None:
    images = [_scene(i) for i in range(4)]
    one, two = (make_mosaic(images, np.random.default_rng(5)) for _ in range(2))
    assert np.array_equal(one.pixels_HWC, two.pixels_HWC)
    assert np.array_equal(one.boxes_M4, two.boxes_M4)
