"""What a decoder of this folder says of a file that it does not read. `decode` makes the user's error of it."""

from __future__ import annotations

__all__ = [
    "MAX_IMAGE_PIXELS",
    "MAX_IMAGE_SIDE_PX",
    "BrokenImageError",
    "OversizeImageError",
    "UnsupportedImageError",
    "check_size",
]

# A 100-megapixel picture is 300 MB as RGB; larger ones are taken for decompression bombs.
MAX_IMAGE_PIXELS = 100_000_000
# That of JPEG, and more than a camera has. Decoders in numpy take a time for each row, whatever is in it: of a PNG of
# 1x100,000,000 px half an hour.
MAX_IMAGE_SIDE_PX = 65_535


class BrokenImageError(ValueError):
    """The file is truncated, or breaks the rules of its format."""


class UnsupportedImageError(ValueError):
    """The file may be sound, but uses a part of its format that is not built in."""


class OversizeImageError(ValueError):
    """The image has more than `MAX_IMAGE_PIXELS` pixels, or a side of more than `MAX_IMAGE_SIDE_PX`."""


def check_size(width: int, height: int) -> None:
    """Refuse a size before anything is allocated for it.

    Raises:
        BrokenImageError: no rows or no columns.
        OversizeImageError: more than `MAX_IMAGE_PIXELS` pixels, or a side of more than `MAX_IMAGE_SIDE_PX`.
    """
    if width < 1 or height < 1:
        raise BrokenImageError(f"size {width}x{height} px")
    if width * height > MAX_IMAGE_PIXELS:
        raise OversizeImageError(f"got {width}x{height} px, expected at most {MAX_IMAGE_PIXELS} pixels")
    if max(width, height) > MAX_IMAGE_SIDE_PX:
        raise OversizeImageError(f"got {width}x{height} px, expected at most {MAX_IMAGE_SIDE_PX} px a side")
