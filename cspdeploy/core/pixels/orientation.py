"""Which way up a photograph was taken: EXIF (CIPA DC-008), else XMP, as Pillow's `getexif` reads them."""

from __future__ import annotations

import re
import struct

import numpy as np
import numpy.typing as npt

__all__ = ["EXIF_HEADER", "read_orientation", "turn_upright"]

Pixels = npt.NDArray[np.uint8]

EXIF_HEADER = b"Exif\0\0"
_ORIENTATION = 0x0112
_XMP = re.compile(rb'tiff:Orientation(="|>)([0-9])')
# Type of a value: its struct code. A number in any other type is not taken, which is what Pillow does.
_INTEGERS = {3: "H", 4: "L", 8: "h", 9: "l"}


def read_orientation(exif: bytes, xmp: bytes = b"") -> int:
    """1 to 8 as EXIF numbers them; 1, upright, where nothing is said or what is said cannot be read."""
    try:
        found = _from_exif(exif)
    except struct.error:
        found = None
    if found is None:
        said = _XMP.search(xmp)
        found = int(said[2]) if said else 1
    return found if found in range(1, 9) else 1


def _from_exif(exif: bytes) -> int | None:
    while exif.startswith(EXIF_HEADER):
        exif = exif[len(EXIF_HEADER) :]
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return None
    (directory,) = struct.unpack_from(order + "L", exif, 4)
    (num_entries,) = struct.unpack_from(order + "H", exif, directory)
    for entry in range(num_entries):
        at = directory + 2 + 12 * entry
        tag, kind, count = struct.unpack_from(order + "HHL", exif, at)
        if tag == _ORIENTATION and kind in _INTEGERS and count == 1:
            (value,) = struct.unpack_from(order + _INTEGERS[kind], exif, at + 8)
            return int(value)
    return None


def turn_upright(image_HWC: Pixels, orientation: int) -> Pixels:
    """Undo what EXIF says was done: `[H, W, 3]` uint8, contiguous; height and width change places from 5 on."""
    if orientation >= 5:
        image_HWC = image_HWC.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        image_HWC = image_HWC[::-1]
    if orientation in (2, 3, 6, 7):
        image_HWC = image_HWC[:, ::-1]
    return np.ascontiguousarray(image_HWC)
