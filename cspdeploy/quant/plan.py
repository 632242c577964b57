"""What a quantised graph is to be: which tensors lie on which grid, which nodes compute in INT8.

A plan is made of decisions alone, so that the same one drives the fake quantisation in PyTorch (`simulate`), the file
(`write`) and quantisation-aware training. Nodes are named by their first output, which every node has and no two share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

__all__ = ["Floats", "Grid", "QuantPlan", "WeightGrid", "fit_weight_grid"]

Floats = npt.NDArray[np.float32]
ActivationType = Literal["uint8", "int8"]

MIN_SCALE = 2.0**-60
"""Of a tensor that is zero throughout. Its square is still a float32 number: biases are stored in steps of products."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Values `scale * (q - zero_point)`, q an integer of `dtype`."""

    scale: float
    zero_point: int
    dtype: ActivationType

    @property
    def bounds(self) -> tuple[int, int]:
        """Smallest and largest q."""
        return (0, 255) if self.dtype == "uint8" else (-128, 127)

    @property
    def range(self) -> tuple[float, float]:
        """Smallest and largest value."""
        low, high = self.bounds
        return self.scale * (low - self.zero_point), self.scale * (high - self.zero_point)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WeightGrid:
    """Symmetric steps of a weight tensor: one for each slice along `axis`, or one for all.

    Attributes:
        scales: float32 `[O]`, or `[1]` for one step throughout.
        axis: of the output channels.
        limit: largest magnitude of the integers: 127, or 64 where pairs of products are summed in 16 bits
            (x86 without VNNI: u8 * s8 + u8 * s8 passes 32767 with 127).
    """

    scales: Floats
    axis: int = 0
    limit: int = 127

    def quantise(self, weight: Floats) -> npt.NDArray[np.int8]:
        """To the nearest step, halves to even, as QuantizeLinear does."""
        steps = np.rint(weight / self._along(weight.ndim))
        integers: npt.NDArray[np.int8] = np.clip(steps, -self.limit, self.limit).astype(np.int8)
        return integers

    def dequantise(self, integers: npt.NDArray[np.int8]) -> Floats:
        """What DequantizeLinear makes of it."""
        values: Floats = integers.astype(np.float32) * self._along(integers.ndim)
        return values

    def _along(self, rank: int) -> Floats:
        shape = [1] * rank
        shape[self.axis] = -1
        return self.scales.reshape(shape)


def fit_weight_grid(weight: Floats, *, per_channel: bool = True, axis: int = 0, limit: int = 127) -> WeightGrid:
    """The finest grid that holds every weight."""
    others = tuple(i for i in range(weight.ndim) if i != axis)
    axes = others if per_channel else None
    largest = np.maximum(weight.max(axis=axes), -weight.min(axis=axes)).reshape(-1)
    return WeightGrid(scales=np.maximum(largest / limit, MIN_SCALE).astype(np.float32), axis=axis, limit=limit)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantPlan:
    """The decisions.

    Attributes:
        grids: of activations, by tensor. Such a tensor passes QuantizeLinear and DequantizeLinear where it is made, and
            every node that takes it, takes that.
        weights: grids of the weights of the nodes that compute in INT8, by initializer.
        values: float32 values that take the place of initializers: equalised, or biases corrected.
        integers: weights that are rounded otherwise than to the nearest, by initializer.
        biases: biases that are stored in steps of (input step * weight step), by initializer: the node's input tensor
            and its weight.
        factors: by tensor, what each of its channels is multiplied by, `[C]`, where `values` are equalised; the file
            says so of itself, so that it can be compared inside.
    """

    grids: Mapping[str, Grid]
    weights: Mapping[str, WeightGrid]
    values: Mapping[str, Floats] = field(default_factory=dict)
    integers: Mapping[str, npt.NDArray[np.int8]] = field(default_factory=dict)
    biases: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    factors: Mapping[str, Floats] = field(default_factory=dict)
