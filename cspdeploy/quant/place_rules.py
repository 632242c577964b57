"""What a node is to quantisation: a product, a mover, a join, an activation; and why a product stays in float."""

from __future__ import annotations

from typing import Any

import torch

from cspdeploy.quant.torch_graph import GraphNode, TorchGraph

__all__ = ["ABSORBED", "ACTIVATIONS", "JOINS", "is_mover", "is_product", "moves_values", "unquantisable", "weight_axis"]

PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
JOINS = frozenset({"Add", "Concat"})

ABSORBED = frozenset({"Relu", "Clip"})
"""Done by rounding: a grid that starts at zero cuts off what is below. ONNX Runtime drops such a node before a
QuantizeLinear (onnxruntime/core/optimizer/qdq_transformer/relu_quantizelinear.cc and clip_quantizelinear.cc)."""

ACTIVATIONS = frozenset({
    "Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSigmoid", "HardSwish", "Mish", "Elu", "Softplus", "Tanh", "Mul",
})  # fmt: skip
"""What an engine that fuses activations computes with the convolution; Mul for x * sigmoid(x) and the like."""

_MOVERS = frozenset({
    "MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split", "DepthToSpace",
    "SpaceToDepth", "Identity", "Dropout",
})  # fmt: skip


def is_mover(node: GraphNode) -> bool:
    """Its outputs hold values of its first input and no others, so that they lie on that tensor's grid."""
    return moves_values(node.operator, node.domain, node.attributes.get("mode", b"nearest"))


def moves_values(operator: str, domain: str, mode: Any) -> bool:
    """The same by what a node is; `mode` is that of a Resize."""
    if domain not in ("", "ai.onnx"):
        return False
    return mode in (b"nearest", "nearest") if operator == "Resize" else operator in _MOVERS


def is_product(node: GraphNode) -> bool:
    """It multiplies by weights."""
    return node.operator in PRODUCTS and node.domain in ("", "ai.onnx")


def weight_axis(node: GraphNode) -> int:
    """Of the output channels, in the weight."""
    if node.operator == "Gemm":
        return 0 if node.attributes.get("transB", 0) else 1
    return 1 if node.operator == "MatMul" else 0


def unquantisable(graph: TorchGraph, node: GraphNode) -> str:
    """Why a product has no INT8 form, or empty."""
    data, name = node.inputs[0], node.inputs[1]
    if node.operator == "ConvTranspose":
        return "transposed convolutions have no INT8 kernel in ONNX Runtime"
    if name not in graph.weights or data in graph.weights:
        return "its weight is computed in the graph"
    weight = graph.weights[name]
    if weight.dtype != torch.float32:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}"
    if node.operator == "MatMul" and weight.dim() != 2:
        return f"its weight has {weight.dim()} dimensions, an INT8 product takes 2"
    if len(node.inputs) > 2 and node.inputs[2] and node.inputs[2] not in graph.weights:
        return "its bias is computed in the graph"
    plain = all(node.attributes.get(key, 1) == 1 for key in ("alpha", "beta")) and not node.attributes.get("transA", 0)
    return "" if node.operator != "Gemm" or plain else "its alpha, beta or transA has no INT8 form"
