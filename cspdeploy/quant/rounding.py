"""Weights rounded together: what the rounding of one weight does to the output, those after it make good.

Nearest rounding is best for each weight by itself, not for their sum. Column by column, the error of a rounded column
is spread over the columns that are still open, by least squares on the activations that the layer will be given:
quantised ones, less their mean, because the bias correction that follows takes the mean out of the error anyway. One
pass through the graph, no gradients, no labels, the same result every time. After Frantar et al., GPTQ,
arXiv 2210.17323.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from cspdeploy.core.channel_factors import output_axis
from cspdeploy.quant.bias import bias_shift, biased_nodes
from cspdeploy.quant.lockstep import Lockstep
from cspdeploy.quant.plan import Floats, QuantPlan, WeightGrid
from cspdeploy.quant.torch_graph import GraphNode, TorchGraph

if TYPE_CHECKING:
    from cspdeploy.quant.place import Layout

__all__ = ["round_weights"]

Integers = npt.NDArray[np.int8]

DAMPING = 0.1
"""Of the mean variance, added to each: deep layers see fewer positions than they have weights, and what calibration
images leave open must not be filled with their noise. On the shipped model 0.1 gains 0.45 dB, 0.01 gains 0.1 dB."""

BLOCK_COLUMNS = 128
"""Columns whose errors are gathered before the columns behind them are touched: one large product in place of many."""

BLOCK_VALUES = 2**24
"""Of unfolded activations at once: 64 MB."""

SAMPLES_PER_INPUT = 32
"""Positions for every weight of an output channel, taken evenly: enough for a covariance, and early layers have
hundreds."""

MAX_INPUTS = 8192
"""Weights of an output channel: the matrix of their covariances then takes 256 MB. Larger layers stay as they are."""


def round_weights(
    graph: TorchGraph, plan: QuantPlan, layout: Layout, batches: Iterable[Floats], *,
    progress: Callable[[int, int], None] = lambda done, total: None, deadline: float = float("inf"),
    clock: Callable[[], float] = time.monotonic,
) -> QuantPlan:  # fmt: skip
    """Round the weights of every Conv and Gemm of the plan so that their outputs, not they, come near.

    Args:
        plan: with biases as they are in float (equalised, not corrected): its `values` count as the float network's.
        batches: images `[<=N, 3, H, W]` float32; those beyond `lockstep.MEMORY_BYTES` are left out.
        progress: is told layers done and layers in all.
        deadline: seconds from now after which no further layer is begun; those left are rounded to the nearest.
        clock: in seconds.

    Returns:
        The plan with `integers`, and in `values` the biases corrected behind them.
    """
    end = clock() + deadline
    integers: dict[str, Integers] = {}
    biases: dict[str, Floats] = {}
    with torch.inference_mode():
        both, biased = Lockstep(graph, plan, batches), biased_nodes(graph)
        layers = {node.outputs[0] for node in graph.nodes if _is_rounded(graph, plan, node)}
        for node in graph.nodes:
            if node.outputs[0] in layers and clock() < end:
                integers[node.inputs[1]] = _round_layer(both, node)
                progress(len(integers), len(layers))
            both.compute(node)
            if node.outputs[0] in biased:
                shift = bias_shift(both, node, layout)
                old = both.rounded_weights[node.inputs[2]]
                biases[node.inputs[2]] = (old + shift.reshape(old.shape)).numpy()
                both.shift_rounded(node.outputs[0], shift)
            both.finish(node)
    return replace(plan, integers=integers, values={**plan.values, **biases})


def _is_rounded(graph: TorchGraph, plan: QuantPlan, node: GraphNode) -> bool:
    if node.operator not in ("Conv", "Gemm") or node.inputs[1] not in plan.weights:
        return False
    weight = graph.weights[node.inputs[1]]
    known = node.attributes.get("auto_pad", b"NOTSET") == b"NOTSET" and not node.attributes.get("transA", 0)
    if node.operator == "Conv":
        return known and weight.dim() == 4 and weight[0].numel() <= MAX_INPUTS
    return known and weight.shape[1 - output_axis(node)] <= MAX_INPUTS


def _round_layer(both: Lockstep, node: GraphNode) -> Integers:
    """Integers of the node's weight, which is put in place for the nodes behind it."""
    name = node.inputs[1]
    grid, weight = both.plan.weights[name], both.exact_weights[name]
    turned = weight.T if output_axis(node) == 1 else weight
    groups = int(node.attributes.get("group", 1))
    rows = turned.reshape(groups, turned.shape[0] // groups, -1)
    scales = torch.from_numpy(grid.scales).expand(turned.shape[0]).reshape(groups, -1)
    found = torch.stack([
        _round_rows(rows[i], scales[i], _covariance(both.rounded[node.inputs[0]], node, weight, i), grid)
        for i in range(groups)
    ]).reshape(turned.shape)  # fmt: skip
    integers: Integers = (found.T if output_axis(node) == 1 else found).to(torch.int8).numpy()
    both.rounded_weights[name] = torch.from_numpy(grid.dequantise(integers))
    return np.ascontiguousarray(integers)


def _covariance(chunks: list[torch.Tensor], node: GraphNode, weight: torch.Tensor, group: int) -> torch.Tensor:
    """Of what the weights of an output channel are multiplied with, `[D, D]` float32."""
    positions = sum(chunk[:, 0].numel() for chunk in chunks)
    every = max(1, positions // (SAMPLES_PER_INPUT * weight[0].numel()))
    products: torch.Tensor | float = 0.0
    total: torch.Tensor | float = 0.0
    num_samples = 0
    for chunk in chunks:
        images = max(1, BLOCK_VALUES * len(chunk) // (chunk.numel() * weight[0, 0].numel()))
        for x in torch.split(chunk, images):
            samples = _unfolded(x, node, weight, group)[:, ::every]
            products = products + samples @ samples.T
            total = total + samples.sum(dim=1)
            num_samples += samples.shape[1]
    mean = torch.as_tensor(total) / num_samples
    return torch.as_tensor(products) / num_samples - torch.outer(mean, mean)


def _unfolded(x: torch.Tensor, node: GraphNode, weight: torch.Tensor, group: int) -> torch.Tensor:
    """Inputs of a group's output channels at every position, `[D, positions]`."""
    if node.operator == "Gemm":
        return x.T
    channels = weight.shape[1]
    pads = list(node.attributes.get("pads", [0] * 4))
    x = functional.pad(x[:, group * channels : (group + 1) * channels], (pads[1], pads[3], pads[0], pads[2]))
    strides, dilations = node.attributes.get("strides", [1, 1]), node.attributes.get("dilations", [1, 1])
    patches = functional.unfold(x, tuple(weight.shape[2:]), tuple(dilations), 0, tuple(strides))
    return patches.transpose(0, 1).flatten(1)


def _round_rows(rows: torch.Tensor, scales: torch.Tensor, covariance: torch.Tensor, grid: WeightGrid) -> torch.Tensor:
    """Integers `[O, D]` (float32) of weights `[O, D]`, one step for each row."""
    variances = covariance.diagonal()
    order = torch.argsort(variances, descending=True, stable=True)  # what counts most is rounded while all is open
    damped = covariance[order][:, order] + torch.eye(len(order)) * (DAMPING * variances.mean()).clamp_min(1e-12)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):  # means so far above the deviations that float32 has lost the covariance
        return (rows / scales[:, None]).round().clamp(-grid.limit, grid.limit)
    spread = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    open_columns = (rows[:, order] / scales[:, None]).T.contiguous()  # [D, O]: a column lies in one piece
    found = torch.empty_like(open_columns)
    for start in range(0, len(open_columns), BLOCK_COLUMNS):
        block = open_columns[start : start + BLOCK_COLUMNS]
        end = start + len(block)
        errors, inner = torch.empty_like(block), spread[start:end, start:end]
        for i in range(len(block)):
            found[start + i] = block[i].round().clamp(-grid.limit, grid.limit)
            errors[i] = (block[i] - found[start + i]) / inner[i, i]
            block[i:].addr_(inner[i, i:], errors[i], alpha=-1)
        open_columns[end:].addmm_(spread[start:end, end:].T, errors, alpha=-1)
    integers = torch.empty_like(rows)
    integers[:, order] = found.T
    return integers
