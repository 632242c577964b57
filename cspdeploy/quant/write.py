"""A quantised graph as a file: QuantizeLinear and DequantizeLinear pairs where the plan has grids.

Of a tensor t: `t/q` its integers, `t/dq` their values, `t/scale` and `t/zero_point` its grid.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper, shape_inference

from cspdeploy.core.channel_factors import FACTORS_KEY, pack_factors
from cspdeploy.core.errors import InputError
from cspdeploy.export.rewrite import captured_names, without_weights
from cspdeploy.quant.place_rules import moves_values
from cspdeploy.quant.plan import Floats, QuantPlan

__all__ = ["write_qdq"]

_INT32 = np.iinfo(np.int32)
_ELEMENTS = {"uint8": TensorProto.UINT8, "int8": TensorProto.INT8}


def write_qdq(model: onnx.ModelProto, plan: QuantPlan) -> onnx.ModelProto:
    """The model with the plan's grids in it; the same model and plan give the same bytes.

    Nodes keep their names, the graph's inputs and outputs their names and types. An output that lies on a grid is what
    its DequantizeLinear gives.

    Args:
        model: as `prepare_float` leaves it.

    Raises:
        InputError: a scale that is not positive and finite; a bias beyond 32 bits in steps of its products.
    """
    return _Writer(model, plan).write()


class _Writer:
    """`nodes` and `initializers` of the new graph, in order; `written`: by name, what is given in place of a tensor."""

    def __init__(self, model: onnx.ModelProto, plan: QuantPlan) -> None:
        self._model, self._plan = model, plan
        graph = model.graph
        self._weights = {tensor.name: tensor for tensor in graph.initializer}
        self._outputs = {value.name for value in graph.output}
        self._taken = {name for node in graph.node for name in (*node.input, *captured_names(node))}
        names = self._taken | self._outputs | {name for node in graph.node for name in node.output}
        self._suffix = _free_suffix(names)
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._written: dict[str, str] = {}
        self._on: dict[str, str] = {}
        self._types = _types_of(model)
        self._values: dict[str, onnx.TypeProto] = {}

    def write(self) -> onnx.ModelProto:
        source = self._model.graph
        for value in source.input:
            if value.name in self._plan.grids:
                self._put_pair(value.name, value.name, on=value.name)
        for node in source.node:
            self._add(node)
        model = onnx.ModelProto(ir_version=self._model.ir_version)
        for field in ("opset_import", "metadata_props", "functions"):
            getattr(model, field).extend(getattr(self._model, field))
        if factors := pack_factors(self._plan.factors):
            model.metadata_props.add(key=FACTORS_KEY, value=factors)
        model.producer_name, model.producer_version = self._model.producer_name, self._model.producer_version
        model.domain, model.model_version = self._model.domain, self._model.model_version
        model.doc_string = self._model.doc_string
        graph = model.graph
        graph.name, graph.doc_string = source.name, source.doc_string
        graph.input.extend(source.input)
        graph.output.extend(source.output)
        graph.node.extend(self._nodes)
        self._keep_weights(name for node in self._nodes for name in (*node.input, *sorted(captured_names(node))))
        self._keep_weights(sorted(self._outputs))
        graph.initializer.extend(self._initializers.values())
        made = [name for node in self._nodes for name in node.output if name and name not in self._outputs]
        known = self._types | self._values
        graph.value_info.extend(onnx.ValueInfoProto(name=name, type=known[name]) for name in made if name in known)
        return model

    def _add(self, old: onnx.NodeProto) -> None:
        node = onnx.NodeProto()
        node.CopyFrom(old)
        for i, name in enumerate(old.input):
            if name in self._plan.weights:
                node.input[i] = self._weight(name)
            elif name in self._plan.biases:
                node.input[i] = self._bias(name)
            else:
                node.input[i] = self._written.get(name, name)
        self._nodes.append(node)
        on = {name: self._grid_of(old, name) for name in old.output if name}
        for i, name in enumerate(old.output):
            if on.get(name):
                made = f"{name}/float{self._suffix}" if name in self._outputs else name
                if made != name and name in self._types:
                    self._values[made] = self._types[name]
                node.output[i] = made
                self._put_pair(name, made, on=on[name])

    def _grid_of(self, node: onnx.NodeProto, name: str) -> str:
        """The tensor whose grid an output lies on; empty for none."""
        if name in self._plan.grids:
            return name
        mode = next((attribute.s for attribute in node.attribute if attribute.name == "mode"), b"nearest")
        if name in self._taken and moves_values(node.op_type, node.domain, mode):
            return self._on.get(node.input[0], "")
        return ""

    def _put_pair(self, name: str, made: str, *, on: str) -> None:
        """Q and DQ behind `made`; whoever takes `name` takes what DQ gives."""
        grid = self._plan.grids[on]
        if not (np.isfinite(grid.scale) and np.float32(grid.scale) > 0):
            raise InputError(f"tensor {name}: step {grid.scale}, expected a positive number", fix="check the images")
        scale = self._keep(f"{on}/scale{self._suffix}", np.float32(grid.scale))
        zero = self._keep(f"{on}/zero_point{self._suffix}", np.dtype(grid.dtype).type(grid.zero_point))
        q = f"{name}/q{self._suffix}"
        dq = name if name in self._outputs else f"{name}/dq{self._suffix}"
        self._nodes += [
            helper.make_node("QuantizeLinear", [made, scale, zero], [q], f"{name}/QuantizeLinear"),
            helper.make_node("DequantizeLinear", [q, scale, zero], [dq], f"{name}/DequantizeLinear"),
        ]
        self._written[name], self._on[name] = dq, on
        if name in self._types:
            self._values[dq] = self._types[name]
            self._values[q] = onnx.TypeProto()
            self._values[q].CopyFrom(self._types[name])
            self._values[q].tensor_type.elem_type = _ELEMENTS[grid.dtype]

    def _weight(self, name: str) -> str:
        grid = self._plan.weights[name]
        integers = self._plan.integers.get(name)
        return self._stored(
            name, grid.quantise(self._value(name)) if integers is None else integers, grid.scales, axis=grid.axis
        )

    def _bias(self, name: str) -> str:
        tensor, weight = self._plan.biases[name]
        steps = np.float32(self._plan.grids[tensor].scale) * self._plan.weights[weight].scales
        whole = np.rint(self._value(name) / steps)
        if not np.all(np.abs(whole) <= _INT32.max):
            raise InputError(
                f"bias {name}: its values pass 32 bits in steps of {float(steps.min()):.3g}",
                fix="widen the steps of its weight, or keep its node in float",
            )
        return self._stored(name, whole.astype(np.int32), steps, axis=0)

    def _stored(self, name: str, integers: npt.NDArray[np.integer], scales: Floats, *, axis: int) -> str:
        """An initializer and its DequantizeLinear, one step for each slice along `axis` or one for all."""
        dq = f"{name}/dq{self._suffix}"
        if name in self._written:
            return dq
        steps = scales.reshape(()) if scales.size == 1 else scales
        inputs = [
            self._keep(f"{name}/q{self._suffix}", integers),
            self._keep(f"{name}/scale{self._suffix}", steps.astype(np.float32)),
            self._keep(f"{name}/zero_point{self._suffix}", np.zeros(steps.shape, integers.dtype)),
        ]
        node = helper.make_node("DequantizeLinear", inputs, [dq], f"{name}/DequantizeLinear")
        if steps.ndim:
            node.attribute.append(helper.make_attribute("axis", axis))
        self._nodes.append(node)
        self._written[name] = dq
        self._values[dq] = helper.make_tensor_type_proto(TensorProto.FLOAT, integers.shape)
        return dq

    def _value(self, name: str) -> Floats:
        if name in self._plan.values:
            return self._plan.values[name]
        value: Floats = numpy_helper.to_array(self._weights[name])
        return value

    def _keep(self, name: str, array: npt.ArrayLike) -> str:
        self._initializers.setdefault(name, numpy_helper.from_array(np.asarray(array), name))
        return name

    def _keep_weights(self, names: Iterable[str]) -> None:
        """Initializers of the source that the new graph takes as they are, or with the plan's values."""
        for name in names:
            if name not in self._weights or name in self._initializers:
                continue
            if name in self._plan.values:
                self._keep(name, self._plan.values[name].astype(np.float32))
            else:
                self._initializers[name] = self._weights[name]


def _free_suffix(names: set[str]) -> str:
    """Appended to new names where a file has some that end like them; nearly always empty."""
    suffix, number = "", 1
    endings = ("/q", "/dq", "/scale", "/zero_point", "/float")
    while any(name.endswith(tuple(f"{ending}{suffix}" for ending in endings)) for name in names):
        number += 1
        suffix = str(number)
    return suffix


def _types_of(model: onnx.ModelProto) -> dict[str, onnx.TypeProto]:
    """Element type and shape of every tensor that inference reaches."""
    graph = shape_inference.infer_shapes(without_weights(model)).graph
    return {value.name: value.type for value in (*graph.value_info, *graph.input, *graph.output)}
