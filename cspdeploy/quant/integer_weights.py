"""INT8 without images: weights stored in 8 bits, with arithmetic in float or with ranges found anew in every run.

"weights": each weight is int8 behind a DequantizeLinear. The file is about a quarter of the size. ONNX Runtime does not
compute the float weights once at loading but in every run (73 DequantizeLinear are left of CSPDarknet53 after its
optimisation), which costs time: 1.46 times float32 at 128x128. It serves downloads, not latency.

"dynamic": DynamicQuantizeLinear finds the range of what a product takes, over the whole batch, then ConvInteger or
MatMulInteger multiplies integers. What one image gives so depends on those that it is batched with. Slower than float32
as well on ONNX Runtime's CPU provider (1.38 times, the same network): its ConvInteger has no fused form.

A convolution's weights are then stored as uint8 around 128: ConvInteger puts the weight first into its matrix product,
and s8 * u8 has no fast kernel on x86 (three times the time of u8 * u8).
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from cspdeploy.core.errors import InputError
from cspdeploy.export.rewrite import captured_names
from cspdeploy.quant.plan import Floats, WeightGrid, fit_weight_grid

__all__ = ["WeightMode", "quantise_weights"]

WeightMode = Literal["weights", "dynamic"]

_MIDDLE = 128
"""Zero point of unsigned weights."""


def quantise_weights(model: onnx.ModelProto, mode: WeightMode, *, weight_limit: int = 127) -> onnx.ModelProto:
    """A copy whose convolutions and matrix products have int8 weights, one step for each output channel.

    Args:
        model: as `prepare_float` leaves it.
        mode: what the arithmetic is.
        weight_limit: largest magnitude of the integers; of "dynamic", see `cspdeploy.quant.placements.Placement`.

    Raises:
        InputError: an unknown mode, or no product with weights of its own.
    """
    if mode not in get_args(WeightMode):
        raise InputError(f"INT8 mode '{mode}': expected one of {', '.join(get_args(WeightMode))}")
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    rewriter = _Rewriter(copy.graph, dynamic=mode == "dynamic", limit=weight_limit)
    rewriter.rewrite()
    if not rewriter.num_rewritten:
        raise InputError(
            "no convolution or matrix product has a weight in the file: there is nothing to store in INT8",
            fix="keep the float32 file",
        )
    return copy


class _Rewriter:
    """Builds the node list anew."""

    def __init__(self, graph: onnx.GraphProto, *, dynamic: bool, limit: int) -> None:
        self._graph, self._dynamic, self._limit = graph, dynamic, limit
        self._weights = {tensor.name: tensor for tensor in graph.initializer}
        self._nodes: list[onnx.NodeProto] = []
        self._quantised: dict[str, tuple[str, str, str]] = {}
        self._stored: dict[str, WeightGrid] = {}
        self.num_rewritten = 0

    def rewrite(self) -> None:
        for node in self._graph.node:
            if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul") and self._is_float_weight(node):
                self.num_rewritten += 1
                if self._dynamic and self._has_integer_form(node):
                    self._multiply_integers(node)
                    continue
                self._dequantise(node)
            self._nodes.append(node)
        del self._graph.node[:]
        self._graph.node.extend(self._nodes)
        used = {name for node in self._nodes for name in (*node.input, *captured_names(node))}
        used |= {value.name for value in self._graph.output}
        kept = [tensor for tensor in self._graph.initializer if tensor.name in used]
        del self._graph.initializer[:]
        self._graph.initializer.extend(kept)

    def _is_float_weight(self, node: onnx.NodeProto) -> bool:
        weight = self._weights.get(node.input[1])
        return weight is not None and weight.data_type == TensorProto.FLOAT and len(weight.dims) >= 2

    def _has_integer_form(self, node: onnx.NodeProto) -> bool:
        """MatMulInteger is a plain product; ConvTranspose has no such operator."""
        weight = self._weights[node.input[1]]
        plain = not any(
            (attribute.name == "transA" and attribute.i) or (attribute.name in ("alpha", "beta") and attribute.f != 1)
            for attribute in node.attribute
        )
        matrices = node.op_type == "MatMul" and len(weight.dims) == 2
        return node.op_type == "Conv" or matrices or (node.op_type == "Gemm" and plain)

    def _dequantise(self, node: onnx.NodeProto) -> None:
        name = node.input[1]
        dq = f"{name}/dq"
        if name not in self._stored:
            axis = len(self._weights[name].dims) - 1 if node.op_type == "MatMul" or _is_wide(node) else 0
            grid, q = self._store(name, self._value(name), axis=axis)
            inputs = [q, self._keep(f"{name}/scale", grid.scales)]
            self._nodes.append(
                helper.make_node("DequantizeLinear", inputs, [dq], f"{name}/DequantizeLinear", axis=axis)
            )
        node.input[1] = dq

    def _multiply_integers(self, node: onnx.NodeProto) -> None:
        """Makes y = float(ConvInteger(q(x), q(w))) * (step of x * steps of w) + bias."""
        name, out, is_conv = node.input[1], node.output[0], node.op_type == "Conv"
        q, step, zero = self._quantise(node.input[0])
        weight = self._value(name).T if _is_turned(node) else self._value(name)
        axis = 0 if is_conv else 1
        stored = f"{name}/turned" if _is_turned(node) else name
        grid, w = self._store(stored, np.ascontiguousarray(weight), axis=axis, unsigned=is_conv)
        along = (-1, *[1] * (weight.ndim - 2)) if is_conv else (-1,)
        steps = self._keep(f"{stored}/scale", grid.scales.reshape(along))
        bias = node.input[2] if len(node.input) > 2 else ""
        operator = "ConvInteger" if is_conv else "MatMulInteger"
        zeros = [zero, self._keep("weights/zero_point", np.uint8(_MIDDLE))] if is_conv else [zero]
        product = helper.make_node(operator, [q, w, *zeros], [f"{out}/sums"], node.name)
        product.metadata_props.extend(node.metadata_props)
        product.attribute.extend(node.attribute if is_conv else [])
        scaled = f"{out}/scaled" if bias else out
        self._nodes += [
            product,
            helper.make_node("Cast", [f"{out}/sums"], [f"{out}/float"], f"{out}/Cast", to=TensorProto.FLOAT),
            helper.make_node("Mul", [step, steps], [f"{out}/steps"], f"{out}/steps/Mul"),
            helper.make_node("Mul", [f"{out}/float", f"{out}/steps"], [scaled], f"{out}/Mul"),
        ]
        if bias:
            added = self._shaped_bias(bias, along) if is_conv else bias
            self._nodes.append(helper.make_node("Add", [scaled, added], [out], f"{out}/Add"))

    def _quantise(self, name: str) -> tuple[str, str, str]:
        """Integers, step and zero point of a tensor, found once for all that take it."""
        if name not in self._quantised:
            made = f"{name}/q", f"{name}/step", f"{name}/zero_point"
            self._nodes.append(
                helper.make_node("DynamicQuantizeLinear", [name], list(made), f"{name}/DynamicQuantizeLinear")
            )
            self._quantised[name] = made
        return self._quantised[name]

    def _shaped_bias(self, name: str, shape: tuple[int, ...]) -> str:
        """Of a convolution, one number for each channel."""
        if name in self._weights:
            return self._keep(f"{name}/shaped", self._value(name).reshape(shape))
        to = self._keep(f"{name}/shape", np.array(shape, np.int64))
        self._nodes.append(helper.make_node("Reshape", [name, to], [f"{name}/shaped"], f"{name}/Reshape"))
        return f"{name}/shaped"

    def _store(self, name: str, weight: Floats, *, axis: int, unsigned: bool = False) -> tuple[WeightGrid, str]:
        if name not in self._stored:
            self._stored[name] = fit_weight_grid(weight, axis=axis, limit=self._limit)
        integers: npt.NDArray[np.integer] = self._stored[name].quantise(weight)
        if unsigned:
            integers = (integers.astype(np.int16) + _MIDDLE).astype(np.uint8)
        return self._stored[name], self._keep(f"{name}/q", integers)

    def _value(self, name: str) -> Floats:
        value: Floats = numpy_helper.to_array(self._weights[name])
        return value

    def _keep(self, name: str, array: npt.ArrayLike) -> str:
        if name not in self._weights:
            self._weights[name] = numpy_helper.from_array(np.asarray(array, order="C"), name)
            self._graph.initializer.append(self._weights[name])
        return name


def _is_turned(node: onnx.NodeProto) -> bool:
    return node.op_type == "Gemm" and any(attribute.name == "transB" and attribute.i for attribute in node.attribute)


def _is_wide(node: onnx.NodeProto) -> bool:
    """A Gemm whose weight has its output channels last."""
    return node.op_type == "Gemm" and not _is_turned(node)
