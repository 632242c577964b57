"""What an ONNX file holds, read from the file itself: any file, also one that no engine here opens."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from cspdeploy.check.audit import audit_model, declared_precision, weight_tensors
from cspdeploy.core.card import CARD_KEY, SUMMARY_KEY, ModelCard, read_card
from cspdeploy.core.errors import InputError
from cspdeploy.core.onnx_graph import OnnxModel, Value, read_onnx
from cspdeploy.core.results import PrecisionAudit
from cspdeploy.core.types import TensorInfo

__all__ = ["Inspection", "WeightSummary", "inspect_onnx"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSummary:
    """Initializers and constants of one element type."""

    dtype: str
    num_tensors: int
    num_values: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """One ONNX file.

    Attributes:
        num_bytes: of the file and its external data.
        operators: how often each occurs, subgraphs included.
        functions: operators that the file itself defines.
        metadata: its `metadata_props`, without those of the card.
        audit: the precision that it computes in.
        card: what the file says of itself; None where it has no card, or one that cannot be read.
        card_problem: why it cannot be read, or empty.
    """

    file: str
    num_bytes: int
    ir_version: int
    opsets: dict[str, int]
    producer: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    operators: dict[str, int]
    functions: tuple[str, ...]
    weights: tuple[WeightSummary, ...]
    external_data: tuple[str, ...]
    metadata: dict[str, str]
    audit: PrecisionAudit
    card: ModelCard | None = None
    card_problem: str = ""


def inspect_onnx(path: Path, *, precision: str = "") -> Inspection:
    """Read `path`. Weights are counted, not read; the file is run only where its MACs cannot be known otherwise.

    Args:
        precision: "fp32", "fp16" or "int8" that the file is meant to be; empty for what its name says.

    Raises:
        InputError: not an ONNX file, or its data lies outside its folder.
    """
    model = read_onnx(path)
    audit = audit_model(model, declared=precision or declared_precision(path))
    card, problem = _card(model)
    external = sum((path.parent / name).stat().st_size for name in model.external_data)
    return Inspection(
        file=str(path), num_bytes=model.num_bytes + external, ir_version=model.ir_version, opsets=model.opsets,
        producer=model.producer, inputs=tuple(map(_info, model.graph.inputs)),
        outputs=tuple(map(_info, model.graph.outputs)), operators=audit.operators, functions=model.functions,
        weights=_weights(model), external_data=model.external_data, audit=audit, card=card, card_problem=problem,
        metadata={key: text for key, text in model.metadata.items() if key not in (CARD_KEY, SUMMARY_KEY)},
    )  # fmt: skip


def _card(model: OnnxModel) -> tuple[ModelCard | None, str]:
    """A card that cannot be read is no reason not to look at the rest of the file."""
    try:
        return read_card(model.metadata, name=model.path.name), ""
    except InputError as error:
        return None, error.message


def _weights(model: OnnxModel) -> tuple[WeightSummary, ...]:
    tensors: Counter[str] = Counter()
    values: Counter[str] = Counter()
    for tensor in weight_tensors(model):
        tensors[tensor.dtype] += 1
        values[tensor.dtype] += tensor.num_values
    return tuple(
        WeightSummary(dtype=dtype, num_tensors=tensors[dtype], num_values=count)
        for dtype, count in values.most_common()
    )


def _info(value: Value) -> TensorInfo:
    """A value of unknown rank has no shape; "..." stands for it, since "?" is one free dimension."""
    return TensorInfo(name=value.name, dtype=value.dtype, shape=("...",) if value.shape is None else value.shape)
