"""Sequential scans of a JPEG, and what all scans share. Source: ITU-T T.81, annex F.

Shapes: B blocks of all components, 64 coefficients in zigzag order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cspdeploy.core.pixels.faults import BrokenImageError
from cspdeploy.core.pixels.jpeg_huffman import (
    END_OF_BLOCK,
    POSITION_BITS,
    POSITION_MASK,
    BitStream,
    HuffmanTable,
    signed,
)

__all__ = ["Codes", "Coefficients", "Scan", "decode_sequential", "gather", "scan_dc"]

Coefficients = npt.NDArray[np.int16]
Longs = npt.NDArray[np.int64]


@dataclass(slots=True, kw_only=True)
class Scan:
    """One scan, ready to be decoded.

    Attributes:
        order: `[MCUs, blocks of an MCU]`, for each block in the order of the file its row among all coefficients.
        slots: for each block of an MCU, which of the scan's components it belongs to.
        dc: a table for each component of the scan, or none where the scan has no DC.
        ac: likewise.
        starts: first bit of each restart interval.
        interval: MCUs of a restart interval.
        band: first and last coefficient.
        low: bits that the values are shifted up by.
    """

    stream: BitStream
    order: npt.NDArray[np.int32]
    slots: tuple[int, ...]
    dc: Sequence[HuffmanTable]
    ac: Sequence[HuffmanTable]
    starts: list[int]
    interval: int
    band: tuple[int, int] = (0, 63)
    low: int = 0

    def intervals(self) -> Iterator[tuple[int, int, int, int]]:
        """First MCU, last MCU + 1, first bit and last bit + 1 of each restart interval."""
        num_mcus = len(self.order)
        if len(self.starts) < -(-num_mcus // self.interval):
            raise BrokenImageError("truncated")
        ends = [*self.starts[1:], self.stream.num_bits]
        for index, first in enumerate(range(0, num_mcus, self.interval)):
            yield first, min(num_mcus, first + self.interval), self.starts[index], ends[index]


@dataclass(slots=True)
class Codes:
    """What a run of codes says: which block each belongs to (in file order), its coefficient and value, its size."""

    blocks: Longs
    places: Longs
    values: Longs
    sizes: Longs


def decode_sequential(scan: Scan, coefficients: Coefficients) -> None:
    """Decode all blocks of a sequential scan into `coefficients` `[B, 64]`.

    Raises:
        BrokenImageError: truncated, or codes that no encoder makes.
    """
    stream, flat = scan.stream, coefficients.reshape(-1)
    pairs = [(scan.dc[slot].steps("dc"), scan.ac[slot].steps("ac")) for slot in scan.slots]
    differences = np.zeros(scan.order.size, np.int64)
    order = scan.order.reshape(-1)
    seen: list[int] = []
    begun = 0  # the MCU with which `seen` begins

    def flush() -> None:
        if not seen:
            return
        codes = gather(scan, np.array(seen, np.int64), first_block=begun * len(scan.slots))
        dc = codes.places == 0
        differences[codes.blocks[dc]] = codes.values[dc]
        ac = ~dc & (codes.sizes > 0)
        if (codes.places[ac] > 63).any():
            raise BrokenImageError("JPEG coefficient beyond the last")
        flat[order[codes.blocks[ac]].astype(np.int64) * 64 + codes.places[ac]] = codes.values[ac]
        seen.clear()

    for first, last, start, end in scan.intervals():
        mcu, at = first, start
        while mcu < last:
            if not stream.base <= at < stream.base + stream.limit:
                flush()
                begun = mcu
            position = stream.seek(at)
            done, position = _walk(stream, position, pairs, last - mcu, seen)
            mcu, at = mcu + done, stream.base + position
        if at > end:
            raise BrokenImageError("truncated")
    flush()
    scan_dc(scan, differences, coefficients)


def _walk(
    stream: BitStream, position: int, pairs: list[tuple[list[int], list[int]]], most: int, seen: list[int]
) -> tuple[int, int]:
    """Note where each code of up to `most` MCUs begins; MCUs passed, and the position after them."""
    windows, limit, mask, append = stream.windows, stream.limit, POSITION_MASK, seen.append
    end = END_OF_BLOCK << POSITION_BITS
    done = 0
    while done < most and position < limit:
        for dc, ac in pairs:
            append(position)
            state = position + dc[windows[position]]
            while state < end:
                append(state)
                state += ac[windows[state & mask]]
            position = state & mask
        done += 1
    return done, position


def gather(scan: Scan, states: Longs, *, first_block: int) -> Codes:
    """Read what the codes at `states` say, all within the open segment; a state at coefficient 0 begins a block.

    Raises:
        BrokenImageError: bits that are no code.
    """
    positions, places = states & POSITION_MASK, states >> POSITION_BITS
    is_dc = places == 0
    blocks = np.cumsum(is_dc) - 1
    slot = np.array(scan.slots)[blocks % len(scan.slots)]
    tables = [*scan.dc, *scan.ac]
    table = np.where(is_dc, slot, slot + len(scan.dc)) if scan.ac else slot
    windows = scan.stream.windows_all
    key = (table << 16) + windows[positions]
    lengths = np.concatenate([item.lengths for item in tables])[key].astype(np.int64)
    symbols = np.concatenate([item.symbols for item in tables])[key].astype(np.int64)
    if (lengths == 0).any() or (symbols[is_dc] > 15).any():
        raise BrokenImageError("JPEG bits that are no Huffman code")
    sizes = symbols & 15
    bits = windows[positions + lengths].astype(np.int64) >> (16 - sizes)
    return Codes(first_block + blocks, places + (symbols >> 4), signed(bits, sizes), sizes)


def scan_dc(scan: Scan, differences: Longs, coefficients: Coefficients) -> None:
    """DC values from the differences `[MCUs * blocks of an MCU]`: summed by component, anew in each interval."""
    per_mcu = len(scan.slots)
    by_mcu = differences.reshape(-1, per_mcu)
    slots = np.array(scan.slots)
    for component in set(scan.slots):
        columns = np.flatnonzero(slots == component)
        sums = np.cumsum(by_mcu[:, columns].reshape(-1)).reshape(-1, len(columns))
        firsts = np.arange(0, len(by_mcu), scan.interval)
        before = np.concatenate([[0], sums[firsts[1:] - 1, -1]])
        sums -= np.repeat(before, scan.interval)[: len(by_mcu), None]
        coefficients[scan.order[:, columns], 0] = (sums << scan.low).astype(np.int16)
