"""Which 8-bit tensors of a graph stand for which real numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cspdeploy.core.onnx_graph import Graph, Node

__all__ = ["Quantisation", "find_quantisation"]

Array = npt.NDArray[Any]

# Position of the scale of the output among the inputs; its zero point follows. Of com.microsoft's operators:
# https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
_OUTPUT_SCALE = {
    "QuantizeLinear": 1, "QLinearConv": 6, "QLinearMatMul": 6, "QLinearAdd": 6, "QLinearMul": 6, "QLinearConcat": 0,
    "QLinearLeakyRelu": 3, "QLinearSigmoid": 3, "QLinearSoftmax": 3, "QLinearGlobalAveragePool": 3,
    "QLinearAveragePool": 3, "QGemm": 7,
}  # fmt: skip
_MOVES_VALUES = frozenset({
    "MaxPool", "Reshape", "Flatten", "Transpose", "Split", "Slice", "Squeeze", "Unsqueeze", "Identity", "DepthToSpace",
    "SpaceToDepth", "Resize", "Gather", "Expand", "Tile",
})  # fmt: skip
"""Operators that give some of the numbers that they take: what these stand for does not change."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Quantisation:
    """real = (stored - zero_point) * scale, along `axis` where there are several scales."""

    scale: Array
    zero_point: Array
    axis: int

    def real(self, stored: Array) -> Array:
        """float32 of 8-bit integers."""
        rank = stored.ndim
        zero = self._along(self.zero_point, rank).astype(np.float32)
        return np.asarray((stored.astype(np.float32) - zero) * self._along(self.scale, rank).astype(np.float32))

    def stored(self, real: Array, *, dtype: str) -> Array:
        """The nearest integers, halves to even, saturated."""
        rank = real.ndim
        limits = np.iinfo(dtype)
        scaled = np.rint(real / self._along(self.scale, rank)) + self._along(self.zero_point, rank)
        return np.asarray(np.clip(scaled, limits.min, limits.max)).astype(np.dtype(dtype))

    @property
    def reach(self) -> tuple[float, float]:
        """The least and the greatest number that can be stored, at the widest scale."""
        limits = np.iinfo(self.zero_point.dtype)
        at = int(np.argmax(self.scale))
        zero, scale = float(np.ravel(self.zero_point)[at % self.zero_point.size]), float(np.ravel(self.scale)[at])
        return (limits.min - zero) * scale, (limits.max - zero) * scale

    def _along(self, values: Array, rank: int) -> Array:
        if values.size == 1 or values.ndim != 1:
            return values.reshape(()) if values.size == 1 else values
        return values.reshape([-1 if self.axis % rank == at else 1 for at in range(rank)])


def find_quantisation(graph: Graph) -> dict[str, Quantisation]:
    """By name, each 8-bit tensor that a node makes with a scale that is a weight."""
    found: dict[str, Quantisation] = {}
    for node in graph.nodes:
        made = _of_output(node, graph) if node.operator in _OUTPUT_SCALE else None
        if made is None and node.operator in _MOVES_VALUES and node.inputs:
            made = found.get(node.inputs[0])
        if made is not None:
            found.update(dict.fromkeys(filter(None, node.outputs), made))
    return found


def _of_output(node: Node, graph: Graph) -> Quantisation | None:
    return _read(node, graph, _OUTPUT_SCALE[node.operator])


def _read(node: Node, graph: Graph, at: int) -> Quantisation | None:
    names = node.inputs[at : at + 2]
    weights: Mapping[str, Any] = graph.initializers
    if len(names) < 2 or any(name not in weights for name in names):
        return None
    scale, zero = (weights[name].array() for name in names)
    axis = node.attributes.get("axis", 1)
    if zero.dtype.kind not in "iu" or scale.dtype.kind != "f" or scale.ndim > 1 or not isinstance(axis, int):
        return None
    return Quantisation(scale=scale, zero_point=zero, axis=axis)
