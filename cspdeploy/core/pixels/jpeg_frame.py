"""The segments of a JPEG file: sizes, tables, components, and the bits of its scans. Source: ITU-T T.81, annex B."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cspdeploy.core.pixels.faults import BrokenImageError, UnsupportedImageError, check_size
from cspdeploy.core.pixels.jpeg_colour import Space
from cspdeploy.core.pixels.jpeg_huffman import BitStream, HuffmanTable

__all__ = ["Component", "Frame", "Segment", "read_frame", "read_huffman", "read_quantisers", "scan_bits", "segments"]

SOI, EOI, SOS, DQT, DHT, DRI = 0xD8, 0xD9, 0xDA, 0xDB, 0xC4, 0xDD
_RST0, _RST7, _TEM = 0xD0, 0xD7, 0x01
FRAMES = frozenset(range(0xC0, 0xD0)) - {DHT, 0xC8, 0xCC}
_SEQUENTIAL, _PROGRESSIVE = (0xC0, 0xC1), 0xC2
_MAX_MCU_BLOCKS = 10


@dataclass(slots=True)
class Component:
    """One plane: sampling factors across and down, its place among all blocks, and what its scans have told so far."""

    identity: int
    across: int
    down: int
    quantiser: int
    width: int = 0
    """In samples; `height` likewise. `columns` and `rows`: in blocks, filled up to whole MCUs."""
    height: int = 0
    columns: int = 0
    rows: int = 0
    first_block: int = 0
    quantisers: npt.NDArray[np.int32] | None = None
    """`[64]` in zigzag order; those that held when its first scan began."""
    missing_bits: list[int] = field(default_factory=lambda: [-1] * 64)
    """Of each coefficient, how many low bits no scan has told yet; -1: it has not been told at all."""

    def blocks(self) -> npt.NDArray[np.int32]:
        """Row of each block among all blocks of the image: `[rows, columns]`."""
        count = self.rows * self.columns
        return np.arange(self.first_block, self.first_block + count, dtype=np.int32).reshape(self.rows, self.columns)


@dataclass(slots=True)
class Frame:
    """Size in pixels, components, and how they are coded."""

    width: int
    height: int
    components: list[Component]
    progressive: bool
    mcu_columns: int = 0
    mcu_rows: int = 0

    @property
    def most_across(self) -> int:
        """The largest sampling factor across."""
        return max(component.across for component in self.components)

    @property
    def most_down(self) -> int:
        """The largest sampling factor down."""
        return max(component.down for component in self.components)

    @property
    def num_blocks(self) -> int:
        """Blocks of all components."""
        return sum(component.rows * component.columns for component in self.components)

    def scan_order(self, chosen: list[Component]) -> tuple[npt.NDArray[np.int32], tuple[int, ...]]:
        """Blocks in the order of a scan, `[MCUs, blocks of an MCU]`, and for each block of an MCU its component.

        A scan of one component has its blocks row by row, without those that fill up MCUs.
        """
        if len(chosen) == 1:
            only = chosen[0]
            blocks = only.blocks()[: (only.height + 7) // 8, : (only.width + 7) // 8]
            return blocks.reshape(-1, 1), (0,)
        parts: list[npt.NDArray[np.int32]] = []
        slots: list[int] = []
        for index, item in enumerate(chosen):
            tiled = item.blocks().reshape(self.mcu_rows, item.down, self.mcu_columns, item.across)
            parts.append(tiled.transpose(0, 2, 1, 3).reshape(self.mcu_rows * self.mcu_columns, -1))
            slots += [index] * (item.across * item.down)
        if len(slots) > _MAX_MCU_BLOCKS:
            raise BrokenImageError(f"JPEG with {len(slots)} blocks in an MCU")
        return np.concatenate(parts, axis=1), tuple(slots)

    def space(self, *, jfif: bool, adobe: int | None) -> Space:
        """The colour space, by libjpeg's rules; `adobe` is the transform of that marker, where there is one."""
        if len(self.components) == 1:
            return "grey"
        if len(self.components) == 4:
            return "cmyk" if adobe in (0, None) else "ycck"
        identities = [component.identity for component in self.components]
        plain = adobe == 0 if adobe is not None else identities == list(b"RGB")
        return "rgb" if plain and not jfif else "ycc"


@dataclass(frozen=True, slots=True)
class Segment:
    """A marker, its content, and where in the file what follows it begins."""

    marker: int
    body: bytes
    end: int


