"""What an engine computes in integers, by its own record of the nodes that it runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cspdeploy.core.types import PlacedNode

__all__ = ["FLOAT_PRODUCTS", "INTEGER_PRODUCTS", "PAIRS", "IntegerWork", "count_integer_work"]

INTEGER_PRODUCTS = frozenset({
    "QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "MatMulInteger", "ConvInteger",
    "DynamicQuantizeMatMul",
})  # fmt: skip
"""Convolutions and matrix products of ONNX and ONNX Runtime whose operands are integers."""
FLOAT_PRODUCTS = frozenset({
    "Conv", "ConvTranspose", "FusedConv", "NhwcConv", "NhwcFusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul",
    "TransposeMatMul",
})  # fmt: skip
PAIRS = ("QuantizeLinear", "DequantizeLinear")
_REWRITTEN_LATER = frozenset({"CPUExecutionProvider"})
"""ONNX Runtime records who runs a node, and rewrites pairs and the product between them into one integer node after
that, on the CPU alone (qdq_selector_action_transformer.cc: ConvQDQRules names the CPU, DML and ACL providers)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerWork:
    """Counts of nodes.

    Attributes:
        num_integer, num_float: convolutions and matrix products by what they are computed in.
        num_pairs: QuantizeLinear and DequantizeLinear that run as kernels of their own.
    """

    num_integer: int
    num_float: int
    num_pairs: int


def count_integer_work(nodes: Iterable[PlacedNode], *, finished: bool = False) -> IntegerWork | None:
    """How much of a network is computed in integers.

    Args:
        nodes: of a session (`Session.nodes`), or of the graph that an engine has written after its own rewrites.
        finished: they are of the second kind: nothing is rewritten after them.

    Returns:
        None where the record does not tell: it was made before the engine puts pairs and products together.
    """
    known = tuple(nodes)
    pairs = [node for node in known if node.operator in PAIRS]
    if (
        not finished
        and any(node.provider in _REWRITTEN_LATER for node in pairs)
        and any(node.provider in _REWRITTEN_LATER and node.operator in FLOAT_PRODUCTS for node in known)
    ):
        return None
    return IntegerWork(
        num_integer=sum(node.operator in INTEGER_PRODUCTS for node in known),
        num_float=sum(node.operator in FLOAT_PRODUCTS for node in known), num_pairs=len(pairs),
    )  # fmt: skip
