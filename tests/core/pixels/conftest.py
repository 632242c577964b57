"""Images as cameras and screens make them: smooth, noisy, with hard edges; and what Pillow makes of a file."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from cspdeploy.core.errors import InputError
from cspdeploy.core.preprocess import Decoder, read_pixels

Pixels = npt.NDArray[np.uint8]


@pytest.fixture(scope="session")
def picture() -> Callable[[int, int], Pixels]:
    """`picture(height, width)`: gradients under noise, with lines as thin as those of text."""

    def make(height: int, width: int) -> Pixels:
        rng = np.random.default_rng(height * 1000 + width)
        coarse = rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
        made = (smooth + rng.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)
        made[height // 3 : height // 3 + 3, ::3] = 0
        made[::5, width // 2 : width // 2 + 2] = (255, 40, 0)
        return made

    return make


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    """`encode(image or array, "JPEG", quality=90)`: a file as Pillow writes it."""

    def make(image: Image.Image | Pixels, kind: str, **options: Any) -> bytes:
        buffer = io.BytesIO()
        (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
        return buffer.getvalue()

    return make


@pytest.fixture(scope="session")
def same_as_pillow() -> Callable[[bytes], None]:
    """`same_as_pillow(file)`: both decoders give the same pixels."""

    def check(data: bytes) -> None:
        np.testing.assert_array_equal(read_pixels(data, by="built in"), read_pixels(data, by="pillow"))

    return check


@pytest.fixture(scope="session")
def read_or_refuse() -> Callable[..., Pixels | None]:
    """`read_or_refuse(file, by=...)`: the pixels, or none where they are refused. Any other error is a failure."""

    def read(data: bytes, by: Decoder = "built in") -> Pixels | None:
        try:
            return read_pixels(data, by=by)
        except InputError:
            return None

    return read
