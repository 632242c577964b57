"""Scans of a progressive JPEG. Source: ITU-T T.81, annex G; jdphuff.c of libjpeg for what it leaves open."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cspdeploy.core.pixels.faults import BrokenImageError
from cspdeploy.core.pixels.jpeg_huffman import END_OF_BLOCK, POSITION_BITS, POSITION_MASK, signed
from cspdeploy.core.pixels.jpeg_scan import Coefficients, Longs, Scan, gather, scan_dc

__all__ = ["decode_ac_first", "decode_ac_refine", "decode_dc_first", "decode_dc_refine"]

# Blocks whose zeros are listed together: 8,192 of them are half a megabyte.
_CHUNK_BLOCKS = 8192


def decode_dc_first(scan: Scan, coefficients: Coefficients) -> None:
    """First DC scan: differences, their low bits left out."""
    stream, per_mcu = scan.stream, len(scan.slots)
    tables = [scan.dc[slot].steps("dc") for slot in scan.slots]
    differences = np.zeros(scan.order.size, np.int64)
    seen: list[int] = []
    begun = 0  # the MCU with which `seen` begins

    def flush() -> None:  # once a segment, however many intervals are in it
        if seen:
            codes = gather(scan, np.array(seen, np.int64), first_block=begun * per_mcu)
            differences[codes.blocks] = codes.values
            seen.clear()

    for first, last, start, end in scan.intervals():
        mcu, at = first, start
        while mcu < last:
            if not stream.holds(at):
                flush()
                begun = mcu
            position = stream.seek(at)
            windows, limit = stream.windows, stream.limit
            while mcu < last and position < limit:
                for steps in tables:
                    seen.append(position)
                    position += steps[windows[position]] & POSITION_MASK
                mcu += 1
            at = stream.base + position
        if at > end:
            raise BrokenImageError("truncated")
    flush()
    scan_dc(scan, differences, coefficients)


def decode_dc_refine(scan: Scan, coefficients: Coefficients) -> None:
    """One more bit for each DC value."""
    intervals = np.array(list(scan.intervals()), np.int64).reshape(-1, 4)
    counts = (intervals[:, 1] - intervals[:, 0]) * len(scan.slots)
    starts, ends = intervals[:, 2], intervals[:, 3]
    if (starts + counts > ends).any():
        raise BrokenImageError("truncated")
    before = np.cumsum(counts) - counts
    bits = scan.stream.bits(np.repeat(starts - before, counts) + np.arange(int(counts.sum())))
    coefficients[scan.order.reshape(-1), 0] |= (bits << scan.low).astype(np.int16)


def decode_ac_first(scan: Scan, coefficients: Coefficients) -> None:
    """First AC scan of one component: as a sequential one, but an end of block may stand for many blocks."""
    stream = scan.stream
    seen: list[tuple[int, int]] = []

    def flush() -> None:  # once a segment, however many intervals are in it
        if seen:
            _store_first(scan, np.array(seen, np.int64).reshape(-1, 2), coefficients)
            seen.clear()

    for first, last, start, end in scan.intervals():
        block, at = first, start
        while block < last:
            if not stream.holds(at):
                flush()
            position = stream.seek(at)
            block, position = _walk_first(scan, position, block, last, seen)
            at = stream.base + position
        if at > end or block > last:
            raise BrokenImageError("truncated, or a run of blocks beyond its interval")
    flush()


def _walk_first(scan: Scan, position: int, block: int, last: int, seen: list[tuple[int, int]]) -> tuple[int, int]:
    """Note where each code begins, with its block; the next block, and the position after the codes."""
    windows, limit, mask = scan.stream.windows, scan.stream.limit, POSITION_MASK
    steps = scan.ac[0].steps("first")
    begin, end = scan.band[0] << POSITION_BITS, (scan.band[1] + 1) << POSITION_BITS
    while block < last and position < limit:
        state = begun = position + begin
        while state < end:
            begun = state
            seen.append((state, block))
            state += steps[windows[state & mask]]
        position = state & mask
        block += 1
        exponent = (state >> POSITION_BITS) - (begun >> POSITION_BITS) - END_OF_BLOCK
        if exponent > 0:  # bits that follow, and a leading 1 that is not written
            block += (1 << exponent) - 1 + (windows[position - exponent] >> (16 - exponent))
    return block, position


def _store_first(scan: Scan, seen: Longs, coefficients: Coefficients) -> None:
    states, owners = seen.T
    positions, places = states & POSITION_MASK, states >> POSITION_BITS
    windows, table = scan.stream.windows_all, scan.ac[0]
    lengths = table.lengths[windows[positions]].astype(np.int64)
    symbols = table.symbols[windows[positions]].astype(np.int64)
    if (lengths == 0).any():
        raise BrokenImageError("JPEG bits that are no Huffman code")
    sizes = symbols & 15
    given = sizes > 0
    places = (places + (symbols >> 4))[given]
    if (places > scan.band[1]).any():
        raise BrokenImageError("JPEG coefficient beyond the band")
    bits = windows[(positions + lengths)[given]].astype(np.int64) >> (16 - sizes[given])
    blocks = scan.order.reshape(-1)[owners[given]]
    coefficients[blocks, places] = (signed(bits, sizes[given]) << scan.low).astype(np.int16)


class _Band:
    """The coefficients of one component's band as they are before a refining scan.

    A zero stays or is filled, any other coefficient gets one bit each: so the walk needs where the zeros of a block
    are, and how many others there are between them.
    """

    def __init__(self, scan: Scan, coefficients: Coefficients) -> None:
        first, last = scan.band
        self.scan = scan
        self.width = last + 1 - first
        self.order = scan.order.reshape(-1)
        self._view = coefficients[:, first : last + 1]
        counts = [np.count_nonzero(self._part(at), axis=1) for at in range(0, len(self.order), _CHUNK_BLOCKS)]
        # Before each block, how many coefficients of the band are not zero.
        self.filled_before: list[int] = np.concatenate([[0], *counts]).cumsum().tolist()
        self.base = self.end = 0
        self.zeros = b""
        self.offsets: list[int] = []

    def _part(self, at: int) -> npt.NDArray[np.int16]:
        return self._view[self.order[at : at + _CHUNK_BLOCKS]]

    def open(self, block: int) -> None:
        """List the zeros of `block` and the blocks after it."""
        rows, places = np.nonzero(self._part(block) == 0)
        self.base, self.end = block, min(block + _CHUNK_BLOCKS, len(self.order))
        self.zeros = places.astype(np.uint8).tobytes()
        self.offsets = np.searchsorted(rows, np.arange(self.end - block + 1)).tolist()

    def filled(self) -> tuple[npt.NDArray[np.int32], Longs]:
        """Rows and places within the band of all coefficients that are not zero, in the order of the scan."""
        found = [np.nonzero(self._part(at)) for at in range(0, len(self.order), _CHUNK_BLOCKS)]
        blocks = [self.order[rows + at * _CHUNK_BLOCKS] for at, (rows, _) in enumerate(found)]
        return np.concatenate(blocks), np.concatenate([places for _, places in found])


class _Refined:
    """What a refining scan says. Positions count from the start of the stream."""

    def __init__(self) -> None:
        self.run_starts: list[int] = []
        """Bits for coefficients that were there: where a run of them begins, and how many they are."""
        self.run_lengths: list[int] = []
        self.blocks: list[int] = []
        """New coefficients: block, place within the band, and where the sign is."""
        self.places: list[int] = []
        self.signs: list[int] = []


def decode_ac_refine(scan: Scan, coefficients: Coefficients) -> None:
    """One more bit for each AC coefficient of a band that is not zero, and those that first show at this bit."""
    band, said = _Band(scan, coefficients), _Refined()
    for first, last, start, end in scan.intervals():
        block, at = first, start
        while block < last:
            scan.stream.seek(at)
            block, at = _walk_refine(band, said, at, block, last)
        if at > end or block > last:
            raise BrokenImageError("truncated, or a run of blocks beyond its interval")
    rows, places = band.filled()
    lengths = np.array(said.run_lengths, np.int64)
    if int(lengths.sum()) != len(rows):
        raise BrokenImageError("JPEG scan that does not refine what is there")
    before = np.cumsum(lengths) - lengths
    bits = scan.stream.bits(np.repeat(np.array(said.run_starts, np.int64) - before, lengths) + np.arange(len(rows)))
    view = coefficients[:, scan.band[0] : scan.band[1] + 1]
    view[rows, places] += (np.sign(view[rows, places]) * (bits << scan.low)).astype(np.int16)
    new = scan.stream.bits(np.array(said.signs, np.int64)) * 2 - 1
    view[band.order[np.array(said.blocks, np.int64)], np.array(said.places, np.int64)] = new << scan.low


def _walk_refine(band: _Band, said: _Refined, at: int, block: int, last: int) -> tuple[int, int]:
    """Go through blocks to the end of the segment or of the interval; the next block and the next bit."""
    stream = band.scan.stream
    base, limit = stream.base, stream.limit
    position = at - base
    while block < last and position < limit:
        if not band.base <= block < band.end:
            band.open(block)
        position, passed = _refine_block(band, said, position, block)
        block += max(1, passed)
        if passed > 1 and block <= last:  # the blocks that are skipped have their bits too
            more = band.filled_before[block] - band.filled_before[block - passed + 1]
            said.run_starts.append(base + position)
            said.run_lengths.append(more)
            position += more
    return block, base + position


def _refine_block(band: _Band, said: _Refined, position: int, block: int) -> tuple[int, int]:
    """One block; the position after it, and how many blocks its end stands for (0: it has no such end)."""
    windows, base, width = band.scan.stream.windows, band.scan.stream.base, band.width
    steps = band.scan.ac[0].steps("refine")
    zeros, index, end = band.zeros, band.offsets[block - band.base], band.offsets[block - band.base + 1]
    place, passed = 0, 0
    while place < width and not passed:
        step = steps[windows[position]]
        symbol, length = step >> POSITION_BITS, step & POSITION_MASK
        if length == 0 or symbol & 14:  # a coefficient that first shows now is 1 or -1
            raise BrokenImageError("JPEG bits that are no Huffman code")
        position += length
        run = symbol >> 4
        if symbol & 1:
            said.signs.append(base + position)
            position += 1
        elif run < 15:
            passed = (1 << run) + (windows[position] >> (16 - run))
            position += run
            run = end - index  # over all zeros that are left
        index += run
        if index < end:
            target = zeros[index]
            index += 1
        else:
            if symbol & 1:
                raise BrokenImageError("JPEG coefficient beyond the band")
            run, target = run - (index - end), width
            index = end
        corrections = target - place - run
        if corrections:
            said.run_starts.append(base + position)
            said.run_lengths.append(corrections)
            position += corrections
        if symbol & 1:
            said.blocks.append(block)
            said.places.append(target)
        place = target + 1
    return position, passed
