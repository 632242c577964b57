"""libjpeg's accurate integer inverse DCT (jidctint.c, "islow") for all blocks at once, equal to the last bit.

Shapes: B blocks, V frequency down, U frequency across, Y row and X column within a block (8 each).
Source: Loeffler, Ligtenberg, Moschytz, "Practical fast 1-D DCT algorithms with 11 multiplications", ICASSP 1989.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cspdeploy.core.pixels.faults import BrokenImageError

__all__ = ["ZIGZAG", "blocks_to_plane"]

Pixels = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int32]

# Place in the block, row by row, of each coefficient in the order of the file.
ZIGZAG = np.array(
    [0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6, 7, 14, 21,
     28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61,
     54, 47, 55, 62, 63]
)  # fmt: skip
_FROM_ZIGZAG = np.argsort(ZIGZAG)

_CONST_BITS, _PASS1_BITS = 13, 2
# Samples of 8 bits have coefficients of up to 1024, and rounding to a multiple of the quantiser at most doubles one.
# Beyond, the builds of libjpeg overflow each in its own way: no encoder made the file so.
_MOST = 2048

# Blocks at a time: their 256 bytes each, and the sums made of them, stay in the second-level cache.
_BLOCKS = 1024


def blocks_to_plane(coefficients: npt.NDArray[np.int16], quantisers: npt.NDArray[np.int32], *, columns: int) -> Pixels:
    """Dequantise and transform.

    Args:
        coefficients: `[B, 64]`, in zigzag order, blocks row by row.
        quantisers: `[64]`, in zigzag order.
        columns: blocks in a row.

    Returns:
        `[8 B / columns, 8 columns]` uint8.

    Raises:
        BrokenImageError: a coefficient that no 8-bit image has.
    """
    rows = len(coefficients) // columns
    plane = np.empty((rows, 8, columns, 8), np.uint8)
    step = max(1, _BLOCKS // columns)
    for first in range(0, rows, step):
        part = coefficients[first * columns : (first + step) * columns]
        dequantised = part * quantisers
        if int(dequantised.max()) > _MOST or int(dequantised.min()) < -_MOST:
            raise BrokenImageError("JPEG coefficient out of range")
        x_VUB = np.ascontiguousarray(dequantised[:, _FROM_ZIGZAG].T).reshape(8, 8, -1)
        rows_first = _transform(list(x_VUB), _CONST_BITS - _PASS1_BITS)
        turned = list(np.stack(rows_first).transpose(1, 0, 2))
        x_XYB = np.stack(_transform(turned, _CONST_BITS + _PASS1_BITS + 3))
        x_XYB += 128
        made = np.clip(x_XYB, 0, 255, out=x_XYB).astype(np.uint8).reshape(8, 8, -1, columns)
        plane[first : first + step] = made.transpose(2, 1, 3, 0)
    return plane.reshape(rows * 8, columns * 8)


def _transform(x: list[Ints], shift: int) -> list[Ints]:
    """One pass over 8 inputs of any shape, each sum rounded and shifted down by `shift` bits."""
    half = 1 << (shift - 1)
    z1 = (x[2] + x[6]) * 4433  # 0.541196100 in 13 bits, and so on below
    even2 = z1 - x[6] * 15137
    even3 = z1 + x[2] * 6270
    even0 = ((x[0] + x[4]) << _CONST_BITS) + half
    even1 = ((x[0] - x[4]) << _CONST_BITS) + half
    e0, e3, e1, e2 = even0 + even3, even0 - even3, even1 + even2, even1 - even2

    z1, z2, z3, z4 = x[7] + x[1], x[5] + x[3], x[7] + x[3], x[5] + x[1]
    z5 = (z3 + z4) * 9633
    z1 *= -7373
    z2 *= -20995
    z3 = z3 * -16069 + z5
    z4 = z4 * -3196 + z5
    o0 = x[7] * 2446 + z1 + z3
    o1 = x[5] * 16819 + z2 + z4
    o2 = x[3] * 25172 + z2 + z3
    o3 = x[1] * 12299 + z1 + z4
    return [
        (e0 + o3) >> shift, (e1 + o2) >> shift, (e2 + o1) >> shift, (e3 + o0) >> shift,
        (e3 - o0) >> shift, (e2 - o1) >> shift, (e1 - o2) >> shift, (e0 - o3) >> shift,
    ]  # fmt: skip
