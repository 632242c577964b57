"""Huffman tables and bit windows: what lets plain Python walk through a JPEG at about 0.1 us a code.

The walk only finds where each code begins: one look into a table gives how far to step on. What the codes say is then
read for all of them at once with numpy. Source: ITU-T T.81, annexes C and F.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cspdeploy.core.pixels.faults import BrokenImageError

__all__ = ["END_OF_BLOCK", "POSITION_BITS", "POSITION_MASK", "BitStream", "HuffmanTable", "signed"]

# A walk's state is one small integer: the coefficient's number above, the bit position below. Python adds numbers
# below 2**30 fastest; positions within a segment stay below 2**22, coefficients below 64 + 64 + 16.
POSITION_BITS = 22
POSITION_MASK = (1 << POSITION_BITS) - 1
END_OF_BLOCK = 64

_SEGMENT_BYTES = 1 << 18
# No MCU is longer: 10 blocks of 64 coefficients, each with a code of 16 bits and 15 bits of value, are 2,480 bytes.
_MARGIN_BYTES = 4096


@dataclass(eq=False, slots=True)
class HuffmanTable:
    """One Huffman table.

    It is spread over all windows of 16 bits when a scan first looks into it, and not where it is read: a file may hold
    any number of tables that no scan uses.
    """

    _codes: list[tuple[int, int, int]]
    """In order: length, symbol, and how many windows begin with it; length 0 stands for all that is no code."""
    _spread: tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]] | None = None
    _steps: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def from_counts(cls, counts: bytes, values: bytes) -> HuffmanTable:
        """From the 16 counts of codes by length, and the symbols in order of their codes.

        Raises:
            BrokenImageError: more codes than there is room for.
        """
        widths = [width for width, count in enumerate(counts, start=1) for _ in range(count)]
        codes = [(width, value, 1 << (16 - width)) for width, value in zip(widths, values, strict=True)]
        rest = (1 << 16) - sum(share for _, _, share in codes)
        # libjpeg keeps the code of all ones free, and so refuses what fills the room to the last.
        if rest < 1 or not codes:
            raise BrokenImageError("JPEG Huffman table")
        codes.append((0, 0, rest))
        return cls(codes)

    @property
    def symbols(self) -> npt.NDArray[np.uint8]:
        """`[65536]`: the symbol whose code a window begins with."""
        return self._windows()[0]

    @property
    def lengths(self) -> npt.NDArray[np.uint8]:
        """`[65536]`: bits of that code; 0 where there is no such code."""
        return self._windows()[1]

    def _windows(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        if self._spread is None:
            lengths, symbols, shares = np.array(self._codes).T
            self._spread = (
                np.repeat(symbols.astype(np.uint8), shares), np.repeat(lengths.astype(np.uint8), shares)
            )  # fmt: skip
        return self._spread

    def steps(self, purpose: str) -> list[int]:
        """For each window, what a walk adds to its state: bits passed, and coefficients passed above `POSITION_BITS`.

        Args:
            purpose: "dc"; "ac" of a sequential scan; "first" AC scan of a progressive image, where the end of a run of
                blocks is coded by its own exponent above `END_OF_BLOCK`; "refine", where symbol and length are given.
        """
        if purpose not in self._steps:
            made: list[int] = []
            for length, symbol, share in self._codes:
                passed, bits = _step(length, symbol, purpose)
                made += [(passed << POSITION_BITS) + bits] * share
            self._steps[purpose] = made
        return self._steps[purpose]


def _step(length: int, symbol: int, purpose: str) -> tuple[int, int]:
    """Coefficients and bits that a walk passes at one code."""
    if purpose == "refine":
        return symbol, length
    if length == 0:
        return END_OF_BLOCK, 1  # the walk goes on, and the lengths give it away later
    if purpose == "dc":
        return 1, length + symbol
    run, size = symbol >> 4, symbol & 15
    if size > 0 or run == 15:
        return run + 1, length + size
    if purpose == "ac":
        return END_OF_BLOCK, length
    return END_OF_BLOCK + run, length + run


def signed(bits: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """EXTEND of T.81: `sizes` bits that begin with 0 stand for a negative number."""
    return np.where(bits < (1 << sizes) >> 1, bits - (1 << sizes) + 1, bits)


class BitStream:
    """The bits of one scan, without stuffed bytes and markers, seen through windows of 16 bits at every position.

    Attributes:
        windows: `windows[p]`: 16 bits from position `p` of the open segment on, for plain Python.
        windows_all: the same as an array `[positions]` uint16.
        base: position of the segment within the stream, in bits.
        limit: first position of the segment at which no MCU should be begun.
    """

    def __init__(self, data: bytes) -> None:
        self.num_bits = 8 * len(data)
        self._data = np.frombuffer(data, np.uint8)
        self.base = -1
        self.limit = 0
        self.windows_all: npt.NDArray[np.uint16] = np.zeros(0, np.uint16)
        self.windows: array[int] = array("H")

    def seek(self, bit: int) -> int:
        """Make `bit` of the stream readable; its position in the segment.

        Raises:
            BrokenImageError: the stream ends before.
        """
        if bit >= self.num_bits:
            raise BrokenImageError("truncated")
        if self.holds(bit):
            return bit - self.base
        first = bit >> 3
        part = self._data[first : first + _SEGMENT_BYTES + _MARGIN_BYTES]
        whole = first + len(part) >= len(self._data)
        padded = np.concatenate([part, np.zeros(_MARGIN_BYTES if whole else 0, np.uint8)]).astype(np.uint32)
        words = padded[:-2] << 16 | padded[1:-1] << 8 | padded[2:]
        windows = np.empty((len(words), 8), np.uint16)
        for shift in range(8):
            windows[:, shift] = words >> (8 - shift)
        self.windows_all = windows.reshape(-1)
        self.windows = array("H")
        self.windows.frombytes(self.windows_all.tobytes())
        self.base = 8 * first
        self.limit = min(8 * _SEGMENT_BYTES, self.num_bits - self.base)
        return bit - self.base

    def holds(self, bit: int) -> bool:
        """Whether `bit` of the stream lies in the open segment, so that `seek` will not open another."""
        return self.base <= bit < self.base + self.limit

    def bits(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Single bits at positions of the stream; 0 beyond its end."""
        inside = np.minimum(positions, self.num_bits - 1)
        found = self._data[inside >> 3] >> (7 - (inside & 7)).astype(np.uint8) & 1
        return np.where(positions < self.num_bits, found, 0).astype(np.int64)
