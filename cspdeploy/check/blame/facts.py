"""What differs between a node and its counterpart: attributes, weights, ranges. Sentences for the reader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from cspdeploy.check.blame.operators import same_family
from cspdeploy.check.blame.quantisation import Quantisation
from cspdeploy.check.blame.sketch import Record
from cspdeploy.core.trace import TracedNode

__all__ = ["attribute_facts", "range_facts", "weight_fact"]

Array = npt.NDArray[Any]

FP16_MAX = 65504.0
_SAME_NUMBER = 1e-6
"""Relative: attributes are float32 in ONNX and float64 in PyTorch."""
_EXPLAINED = 0.05
"""Share of a difference that a common factor may leave over and still be its explanation."""

# PyTorch's name of an attribute, as ONNX has it.
_ALIASES = {"negative_slope": "alpha", "padding": "pads", "stride": "strides", "dilation": "dilations",
            "groups": "group", "eps": "epsilon", "dim": "axis", "kernel_size": "kernel_shape"}  # fmt: skip
# What a missing attribute means, where that matters here: https://onnx.ai/onnx/operators
_DEFAULTS: dict[str, dict[str, Any]] = {
    "LeakyRelu": {"alpha": 0.01}, "BatchNormalization": {"epsilon": 1e-5}, "Conv": {"group": 1},
    "Resize": {"mode": "nearest", "coordinate_transformation_mode": "half_pixel"},
}  # fmt: skip


def attribute_facts(node: TracedNode, reference: TracedNode) -> list[str]:
    """Attributes that both have and that differ; between two ONNX nodes also those that one alone has."""
    if not same_family(node.operator, reference.operator):
        return []
    ours, theirs = _attributes(node), _attributes(reference)
    whole = node.operator == reference.operator
    found = []
    for name in sorted({*ours, *theirs} if whole else ours.keys() & theirs.keys()):
        here, there = ours.get(name), theirs.get(name)
        if not _same(here, there):
            found.append(f"{name}: {_shown(here)} here, {_shown(there)} in the reference")
    return found


def weight_fact(name: str, values: Array, reference: Array) -> str:
    """How a weight differs from its counterpart; empty where it does not."""
    if values.size != reference.size:
        return f"weight {name}: {list(values.shape)} here, {list(reference.shape)} in the reference"
    here, there = values.reshape(-1).astype(np.float64), reference.reshape(-1).astype(np.float64)
    off = here - there
    norm = float(np.linalg.norm(there)) or 1.0
    distance = float(np.linalg.norm(off)) / norm
    if distance == 0:
        return ""
    factor = float(here @ there) / norm**2
    if values.size > 1 and float(np.linalg.norm(here - factor * there)) / norm < _EXPLAINED * distance:
        return f"weight {name}: {factor:.6g} times the reference's"
    at = int(np.argmax(np.abs(off)))
    place = [int(index) for index in np.unravel_index(at, values.shape)]
    return (
        f"weight {name}: relative L2 {distance:.1e}; most at {place}: {here[at]:.6g} here, "
        f"{there[at]:.6g} in the reference"
    )


def range_facts(record: Record, reference: Record | None, quantised: Quantisation | None, *, half: bool) -> list[str]:
    """What does not fit into the type of a node's output.

    Args:
        record: of the output.
        quantised: what it is stored in, if in 8 bits.
        half: it is stored in FP16.
    """
    found = []
    if record.num_bad:
        found.append(f"{record.num_bad:,} of {record.size:,} values are NaN or infinite")
    if reference is not None and half and reference.absmax > FP16_MAX:
        found.append(f"the reference reaches {reference.absmax:.4g}, FP16 holds {FP16_MAX:g}")
    if reference is not None and quantised is not None:
        low, high = quantised.reach
        found.append(
            f"the scale {float(np.max(quantised.scale)):.4g} covers {low:.4g} to {high:.4g}, the reference goes from "
            f"{reference.low:.4g} to {reference.high:.4g}"
        )
    return found


def _attributes(node: TracedNode) -> dict[str, Any]:
    given = {_ALIASES.get(name, name): value for name, value in node.attributes.items()}
    return {**_DEFAULTS.get(node.operator, {}), **given}


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) == 2 * len(b):  # ONNX pads both ends, PyTorch gives one number for the two
            b = (*b, *b)
        elif len(b) == 2 * len(a):
            a = (*a, *a)
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, int | float) and isinstance(b, int | float):
        return abs(a - b) <= _SAME_NUMBER * max(abs(a), abs(b))
    return bool(a == b)


def _shown(value: Any) -> str:
    if value is None:
        return "not given"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown, value))}]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def weights_of(node: TracedNode, records: Mapping[str, Record]) -> list[str]:
    """Constant inputs of a node."""
    return [name for name in dict.fromkeys(node.inputs) if name in records and records[name].constant]
