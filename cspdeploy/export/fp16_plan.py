"""Which nodes of a float32 graph can compute in FP16, and which must stay float32.

FP16 holds magnitudes from 6e-8 to 65504 with 11 bits. A node stays float32 if one of these holds on real images:

    overflow   an operand or result comes within a factor of 4 of 65504: unseen images go further than those measured
    sum        a mean or a sum over a map, where an engine that adds up in FP16 would pass 65504 on the way
    underflow  the result's root mean square is below 6.1e-5, the smallest normal FP16 number: bits are being lost
    weights    a weight tensor does not survive rounding: infinite values, or a relative L2 error above 2^-9
    operator   the operator is defined for float32 alone
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import numpy_helper

from cspdeploy.export.ranges import TensorRange
from cspdeploy.export.rewrite import captured_names, subgraphs_of

__all__ = ["Fp16Plan", "nodes_in_half", "plan_fp16", "to_half", "writable"]

FP16_MAX = 65504.0
HEADROOM = 4.0
FP16_SMALLEST_NORMAL = 2.0**-14
WEIGHT_ERROR_LIMIT = 2.0**-9  # four times the worst rounding error of a normal number, so only lost values pass it

_FP32_OPERATORS = frozenset({
    "NonMaxSuppression", "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConstantOfShape", "EyeLike",
    "RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli", "Range",
})  # fmt: skip
_SUMS = frozenset({"GlobalAveragePool", "ReduceMean", "ReduceSum", "AveragePool"})
_HEAVY = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
"""Where a network's multiplications and weights are."""


@dataclass(slots=True)
class Fp16Plan:
    """Which nodes (by index) stay float32 and why; how many values of which weights become zero."""

    reasons: dict[int, str] = field(default_factory=dict)
    flushed: dict[str, int] = field(default_factory=dict)


def plan_fp16(graph: onnx.GraphProto, floats: frozenset[str], ranges: dict[str, TensorRange]) -> Fp16Plan:
    """Decide for every node of a graph that has ranges for its computed tensors and its inputs.

    Args:
        floats: names of all float32 tensors.
    """
    plan = Fp16Plan()
    weights = {tensor.name: writable(tensor) for tensor in graph.initializer if tensor.name in floats}
    unfit = {name: reason for name, array in weights.items() if (reason := _unfit_weight(array))}
    captured = {name for node in graph.node for name in captured_names(node)}
    for index, node in enumerate(graph.node):
        touched = [name for name in (*node.input, *node.output) if name in ranges]
        reason = _reason(node, [(name, ranges[name]) for name in touched], ranges)
        reason = reason or next((f"weights: {unfit[name]}" for name in node.input if name in unfit), "")
        if not reason and (list(subgraphs_of(node)) or captured.intersection(node.output)):
            reason = "operator: has or feeds a subgraph"
        if reason and any(name in floats for name in (*node.input, *node.output)):
            plan.reasons[index] = reason
    in_half = {name for i, node in enumerate(graph.node) if i not in plan.reasons for name in node.input}
    for name in sorted(in_half.intersection(weights)):
        lost = int(np.count_nonzero((weights[name] != 0) & (to_half(weights[name]) == 0)))
        if lost:
            plan.flushed[name] = lost
    return plan


def _unfit_weight(array: npt.NDArray[np.float32]) -> str:
    largest = float(np.abs(array).max(initial=0.0))
    if largest > FP16_MAX:
        return f"{largest:.3g} is beyond 65504"
    exact = torch.from_numpy(array)
    norm = torch.linalg.vector_norm(exact, dtype=torch.float64)
    error = float(torch.linalg.vector_norm(exact - exact.half(), dtype=torch.float64) / norm) if norm else 0.0
    return f"rounding error {error:.1e}" if error > WEIGHT_ERROR_LIMIT else ""


def writable(tensor: onnx.TensorProto) -> npt.NDArray[np.float32]:
    """A weight's values, in memory of their own: torch warns of arrays that it must not write to."""
    return np.array(numpy_helper.to_array(tensor), np.float32)


def to_half(array: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    """Round to nearest, ties to even, as numpy does; torch does it with the CPU's own instruction."""
    half: npt.NDArray[np.float16] = torch.from_numpy(array).half().numpy()
    return half


def _reason(node: onnx.NodeProto, touched: list[tuple[str, TensorRange]], ranges: dict[str, TensorRange]) -> str:
    if node.op_type in _FP32_OPERATORS:
        return "operator: defined for float32"
    if node.domain not in ("", "ai.onnx"):
        return f"operator: of {node.domain}, which may know float32 alone"
    for _, values in touched:
        if not values.absmax <= FP16_MAX / HEADROOM:
            return f"overflow: reaches {values.absmax:.3g} of 65504"
    if node.op_type in _SUMS and node.input[0] in ranges and node.output[0] in ranges:
        whole, parts = ranges[node.input[0]], ranges[node.output[0]]
        window = next((list(item.ints) for item in node.attribute if item.name == "kernel_shape"), [])
        num_summed = math.prod(window) if window else whole.num_elements / max(1, parts.num_elements)
        total = whole.absmax * num_summed
        if total > FP16_MAX:
            return f"sum: may reach {total:.3g} of 65504"
    for name, values in touched:
        if name in node.output and 0 < values.rms < FP16_SMALLEST_NORMAL:
            return f"underflow: root mean square {values.rms:.1e}"
    return ""


def nodes_in_half(graph: onnx.GraphProto, floats: frozenset[str], plan: Fp16Plan) -> int:
    """How many of the nodes that matter would compute in FP16."""
    touching = [
        (index, node)
        for index, node in enumerate(graph.node)
        if any(name in floats for name in (*node.input, *node.output))
    ]
    heavy = [index for index, node in touching if node.op_type in _HEAVY]
    return sum(index not in plan.reasons for index in heavy or [index for index, _ in touching])
