"""The parts that networks are made of.

Attribute names are the published checkpoints' own (`conv`, `bn`, `conv1`, `attn.fc1`, ...), so that their state
dicts load as they are. Reference: CSPNet, arXiv 1911.11929; Darknet cfgs of CrossStagePartialNetworks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = [
    "BLOCKS",
    "MAX_CHS",
    "MAX_DEPTH",
    "Act",
    "ActName",
    "BottleBlock",
    "Conv2d",
    "ConvNormAct",
    "DarkBlock",
    "EdgeBlock",
    "FeatureLevel",
    "global_mean",
    "make_activation",
    "make_classifier",
    "require_range",
]

Act = Callable[[], nn.Module]
ActName = str

BN_EPS = 1e-5  # of the published checkpoints; Darknet fuses with the same number

# A configuration comes from a file: these keep a wrong number from taking all memory or all day.
MAX_CHS = 65_536
MAX_DEPTH = 1_000


@dataclass(frozen=True, slots=True)
class FeatureLevel:
    """One level of a network's pyramid of feature maps: `[N, num_chs, H / stride, W / stride]`."""

    stride: int
    num_chs: int


def require_range(name: str, value: float, low: float, high: float) -> None:
    """Guard of configurations.

    Raises:
        ValueError: `value` is not in [low, high]; NaN never is.
    """
    if not low <= value <= high:
        raise ValueError(f"{name}: got {value}, expected {low} to {high}")


def make_activation(name: ActName, slope: float) -> Act:
    """A factory of activations: leaky_relu (negative slope `slope`), relu, silu or mish.

    Raises:
        ValueError: unknown name.
    """
    factories: dict[str, Act] = {
        "leaky_relu": lambda: nn.LeakyReLU(slope, inplace=True),
        "relu": lambda: nn.ReLU(inplace=True),
        "silu": lambda: nn.SiLU(inplace=True),
        "mish": lambda: nn.Mish(inplace=True),
    }
    if name not in factories:
        raise ValueError(f"activation: got {name!r}, expected one of {', '.join(factories)}")
    return factories[name]


class Conv2d(nn.Conv2d):
    """nn.Conv2d whose weights start from He's normal distribution (fan out, 1502.01852), its bias from zero.

    Drawn here, where PyTorch would draw its own default first: that halves the time a network takes to build.
    """

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def make_classifier(in_chs: int, num_classes: int) -> nn.Linear:
    """The last layer, from small normal weights and zero bias, so that the first predictions are near uniform."""
    linear = nn.Linear(in_chs, num_classes)
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    return linear


class ConvNormAct(nn.Module):
    """Convolution without bias, batch norm, activation. Padding is symmetric: ((stride - 1) + (kernel - 1)) // 2.

    Args:
        act: factory of the activation, or None for a linear unit.
    """

    def __init__(
        self, in_chs: int, out_chs: int, kernel: int, *, act: Act | None, stride: int = 1, groups: int = 1,
        padding: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        pad = ((stride - 1) + (kernel - 1)) // 2 if padding is None else padding
        self.conv = Conv2d(in_chs, out_chs, kernel, stride=stride, padding=pad, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out_chs, eps=BN_EPS)
        self.act = act() if act is not None else nn.Identity()

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x_NCHW)))