def segments(data: bytes, at: int) -> Iterator[Segment]:
    """Segments from `at` on, up to the end of the image. Junk between them, such as the bits of a scan, is passed over.

    Raises:
        BrokenImageError: the file ends before the image.
    """
    while True:
        at = data.find(b"\xff", at)
        if at < 0 or at + 1 >= len(data):
            raise BrokenImageError("truncated")
        marker = data[at + 1]
        at += 1 if marker == 0xFF else 2
        if marker in (0x00, 0xFF, _TEM, SOI) or _RST0 <= marker <= _RST7:
            continue
        if marker == EOI:
            return
        (length,) = struct.unpack_from(">H", data, at)
        if length < 2 or at + length > len(data):
            raise BrokenImageError("truncated")
        yield Segment(marker, data[at + 2 : at + length], at + length)
        at += length


def read_frame(segment: Segment, *, file_bytes: int) -> Frame:
    """The frame header.

    Raises:
        UnsupportedImageError: lossless, hierarchical, arithmetic coding, other than 8 bits.
        BrokenImageError: not by the rules, or more blocks than the file has bits.
        OversizeImageError: too many pixels.
    """
    precision, height, width, count = struct.unpack_from(">BHHB", segment.body)
    if segment.marker not in (*_SEQUENTIAL, _PROGRESSIVE) or precision != 8 or count not in (1, 3, 4):
        raise UnsupportedImageError(f"JPEG frame {segment.marker:#x}, {precision} bits, {count} components")
    check_size(width, height)
    if len(segment.body) != 6 + 3 * count:
        raise BrokenImageError("JPEG frame header")
    parts = [segment.body[at : at + 3] for at in range(6, len(segment.body), 3)]
    components = [Component(part[0], part[1] >> 4, part[1] & 15, part[2]) for part in parts]
    if any(not (1 <= item.across <= 4 and 1 <= item.down <= 4) for item in components):
        raise BrokenImageError("JPEG sampling factors")
    frame = Frame(width, height, components, segment.marker == _PROGRESSIVE)
    frame.mcu_columns = -(-width // (8 * frame.most_across))
    frame.mcu_rows = -(-height // (8 * frame.most_down))
    first = 0
    for item in components:
        item.width = -(-width * item.across // frame.most_across)
        item.height = -(-height * item.down // frame.most_down)
        item.columns, item.rows = frame.mcu_columns * item.across, frame.mcu_rows * item.down
        item.first_block = first
        first += item.columns * item.rows
    told = sum(-(-item.width // 8) * -(-item.height // 8) for item in components)
    if told > 8 * file_bytes:  # each block has a code of a bit at least; nothing is allocated for what cannot be there
        raise BrokenImageError("truncated")
    return frame


def read_huffman(body: bytes, tables: dict[int, HuffmanTable]) -> None:
    """Tables of a DHT segment, into `tables` by class and number (0x10 is AC table 0)."""
    at = 0
    while at < len(body):
        counts = body[at + 1 : at + 17]
        end = at + 17 + sum(counts)
        if len(counts) < 16 or end > len(body):
            raise BrokenImageError("JPEG Huffman table")
        tables[body[at]] = HuffmanTable.from_counts(counts, body[at + 17 : end])
        at = end


def read_quantisers(body: bytes, tables: dict[int, npt.NDArray[np.int32]]) -> None:
    """Tables of a DQT segment, into `tables` by number: `[64]` in zigzag order."""
    at = 0
    while at < len(body):
        dtype = np.dtype(">u2" if body[at] >> 4 else np.uint8)
        size = 64 * dtype.itemsize
        if at + 1 + size > len(body):
            raise BrokenImageError("JPEG quantisation table")
        tables[body[at] & 15] = np.frombuffer(body, dtype, 64, at + 1).astype(np.int32)
        at += 1 + size


def scan_bits(data: bytes, start: int, markers: npt.NDArray[np.int64]) -> tuple[BitStream, list[int]]:
    """The bits of the scan that begins at `start`, and the first bit of each restart interval.

    Args:
        markers: places in `data` of all 0xFF that begin a marker (no 0 and no 0xFF follows).
    """
    parts: list[bytes] = []
    starts = [0]
    for mark in markers[np.searchsorted(markers, start) :].tolist():
        # Any number of 0xFF may stand before a marker; one that belongs to the data has a 0 after it.
        parts.append(data[start:mark].rstrip(b"\xff").replace(b"\xff\x00", b"\xff"))
        code = data[mark + 1]
        if not _RST0 <= code <= _RST7:
            break
        if code != _RST0 + (len(parts) - 1) % 8:
            raise BrokenImageError("JPEG restart markers out of order")
        starts.append(starts[-1] + 8 * len(parts[-1]))
        start = mark + 2
    else:
        parts.append(data[start:].replace(b"\xff\x00", b"\xff"))
    return BitStream(b"".join(parts)), starts
