"""Images that are like photographs for all that an audit of images measures, and that no file has to hold."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]


def pictures(count: int, *, height: int = 40, width: int = 48, colour: bool = True, seed: int = 0) -> Pixels:
    """Smooth ground, hard-edged shapes, grain: `[count, height, width, 3]`, without colour `[count, height, width]`."""
    generator = np.random.default_rng(seed)
    channels = 3 if colour else 1
    made = np.empty((count, height, width, channels), np.uint8)
    for picture in made:
        for channel in range(channels):
            coarse = generator.integers(30, 200, (5, 5), np.uint8)
            ground = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
            picture[:, :, channel] = np.asarray(ground)
        for _ in range(3):
            top, left = generator.integers(0, height // 2), generator.integers(0, width // 2)
            bottom, right = top + generator.integers(4, height // 2), left + generator.integers(4, width // 2)
            picture[top:bottom, left:right] = generator.integers(0, 256, channels)
        grain = generator.integers(-4, 5, picture.shape)
        picture[:] = (picture + grain).clip(0, 255).astype(np.uint8)
    return made if colour else made[..., 0]
