from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cspdeploy.train.gemm_conv import MAX_PIXELS, use_gemm_convolutions


def _conv(in_chs: int, out_chs: int, kernel: Any, **options: Any) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(in_chs, out_chs, kernel, bias=False, **options).double()


def _input(height: int, width: int, *, chs: int = 4) -> Tensor:
    return torch.randn(3, chs, height, width, dtype=torch.float64, requires_grad=True)


def _with_gradients(conv: nn.Conv2d, x_NCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, gradient of the input, gradient of the weight; the loss weighs every output differently."""
    y_NCHW = conv(x_NCHW)
    weights = torch.arange(y_NCHW.numel(), dtype=torch.float64).sin().view(y_NCHW.shape)
    dx, dw = torch.autograd.grad((y_NCHW * weights).sum(), [x_NCHW, conv.weight])
    return y_NCHW, dx, dw


def _assert_same(conv: nn.Conv2d, x_NCHW: Tensor) -> None:
    expected = _with_gradients(conv, x_NCHW)
    use_gemm_convolutions(conv)
    for got, want in zip(_with_gradients(conv, x_NCHW), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def _by_matrix_product(y_NCHW: Tensor) -> bool:
    assert y_NCHW.grad_fn is not None
    return any(function and "GemmConv" in function.name() for function, _ in y_NCHW.grad_fn.next_functions)


@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize(("height", "width"), [(5, 5), (8, 8), (6, 7)])
def test_equal_to_conv2d_with_both_gradients(kernel: int, stride: int, padding: int, height: int, width: int) -> None:
    _assert_same(_conv(4, 6, kernel, stride=stride, padding=padding), _input(height, width))


def test_channels_last_and_single_pixel() -> None:
    conv = _conv(4, 6, 3, padding=1).to(memory_format=torch.channels_last)
    _assert_same(conv, _input(8, 8).detach().contiguous(memory_format=torch.channels_last).requires_grad_())
    _assert_same(_conv(4, 6, 3, padding=1), _input(1, 1))


def test_small_maps_go_by_matrix_product_and_large_ones_do_not() -> None:
    conv = _conv(4, 6, 3, padding=1)
    use_gemm_convolutions(conv)
    side = int(MAX_PIXELS**0.5)
    assert _by_matrix_product(conv(_input(side, side)))
    assert not _by_matrix_product(conv(_input(side, side + 1)))


def test_without_gradients_the_own_forward_runs() -> None:
    conv = _conv(4, 6, 3, padding=1)
    x_NCHW = _input(4, 4)
    with torch.no_grad():
        expected = conv(x_NCHW)
        use_gemm_convolutions(conv)
        assert torch.equal(conv(x_NCHW), expected)


def test_autocast_decides_the_dtype() -> None:
    conv = nn.Conv2d(4, 6, 3, padding=1, bias=False)
    x_NCHW = torch.randn(2, 4, 4, 4)
    expected = conv(x_NCHW)
    use_gemm_convolutions(conv)
    with torch.autocast("cpu", torch.bfloat16):
        y_NCHW = conv(x_NCHW)
    assert y_NCHW.dtype == torch.bfloat16
    torch.testing.assert_close(y_NCHW.float(), expected, rtol=0.02, atol=0.02)
    y_NCHW.float().sum().backward()
    assert conv.weight.grad is not None
    assert conv.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    "conv",
    [
        _conv(4, 6, (3, 1), padding=1),
        _conv(4, 6, 3, padding=(1, 0)),
        _conv(4, 6, 3, stride=(1, 2), padding=1),
        _conv(4, 6, 3, padding=2, dilation=2),
        _conv(4, 6, 3, padding="same"),
        _conv(4, 6, 3, padding=1, padding_mode="reflect"),
        _conv(4, 6, 3, padding=1, groups=2),
        nn.Conv2d(4, 6, 3, padding=1).double(),
    ],
    ids=["not square", "one-sided padding", "one-sided stride", "dilated", "padding by name", "reflected", "grouped",
         "bias"],
)  # fmt: skip
def test_convolution_that_is_not_dense_and_square_is_left_alone(conv: nn.Conv2d) -> None:
    _assert_same(conv, _input(6, 6))
