"""Convolution on small maps as one matrix product, for training on a CPU.

oneDNN computes the gradient of the weights image by image, with the pixels of one map as the inner dimension. On the
last stages of a network that dimension is 1 to 16, its tiles of 32 stay empty, and those layers come to dominate the
step. Gathering the patches of the whole batch first makes the inner dimension N*H*W. The result is the same up to the
order of summation. `tests/benchmarks/train_step.py` measures the gain.

Shapes: N images, H W output map, K kernel side, C input and O output channels.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["use_gemm_convolutions"]

# Above this many output pixels oneDNN's own kernels are as fast, and the gathered patches grow large.
MAX_PIXELS = 64


class _GemmConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NHWC: Tensor, weight_OKKC: Tensor, stride: int, padding: int) -> Tensor:
        out_chs, kernel = weight_OKKC.shape[:2]
        patches = _gather(x_NHWC, kernel, stride, padding)
        weight = weight_OKKC.reshape(out_chs, -1)
        ctx.save_for_backward(patches, weight)
        ctx.geometry = (x_NHWC.shape, kernel, stride, padding)
        return (patches.flatten(0, 2) @ weight.t()).view(*patches.shape[:3], out_chs)

    @staticmethod
    def backward(ctx: Any, grad_NHWO: Tensor) -> tuple[Tensor, Tensor, None, None]:
        patches, weight = ctx.saved_tensors
        shape, kernel, stride, padding = ctx.geometry
        grad = grad_NHWO.flatten(0, 2)
        grad_weight = (grad.t() @ patches.flatten(0, 2)).view(weight.shape[0], kernel, kernel, -1)
        grad_patches = (grad @ weight).view(patches.shape)
        return _scatter(grad_patches, shape, kernel, stride, padding), grad_weight, None, None


def _windows(size: tuple[int, int], kernel: int, stride: int) -> list[tuple[slice, slice]]:
    rows, columns = size
    return [
        (slice(i, i + stride * (rows - 1) + 1, stride), slice(j, j + stride * (columns - 1) + 1, stride))
        for i in range(kernel)
        for j in range(kernel)
    ]


def _gather(x_NHWC: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """`[N, H, W, K*K*C]`: every output pixel's window."""
    if kernel == 1 and stride == 1 and padding == 0:
        return x_NHWC
    padded = nn.functional.pad(x_NHWC, (0, 0, padding, padding, padding, padding))
    rows = (padded.shape[1] - kernel) // stride + 1
    columns = (padded.shape[2] - kernel) // stride + 1
    return torch.cat([padded[:, i, j] for i, j in _windows((rows, columns), kernel, stride)], dim=3)


def _scatter(grad_patches: Tensor, shape: torch.Size, kernel: int, stride: int, padding: int) -> Tensor:
    """The transpose of `_gather`."""
    if kernel == 1 and stride == 1 and padding == 0:
        return grad_patches
    num, height, width, chs = shape
    padded = grad_patches.new_zeros(num, height + 2 * padding, width + 2 * padding, chs)
    parts = grad_patches.split(chs, dim=3)
    for (i, j), part in zip(_windows((parts[0].shape[1], parts[0].shape[2]), kernel, stride), parts, strict=True):
        padded[:, i, j] += part
    return padded[:, padding : padding + height, padding : padding + width]


def _forward(conv: nn.Conv2d, x_NCHW: Tensor) -> Tensor:
    stride, padding = conv.stride[0], int(conv.padding[0])
    rows = (x_NCHW.shape[2] + 2 * padding - conv.kernel_size[0]) // stride + 1
    columns = (x_NCHW.shape[3] + 2 * padding - conv.kernel_size[0]) // stride + 1
    if rows * columns > MAX_PIXELS or not torch.is_grad_enabled():
        return nn.Conv2d.forward(conv, x_NCHW)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x_NCHW.dtype
    x_NHWC = x_NCHW.permute(0, 2, 3, 1).to(dtype)
    weight_OKKC = conv.weight.permute(0, 2, 3, 1).to(dtype)
    y_NHWO: Tensor = _GemmConv.apply(x_NHWC, weight_OKKC, stride, padding)
    return y_NHWO.permute(0, 3, 1, 2)


def _dense_and_square(conv: nn.Conv2d) -> bool:
    plain = conv.groups == 1 and conv.bias is None and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
    sides = (conv.kernel_size, conv.stride, conv.padding)
    return plain and all(not isinstance(pair, str) and pair[0] == pair[1] for pair in sides)


def use_gemm_convolutions(model: nn.Module) -> None:
    """Make the dense square convolutions of `model` compute by matrix product wherever their map is small.

    Affects training passes on the CPU only; without gradients the module's own forward runs.
    """
    for conv in model.modules():
        if isinstance(conv, nn.Conv2d) and _dense_and_square(conv):
            conv.forward = functools.partial(_forward, conv)  # type: ignore[method-assign]