class SqueezeExcite(nn.Module):
    """Channel attention (Hu et al., 1709.01507): global mean, bottleneck of 1x1 convolutions, sigmoid gate."""

    def __init__(self, chs: int, ratio: float, act: Act) -> None:
        super().__init__()
        mid_chs = max(8, int(chs * ratio + 4) // 8 * 8)  # nearest multiple of 8, at least 8
        self.fc1 = Conv2d(chs, mid_chs, 1)
        self.act = act()
        self.fc2 = Conv2d(mid_chs, chs, 1)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        gate = self.fc2(self.act(self.fc1(x_NCHW.mean((2, 3), keepdim=True))))
        return x_NCHW * gate.sigmoid()


def _attention(chs: int, se_ratio: float, act: Act) -> nn.Module:
    return SqueezeExcite(chs, se_ratio, act) if se_ratio else nn.Identity()


def _inner(out_chs: int, bottle_ratio: float) -> int:
    mid_chs = round(out_chs * bottle_ratio)
    require_range("channels inside a block", mid_chs, 1, MAX_CHS)
    return mid_chs


def _sum_chs(in_chs: int, out_chs: int) -> tuple[int, int]:
    """Channels of a block's output that its input is added to, and the rest."""
    require_range("channels of a block's output beyond its input's", out_chs - in_chs, 0, MAX_CHS)
    return in_chs, out_chs - in_chs


def add_partial(y_NCHW: Tensor, shortcut_NCHW: Tensor, chs: tuple[int, int]) -> Tensor:
    """Residual sum onto the first channels of `y`, as many as the shortcut has (Darknet's partial residual).

    Args:
        chs: channels that take the sum, and the rest. Given as numbers: while a network is traced, a shape that is
            asked for is a tensor.
    """
    if not chs[1]:
        return y_NCHW + shortcut_NCHW
    first_NCHW, rest_NCHW = y_NCHW.split(list(chs), dim=1)
    return torch.cat([first_NCHW + shortcut_NCHW, rest_NCHW], dim=1)


class DarkBlock(nn.Module):
    """Darknet's residual block: 1x1, 3x3, add. No activation after the sum."""

    def __init__(
        self, in_chs: int, out_chs: int, *, bottle_ratio: float, groups: int, se_ratio: float, act: Act
    ) -> None:
        super().__init__()
        mid_chs = _inner(out_chs, bottle_ratio)
        self.sum_chs = _sum_chs(in_chs, out_chs)
        self.conv1 = ConvNormAct(in_chs, mid_chs, 1, act=act)
        self.attn = _attention(mid_chs, se_ratio, act)
        self.conv2 = ConvNormAct(mid_chs, out_chs, 3, groups=groups, act=act)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The norm whose zero scale makes the block an identity."""
        return self.conv2.bn

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return add_partial(self.conv2(self.attn(self.conv1(x_NCHW))), x_NCHW, self.sum_chs)


class BottleBlock(nn.Module):
    """ResNet's bottleneck: 1x1, 3x3, 1x1 linear, add, activation."""

    def __init__(
        self, in_chs: int, out_chs: int, *, bottle_ratio: float, groups: int, se_ratio: float, act: Act
    ) -> None:
        super().__init__()
        mid_chs = _inner(out_chs, bottle_ratio)
        self.sum_chs = _sum_chs(in_chs, out_chs)
        self.conv1 = ConvNormAct(in_chs, mid_chs, 1, act=act)
        self.conv2 = ConvNormAct(mid_chs, mid_chs, 3, groups=groups, act=act)
        self.attn2 = _attention(mid_chs, se_ratio, act)
        self.conv3 = ConvNormAct(mid_chs, out_chs, 1, act=None)
        self.act = act()

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The norm whose zero scale makes the block an identity."""
        return self.conv3.bn

    def forward(self, x_NCHW: Tensor) -> Tensor:
        y_NCHW = self.conv3(self.attn2(self.conv2(self.conv1(x_NCHW))))
        return self.act(add_partial(y_NCHW, x_NCHW, self.sum_chs))


class EdgeBlock(nn.Module):
    """3x3, 1x1, add: the fused form that suits accelerators without cheap pointwise convolutions."""

    def __init__(
        self, in_chs: int, out_chs: int, *, bottle_ratio: float, groups: int, se_ratio: float, act: Act
    ) -> None:
        super().__init__()
        mid_chs = _inner(out_chs, bottle_ratio)
        self.sum_chs = _sum_chs(in_chs, out_chs)
        self.conv1 = ConvNormAct(in_chs, mid_chs, 3, groups=groups, act=act)
        self.attn = _attention(mid_chs, se_ratio, act)
        self.conv2 = ConvNormAct(mid_chs, out_chs, 1, act=act)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The norm whose zero scale makes the block an identity."""
        return self.conv2.bn

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return add_partial(self.conv2(self.attn(self.conv1(x_NCHW))), x_NCHW, self.sum_chs)


BLOCKS: dict[str, type[DarkBlock] | type[BottleBlock] | type[EdgeBlock]] = {
    "dark": DarkBlock,
    "bottle": BottleBlock,
    "edge": EdgeBlock,
}


def global_mean(x_NCHW: Tensor) -> Tensor:
    """Global average pooling to `[N, C]`."""
    return torch.flatten(nn.functional.adaptive_avg_pool2d(x_NCHW, 1), 1)
