"""ONNX operators in PyTorch.

Each takes attributes and inputs (None where absent), and gives its outputs, or None where it does not cover what is
asked for: the onnx package's reference implementation then does.

Semantics: https://onnx.ai/onnx/operators
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper
from torch.nn import functional

from cspdeploy.quant.torch_shapes import SHAPES
from cspdeploy.quant.torch_spatial import SPATIAL, Attributes, Inputs, Outputs

__all__ = ["OPERATORS", "by_reference"]


def _gemm(attributes: Attributes, inputs: Inputs) -> Outputs:
    a, b, c = (*inputs, None)[:3]
    a = a.T if attributes.get("transA", 0) else a
    b = b.T if attributes.get("transB", 0) else b
    product = attributes.get("alpha", 1.0) * (a @ b) if attributes.get("alpha", 1.0) != 1.0 else a @ b
    return [product if c is None else product + attributes.get("beta", 1.0) * c]


def _clip(attributes: Attributes, inputs: Inputs) -> Outputs:
    x, low, high = (*inputs, None, None)[:3]
    low = attributes.get("min") if low is None else float(low)
    high = attributes.get("max") if high is None else float(high)
    return [x if low is None and high is None else torch.clamp(x, low, high)]


def _batch_norm(attributes: Attributes, inputs: Inputs) -> Outputs:
    if attributes.get("training_mode", 0):
        return None
    x, scale, bias, mean, variance = inputs
    return [functional.batch_norm(x, mean, variance, scale, bias, False, 0.0, attributes.get("epsilon", 1e-5))]


def _instance_norm(attributes: Attributes, inputs: Inputs) -> Outputs:
    x, scale, bias = inputs
    axes = tuple(range(2, x.dim()))  # by hand: torch's own refuses maps of one pixel
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    along = (-1, *[1] * len(axes))
    found = (x - mean) / torch.sqrt(variance + attributes.get("epsilon", 1e-5))
    return [found * scale.reshape(along) + bias.reshape(along)]


def _local_response_norm(attributes: Attributes, inputs: Inputs) -> Outputs:
    if attributes["size"] % 2 == 0:
        return None  # torch's window then lies one channel further down
    alpha, beta, k = (attributes.get(name, value) for name, value in (("alpha", 1e-4), ("beta", 0.75), ("bias", 1.0)))
    return [functional.local_response_norm(inputs[0], attributes["size"], alpha, beta, k)]


def _softmax(attributes: Attributes, inputs: Inputs) -> Outputs:
    """Over the last axis, where the definitions before and since opset 13 agree."""
    x = inputs[0]
    return [torch.softmax(x, -1)] if attributes.get("axis") in (-1, x.dim() - 1) else None


def _hard_sigmoid(attributes: Attributes, inputs: Inputs) -> Outputs:
    return [torch.clamp(attributes.get("alpha", 0.2) * inputs[0] + attributes.get("beta", 0.5), 0.0, 1.0)]


def _gelu(attributes: Attributes, inputs: Inputs) -> Outputs:
    return [functional.gelu(inputs[0], approximate=attributes.get("approximate", b"none").decode())]


def _unary(function: Callable[[Any], torch.Tensor]) -> Callable[[Attributes, Inputs], Outputs]:
    return lambda attributes, inputs: [function(inputs[0])]


def _binary(function: Callable[[Any, Any], torch.Tensor]) -> Callable[[Attributes, Inputs], Outputs]:
    return lambda attributes, inputs: [function(inputs[0], inputs[1])]


def _all(function: Callable[[Any, Any], torch.Tensor]) -> Callable[[Attributes, Inputs], Outputs]:
    return lambda attributes, inputs: [reduce(function, inputs)]


OPERATORS: dict[str, Callable[[Attributes, Inputs], Outputs]] = {
    **SPATIAL,
    **SHAPES,
    "Gemm": _gemm,
    "MatMul": _binary(torch.matmul),
    "Add": _binary(torch.add),
    "Sub": _binary(torch.sub),
    "Mul": _binary(torch.mul),
    "Div": lambda attributes, inputs: [inputs[0] / inputs[1]] if torch.is_floating_point(inputs[0]) else None,
    "Pow": _binary(torch.pow),
    "Sum": _all(torch.add),
    "Max": _all(torch.maximum),
    "Min": _all(torch.minimum),
    "Concat": lambda attributes, inputs: [torch.cat(inputs, attributes["axis"])],
    "GlobalAveragePool": _unary(lambda x: x.mean(tuple(range(2, x.dim())), keepdim=True)),
    "GlobalMaxPool": _unary(lambda x: x.amax(tuple(range(2, x.dim())), keepdim=True)),
    "LeakyRelu": lambda attributes, inputs: [functional.leaky_relu(inputs[0], attributes.get("alpha", 0.01))],
    "PRelu": _binary(lambda x, slope: torch.where(x < 0, slope * x, x)),
    "Elu": lambda attributes, inputs: [functional.elu(inputs[0], attributes.get("alpha", 1.0))],
    "Relu": _unary(torch.relu),
    "Sigmoid": _unary(torch.sigmoid),
    "HardSigmoid": _hard_sigmoid,
    "Tanh": _unary(torch.tanh),
    "Exp": _unary(torch.exp),
    "Log": _unary(torch.log),
    "Sqrt": _unary(torch.sqrt),
    "Abs": _unary(torch.abs),
    "Neg": _unary(torch.neg),
    "Erf": _unary(torch.erf),
    "Gelu": _gelu,
    "Softplus": _unary(functional.softplus),
    "Mish": _unary(functional.mish),
    "HardSwish": _unary(functional.hardswish),
    "LRN": _local_response_norm,
    "Softmax": _softmax,
    "BatchNormalization": _batch_norm,
    "InstanceNormalization": _instance_norm,
    "Identity": _unary(lambda x: x),
    "Dropout": lambda attributes, inputs: [inputs[0]],
    "Clip": _clip,
}


def by_reference(model: onnx.ModelProto, node: onnx.NodeProto) -> Callable[[Inputs], list[torch.Tensor]]:
    """The onnx package's implementation of that one node."""
    from onnx.reference import ReferenceEvaluator

    names = [name for name in dict.fromkeys(node.input) if name]
    outputs = [name for name in node.output if name]
    graph = helper.make_graph(
        [node], "node", [helper.make_empty_tensor_value_info(name) for name in names],
        [helper.make_empty_tensor_value_info(name) for name in outputs],
    )  # fmt: skip
    one = helper.make_model(graph, opset_imports=list(model.opset_import), functions=list(model.functions))
    one.ir_version = model.ir_version
    evaluator = ReferenceEvaluator(one)

    def compute(taken: Inputs) -> list[torch.Tensor]:
        feeds = {name: value.detach().numpy() for name, value in zip(node.input, taken, strict=True) if name}
        found = dict(zip(outputs, evaluator.run(None, feeds), strict=True))
        return [torch.from_numpy(np.array(found[name])) if name in found else torch.empty(0) for name in node.output]

    return compute
