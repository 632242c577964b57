"""Random flips and shifts of a batch, before normalisation. Shapes: N images, H height, W width."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["augment"]

SHIFT_SHARE = 1 / 16  # of the side: 2 px at 32


def augment(images_NHWC: npt.NDArray[np.uint8], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Mirror each image with probability one half and move it by up to a sixteenth of its size, filling with black."""
    num, height, width, _ = images_NHWC.shape
    shift = max(1, round(SHIFT_SHARE * max(height, width)))
    padded = np.pad(images_NHWC, ((0, 0), (shift, shift), (shift, shift), (0, 0)))
    tops, lefts = rng.integers(0, 2 * shift + 1, (2, num)).tolist()
    flips = rng.integers(0, 2, size=(num,)).tolist()
    out = np.empty_like(images_NHWC)
    for i, (top, left, flip) in enumerate(zip(tops, lefts, flips, strict=True)):
        window = padded[i, top : top + height, left : left + width]
        out[i] = window[:, ::-1] if flip else window
    return out
