"""Steps of the weights of a layout, wide enough for the biases that are stored in steps of products."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from cspdeploy.quant.place import Layout
from cspdeploy.quant.placements import Placement
from cspdeploy.quant.plan import Floats, Grid, WeightGrid, fit_weight_grid
from cspdeploy.quant.torch_graph import TorchGraph

__all__ = ["fit_weight_grids"]

# Half of the 32-bit integers: the other half is left to the sums of products that the bias is added to.
_MAX_BIAS = 2.0**30


def fit_weight_grids(
    graph: TorchGraph,
    layout: Layout,
    placement: Placement,
    *,
    grids: Mapping[str, Grid],
    values: Mapping[str, Floats] | None = None,
) -> dict[str, WeightGrid]:
    """The finest grid of each weight that holds it, and whose product with the input's step holds the bias.

    A channel that training has emptied has weights of 1e-20 and a bias of 1: in steps of its products that is no 32-bit
    number. Its weights get coarser steps, which costs nothing that could be seen beside the bias.

    Args:
        grids: of the tensors of the layout.
        values: in place of initializers, as in `QuantPlan`.
    """
    values = values or {}
    found = {
        name: fit_weight_grid(
            _value(graph, values, name), per_channel=placement.per_channel, axis=axis, limit=placement.weight_limit
        )
        for name, axis in layout.weights.items()
    }
    for bias, (tensor, name) in layout.biases.items():
        least = np.abs(_value(graph, values, bias)) / (_MAX_BIAS * grids[tensor].scale)
        if found[name].scales.size == 1:
            least = least.max(keepdims=True)
        scales = np.maximum(found[name].scales, least).astype(np.float32)
        found[name] = dataclasses.replace(found[name], scales=scales)
    return found


def _value(graph: TorchGraph, values: Mapping[str, Floats], name: str) -> Floats:
    if name in values:
        return values[name]
    value: Floats = graph.weights[name].numpy()
    return value
