"""What the error of a value counts for when tensors share one step, and which errors are none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from cspdeploy.quant.histogram import Doubles
from cspdeploy.quant.observations import Observations
from cspdeploy.quant.plan import Floats
from cspdeploy.quant.torch_graph import TorchGraph

__all__ = ["Sharing", "error_weights", "joined_tensors"]

_JOINS = frozenset({"Add", "Concat"})
_ABSORBED = frozenset({"Relu", "Clip"})


LEAST_IMPORTANCE = 0.01
"""Of the mean of a tensor's channels."""


class Sharing(Protocol):
    """Of a `Layout`, what ranges depend on."""

    @property
    def tensors(self) -> tuple[str, ...]:
        """That get a grid."""

    @property
    def groups(self) -> tuple[frozenset[str], ...]:
        """That share one step."""

    @property
    def followed_by(self) -> Mapping[str, str]:
        """Tensor after an activation by the one before it."""


def joined_tensors(graph: TorchGraph, layout: Sharing) -> frozenset[str]:
    """Tensors whose values are on the grid of their group before they are rounded: sums and joints of such.

    Rounding them costs nothing, whatever the step; only what lies beyond the grid's ends is lost.
    """
    made = {}
    for name in layout.tensors:
        node = graph.producers.get(name)
        while node is not None and node.operator in _ABSORBED and node.inputs[0] not in layout.tensors:
            node = graph.producers.get(node.inputs[0])
        if node is not None and node.operator in _JOINS:
            made[name] = node
    groups = {name: group for group in layout.groups for name in group}
    return frozenset(
        name for name, node in made.items() if all(taken in groups.get(name, ()) for taken in node.inputs)
    )  # fmt: skip


def error_weights(
    observations: Observations,
    layout: Sharing,
    group: Sequence[str],
    factors: Mapping[str, Floats],
    importance: Mapping[str, Floats],
) -> dict[str, Doubles]:
    """`[C]`: what a squared error of a channel counts for, in equalised units and for one value of the histogram.

    Equalisation divides by the factors what takes the channel: an error in it counts that much less. Without this,
    channels that were lifted because they hold little but negative values asked for steps 1.7 times as large, 2 dB.
    """
    places = {name: layout.followed_by.get(name, name) for name in group}
    known = all(place in importance for place in places.values())
    found = {}
    for name, place in places.items():
        seen = observations.tensors.get(name)
        if seen is None:
            continue  # an error with a name, where its histogram is asked for
        moved = np.ones(len(seen.low))
        if known:
            # A channel that no image of the sample moved may matter on another.
            moved = np.maximum(importance[place].astype(np.float64), LEAST_IMPORTANCE * importance[place].mean())
        unsampled = seen.num_values / max(int(seen.counts.sum(dtype=np.int64)), 1)
        found[name] = moved * unsampled / np.square(np.asarray(factors.get(name, 1.0), dtype=np.float64))
    return found
