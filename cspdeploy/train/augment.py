"""Random flips and shifts of a batch, before normalisation. Shapes: N images, H height, W width."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["augment"]

SHIFT_SHARE = 1 / 16  # of the side: 2 px at 32


def augment(
    images_NHWC: npt.NDArray[np.uint8], rng: np.random.Generator, *, part: slice | None = None, num: int | None = None
) -> npt.NDArray[np.uint8]:
    """Mirror each image with probability one half and move it by up to a sixteenth of its size, filling with black.

    Args:
        images_NHWC: a batch, or some images of it.
        rng: gives numbers for the whole batch, so that an image is changed in the same way whoever changes it.
        part: which images of the batch they are; None: all.
        num: images of the batch; None: those given.
    """
    given, height, width, _ = images_NHWC.shape
    num = given if num is None else num
    shift = max(1, round(SHIFT_SHARE * max(height, width)))
    padded = np.pad(images_NHWC, ((0, 0), (shift, shift), (shift, shift), (0, 0)))
    tops, lefts = rng.integers(0, 2 * shift + 1, (2, num))
    flips = rng.integers(0, 2, size=(num,))
    own = slice(None) if part is None else part
    moves = zip(tops[own].tolist(), lefts[own].tolist(), flips[own].tolist(), strict=True)
    out = np.empty_like(images_NHWC)
    for image, changed, (top, left, flip) in zip(padded, out, moves, strict=True):
        window = image[top : top + height, left : left + width]
        changed[...] = window[:, ::-1] if flip else window
    return out
