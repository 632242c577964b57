"""ResNet and ResNeXt with bottleneck blocks: the baselines of the CSP classifiers.

Papers: ResNet 1512.03385, ResNeXt 1611.05431. The stride is in the 3x3 convolution (torchvision's "v1.5").
State dict: the layout of the published torchvision checkpoints, key for key. Darknet's networks of these names are
others: they have no projection in their shortcuts and 22.7 million parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from cspdeploy.nets.blocks import (
    MAX_CHS,
    MAX_DEPTH,
    Conv2d,
    FeatureLevel,
    global_mean,
    make_classifier,
    require_range,
)

__all__ = ["ResNet", "ResNetConfig"]

STEM_CHS = 64
EXPANSION = 4  # of a block's output over the width its stage is named by


@dataclass(frozen=True, slots=True, kw_only=True)
class ResNetConfig:
    """Blocks of each stage and their 3x3 convolution. No field has a default: each one names the architecture."""

    depths: tuple[int, ...]
    groups: int
    group_width: int
    """Channels of one group in the first stage; they double with each stage."""

    def __post_init__(self) -> None:
        require_range("stages", len(self.depths), 1, 8)  # each one halves the map
        for depth in self.depths:
            require_range("depth", depth, 1, MAX_DEPTH)
        require_range("groups", self.groups, 1, MAX_CHS)
        require_range("group_width", self.group_width, 1, MAX_CHS)
        require_range("groups * group_width", self.groups * self.group_width, 1, MAX_CHS)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 linear, add, ReLU; a 1x1 projection in the shortcut where shapes change."""

    def __init__(self, in_chs: int, mid_chs: int, out_chs: int, *, stride: int, groups: int) -> None:
        super().__init__()
        self.conv1 = Conv2d(in_chs, mid_chs, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(mid_chs)
        self.conv2 = Conv2d(mid_chs, mid_chs, 3, stride=stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(mid_chs)
        self.conv3 = Conv2d(mid_chs, out_chs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_chs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_chs != out_chs:
            self.downsample = nn.Sequential(
                Conv2d(in_chs, out_chs, 1, stride=stride, bias=False), nn.BatchNorm2d(out_chs)
            )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        y_NCHW = self.relu(self.bn1(self.conv1(x_NCHW)))
        y_NCHW = self.relu(self.bn2(self.conv2(y_NCHW)))
        return self.relu(self.bn3(self.conv3(y_NCHW)) + self.downsample(x_NCHW))


class ResNet(nn.Module):
    """`[N, 3, H, W]` float to logits `[N, num_classes]`.

    `feature_levels` are the stem, before its pool, and the stages.
    """

    def __init__(self, config: ResNetConfig, *, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.conv1 = Conv2d(3, STEM_CHS, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM_CHS)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        levels = [FeatureLevel(2, STEM_CHS)]
        in_chs = STEM_CHS
        for i, depth in enumerate(config.depths):
            mid_chs = config.groups * config.group_width * 2**i
            out_chs = STEM_CHS * EXPANSION * 2**i
            blocks = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(Bottleneck(in_chs, mid_chs, out_chs, stride=stride, groups=config.groups))
                in_chs = out_chs
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
            levels.append(FeatureLevel(4 * 2**i, out_chs))
        self.fc = make_classifier(in_chs, num_classes)
        self.feature_levels = tuple(levels)

    def zero_init_residual(self) -> None:
        """Start every residual block as an identity, which makes deep networks easier to train from nothing."""
        for module in self.modules():
            if isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.fc(global_mean(self.forward_features(x_NCHW)[-1]))

    def forward_features(self, x_NCHW: Tensor) -> tuple[Tensor, ...]:
        """One map `[N, num_chs, H / stride, W / stride]` for each of `feature_levels`, finest first."""
        x_NCHW = self.relu(self.bn1(self.conv1(x_NCHW)))
        maps = [x_NCHW]
        x_NCHW = self.maxpool(x_NCHW)
        for i in range(len(self.config.depths)):
            x_NCHW = self.get_submodule(f"layer{i + 1}")(x_NCHW)
            maps.append(x_NCHW)
        return tuple(maps)
