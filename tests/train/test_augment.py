from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cspdeploy.train.augment import augment

Pixels = npt.NDArray[np.uint8]


def _images(num: int, height: int = 32, width: int = 32) -> Pixels:
    return np.random.default_rng(0).integers(1, 256, (num, height, width, 3), np.uint8)  # no black: the filling shows


def _moves(image: Pixels, shift: int) -> list[Pixels]:
    """All that may become of an image."""
    height, width, _ = image.shape
    padded = np.pad(image, ((shift, shift), (shift, shift), (0, 0)))
    windows = [
        padded[top : top + height, left : left + width] for top in range(2 * shift + 1) for left in range(2 * shift + 1)
    ]
    return windows + [window[:, ::-1] for window in windows]


def test_every_image_is_mirrored_or_moved_by_at_most_a_sixteenth() -> None:
    images = _images(12)
    for image, changed in zip(images, augment(images, np.random.default_rng(1)), strict=True):
        assert any(np.array_equal(changed, move) for move in _moves(image, 2))


def test_all_moves_occur() -> None:
    image = _images(1, 8, 8)
    changed = augment(np.repeat(image, 400, axis=0), np.random.default_rng(1))
    seen = {other.tobytes() for other in changed}
    assert seen == {move.tobytes() for move in _moves(image[0], 1)}


def test_half_of_them_are_mirrored() -> None:
    """Left half dark, right half bright, so that a small shift does not hide the direction."""
    images = np.zeros((1000, 16, 16, 3), np.uint8)
    images[:, :, 8:] = 255
    changed = augment(images, np.random.default_rng(1)).astype(int)
    mirrored = (changed[:, :, :8].sum((1, 2, 3)) > changed[:, :, 8:].sum((1, 2, 3))).mean()
    assert 0.4 < mirrored < 0.6


def test_same_seed_gives_the_same_images_and_the_originals_stay() -> None:
    images = _images(6, 20, 12)
    before = images.copy()
    first, second, third = (augment(images, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, third)
    assert np.array_equal(images, before)
    assert first.shape == images.shape
    assert first.dtype == np.uint8


def test_part_of_a_batch_is_changed_as_the_whole_is() -> None:
    images = _images(6)
    whole = augment(images, np.random.default_rng(1))
    part = augment(images[2:4], np.random.default_rng(1), part=slice(2, 4), num=6)
    assert np.array_equal(part, whole[2:4])
