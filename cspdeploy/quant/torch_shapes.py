"""ONNX operators that move values about, in PyTorch: what the channels' numbers can follow.

Semantics: https://onnx.ai/onnx/operators. Axes, sizes and the like come as an input since opset 13, before that as an
attribute; both are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper

from cspdeploy.quant.torch_spatial import Attributes, Inputs, Outputs

__all__ = ["SHAPES", "axes_of"]


def axes_of(attributes: Attributes, inputs: Inputs, *, position: int = 1, name: str = "axes") -> list[int] | None:
    """A list of integers that is an attribute or an input; None where it is neither."""
    if len(inputs) > position and inputs[position] is not None:
        values: list[int] = inputs[position].reshape(-1).tolist()
        return values
    given = attributes.get(name)
    return None if given is None else list(given)


def _flatten(attributes: Attributes, inputs: Inputs) -> Outputs:
    x, axis = inputs[0], attributes.get("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    return [x.reshape(math.prod(x.shape[:axis]), -1)]


def _reshape(attributes: Attributes, inputs: Inputs) -> Outputs:
    x, shape = inputs[0], axes_of(attributes, inputs, name="shape")
    if shape is None:
        return None
    if not attributes.get("allowzero", 0):
        shape = [x.shape[i] if size == 0 else size for i, size in enumerate(shape)]
    return [x.reshape(shape)]


def _transpose(attributes: Attributes, inputs: Inputs) -> Outputs:
    return [inputs[0].permute(attributes.get("perm", list(reversed(range(inputs[0].dim())))))]


def _squeeze(attributes: Attributes, inputs: Inputs) -> Outputs:
    axes = axes_of(attributes, inputs)
    return None if axes is None else [inputs[0].squeeze(tuple(axes))]


def _unsqueeze(attributes: Attributes, inputs: Inputs) -> Outputs:
    x, axes = inputs[0], axes_of(attributes, inputs)
    if axes is None:
        return None
    for axis in sorted(axis % (x.dim() + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return [x]


def _split(attributes: Attributes, inputs: Inputs) -> Outputs:
    x, axis = inputs[0], attributes.get("axis", 0)
    sizes = axes_of(attributes, inputs, name="split")
    # Rounded up, so that the last part is the smaller one.
    return list(torch.split(x, -(-x.shape[axis] // attributes["num_outputs"]) if sizes is None else sizes, axis))


def _slice(attributes: Attributes, inputs: Inputs) -> Outputs:
    x = inputs[0]
    starts, ends = (axes_of(attributes, inputs, position=i, name=n) for i, n in ((1, "starts"), (2, "ends")))
    if starts is None or ends is None:
        return None
    axes = axes_of(attributes, inputs, position=3) or list(range(len(starts)))
    steps = axes_of(attributes, inputs, position=4, name="steps") or [1] * len(starts)
    if min(steps) < 1:
        return None
    where = [slice(None)] * x.dim()
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        where[axis] = slice(start, end, step)
    return [x[tuple(where)]]


def _gather(attributes: Attributes, inputs: Inputs) -> Outputs:
    x, indices = inputs
    axis = attributes.get("axis", 0) % max(x.dim(), 1)
    whole = torch.where(indices < 0, indices + x.shape[axis], indices)
    shape = [*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]]
    return [x.index_select(axis, whole.reshape(-1)).reshape(shape)]


def _expand(attributes: Attributes, inputs: Inputs) -> Outputs:
    return [inputs[0].expand(np.broadcast_shapes(tuple(inputs[0].shape), tuple(inputs[1].tolist())))]


def _shape(attributes: Attributes, inputs: Inputs) -> Outputs:
    shape = list(inputs[0].shape)[attributes.get("start", 0) : attributes.get("end")]
    return [torch.tensor(shape, dtype=torch.int64)]


def _cast(attributes: Attributes, inputs: Inputs) -> Outputs:
    if attributes["to"] == onnx.TensorProto.BFLOAT16:
        return [inputs[0].bfloat16()]
    dtype = torch.from_numpy(np.empty(0, helper.tensor_dtype_to_np_dtype(attributes["to"]))).dtype
    return [inputs[0].to(dtype)]


def _reduce(function: Callable[..., Any]) -> Callable[[Attributes, Inputs], Outputs]:
    def compute(attributes: Attributes, inputs: Inputs) -> Outputs:
        x, axes = inputs[0], axes_of(attributes, inputs)
        if not axes and attributes.get("noop_with_empty_axes", 0):
            return [x]
        return [function(x, tuple(axes or range(x.dim())), bool(attributes.get("keepdims", 1)))]

    return compute


SHAPES: dict[str, Callable[[Attributes, Inputs], Outputs]] = {
    "Cast": _cast,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "ReduceMax": _reduce(torch.amax),
    "ReduceMean": _reduce(torch.mean),
    "ReduceMin": _reduce(torch.amin),
    "ReduceSum": _reduce(torch.sum),
    "Reshape": _reshape,
    "Shape": _shape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
