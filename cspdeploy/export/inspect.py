"""What an ONNX file holds, read from the file itself."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto

from cspdeploy.core.errors import InputError
from cspdeploy.core.onnx_file import check_external_data, external_data_files
from cspdeploy.core.types import TensorInfo

__all__ = ["Inspection", "WeightSummary", "inspect_onnx"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSummary:
    """Initializers of one element type."""

    dtype: str
    num_tensors: int
    num_values: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """One ONNX file."""

    file: str
    num_bytes: int
    ir_version: int
    opsets: dict[str, int]
    producer: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    operators: dict[str, int]
    weights: tuple[WeightSummary, ...]
    external_data: tuple[str, ...]
    metadata: dict[str, str]


def inspect_onnx(path: Path) -> Inspection:
    """Read `path`. Weights in other files are counted, not opened.

    Raises:
        InputError: not an ONNX file, or its data lies outside its folder.
    """
    check_external_data(path)
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's DecodeError, from a package without types
        raise InputError(f"{path}: not an ONNX file ({error})", fix="name an .onnx file") from error
    graph = model.graph
    initializers = {tensor.name for tensor in graph.initializer}
    values: Counter[str] = Counter()
    tensors: Counter[str] = Counter()
    for tensor in graph.initializer:
        dtype = _dtype(tensor.data_type)
        tensors[dtype] += 1
        values[dtype] += _count(tensor)
    return Inspection(
        file=str(path), num_bytes=path.stat().st_size, ir_version=model.ir_version,
        opsets={entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        inputs=tuple(_info(value) for value in graph.input if value.name not in initializers),
        outputs=tuple(_info(value) for value in graph.output),
        operators=dict(Counter(node.op_type for node in graph.node).most_common()),
        weights=tuple(
            WeightSummary(dtype=dtype, num_tensors=tensors[dtype], num_values=count)
            for dtype, count in values.most_common()
        ),
        external_data=tuple(external_data_files(path)),
        metadata={entry.key: entry.value for entry in model.metadata_props},
    )  # fmt: skip


def _count(tensor: onnx.TensorProto) -> int:
    count = 1
    for dim in tensor.dims:
        count *= dim
    return count


def _dtype(code: int) -> str:
    return str(TensorProto.DataType.Name(code)).lower()


def _info(value: onnx.ValueInfoProto) -> TensorInfo:
    tensor = value.type.tensor_type
    shape = tuple(dim.dim_param or (dim.dim_value if dim.HasField("dim_value") else "?") for dim in tensor.shape.dim)
    return TensorInfo(name=value.name, dtype=_dtype(tensor.elem_type), shape=shape)
