"""Channel equalisation over whole groups: exact in floating point, and one step then serves every channel of a tensor.

The channels of a tensor share one step on the quantiser's grid, whatever their ranges. A factor k > 0 on a channel is
folded into the weights that make it and out of those that take it; where LeakyRelu, Add, Concat or Split lie between,
the factor is one for the whole class of channels that they join. After Nagel et al., arXiv 1906.04721, whose factors
hold for one pair of layers at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cspdeploy.core.channel_factors import fold_factors
from cspdeploy.quant.channels import ChannelClasses, find_channel_classes
from cspdeploy.quant.plan import Floats
from cspdeploy.quant.torch_graph import GraphNode, TorchGraph

__all__ = ["Equalisation", "equalise"]

Doubles = npt.NDArray[np.float64]

LARGEST_FACTOR = 10.0
"""A channel that is 20 times smaller than the largest is lifted by about 10 at exponent 0.75. One that is smaller still
is next to dead on the calibration images, and may not be on others. The shipped model's largest is 8.0."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Equalisation:
    """Another network with the same outputs.

    Attributes:
        values: float32 values in place of initializers.
        factors: by tensor, what each channel is multiplied by, float32 `[C]`; tensors that stay as they are too.
        num_classes: classes of channels that got a factor other than 1.
        largest_factor: of all.
    """

    values: Mapping[str, Floats]
    factors: Mapping[str, Floats]
    num_classes: int
    largest_factor: float


def equalise(graph: TorchGraph, magnitudes: Mapping[str, Floats], *, exponent: float = 0.75) -> Equalisation:
    """Lift the channels that are small beside the largest that shares their step.

    Args:
        magnitudes: by tensor, a robust maximum of each channel, `[C]`: 0 and NaN count as nothing seen.
        exponent: 0 leaves all as it is, 1 gives all channels the same magnitude. In between the activations win and
            the weights, whose columns are divided by the factors, lose little: 0.75 was best of 0.5, 0.6, 0.75, 0.9
            and 1 on the shipped model.

    Returns:
        The outputs of the graph with `values` are those of the graph, up to float32 rounding.
    """
    classes = find_channel_classes(graph)
    factors = _class_factors(classes, magnitudes, exponent)
    of_tensor = {name: factors[channels].astype(np.float32) for name, channels in classes.of.items()}
    values: dict[str, Floats] = {}
    for node in classes.weighted:
        values.update(_folded(graph, node, factors[classes.of[node.inputs[0]]], factors[classes.of[node.outputs[0]]]))
    return Equalisation(
        values=values, factors=of_tensor, num_classes=int((factors != 1).sum()), largest_factor=float(factors.max())
    )


def _class_factors(classes: ChannelClasses, magnitudes: Mapping[str, Floats], exponent: float) -> Doubles:
    """`[num_classes]`, each at least 1: nothing grows beyond the largest channel that shares its step."""
    largest = np.zeros(len(classes.pinned))
    for name, channels in classes.of.items():
        if name in magnitudes and len(magnitudes[name]) == len(channels):
            np.maximum.at(largest, channels, np.nan_to_num(magnitudes[name], posinf=0.0, neginf=0.0))
    reference = _largest_of_neighbours(classes, largest)
    # A channel that no image woke keeps its scale: there is nothing to measure a factor by.
    alive = (largest > 0) & ~classes.pinned
    ratio = np.divide(reference, largest, out=np.ones_like(largest), where=alive)
    return np.clip(ratio**exponent, 1.0, LARGEST_FACTOR)


def _largest_of_neighbours(classes: ChannelClasses, largest: Doubles) -> Doubles:
    """The largest magnitude among all classes that a chain of common tensors ties to a class."""
    group = np.arange(len(largest))
    tensors = [np.unique(channels) for channels in classes.of.values()]
    changed = True
    while changed:
        changed = False
        for channels in tensors:
            lowest = group[channels].min()
            if (group[channels] != lowest).any():
                group[channels] = lowest
                changed = True
    found = np.zeros_like(largest)
    np.maximum.at(found, group, largest)
    return found[group]


def _folded(graph: TorchGraph, node: GraphNode, taken: Doubles, made: Doubles) -> dict[str, Floats]:
    """Weight and bias of a node whose input channels are multiplied by `taken`, and its output's shall be by `made`."""
    if (taken == 1).all() and (made == 1).all():
        return {}
    weight = fold_factors(node, graph.weights[node.inputs[1]].numpy(), taken=taken, made=made)
    found: dict[str, Floats] = {node.inputs[1]: weight.astype(np.float32)}
    if len(node.inputs) > 2 and node.inputs[2]:
        bias = graph.weights[node.inputs[2]].numpy()
        found[node.inputs[2]] = (bias.astype(np.float64) * made.reshape(bias.shape)).astype(np.float32)
    return found
