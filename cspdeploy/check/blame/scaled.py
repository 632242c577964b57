"""A reference in the channel scales of the artifact: of two files that differ by equalisation alone, all is equal."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cspdeploy.check.blame.reference import Origin
from cspdeploy.core.channel_factors import fold_factors, output_axis
from cspdeploy.core.trace import Sink, TracedNode, TraceSource, Values

__all__ = ["ScaledSource", "in_scale_of"]

Array = npt.NDArray[Any]
Calls = Sequence[Mapping[str, Array]]
Factors = Mapping[str, npt.NDArray[np.float64]]

_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def in_scale_of(artifact: Factors, origin: Origin, *, own: Factors) -> Origin:
    """The origin with its inner tensors and weights as the artifact has them; outputs stay what they are.

    Args:
        artifact: what each channel of its tensors is multiplied by, by name.
        own: the same of the origin's file.
    """
    factors = {}
    for name in artifact.keys() | own.keys():
        ours, theirs = artifact.get(name, np.ones(1)), own.get(name, np.ones(1))
        if ours.size == theirs.size or 1 in (ours.size, theirs.size):
            factors[name] = ours / theirs
    factors = {name: ratio for name, ratio in factors.items() if (ratio != 1).any()}
    if not factors:
        return origin
    exact = ScaledSource(origin.exact, factors)
    source = exact if origin.source is origin.exact else ScaledSource(origin.source, factors)
    return dataclasses.replace(origin, source=source, exact=exact, rounded=ScaledSource(origin.rounded, factors))


class ScaledSource:
    """A `TraceSource` of an ONNX file whose tensors come multiplied, and its weights and biases as that makes them.

    Args:
        factors: by tensor, `[C]`, along axis 1. Those of the graph's outputs are not believed: outputs are compared
            as they are.
    """

    def __init__(self, source: TraceSource, factors: Factors) -> None:
        self._source = source
        self.title = source.title
        self._factors = {name: ratio for name, ratio in factors.items() if name not in source.outputs}
        self._folds: dict[str, tuple[TracedNode, int]] = {}
        for node in source.nodes:
            handed = node.inputs[0] if node.inputs else ""
            if node.operator in ("QuantizeLinear", "DequantizeLinear") and handed in self._factors:
                self._factors.setdefault(node.outputs[0], self._factors[handed])
            if node.operator in _WEIGHTED:
                self._folds.update({name: (node, place) for place, name in enumerate(node.inputs[1:], 1)})

    @property
    def nodes(self) -> Sequence[TracedNode]:
        """Those of the source."""
        return self._source.nodes

    @property
    def outputs(self) -> Sequence[str]:
        """Those of the source."""
        return self._source.outputs

    def trace(self, calls: Calls, sink: Sink, *, wanted: Collection[str] | None = None) -> None:
        """As of the source.

        Raises:
            InputError: it cannot be run.
        """

        def scaled(name: str, values: Array, constant: bool) -> None:
            sink(name, self._weight(name, values) if constant else self._data(name, values), constant)

        self._source.trace(calls, scaled, wanted=wanted)

    def replay(self, calls: Calls, given: Values, targets: Sequence[str]) -> dict[str, list[Array]]:
        """Nothing: a reference introduces no error of its own."""
        return {}

    def _data(self, name: str, values: Array) -> Array:
        factors = self._factors.get(name)
        if factors is None or values.ndim < 2 or values.shape[1] != factors.size:
            return values
        made: Array = (values * factors.reshape(-1, *[1] * (values.ndim - 2))).astype(values.dtype)
        return made

    def _weight(self, name: str, values: Array) -> Array:
        node, place = self._folds.get(name, (None, 0))
        if node is None:
            return values
        made = self._factors.get(node.outputs[0])
        if place == 2:
            folded = values if made is None or made.size != values.size else values * made.reshape(values.shape)
            return folded.astype(values.dtype)
        taken = self._factors.get(node.inputs[0])
        if (made is None and taken is None) or values.ndim < 2:
            return values
        most = max(values.shape[:2]) * int(node.attributes.get("group", 1))
        whole: Array = fold_factors(
            node, values, taken=np.ones(most) if taken is None else taken,
            made=np.ones(_num_outputs(node, values)) if made is None else made,
        ).astype(values.dtype)  # fmt: skip
        return whole


def _num_outputs(node: TracedNode, weight: Array) -> int:
    groups = int(node.attributes.get("group", 1)) if node.operator == "ConvTranspose" else 1
    return int(weight.shape[output_axis(node)]) * groups
