"""Bias correction on real activations: what rounding shifts in the mean, the bias of that layer takes back.

One pass through the graph carries the float and the quantised activations of the same images together. At every layer
with a bias the quantised side is what the file will compute, all earlier corrections included, so that errors do not
add up layer by layer. The mean is taken after the activation and its quantiser, where the next layer takes it: that of
the pre-activation says little, because an activation is not linear. After Nagel et al., arXiv 1906.04721, section 4.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch

from cspdeploy.quant.lockstep import Lockstep
from cspdeploy.quant.plan import Floats, QuantPlan
from cspdeploy.quant.torch_graph import GraphNode, TorchGraph

if TYPE_CHECKING:
    from cspdeploy.quant.place import Layout
from cspdeploy.quant.place_rules import ACTIVATIONS

__all__ = ["bias_shift", "biased_nodes", "correct_biases"]

Respond = Callable[[torch.Tensor], torch.Tensor]

NEWTON_STEPS = 3
"""The mean behind a piecewise linear activation is nearly linear in the bias: two steps land, the third has what
clipping and coarse grids leave. Of each channel the best is kept, none included."""

SMALLEST_SLOPE = 0.05
"""A channel that the activation holds at zero would ask for an endless bias."""

PROBE_STEP = 0.02
"""Of a channel's standard deviation: finite difference for the mean slope of the activation. Small beside the distance
of its kinks, large beside float32 rounding."""


def correct_biases(graph: TorchGraph, plan: QuantPlan, layout: Layout, batches: Iterable[Floats]) -> dict[str, Floats]:
    """Biases under which the mean of every channel is what it is in float, layer after layer.

    Args:
        plan: where it has `values`, these compute the same network (equalised weights and their biases); the result is
            to be laid over them.
        batches: images `[<=N, 3, H, W]` float32; those beyond `lockstep.MEMORY_BYTES` are left out.

    Returns:
        New float32 value of every bias initializer that belongs to one Conv, ConvTranspose or Gemm alone, those of
        nodes that stay in float included: they too are given rounded activations.
    """
    with torch.inference_mode():
        both = Lockstep(graph, plan, batches)
        biased = biased_nodes(graph)
        found: dict[str, Floats] = {}
        for node in graph.nodes:
            both.compute(node)
            if node.outputs[0] in biased:
                bias = node.inputs[2]
                shift = bias_shift(both, node, layout)
                old = both.rounded_weights[bias]
                found[bias] = (old + shift.reshape(old.shape)).numpy()
                both.shift_rounded(node.outputs[0], shift)
            both.finish(node)
    return found


def biased_nodes(graph: TorchGraph) -> dict[str, GraphNode]:
    """Nodes with weights and a bias of their own, by first output."""
    return {
        node.outputs[0]: node
        for node in graph.nodes
        if node.operator in ("Conv", "ConvTranspose", "Gemm") and len(node.inputs) > 2
        and node.inputs[2] in graph.weights and len(graph.consumers[node.inputs[2]]) == 1
        and graph.weights[node.inputs[2]].numel() == graph.probe.shapes[node.outputs[0]][1]
        and node.attributes.get("beta", 1.0) == 1.0
    }  # fmt: skip


def bias_shift(both: Lockstep, node: GraphNode, layout: Layout) -> torch.Tensor:
    """What to add to the bias, `[C]`: Newton's steps on the mean behind activation and quantiser; the best of them."""
    output = node.outputs[0]
    exact, rounded = both.exact[output], both.rounded[output]
    activate, respond = _responses(both, output, layout)
    target = _mean(exact, activate)
    slope = _slope(exact, activate).clamp_min(SMALLEST_SLOPE)
    shift = torch.zeros_like(target)
    best, smallest = shift, torch.full_like(target, torch.inf)
    for _ in range(NEWTON_STEPS + 1):
        error = target - _mean([y + _along(shift, y) for y in rounded], respond)
        better = error.abs() < smallest
        best, smallest = torch.where(better, shift, best), torch.where(better, error.abs(), smallest)
        shift = shift + error / slope
    return best


def _responses(both: Lockstep, output: str, layout: Layout) -> tuple[Respond, Respond]:
    """What the next layer takes of that output: in float, and with every rounding on the way."""
    before = both.change(output)
    after = layout.followed_by.get(output) or _activation_behind(both.graph, output)
    node = both.graph.producers.get(after) if after is not None else None
    if node is None or node.inputs[0] != output or not all(name in both.graph.weights for name in node.inputs[1:]):
        return lambda y: y, before
    constants = [both.graph.weights[name] for name in node.inputs[1:]]
    rounding = both.change(node.outputs[0])

    def activate(y: torch.Tensor) -> torch.Tensor:
        return both.graph.compute(node, [y, *constants])[0]

    return activate, lambda y: rounding(activate(before(y)))


def _activation_behind(graph: TorchGraph, output: str) -> str | None:
    """Where the engine computes a layer and its activation in one, there is no grid between them that tells of it.

    The mean before the activation is no substitute: matching what LeakyReLU all but discards spoils what it lets
    through. Measured on CSPDarknet53 as placed for OpenVINO: 32.6 dB fell to 25.4.
    """
    takers = graph.consumers.get(output, [])
    if len(takers) != 1 or output in graph.output_names:
        return None
    node, position = takers[0]
    return node.outputs[0] if position == 0 and node.operator in ACTIVATIONS - {"Mul"} else None


def _slope(exact: list[torch.Tensor], activate: Respond) -> torch.Tensor:
    """Mean slope of the activation over the values of each channel, `[C]`."""
    spread = torch.cat([y.transpose(0, 1).flatten(1) for y in exact[:1]]).std(dim=1, correction=0)
    step = (PROBE_STEP * spread).clamp_min(torch.finfo(torch.float32).tiny ** 0.5)
    return (_mean([y + _along(step, y) for y in exact], activate) - _mean(exact, activate)) / step


def _mean(values: list[torch.Tensor], function: Respond) -> torch.Tensor:
    """Of each channel (axis 1) over all chunks, `[C]` float32, summed in float64."""
    sums = [function(y).transpose(0, 1).flatten(1).sum(dim=1, dtype=torch.float64) for y in values]
    num_values = sum(y.numel() // y.shape[1] for y in values)
    return (torch.stack(sums).sum(dim=0) / num_values).float()


def _along(per_channel: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return per_channel.reshape(1, -1, *[1] * (y.dim() - 2))
