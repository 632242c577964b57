"""Protocol buffers' wire format, as far as ONNX files need it: fields are found and kept as positions, not copied.

Each field is a varint `number << 3 | type`; type 0 varint, 1 eight bytes, 2 length and bytes, 5 four bytes.
https://protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from cspdeploy.core.errors import InputError

__all__ = ["Buffer", "Message", "Span", "decode_varints", "printable", "read_message"]

_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5

Buffer = bytes | mmap.mmap
Span = tuple[int, int]
"""Start and end of a field's value within the file."""
T = TypeVar("T")


class Message:
    """The fields of one message. A message that is given in several parts is their sum, as protocol buffers have it.

    Raises:
        ValueError: the bytes are no message.
    """

    __slots__ = ("_data", "_messages", "_spans")

    def __init__(self, data: Buffer, *parts: Span) -> None:
        self._data = data
        self._spans: dict[tuple[int, int], list[Span]] = {}
        self._messages: dict[int, list[Message]] = {}
        for start, end in parts:
            self._scan(start, end)

    def _scan(self, at: int, end: int) -> None:
        data = self._data
        while at < end:
            tag, start = data[at], at + 1
            if tag > 0x7F:  # nearly all tags and sizes are of one byte, and a call for each would double the time
                tag, start = _varint(data, at)
            number, wire = tag >> 3, tag & 7
            if wire == _BYTES:
                size, start = data[start], start + 1
                if size > 0x7F:
                    size, start = _varint(data, start - 1)
                at = start + size
            elif wire == _VARINT:
                _, at = _varint(data, start)
            elif wire in (_EIGHT_BYTES, _FOUR_BYTES):
                at = start + (8 if wire == _EIGHT_BYTES else 4)
            else:
                raise ValueError(f"wire type {wire}")
            if at > end:
                raise ValueError("a field is longer than what holds it")
            if number == 0:
                raise ValueError("field number 0")
            self._spans.setdefault((number, wire), []).append((start, at))

    def has(self, number: int) -> bool:
        """Whether the field is there at all."""
        return any(field == number for field, _ in self._spans)

    def messages(self, number: int) -> list[Message]:
        """Each value of a repeated message field. They are kept, for a graph is walked more than once."""
        spans = self._spans.get((number, _BYTES))
        if not spans:
            return []
        if number not in self._messages:
            self._messages[number] = [Message(self._data, span) for span in spans]
        return self._messages[number]

    def message(self, number: int) -> Message | None:
        """A message field that is not repeated: its parts merged; None where it is absent."""
        parts = self._spans.get((number, _BYTES), ())
        if len(parts) < 2:
            return next(iter(self.messages(number)), None)
        return Message(self._data, *parts)

    def count(self, number: int) -> int:
        """How many values a repeated message field has, none of them read."""
        return len(self._spans.get((number, _BYTES), ()))

    def blobs(self, number: int) -> list[bytes]:
        """Each value of a repeated bytes field, copied."""
        return [self._data[start:end] for start, end in self._spans.get((number, _BYTES), ())]

    def texts(self, number: int) -> tuple[str, ...]:
        """Each value of a repeated string field."""
        return tuple(blob.decode() for blob in self.blobs(number))

    def text(self, number: int) -> str:
        """A string field; empty where it is absent."""
        found = self._spans.get((number, _BYTES))
        return self._data[slice(*found[-1])].decode() if found else ""

    def integer(self, number: int) -> int:
        """A signed integer field of up to 64 bits; 0 where it is absent."""
        found = self._spans.get((number, _VARINT))
        return _signed(_varint(self._data, found[-1][0])[0]) if found else 0

    def integers(self, number: int) -> tuple[int, ...]:
        """A repeated integer field, packed or not."""
        return tuple(value for start, end in self.spans(number) for value in decode_varints(self._data[start:end]))

    def float32(self, number: int) -> float:
        """A 32-bit float field; 0 where it is absent."""
        found = self._spans.get((number, _FOUR_BYTES))
        return float(struct.unpack("<f", self._data[slice(*found[-1])])[0]) if found else 0.0

    def floats(self, number: int) -> tuple[float, ...]:
        """A repeated 32-bit float field, packed or not."""
        data = b"".join(self._data[start:end] for start, end in self.spans(number))
        return tuple(value for (value,) in struct.iter_unpack("<f", data))

    def spans(self, number: int) -> tuple[Span, ...]:
        """Where the values of a field lie, whatever its wire type. Packed or not, their bytes are the same."""
        found = [span for (field, _), spans in self._spans.items() if field == number for span in spans]
        return tuple(sorted(found))


def read_message(path: Path, reader: Callable[[Message], T]) -> T:
    """What `reader` makes of the file's message. The file is mapped meanwhile, and no page of it read without need.

    Raises:
        InputError: missing, empty, truncated, or something else than a protocol buffer.
    """
    try:
        if path.is_file() and not path.stat().st_size:
            raise InputError(f"{path}: an empty file, expected an ONNX file", fix="copy it again, or export it again")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            _refuse_other_formats(path, mapped[:8])
            return reader(Message(mapped, (0, len(mapped))))
    except (ValueError, IndexError, RecursionError, struct.error) as error:
        reason = f"{path}: not an ONNX file, or a truncated one ({error})"
        raise InputError(reason, fix="copy it again, or export it again") from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}", fix="name an .onnx file") from error


def _refuse_other_formats(path: Path, head: bytes) -> None:
    """What is often taken for an ONNX file."""
    if head == b"version ":  # the first line of a Git LFS pointer
        raise InputError(f"{path}: a Git LFS pointer, the file itself was not fetched", fix="git lfs pull")
    if head.startswith(b"PK\x03\x04"):
        fix = "name the .onnx file"
        raise InputError(f"{path}: a zip archive such as TorchScript, expected an ONNX file", fix=fix)
    if head[4:] == b"ORTM":
        fix = "name the .onnx file that it was made from"
        raise InputError(f"{path}: in ONNX Runtime's own format, expected an ONNX file", fix=fix)


def printable(name: str) -> str:
    """A name from a file of unknown origin, for a message of one line: cut, and without line ends and escapes."""
    return name[:80].encode("unicode_escape").decode()


def decode_varints(data: bytes) -> list[int]:
    """The signed integers of a packed field."""
    found, at = [], 0
    while at < len(data):
        value, at = _varint(data, at)
        found.append(_signed(value))
    return found


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _varint(data: Buffer, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            if value >> 64:
                raise ValueError("a number of more than 64 bits")
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
