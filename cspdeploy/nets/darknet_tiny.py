"""DarknetTiny: the backbone of YOLOv4-tiny, a CSP network of 3x3 convolutions that sends half of the channels on.

Reference: yolov4-tiny.cfg of AlexeyAB/darknet, layers 0 to 26; Scaled-YOLOv4, arXiv 2011.08036, section 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from cspdeploy.nets.blocks import (
    MAX_CHS,
    Act,
    ConvNormAct,
    FeatureLevel,
    global_mean,
    make_activation,
    make_classifier,
    require_range,
)

__all__ = ["DarknetTiny", "DarknetTinyConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DarknetTinyConfig:
    """A whole network without its head size. No field has a default: each one names the architecture."""

    stem_chs: int
    """Of the first convolution; the second has twice as many."""
    num_blocks: int
    """Each one doubles the channels and is followed by a pool; a 3x3 convolution comes after the last pool."""
    activation: Literal["leaky_relu", "relu", "silu", "mish"]
    leaky_slope: float

    def __post_init__(self) -> None:
        require_range("num_blocks", self.num_blocks, 1, 8)  # each one halves the map
        require_range("stem_chs", self.stem_chs, 1, MAX_CHS >> (self.num_blocks + 1))
        require_range("leaky_slope", self.leaky_slope, 0.0, 1.0)


class TinyBlock(nn.Module):
    """3x3 over all channels; 3x3 twice over the second half of them, both joined and mixed; joined with the first.

    From `[N, in_chs, H, W]`: the mixed part `[N, chs, H, W]`, and all of it `[N, 2 * chs, H, W]`.
    """

    def __init__(self, in_chs: int, chs: int, act: Act) -> None:
        super().__init__()
        self.half_chs = chs // 2
        self.conv1 = ConvNormAct(in_chs, chs, 3, act=act)
        self.conv2 = ConvNormAct(self.half_chs, self.half_chs, 3, act=act)
        self.conv3 = ConvNormAct(self.half_chs, self.half_chs, 3, act=act)
        self.conv4 = ConvNormAct(chs, chs, 1, act=act)

    def forward(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        whole = self.conv1(x_NCHW)
        first = self.conv2(whole.narrow(1, self.half_chs, self.half_chs))
        mixed = self.conv4(torch.cat([self.conv3(first), first], dim=1))
        return mixed, torch.cat([whole, mixed], dim=1)


class DarknetTiny(nn.Module):
    """`[N, 3, H, W]` float to logits `[N, num_classes]`.

    `feature_levels` are the first convolution, the mixed part of each block, and the last convolution.
    """

    def __init__(self, config: DarknetTinyConfig, *, num_classes: int) -> None:
        super().__init__()
        act = make_activation(config.activation, config.leaky_slope)
        chs = 2 * config.stem_chs
        self.config = config
        self.conv1 = ConvNormAct(3, config.stem_chs, 3, stride=2, act=act)
        self.conv2 = ConvNormAct(config.stem_chs, chs, 3, stride=2, act=act)
        levels = [FeatureLevel(2, config.stem_chs)]
        self.blocks = nn.ModuleList()
        in_chs, stride = chs, 4
        for _ in range(config.num_blocks):
            self.blocks.append(TinyBlock(in_chs, chs, act))
            levels.append(FeatureLevel(stride, chs))
            chs, in_chs, stride = 2 * chs, 2 * chs, 2 * stride
        self.pool = nn.MaxPool2d(2)
        self.conv3 = ConvNormAct(in_chs, chs, 3, act=act)
        levels.append(FeatureLevel(stride, chs))
        self.fc = make_classifier(chs, num_classes)
        self.feature_levels = tuple(levels)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.fc(global_mean(self.forward_features(x_NCHW)[-1]))

    def forward_features(self, x_NCHW: Tensor) -> tuple[Tensor, ...]:
        """One map `[N, num_chs, H / stride, W / stride]` for each of `feature_levels`, finest first."""
        maps = [self.conv1(x_NCHW)]
        x_NCHW = self.conv2(maps[0])
        for block in self.blocks:
            mixed, x_NCHW = block(x_NCHW)
            maps.append(mixed)
            x_NCHW = self.pool(x_NCHW)
        return (*maps, self.conv3(x_NCHW))
