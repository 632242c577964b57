"""A float32 graph to FP16 arithmetic, with float32 inputs and outputs, and FP32 islands where FP16 would fail.

FP16 holds magnitudes from 6e-8 to 65504 with 11 bits. Before anything is converted, every tensor's range is measured on
real images, and a node stays float32 if one of these holds:

    overflow   an operand or result comes within a factor of 4 of 65504: unseen images go further than those measured
    sum        a mean or a sum over a map, where an engine that adds up in FP16 would pass 65504 on the way
    underflow  the result's root mean square is below 6.1e-5, the smallest normal FP16 number: bits are being lost
    weights    a weight tensor does not survive rounding: infinite values, or a relative L2 error above 2^-9
    operator   the operator is defined for float32 alone
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper, shape_inference

from cspdeploy.core.types import StepRecord
from cspdeploy.export.ranges import TensorRange, measure_ranges
from cspdeploy.export.rewrite import captured_names, subgraphs_of, write_model

__all__ = ["convert_fp16"]

FP16_MAX = 65504.0
HEADROOM = 4.0
FP16_SMALLEST_NORMAL = 2.0**-14
LARGE_BYTES = 1024
WEIGHT_ERROR_LIMIT = 2.0**-9  # four times the worst rounding error of a normal number, so only lost values pass it

_FP32_OPERATORS = frozenset({
    "NonMaxSuppression", "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConstantOfShape", "EyeLike",
    "RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli", "Range",
})  # fmt: skip
_FP32_OPERANDS = {"Resize": (1, 2), "Upsample": (1,)}  # roi and scales are float32 by the operator's definition
_SUMS = frozenset({"GlobalAveragePool", "ReduceMean", "ReduceSum", "AveragePool"})


@dataclass(slots=True)
class _Plan:
    """Which nodes (by index) stay float32 and why; which weights lose values."""

    reasons: dict[int, str] = field(default_factory=dict)
    flushed: dict[str, int] = field(default_factory=dict)


def convert_fp16(source: Path, target: Path, x_NCHW: npt.NDArray[np.float32], *, batch: int) -> StepRecord:
    """Convert `source`, a float32 ONNX file, into `target`.

    Args:
        x_NCHW: real images to measure ranges on.
        batch: images a call that the graph takes.

    Returns:
        A record that names every node kept in float32 with its reason and every weight tensor with values that FP16
        cannot hold.
    """
    model = onnx.load(source)
    _constants_to_initializers(model.graph)
    floats = _float_tensors(model)
    computed = [name for node in model.graph.node for name in node.output if name in floats]
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value.name for value in model.graph.input if value.name in floats and value.name not in weights]
    ranges = measure_ranges(model, computed, x_NCHW, batch=batch)
    ranges |= {name: _array_range(x_NCHW) for name in inputs}
    plan = _plan(model.graph, floats, ranges)
    record = _record(model.graph, plan, len(x_NCHW))
    _Converter(model.graph, floats, frozenset(plan.reasons)).convert()
    write_model(model, target)
    return record


def _record(graph: onnx.GraphProto, plan: _Plan, num_images: int) -> StepRecord:
    nodes = graph.node
    kept = [
        {"node": nodes[index].name, "operator": nodes[index].op_type, "reason": reason}
        for index, reason in sorted(plan.reasons.items())
    ]
    facts: dict[str, Any] = {
        "num_images": num_images,
        "fp32_nodes": kept,
        "clamped_weights": [{"tensor": name, "to_zero": count} for name, count in sorted(plan.flushed.items())],
    }
    lost = sum(plan.flushed.values())
    detail = f"{len(nodes) - len(kept)} of {len(nodes)} nodes in FP16 (ranges of {num_images} real images)"
    if kept:
        detail += "; FP32: " + ", ".join(f"{item['node']} ({item['reason']})" for item in kept[:4])
        detail += f" and {len(kept) - 4} more" if len(kept) > 4 else ""
    detail += f"; {lost} weights below 3e-8 became 0" if lost else "; no weight clamped"
    return StepRecord(name="fp16", outcome="done", detail=detail, facts=facts)


def _constants_to_initializers(graph: onnx.GraphProto) -> None:
    nodes = []
    for node in graph.node:
        tensor = _constant(node)
        if tensor is not None:
            tensor.name = node.output[0]
            graph.initializer.append(tensor)
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _constant(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """The float32 or other tensor of a Constant node; None for other nodes and for constants of other kinds."""
    if node.op_type != "Constant":
        return None
    for attribute in node.attribute:
        if attribute.name == "value":
            value: onnx.TensorProto = attribute.t
            return value
        if attribute.name == "value_float":
            return numpy_helper.from_array(np.asarray(attribute.f, np.float32))
        if attribute.name == "value_floats":
            return numpy_helper.from_array(np.asarray(attribute.floats, np.float32))
    return None


def _float_tensors(model: onnx.ModelProto) -> frozenset[str]:
    """Names of all float32 tensors, by ONNX's own type inference."""
    graph = shape_inference.infer_shapes(_without_weights(model), strict_mode=True).graph
    typed = (*graph.input, *graph.output, *graph.value_info)
    names = {value.name for value in typed if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    return frozenset(names | {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT})


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its large initializers as inputs of their type: what type inference needs, without 100 MB."""
    light = onnx.ModelProto(ir_version=model.ir_version)
    light.opset_import.extend(model.opset_import)
    light.functions.extend(model.functions)
    graph = light.graph
    graph.name = model.graph.name
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    given = {value.name for value in graph.input}
    for tensor in model.graph.initializer:
        if tensor.ByteSize() < LARGE_BYTES:  # shapes, axes, scales: inference reads their values
            graph.initializer.append(tensor)
        elif tensor.name not in given:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    return light


def _array_range(x: npt.NDArray[np.float32]) -> TensorRange:
    rms = float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))
    return TensorRange(absmax=float(np.abs(x).max()), rms=rms, num_elements=x.size // len(x))


def _plan(graph: onnx.GraphProto, floats: frozenset[str], ranges: dict[str, TensorRange]) -> _Plan:
    plan = _Plan()
    weights = {tensor.name: _writable(tensor) for tensor in graph.initializer if tensor.name in floats}
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
        lost = int(np.count_nonzero((weights[name] != 0) & (_to_half(weights[name]) == 0)))
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


def _writable(tensor: onnx.TensorProto) -> npt.NDArray[np.float32]:
    """The values, in memory of their own: torch warns of arrays that it must not write to."""
    return np.array(numpy_helper.to_array(tensor), np.float32)


def _to_half(array: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    """Round to nearest, ties to even, as numpy does; torch does it with the CPU's own instruction."""
    half: npt.NDArray[np.float16] = torch.from_numpy(array).half().numpy()
    return half


def _reason(node: onnx.NodeProto, touched: list[tuple[str, TensorRange]], ranges: dict[str, TensorRange]) -> str:
    if node.op_type in _FP32_OPERATORS:
        return "operator: defined for float32"
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


class _Converter:
    """Rebuilds the node list with casts wherever a tensor is wanted in the other precision than it is made in."""

    def __init__(self, graph: onnx.GraphProto, floats: frozenset[str], fp32_nodes: frozenset[int]) -> None:
        self._graph, self._floats, self._fp32_nodes = graph, floats, fp32_nodes
        self._weights = {tensor.name: _copy(tensor) for tensor in graph.initializer}
        self._outputs = {value.name for value in graph.output}
        self._half: set[str] = set()
        self._made: dict[tuple[str, bool], str] = {}
        self._nodes: list[onnx.NodeProto] = []

    def convert(self) -> None:
        graph = self._graph
        source = list(graph.node)
        for index, node in enumerate(source):
            touches_floats = any(name in self._floats for name in (*node.input, *node.output))
            half = touches_floats and index not in self._fp32_nodes
            operands_fp32 = _FP32_OPERANDS.get(node.op_type, ())
            if touches_floats:
                wanted = [self._as(name, half=half and i not in operands_fp32) for i, name in enumerate(node.input)]
                node.input[:] = wanted
            self._nodes.append(node)
            if half:
                self._make_half(node)
        used = {name for node in self._nodes for name in (*node.input, *captured_names(node))} | self._outputs
        kept = [tensor for name, tensor in self._weights.items() if name in used]
        del graph.node[:], graph.value_info[:]
        graph.node.extend(self._nodes)
        graph.ClearField("initializer")
        graph.initializer.extend(kept)

    def _make_half(self, node: onnx.NodeProto) -> None:
        if node.op_type == "Cast":
            for attribute in node.attribute:
                if attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                    attribute.i = TensorProto.FLOAT16
        finals = []
        for i, name in enumerate(node.output):
            if name not in self._floats:
                continue
            self._half.add(name)
            if name in self._outputs:  # the graph's own output keeps its name and stays float32
                node.output[i] = f"{name}/fp16"
                self._made[name, True] = node.output[i]
                finals.append(_cast(node.output[i], name, half=False))
        self._nodes += finals

    def _as(self, name: str, *, half: bool) -> str:
        """Name of the tensor in the wanted precision; casts it once if need be."""
        if name not in self._floats:
            return name
        if (name, half) in self._made:
            return self._made[name, half]
        if name in self._weights:
            if not half:
                return name
            array = _to_half(_writable(self._weights[name]))
            converted = f"{name}/fp16"
            self._weights[converted] = numpy_helper.from_array(array, converted)
        elif (name in self._half) == half or (name in self._outputs and not half):
            return name
        else:
            converted = f"{name}/{'fp16' if half else 'fp32'}"
            self._nodes.append(_cast(name, converted, half=half))
        self._made[name, half] = converted
        return converted


def _copy(tensor: onnx.TensorProto) -> onnx.TensorProto:
    copied = onnx.TensorProto()
    copied.CopyFrom(tensor)
    return copied


def _cast(before: str, after: str, *, half: bool) -> onnx.NodeProto:
    to = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    return helper.make_node("Cast", [before], [after], name=f"{after}/cast", to=to)
