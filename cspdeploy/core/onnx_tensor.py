"""A tensor of an ONNX file: what it is, known at once; its values, read from the file when asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from cspdeploy.core.errors import InputError
from cspdeploy.core.onnx_wire import Message, Span, decode_varints, printable

__all__ = ["ELEMENT_TYPES", "FLOAT_TYPES", "Tensor", "read_sparse_tensor", "read_tensor"]

_DIMS, _DATA_TYPE, _NAME, _RAW, _EXTERNAL_DATA, _DATA_LOCATION = 1, 2, 8, 9, 13, 14  # TensorProto
_FLOAT_FIELDS, _STRINGS = (4, 10), 6  # float_data and double_data; string_data
_EXTERNAL = 1  # TensorProto.DataLocation
_SPARSE_VALUES, _SPARSE_INDICES, _SPARSE_DIMS = 1, 2, 3


Encoding = Literal["raw", "floats", "varints", "strings", "sparse"]


class _Element(NamedTuple):
    """An element type: its name here, its bits, TensorProto's field for it, and numpy's type for its raw bytes."""

    name: str
    bits: int
    field: int
    raw: str


# TensorProto.DataType. float_data is field 4, int32_data 5, string_data 6, int64_data 7, double_data 10,
# uint64_data 11.
_ELEMENTS = {
    1: _Element("float32", 32, 4, "<f4"), 2: _Element("uint8", 8, 5, "<u1"), 3: _Element("int8", 8, 5, "<i1"),
    4: _Element("uint16", 16, 5, "<u2"), 5: _Element("int16", 16, 5, "<i2"), 6: _Element("int32", 32, 5, "<i4"),
    7: _Element("int64", 64, 7, "<i8"), 8: _Element("string", 0, _STRINGS, ""), 9: _Element("bool", 8, 5, "?"),
    10: _Element("float16", 16, 5, "<f2"), 11: _Element("float64", 64, 10, "<f8"),
    12: _Element("uint32", 32, 11, "<u4"), 13: _Element("uint64", 64, 11, "<u8"),
    14: _Element("complex64", 64, 4, "<c8"), 15: _Element("complex128", 128, 10, "<c16"),
    16: _Element("bfloat16", 16, 5, "<u2"), 17: _Element("float8e4m3fn", 8, 5, ""),
    18: _Element("float8e4m3fnuz", 8, 5, ""), 19: _Element("float8e5m2", 8, 5, ""),
    20: _Element("float8e5m2fnuz", 8, 5, ""), 21: _Element("uint4", 4, 5, "<u1"), 22: _Element("int4", 4, 5, "<u1"),
    23: _Element("float4e2m1", 4, 5, ""), 24: _Element("float8e8m0", 8, 5, ""), 25: _Element("uint2", 2, 5, ""),
    26: _Element("int2", 2, 5, ""), 27: _Element("float6e2m3", 6, 5, ""), 28: _Element("float6e3m2", 6, 5, ""),
}  # fmt: skip
ELEMENT_TYPES = {code: element.name for code, element in _ELEMENTS.items()}
FLOAT_TYPES = frozenset(name for name in ELEMENT_TYPES.values() if "float" in name)
_BY_NAME = {element.name: element for element in _ELEMENTS.values()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """Weights, or the constant of an attribute.

    Attributes:
        dtype: as numpy spells it, and "bfloat16", "int4", "string", ... where numpy has none.
        num_bytes: of its values, wherever they are kept.
        external: the file that holds them, as the ONNX file names it; empty where they are in that itself.
        source: the file that holds them.
        encoding: how: as raw bytes, as 32- or 64-bit floats, as varints, as strings, or sparse.
        spans: where in `source`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    external: str
    source: Path
    encoding: Encoding
    spans: tuple[Span, ...]

    @property
    def num_values(self) -> int:
        """How many elements."""
        return math.prod(self.shape)

    def array(self) -> npt.NDArray[np.generic]:
        """The values, `shape`; a fresh array. bfloat16 as float32, (u)int4 as (u)int8, strings as objects.

        Raises:
            InputError: sparse, of a type that numpy lacks, or the file is no longer what it was.
        """
        element = _BY_NAME[self.dtype]
        if self.encoding == "strings":
            # each span is one string
            return np.array([part.decode() for part in self._parts()], dtype=object).reshape(self.shape)
        if self.encoding == "sparse" or not element.raw:
            what = "a sparse tensor" if self.encoding == "sparse" else f"a tensor of {self.dtype}"
            raise InputError(
                f"{self.source}: '{printable(self.name)}' is {what}, which is not read", fix="use a dense float type"
            )
        data = b"".join(self._parts())
        if self.encoding == "varints":
            values = np.array(decode_varints(data), np.int64)
            if element.bits >= 8:
                if len(values) != self.num_values:
                    raise self._wrong_size(len(values), self.num_values, "values")
                # float16 and bfloat16 are kept as the integer of the same bits
                stored = f"<u{element.bits // 8}" if element.raw in ("<f2", "<u2") else element.raw
                data = values.astype(stored).tobytes()
            else:
                data = values.astype(np.uint8).tobytes()
        return self._decoded(data, element)

    def _decoded(self, data: bytes, element: _Element) -> npt.NDArray[np.generic]:
        if element.bits < 8:
            return _unpack_nibbles(data, self.shape, signed=self.dtype == "int4")
        values = np.frombuffer(bytearray(data), element.raw).reshape(self.shape)
        if self.dtype == "bfloat16":
            return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return values

    def _parts(self) -> list[bytes]:
        try:
            with self.source.open("rb") as file:
                found = []
                for start, end in self.spans:
                    file.seek(start)
                    found.append(file.read(end - start))
        except OSError as error:
            reason = f"{self.source}: {error.strerror or error}"
            raise InputError(reason, fix="do not move the file while it is read") from error
        got, expected = sum(map(len, found)), sum(end - start for start, end in self.spans)
        if got != expected:
            raise self._wrong_size(got, expected, "bytes")
        return found

    def _wrong_size(self, got: int, expected: int, unit: str) -> InputError:
        what = f"{self.source}: tensor '{printable(self.name)}' has {got} {unit}"
        reason = f"{what}, its shape {list(self.shape)} wants {expected}"
        return InputError(reason, fix="copy it again, or export it again")


