"""Multiply-accumulates of an ONNX graph's nodes. Shapes: N batch, C and M channels, G groups, K inner dimension."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

from cspdeploy.core.onnx_graph import DEFAULT_DOMAIN, Node

__all__ = ["UNCOUNTED", "MacOperator", "count_macs", "mac_operator", "needed_tensors"]

Shapes = Mapping[str, tuple[int, ...]]

_MICROSOFT = "com.microsoft"


class MacOperator(NamedTuple):
    """How an operator multiplies: `data` and `weight` are the places of these among its inputs.

    Attributes:
        integer: its operands are integers, by its definition.
    """

    kind: Literal["convolution", "transposed", "product"]
    data: int
    weight: int
    integer: bool = False


_CONVOLUTION, _TRANSPOSED = MacOperator("convolution", 0, 1), MacOperator("transposed", 0, 1)
_PRODUCT, _INTEGER_PRODUCT = MacOperator("product", 0, 1), MacOperator("product", 0, 1, integer=True)

# https://onnx.ai/onnx/operators and https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
_OPERATORS = {
    (DEFAULT_DOMAIN, "Conv"): _CONVOLUTION,
    (DEFAULT_DOMAIN, "DeformConv"): _CONVOLUTION,
    (DEFAULT_DOMAIN, "ConvTranspose"): _TRANSPOSED,
    (DEFAULT_DOMAIN, "Gemm"): _PRODUCT,
    (DEFAULT_DOMAIN, "MatMul"): _PRODUCT,
    (DEFAULT_DOMAIN, "ConvInteger"): _CONVOLUTION._replace(integer=True),
    (DEFAULT_DOMAIN, "MatMulInteger"): _INTEGER_PRODUCT,
    (DEFAULT_DOMAIN, "QLinearConv"): MacOperator("convolution", 0, 3, integer=True),
    (DEFAULT_DOMAIN, "QLinearMatMul"): MacOperator("product", 0, 3, integer=True),
    (_MICROSOFT, "FusedConv"): _CONVOLUTION,
    (_MICROSOFT, "NhwcFusedConv"): _CONVOLUTION,
    (_MICROSOFT, "FusedMatMul"): _PRODUCT,
    (_MICROSOFT, "FusedGemm"): _PRODUCT,
    (_MICROSOFT, "QLinearConv"): MacOperator("convolution", 0, 3, integer=True),
    (_MICROSOFT, "QGemm"): MacOperator("product", 0, 3, integer=True),
    (_MICROSOFT, "MatMulIntegerToFloat"): _INTEGER_PRODUCT,
    (_MICROSOFT, "DynamicQuantizeMatMul"): MacOperator("product", 0, 1, integer=True),
}
UNCOUNTED = frozenset(
    {"LSTM", "GRU", "RNN", "Einsum", "Attention", "MultiHeadAttention", "GroupQueryAttention", "QAttention",
     "DynamicQuantizeLSTM", "MatMulNBits", "PackedAttention", "LinearAttention"}
)  # fmt: skip
"""Operators that multiply, of which this module does not know how often."""


def mac_operator(node: Node) -> MacOperator | None:
    """How the node multiplies; None where it does not, or one of its operands is missing."""
    found = _OPERATORS.get((node.domain, node.operator))
    return found if found and len(node.inputs) > found.weight and node.outputs else None


def needed_tensors(node: Node, operator: MacOperator) -> tuple[str, ...]:
    """Tensors whose shapes `count_macs` needs."""
    data, weight, output = node.inputs[operator.data], node.inputs[operator.weight], node.outputs[0]
    if operator.kind == "convolution":
        return (weight, output)
    return (data, weight) if operator.kind == "transposed" else (data, output)


def count_macs(node: Node, operator: MacOperator, shapes: Shapes) -> int | None:
    """Of one run of the node; None where shapes are unknown or no such node has them.

    Each output of a convolution is a sum over C/G channels and the kernel; a transposed one spreads each input over
    M/G channels and the kernel. A product sums over K. Bias, activation and scales are not counted.
    """
    needed = needed_tensors(node, operator)
    if any(name not in shapes for name in needed):
        return None
    first, second = (shapes[name] for name in needed)
    if operator.kind == "convolution":  # weight [M, C/G, kernel...]
        return math.prod(second) * math.prod(first[1:])
    if operator.kind == "transposed":  # weight [C, M/G, kernel...]
        return math.prod(first) * math.prod(second[1:])
    if not first:
        return None
    transposed = node.attributes.get("transA", 0)  # [K, N] or [..., K, N]
    return math.prod(second) * (first[-2] if transposed and len(first) > 1 else first[-1])
