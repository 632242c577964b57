"""A float32 graph to FP16 arithmetic, with float32 inputs and outputs, and FP32 islands where FP16 would fail.

Before anything is converted, every tensor's range is measured on real images; `cspdeploy.export.fp16_plan` says what
follows from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper, shape_inference

from cspdeploy.core.types import StepRecord
from cspdeploy.export.fp16_plan import Fp16Plan, nodes_in_half, plan_fp16, to_half, writable
from cspdeploy.export.ranges import TensorRange, measure_ranges
from cspdeploy.export.rewrite import captured_names, count_operators, without_weights, write_model

__all__ = ["convert_fp16"]

_FP32_OPERANDS = {"Resize": (1, 2), "Upsample": (1,)}  # roi and scales are float32 by the operator's definition


def convert_fp16(source: Path, target: Path, x_NCHW: npt.NDArray[np.float32], *, batch: int) -> StepRecord:
    """Convert `source`, a float32 ONNX file, into `target`.

    Args:
        x_NCHW: real images to measure ranges on.
        batch: images a call that the graph takes.

    Returns:
        A record that names every node kept in float32 with its reason and every weight tensor with values that FP16
        cannot hold. Its outcome is "kept", and `target` is not written, where all convolutions and matrix products
        would stay in float32 (where there are none: all nodes), for such a file would be FP16 in name alone.
    """
    model = onnx.load(source)
    before = count_operators(model.graph)
    _constants_to_initializers(model.graph)
    types = _infer_types(model)
    floats = frozenset(name for name, kind in types.items() if kind.tensor_type.elem_type == TensorProto.FLOAT)
    computed = [name for node in model.graph.node for name in node.output if name in floats]
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value.name for value in model.graph.input if value.name in floats and value.name not in weights]
    ranges = measure_ranges(model, computed, x_NCHW, batch=batch)
    ranges |= {name: _array_range(x_NCHW) for name in inputs}
    plan = plan_fp16(model.graph, floats, ranges)
    num_nodes, record = len(model.graph.node), _record(model.graph, plan, len(x_NCHW))
    if not nodes_in_half(model.graph, floats, plan):
        why = f"no FP16 file: nothing that computes can be in FP16; {len(plan.reasons)} of {num_nodes} nodes stay FP32"
        detail = f"{why}: {_listed(record.facts['fp32_nodes'])}" if plan.reasons else why
        return dataclasses.replace(record, outcome="kept", detail=detail)
    _Converter(model.graph, types, frozenset(plan.reasons)).convert()
    write_model(model, target)
    facts = {**record.facts, "operators_before": before, "operators_after": count_operators(model.graph)}
    return dataclasses.replace(record, facts=facts)


def _record(graph: onnx.GraphProto, plan: Fp16Plan, num_images: int) -> StepRecord:
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
        detail += f"; FP32: {_listed(kept)}"
    detail += f"; {lost} weights below 3e-8 became 0" if lost else "; no weight clamped"
    return StepRecord(name="fp16", outcome="done", detail=detail, facts=facts)


def _listed(kept: list[dict[str, str]]) -> str:
    """The first four, and how many more."""
    first = ", ".join(f"{item['node']} ({item['reason']})" for item in kept[:4])
    return f"{first} and {len(kept) - 4} more" if len(kept) > 4 else first


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


def _infer_types(model: onnx.ModelProto) -> dict[str, onnx.TypeProto]:
    """Element type and shape of every tensor, by ONNX's own inference."""
    graph = shape_inference.infer_shapes(without_weights(model), strict_mode=True).graph
    types = {value.name: value.type for value in (*graph.input, *graph.output, *graph.value_info)}
    for tensor in model.graph.initializer:
        types[tensor.name] = helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
    return types


def _array_range(x: npt.NDArray[np.float32]) -> TensorRange:
    rms = float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))
    return TensorRange(absmax=float(np.abs(x).max()), rms=rms, num_elements=x.size // len(x))


class _Converter:
    """Rebuilds the node list with casts wherever a tensor is wanted in the other precision than it is made in."""

    def __init__(self, graph: onnx.GraphProto, types: dict[str, onnx.TypeProto], fp32_nodes: frozenset[int]) -> None:
        self._graph, self._types, self._fp32_nodes = graph, types, fp32_nodes
        self._floats = {name for name, kind in types.items() if kind.tensor_type.elem_type == TensorProto.FLOAT}
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
        graph.value_info.extend(self._values())
        graph.ClearField("initializer")
        graph.initializer.extend(kept)

    def _values(self) -> Iterator[onnx.ValueInfoProto]:
        """What flows between the nodes. Shapes are those of before: without them a reader must run the file."""
        made = {after: (before, half) for (before, half), after in self._made.items()}
        for name in (name for node in self._nodes for name in node.output if name and name not in self._outputs):
            before, half = made.get(name, (name, name in self._half))
            if before not in self._types:
                continue
            value = onnx.ValueInfoProto(name=name, type=self._types[before])
            if before in self._floats:
                value.type.tensor_type.elem_type = TensorProto.FLOAT16 if half else TensorProto.FLOAT
            yield value

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
            array = to_half(writable(self._weights[name]))
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
