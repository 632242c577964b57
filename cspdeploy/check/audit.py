"""What precision an ONNX file really computes in: each of its multiply-accumulates and weights, not its name."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cspdeploy.check.macs import UNCOUNTED, MacOperator, count_macs, mac_operator, needed_tensors
from cspdeploy.check.shapes import choose_input_shapes, find_dtypes, find_shapes, run_for_shapes
from cspdeploy.core.onnx_graph import DEFAULT_DOMAIN, Node, OnnxModel, Tensor, read_onnx, walk_nodes
from cspdeploy.core.results import PrecisionAudit

__all__ = ["INT8_WEIGHTS", "audit_model", "audit_onnx", "declared_precision", "weight_tensors"]

Feeds = Mapping[str, npt.NDArray[np.generic]]

# Why half: FP16 and INT8 files keep some nodes in FP32 on purpose (what would overflow; first, last and sensitive
# layers), which is a minority of the MACs wherever the conversion was worth it. What is mostly FP32 is an FP32 file.
MIN_SHARE = 0.5
INT8_WEIGHTS = "int8-weights"
"""A declaration of weights that are stored in 8 bits, and of arithmetic in float."""
# An FP32 file has no reason to compute anything in fewer bits. Of its weights, lookup tables and masks may be small
# integers; a hundredth leaves room for them, and none for a layer that counts.
MAX_REDUCED_WEIGHTS = 0.01

_ONNX_DOMAINS = frozenset({DEFAULT_DOMAIN, "ai.onnx.ml", "ai.onnx.training", "ai.onnx.preview.training"})
_KNOWN_DOMAINS = _ONNX_DOMAINS | {"com.microsoft", "com.microsoft.nchwc"}
"""Domains whose operators `cspdeploy.check.macs` knows, those that multiply and those that do not."""
_PRECISIONS = {
    "float64": "fp64", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int8": "int8", "uint8": "int8",
    "int16": "int16", "uint16": "int16", "int32": "int32", "int4": "int4", "uint4": "int4", "int2": "int2",
    "uint2": "int2", **{f"float8{form}": "fp8" for form in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0")},
    "float4e2m1": "fp4", "float6e2m3": "fp6", "float6e3m2": "fp6",
}  # fmt: skip
"""int64, bool and strings are left out: they are shapes, indices and masks, not weights."""
_FULL = ("fp32", "fp64", "int32")
_DECLARED = re.compile(r"[._-](fp32|fp16|int8|int8-weights)(\.u8)?\.onnx$", re.IGNORECASE)
# Operators that only move values: what is quantised before them is so after them.
_MOVES = frozenset({"Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """A node that multiplies. `weight_only`: its weights are quantised, its arithmetic is not."""

    node: Node
    operator: MacOperator
    precision: str
    weight_only: bool


def declared_precision(path: Path) -> str:
    """The precision that a file's name promises: "int8" of model.int8.onnx or model-int8.onnx; empty for none.

    What takes bytes, model.int8.u8.onnx, promises the same of its arithmetic.

    "int8-weights" promises weights that are stored in 8 bits, and nothing of the arithmetic.
    """
    found = _DECLARED.search(path.name)
    return found[1].lower() if found else ""


def audit_onnx(path: Path, *, declared: str, feeds: Feeds | None = None) -> PrecisionAudit:
    """What the file is.

    Args:
        declared: "fp32", "fp16", "int8" or "int8-weights" as it is listed or named; empty where nothing is promised.
        feeds: inputs, `[N, ...]` each, of which the shapes alone are used, for dimensions that the file leaves free.

    Raises:
        InputError: not an ONNX file that can be read.
    """
    return audit_model(read_onnx(path), declared=declared, feeds=feeds)


def audit_model(model: OnnxModel, *, declared: str, feeds: Feeds | None = None) -> PrecisionAudit:
    """The same of a file that was read already. It is run only where MACs need shapes that it does not hold."""
    work = _find_work(model)
    macs, num_macs, unknown = _share_macs(model, work, feeds=feeds)
    weights = _share_weights(model)
    judged = macs or weights
    operators = Counter(_operator(node) for node in walk_nodes(model.graph))
    custom = {
        _operator(node)
        for node in walk_nodes(model.graph)
        if node.domain not in _ONNX_DOMAINS and f"{node.domain}.{node.operator}" not in model.functions
    }
    return PrecisionAudit(
        declared=declared, found=max(judged, key=lambda name: judged[name]) if judged else "fp32",
        macs=macs, num_macs=num_macs, macs_unknown=unknown, weights=weights, opsets=model.opsets,
        ir_version=model.ir_version, operators=dict(operators.most_common()),
        custom_operators=tuple(sorted(custom)), external_data=model.external_data,
        problem=_problem(declared, macs=macs, weights=weights, work=work),
    )  # fmt: skip


def weight_tensors(model: OnnxModel) -> Iterable[Tensor]:
    """Initializers of the graph and its subgraphs, and constants, which some exporters use in their place."""
    yield from model.graph.initializers.values()
    for node in walk_nodes(model.graph):
        for graph in node.subgraphs:
            yield from graph.initializers.values()
        constant = node.attributes.get("value")
        if node.operator == "Constant" and isinstance(constant, Tensor):
            yield constant


def _operator(node: Node) -> str:
    return node.operator if node.domain == DEFAULT_DOMAIN else f"{node.domain}.{node.operator}"


def _find_work(model: OnnxModel) -> list[_Work]:
    dtypes = find_dtypes(model.graph)
    makers = {name: node for node in model.graph.nodes for name in node.outputs}
    found = []
    for node in model.graph.nodes:
        operator = mac_operator(node)
        if operator is None:
            continue
        data, weight = node.inputs[operator.data], node.inputs[operator.weight]
        quantised = [_quantised_as(name, makers=makers, dtypes=dtypes) for name in (data, weight)]
        computed = dtypes.get(weight, "") or dtypes.get(data, "")
        precision = _PRECISIONS.get(computed, computed or "unknown")
        if operator.integer:
            precision = "int8"
        elif all(quantised):
            precision = quantised[0]
        weight_only = not operator.integer and bool(quantised[1]) and not quantised[0]
        found.append(_Work(node=node, operator=operator, precision=precision, weight_only=weight_only))
    return found


def _quantised_as(name: str, *, makers: Mapping[str, Node], dtypes: Mapping[str, str]) -> str:
    """The precision of the integers that a tensor was dequantised from; empty where it was not."""
    maker = makers.get(name)
    while maker is not None and maker.operator in _MOVES:
        maker = makers.get(maker.inputs[0])
    if maker is None or maker.operator != "DequantizeLinear":
        return ""
    return _PRECISIONS.get(dtypes.get(maker.inputs[0], ""), "int8")


def _share_macs(
    model: OnnxModel, work: list[_Work], *, feeds: Feeds | None
) -> tuple[dict[str, float], int | None, str]:
    """Shares by precision, MACs for one image, and what is not known of these."""
    inputs = choose_input_shapes(model, feeds=feeds)
    shapes = find_shapes(model, inputs)
    needed = {name for item in work for name in needed_tensors(item.node, item.operator)}
    missing = sorted(needed - shapes.keys())
    if missing:
        measured = run_for_shapes(model, inputs, names=missing)
        if isinstance(measured, str):
            return {}, None, measured
        shapes.update(measured)
    counts: dict[str, int] = defaultdict(int)
    for item in work:
        counts[item.precision] += count_macs(item.node, item.operator, shapes) or 0
    total = sum(counts.values())
    unknown = "; ".join(filter(None, (_uncounted(model), inputs.assumed)))
    shares = {name: count / total for name, count in sorted(counts.items()) if count} if total else {}
    return shares, None if unknown else total // _batch(inputs.shapes.values(), total), unknown


def _batch(shapes: Iterable[tuple[int, ...]], total: int) -> int:
    """Images in one run: the first dimension that all inputs share, where the work divides by it."""
    sizes = {shape[0] if shape else 1 for shape in shapes}
    size = max(1, sizes.pop()) if len(sizes) == 1 else 1
    return size if total % size == 0 else 1


def _uncounted(model: OnnxModel) -> str:
    """What multiplies without being counted."""
    inner = sum(mac_operator(node) is not None for node in walk_nodes(model.graph))
    inner -= sum(mac_operator(node) is not None for node in model.graph.nodes)
    others = Counter(
        node.operator
        for node in walk_nodes(model.graph)
        if node.operator in UNCOUNTED
        or f"{node.domain}.{node.operator}" in model.functions
        or node.domain not in _KNOWN_DOMAINS  # whatever such an operator does, it may multiply
    )
    said = [f"{count} {name}" for name, count in others.most_common()]
    said += [f"{inner} operators inside of If, Loop or Scan"] if inner else []
    return f"not counted: {', '.join(said)}" if said else ""


def _share_weights(model: OnnxModel) -> dict[str, float]:
    counts: dict[str, int] = defaultdict(int)
    for tensor in weight_tensors(model):
        if tensor.dtype in _PRECISIONS:
            counts[_PRECISIONS[tensor.dtype]] += math.prod(tensor.shape)
    total = sum(counts.values())
    return {name: count / total for name, count in sorted(counts.items()) if count}


def _problem(declared: str, *, macs: dict[str, float], weights: dict[str, float], work: list[_Work]) -> str:
    """Why the file is not what it is declared as: by its MACs, and by its weights where these are unknown."""
    if not declared:
        return ""
    if declared == "fp32":
        return _reduced(macs, weights)
    if declared == INT8_WEIGHTS:
        stored = _describe(weights) or "unknown"
        return "" if weights.get("int8", 0.0) >= MIN_SHARE else f"named INT8 in its weights, but these are {stored}"
    name, judged, what = declared.upper(), macs or weights, "MACs" if macs else "weights"
    if judged.get(declared, 0.0) < MIN_SHARE:
        share = f"{100 * judged.get(declared, 0.0):.3g} % of its {what} are in {name}"
        weight_only = "weight-only: " if any(item.weight_only for item in work) else ""
        return f"named {name}, but {weight_only}{share} ({_describe(judged) or 'it has none'})"
    if declared == "fp16" and weights and weights.get("fp16", 0.0) < MIN_SHARE:
        return f"named FP16, but its weights are {_describe(weights)}: the file is no smaller"
    return ""


def _reduced(macs: dict[str, float], weights: dict[str, float]) -> str:
    reduced = {name: share for name, share in macs.items() if name not in (*_FULL, "unknown")}
    if reduced:
        return f"named FP32, but of its MACs {_describe(reduced)} are not"
    reduced = {name: share for name, share in weights.items() if name not in _FULL}
    if sum(reduced.values()) > MAX_REDUCED_WEIGHTS:
        return f"named FP32, but of its weights {_describe(reduced)} are not"
    return ""


def _describe(shares: dict[str, float]) -> str:
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    return ", ".join(f"{100 * share:.3g} % {name.upper()}" for name, share in ordered)
