"""What one image tells about a set of images: its identity, its size, whether it is blank, grey or noise.

Shapes: H, W of the network's input; h, w of the image.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

__all__ = ["THUMBNAIL_PX", "ImageTraits", "measure_image"]

CONSTANT_LEVELS = 3
"""Of 255: an image that spans no more is of one colour. An image of values in [0, 1] that was stored as bytes spans 1,
a blank scan saved as JPEG 2."""

GREY_LEVELS = 2.0
"""Mean difference between the channels of an image without colour. JPEG brings one of up to 1 into a grey image."""

NOISE_CORRELATION = 0.35
"""Between neighbouring pixels, below which an image is noise.

Lowest of 1,300 real images (photographs, crops of them, cut-outs, Fashion-MNIST, rendered letters, diagrams, screens),
at full size and reduced alike: 0.48. Highest of 430 of noise (uniform and normal, 8 to 640 px, as JPEG, resized by a
factor between 0.5 and 8): 0.31 at full size unless enlarged, 0.28 reduced.
"""
COARSE_PX = 16
"""The shorter side to which an image is reduced, at least: enlarged noise shows itself there, a dithered photograph,
which is noise at full size (-0.19 to 0.29), is a photograph there (0.87)."""
MAX_NATIVE_PX = 512
"""Of an image at full size its centre tells enough, and the cost is bounded."""

THUMBNAIL_PX = 16
"""Side of the thumbnail that near copies are found by."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImageTraits:
    """Of one image; about a kilobyte, so that thousands are kept in no time."""

    pixel_digest: bytes
    """SHA-256 of the decoded pixels and their shape: the same for a picture stored in two lossless formats."""
    width_px: int
    height_px: int
    constant: bool
    grey: bool
    fine_correlation: float
    """Of neighbouring pixels at full size, in [-1, 1]; 1 for a constant image."""
    coarse_correlation: float
    """The same after reduction to 16 to 31 px."""
    thumbnail: npt.NDArray[np.uint8]
    """`[16 * 16]`, lightness."""

    @property
    def is_noise(self) -> bool:
        """Noise beyond doubt: no structure at any scale."""
        return max(self.fine_correlation, self.coarse_correlation) < NOISE_CORRELATION

    @property
    def lacks_coarse_structure(self) -> bool:
        """Noise that was enlarged, or a fine texture such as sand, which cannot be told apart."""
        return self.coarse_correlation < NOISE_CORRELATION


def measure_image(image: Image.Image, resized_HWC: npt.NDArray[np.uint8]) -> ImageTraits:
    """Measure one image.

    Args:
        image: decoded, RGB, `[h, w]`.
        resized_HWC: the same image at the network's size, `[H, W, 3]` uint8 RGB.
    """
    constant = _spans_nothing(image) or _spans_nothing(Image.fromarray(resized_HWC))
    fine, coarse = (1.0, 1.0) if constant else _correlations(image)
    thumbnail = image.convert("L").resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BOX)
    return ImageTraits(
        pixel_digest=hashlib.sha256(f"{image.size}".encode() + image.tobytes()).digest(),
        width_px=image.width,
        height_px=image.height,
        constant=constant,
        grey=_mean_spread(resized_HWC) < GREY_LEVELS,
        fine_correlation=fine,
        coarse_correlation=coarse,
        # A copy: what Pillow hands out is the end of a buffer of 64 KB, and thousands of them leave the heap in shreds.
        thumbnail=np.asarray(thumbnail).ravel().copy(),
    )


def _spans_nothing(image: Image.Image) -> bool:
    histogram = np.asarray(image.histogram()).reshape(-1, 256)
    spans = [levels[-1] - levels[0] for levels in map(np.flatnonzero, histogram)]
    return bool(max(spans) <= CONSTANT_LEVELS)


def _mean_spread(image_HWC: npt.NDArray[np.uint8]) -> float:
    """Mean difference between the largest and the smallest channel of a pixel."""
    red, green, blue = (image_HWC[:, :, channel].astype(np.int16) for channel in range(3))
    # Pairwise: a reduction along an axis of three is ten times as slow.
    largest = np.maximum(np.maximum(red, green), blue)
    return float((largest - np.minimum(np.minimum(red, green), blue)).mean())


def _correlations(image: Image.Image) -> tuple[float, float]:
    """Of neighbouring pixels at full size, and after reduction."""
    width, height = min(image.width, MAX_NATIVE_PX), min(image.height, MAX_NATIVE_PX)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    fine = image.crop((left, top, left + width, top + height)).convert("F")
    factor = max(1, min(image.size) // COARSE_PX)
    # Floats before the reduction: means of a large noise image differ by less than one level.
    coarse = image.convert("F").reduce(factor)
    return _neighbour_correlation(np.asarray(fine)), _neighbour_correlation(np.asarray(coarse))


def _neighbour_correlation(image_HW: npt.NDArray[np.float32]) -> float:
    """The larger of the horizontal and the vertical one: stripes have structure in one direction alone."""
    centred = image_HW.astype(np.float64) - image_HW.mean(dtype=np.float64)
    variance = float(np.square(centred).mean())
    pairs = [(centred[:, 1:], centred[:, :-1]), (centred[1:], centred[:-1])]
    products = [float((a * b).mean()) for a, b in pairs if a.size]
    return max(products) / variance if variance > 0 and products else 0.0
