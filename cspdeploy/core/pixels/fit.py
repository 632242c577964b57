"""Where a contract puts an image: the size to scale to, and which part of that is kept."""

from __future__ import annotations

from dataclasses import dataclass

from cspdeploy.core.errors import InputError
from cspdeploy.core.pixels.faults import MAX_IMAGE_PIXELS
from cspdeploy.core.spec import Preprocess

__all__ = ["LETTERBOX_GREY", "Fit", "fit_image"]

LETTERBOX_GREY = 128
"""Darknet pads its floats with 0.5; this is the nearest byte, 0.002 above."""


@dataclass(frozen=True, slots=True)
class Fit:
    """An image is scaled to `scaled_px`, and laid under a window of the contract's size.

    Attributes:
        scaled_px: width and height.
        left_px: of the window within the scaled image; negative where a border stays to its left.
        top_px: likewise; negative where a border stays above.
    """

    scaled_px: tuple[int, int]
    left_px: int
    top_px: int


def fit_image(contract: Preprocess, *, width: int, height: int) -> Fit:
    """The place of an image of `width` x `height` px in the contract's window.

    Raises:
        InputError: the image is so thin that it would have more than `MAX_IMAGE_PIXELS` pixels when scaled.
    """
    size = (contract.width_px, contract.height_px)
    if contract.resize == "stretch":
        return Fit(size, 0, 0)
    if contract.resize == "letterbox":
        return _letterbox(size, width=width, height=height)
    scale = max(
        int(contract.width_px / contract.crop_pct) / width,
        int(contract.height_px / contract.crop_pct) / height,
    )
    scaled = (max(size[0], round(width * scale)), max(size[1], round(height * scale)))
    if scaled[0] * scaled[1] > MAX_IMAGE_PIXELS:
        raise InputError(f"image of {width}x{height} px: too thin, scaled it has {scaled[0]}x{scaled[1]} px")
    # Rounds as torchvision's CenterCrop does, so that published accuracies hold.
    return Fit(scaled, round((scaled[0] - size[0]) / 2), round((scaled[1] - size[1]) / 2))


def _letterbox(size: tuple[int, int], *, width: int, height: int) -> Fit:
    """Darknet's letterbox_image: the longer side fits, the rest is grey. Sizes and offsets are cut to whole pixels."""
    if size[0] * height < size[1] * width:
        inner = (size[0], max(1, height * size[0] // width))
    else:
        inner = (max(1, width * size[1] // height), size[1])
    return Fit(inner, -((size[0] - inner[0]) // 2), -((size[1] - inner[1]) // 2))