def read_tensor(message: Message, *, path: Path) -> Tensor:
    """A TensorProto of the file `path`. Values are not read, but their number is checked against the shape.

    Raises:
        InputError: unknown element type, or more or fewer values than the shape wants.
        ValueError: no message.
    """
    name = message.text(_NAME)
    element, shape = _element(message, name=name, path=path), _shape(message.integers(_DIMS), name=name, path=path)
    external = dict(_entries(message)) if message.integer(_DATA_LOCATION) == _EXTERNAL else None
    num_bytes = -(-math.prod(shape) * element.bits // 8)
    source, encoding, spans = path, _encoding(message, element), message.spans(_RAW) or message.spans(element.field)
    if external is not None:
        source, encoding = path.parent / external.get("location", ""), "raw"
        spans = (_external_span(external, num_bytes),)
    tensor = Tensor(
        name=name, dtype=element.name, shape=shape,
        num_bytes=num_bytes if element.bits else sum(end - start for start, end in spans),
        external=external.get("location", "") if external is not None else "",
        source=source, encoding=encoding, spans=spans,
    )  # fmt: skip
    _check_size(tensor, element)
    return tensor


def read_sparse_tensor(message: Message, *, path: Path) -> Tensor:
    """A SparseTensorProto: known by name, type, shape and size, its values not to be had.

    Raises:
        InputError, ValueError: as `read_tensor`.
    """
    values, indices = message.message(_SPARSE_VALUES), message.message(_SPARSE_INDICES)
    if values is None or indices is None:
        raise ValueError("a sparse tensor without values")
    stored, where = read_tensor(values, path=path), read_tensor(indices, path=path)
    return Tensor(
        name=stored.name, dtype=stored.dtype,
        shape=_shape(message.integers(_SPARSE_DIMS), name=stored.name, path=path),
        num_bytes=stored.num_bytes + where.num_bytes, external=stored.external, source=stored.source,
        encoding="sparse", spans=stored.spans,
    )  # fmt: skip


def _encoding(message: Message, element: _Element) -> Encoding:
    if message.has(_RAW):
        return "raw"
    return "strings" if element.field == _STRINGS else "floats" if element.field in _FLOAT_FIELDS else "varints"


def _element(message: Message, *, name: str, path: Path) -> _Element:
    code = message.integer(_DATA_TYPE)
    if code not in _ELEMENTS:
        reason = f"{path}: tensor '{printable(name)}' has element type {code}, expected one of 1 to {max(_ELEMENTS)}"
        raise InputError(reason, fix="copy it again, or update cspdeploy")
    return _ELEMENTS[code]


def _shape(dims: tuple[int, ...], *, name: str, path: Path) -> tuple[int, ...]:
    if any(dim < 0 for dim in dims):
        reason = f"{path}: tensor '{printable(name)}' has the shape {list(dims)}, expected no negative dimension"
        raise InputError(reason, fix="copy it again, or export it again")
    return dims


def _entries(message: Message) -> list[tuple[str, str]]:
    return [(entry.text(1), entry.text(2)) for entry in message.messages(_EXTERNAL_DATA)]


def _external_span(entries: dict[str, str], num_bytes: int) -> Span:
    start = int(entries.get("offset", "0"))
    if start < 0:
        raise ValueError("external data at a negative offset")
    return start, start + int(entries.get("length", num_bytes))


def _check_size(tensor: Tensor, element: _Element) -> None:
    """Before anything is allocated: a shape of a billion values needs a file that holds them."""
    held, wanted, unit = sum(end - start for start, end in tensor.spans), tensor.num_bytes, "bytes"
    if tensor.encoding == "strings":
        held, wanted, unit = len(tensor.spans), tensor.num_values, "values"
    elif tensor.encoding == "varints":  # each has at least one byte; 4-bit values come two to a varint
        wanted = -(-tensor.num_values * min(element.bits, 8) // 8)
        held = min(held, wanted)
    elif tensor.external:
        size = tensor.source.stat().st_size if tensor.source.is_file() else 0
        held = min(held, max(0, size - tensor.spans[0][0]))
    if held != wanted:
        what = f"{tensor.source}: tensor '{printable(tensor.name)}' has {held} {unit}"
        reason = f"{what}, its shape {list(tensor.shape)} of {tensor.dtype} wants {wanted}"
        raise InputError(reason, fix="copy it again, or export it again")


def _unpack_nibbles(data: bytes, shape: tuple[int, ...], *, signed: bool) -> npt.NDArray[np.generic]:
    """Two values a byte, the lower half first."""
    pairs = np.frombuffer(data, np.uint8)
    values = np.stack([pairs & 0xF, pairs >> 4], axis=-1).reshape(-1)[: math.prod(shape)].reshape(shape)
    return ((values.astype(np.int8) ^ 8) - 8).astype(np.int8) if signed else values
