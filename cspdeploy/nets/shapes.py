"""Shapes of the common operations, without PyTorch's own kernels for its meta device.

Many of those are written in Python: the first one loads the compiler or SymPy, which takes seconds, and each takes a
millisecond. A function here takes the operation's own arguments and gives empty tensors of the right shape; what it
does not know, errors included, it leaves to PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["SHAPES"]

aten = torch.ops.aten


def _convolution(x_NCHW: Tensor, weight: Tensor, *settings: Any) -> Any:
    _, stride, padding, dilation, transposed, _, groups = settings
    reach = [step * (kernel - 1) + 1 for step, kernel in zip(dilation, weight.shape[2:], strict=True)]
    sides = _slid(x_NCHW, reach, stride, padding)
    if transposed or x_NCHW.shape[1] != groups * weight.shape[1] or min(sides) < 1:
        return aten.convolution.default(x_NCHW, weight, *settings)
    return x_NCHW.new_empty((x_NCHW.shape[0], weight.shape[0], *sides))


def _slid(x_NCHW: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> list[int]:
    """Height and width of what a window makes that slides over `x`."""
    sides = zip(x_NCHW.shape[2:], _pair(kernel), _pair(stride or kernel), _pair(padding), strict=True)
    return [(size + 2 * pad - reach) // step + 1 for size, reach, step, pad in sides]


def _pair(values: Sequence[int]) -> Sequence[int]:
    return values if len(values) == 2 else [*values, *values]


def _max_pool(x_NCHW: Tensor, kernel: list[int], *settings: Any) -> Any:
    defaults: tuple[Any, ...] = ([], [0], [1], False)
    stride, padding, dilation, ceil_mode = settings + defaults[len(settings) :]
    sides = _slid(x_NCHW, kernel, stride, padding)
    if ceil_mode or max(dilation) > 1 or 2 * max(padding) > min(kernel) or min(sides) < 1:
        return aten.max_pool2d_with_indices.default(x_NCHW, kernel, *settings)
    shape = (*x_NCHW.shape[:2], *sides)
    return x_NCHW.new_empty(shape), x_NCHW.new_empty(shape, dtype=torch.int64)


def _average_pool(x_NCHW: Tensor, kernel: list[int], *settings: Any) -> Any:
    defaults: tuple[Any, ...] = ([], [0], False)
    stride, padding, ceil_mode = settings[:3] + defaults[len(settings) :]
    sides = _slid(x_NCHW, kernel, stride, padding)
    if ceil_mode or 2 * max(padding) > min(kernel) or min(sides) < 1:
        return aten.avg_pool2d.default(x_NCHW, kernel, *settings)
    return x_NCHW.new_empty((*x_NCHW.shape[:2], *sides))


def _batch_norm(x_NCHW: Tensor, *others: Any) -> Any:
    return x_NCHW.new_empty(x_NCHW.shape), x_NCHW.new_empty((0,)), x_NCHW.new_empty((0,))


def _in_place(x: Tensor, *others: Any) -> Tensor:
    return x


def _elementwise(x: Tensor, *others: Any) -> Tensor:
    return x.new_empty(np.broadcast_shapes(x.shape, *(y.shape for y in others if isinstance(y, Tensor))))


def _concatenate(tensors: list[Tensor], dim: int = 0) -> Any:
    shape = list(tensors[0].shape)
    if any(t.ndim != len(shape) or _without(t.shape, dim) != _without(shape, dim) for t in tensors):
        return aten.cat.default(tensors, dim)
    shape[dim] = sum(t.shape[dim] for t in tensors)
    return tensors[0].new_empty(shape)


def _without(shape: Sequence[int], dim: int) -> list[int]:
    sizes = list(shape)
    del sizes[dim]
    return sizes


def _mean(x: Tensor, dims: list[int] | None, keepdim: bool = False, **others: Any) -> Tensor:
    reduced = {dim % x.ndim for dim in dims or ()} or set(range(x.ndim))
    sizes = [1 if i in reduced else size for i, size in enumerate(x.shape) if keepdim or i not in reduced]
    return x.new_empty(sizes)


def _linear(bias: Tensor, x_NC: Tensor, weight_CK: Tensor, **others: Any) -> Any:
    if x_NC.shape[1] != weight_CK.shape[0]:
        return aten.addmm.default(bias, x_NC, weight_CK, **others)
    return x_NC.new_empty((x_NC.shape[0], weight_CK.shape[1]))


SHAPES: dict[Any, Callable[..., Any]] = {
    aten.convolution.default: _convolution,
    aten.native_batch_norm.default: _batch_norm,
    aten.max_pool2d_with_indices.default: _max_pool,
    aten.avg_pool2d.default: _average_pool,
    aten.cat.default: _concatenate,
    aten.mean.dim: _mean,
    aten.addmm.default: _linear,
    **dict.fromkeys((aten.leaky_relu_.default, aten.relu_.default, aten.silu_.default, aten.mish_.default), _in_place),
    **dict.fromkeys((aten.add.Tensor, aten.mul.Tensor, aten.sigmoid.default, aten.relu.default), _elementwise),
}
