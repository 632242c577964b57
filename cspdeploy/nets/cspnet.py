"""CspNet: one configuration-driven network for the CSP family of classifiers.

A stage halves the map (conv_down), expands the channels with one 1x1 convolution, sends one half of them through
residual blocks, leaves the other half alone, joins both and mixes them with a 1x1 transition:

    csp   conv_exp -> [cross | block]; block -> blocks -> conv_transition_b; cat[cross, block] -> conv_transition
    cs3   conv_exp -> [block | cross]; block -> blocks;                      cat[block, cross] -> conv_transition
    dark  blocks

Note that csp and cs3 send opposite halves through the blocks. Papers: CSPNet 1911.11929, Darknet (YOLOv3 1804.02767).
State dict: the layout of the published ImageNet checkpoints, key for key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from cspdeploy.nets.blocks import (
    BLOCKS,
    MAX_CHS,
    MAX_DEPTH,
    Act,
    BottleBlock,
    ConvNormAct,
    DarkBlock,
    EdgeBlock,
    FeatureLevel,
    global_mean,
    make_activation,
    make_classifier,
    require_range,
)

__all__ = ["CspNet", "CspNetConfig", "StageConfig", "StemConfig", "level_strides"]

MAX_KERNEL = 31


@dataclass(frozen=True, slots=True, kw_only=True)
class StemConfig:
    """The convolutions before the first stage. No field has a default: each one names the architecture."""

    out_chs: tuple[int, ...]
    kernel: int
    stride: Literal[1, 2, 4]
    """Total stride. 2: the first convolution strides. 4: the first one and the pool (or the last one, without pool)."""
    pool: Literal["none", "max3", "max2"]
    """max3: 3x3 stride 2 pad 1. max2: 2x2 stride 2, the Darknet form."""
    padding: int | None
    """Of the first convolution; None: symmetric, by its kernel."""

    def __post_init__(self) -> None:
        require_range("convolutions of the stem", len(self.out_chs), 1, MAX_DEPTH)
        require_range("stem.out_chs", min(self.out_chs), 1, MAX_CHS)
        require_range("stem.out_chs", max(self.out_chs), 1, MAX_CHS)
        require_range("stem.kernel", self.kernel, 1, MAX_KERNEL)
        require_range("stem.padding", self.padding or 0, 0, MAX_KERNEL)
        if self.pool != "none" and self.stride != 4:
            raise ValueError(f"stem.stride: got {self.stride} with a pool, expected 4")
        if self.pool == "none" and self.stride == 4 and len(self.out_chs) == 1:
            raise ValueError(
                "stem.stride: got 4 with one convolution and no pool, expected a second one to halve the map"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class StageConfig:
    """One stage. Widths follow from `out_chs` and the ratios; no field that every stage needs has a default."""

    kind: Literal["csp", "cs3", "dark"]
    block: Literal["dark", "bottle", "edge"]
    depth: int
    out_chs: int
    stride: Literal[1, 2]
    groups: int
    expand_ratio: float
    """Channels after conv_exp, as a share of `out_chs`; each path gets half of them."""
    block_ratio: float
    """Channels of a block's output, as a share of `out_chs`."""
    bottle_ratio: float
    """Channels inside a block, as a share of its output."""
    cross_linear: bool
    """No activation after conv_exp."""
    down_growth: bool
    """conv_down already has `out_chs` channels, not the input's."""
    avg_down: bool
    """Down-sample by 2x2 mean and 1x1 convolution instead of a strided 3x3."""
    se_ratio: float
    """Squeeze-and-excitation width as a share of the channels; 0: none."""
    block_in_chs: int | None = None
    """Channels into the blocks of a csp stage where they are fewer than a block's output, as in stage 1 of the Darknet
    csresnet50: the first block then adds its input to the first channels of its output. None: half of conv_exp."""

    def __post_init__(self) -> None:
        require_range("depth", self.depth, 1, MAX_DEPTH)
        require_range("out_chs", self.out_chs, 1, MAX_CHS)
        require_range("groups", self.groups, 1, MAX_CHS)
        require_range("se_ratio", self.se_ratio, 0.0, 1.0)
        require_range("conv_exp channels of a path", self.cross_chs, 1, MAX_CHS)
        require_range("block_ratio * out_chs", self.block_chs, 1, MAX_CHS)
        if self.block_in_chs is not None and (self.kind != "csp" or self.block_in_chs < 1):
            raise ValueError(
                f"block_in_chs: got {self.block_in_chs} in a {self.kind} stage, expected at least 1, in a csp stage"
            )

    @property
    def cross_chs(self) -> int:
        """Channels of the cross path: half of conv_exp."""
        return round(self.out_chs * self.expand_ratio) // 2

    @property
    def block_chs(self) -> int:
        """Channels of a block's output."""
        return round(self.out_chs * self.block_ratio)


@dataclass(frozen=True, slots=True, kw_only=True)
class CspNetConfig:
    """A whole network without its head size."""

    stem: StemConfig
    stages: tuple[StageConfig, ...]
    activation: Literal["leaky_relu", "relu", "silu", "mish"]
    leaky_slope: float
    """Of leaky_relu: 0.01 for the published PyTorch checkpoints, 0.1 for Darknet's. The weights cannot tell."""

    def __post_init__(self) -> None:
        require_range("stages", len(self.stages), 1, MAX_DEPTH)
        require_range("leaky_slope", self.leaky_slope, 0.0, 1.0)


class Stem(nn.Sequential):
    """`conv1`..`convN`, then an optional pool."""

    def __init__(self, config: StemConfig, act: Act, *, in_chs: int = 3) -> None:
        super().__init__()
        last = len(config.out_chs) - 1
        for i, out_chs in enumerate(config.out_chs):
            strided = (i == 0 and config.stride > 1) or (i == last and config.stride > 2 and config.pool == "none")
            padding = config.padding if i == 0 else None
            conv = ConvNormAct(
                in_chs, out_chs, config.kernel, stride=2 if strided else 1, padding=padding, act=act
            )  # fmt: skip
            self.add_module(f"conv{i + 1}", conv)
            in_chs = out_chs
        if config.pool == "max3":
            self.add_module("pool", nn.MaxPool2d(3, stride=2, padding=1))
        elif config.pool == "max2":
            self.add_module("pool", nn.MaxPool2d(2, stride=2))

    def forward_level(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """The map before the pool, and the output."""
        level_NCHW = x_NCHW
        for name, part in self.named_children():
            x_NCHW = part(x_NCHW)
            level_NCHW = level_NCHW if name == "pool" else x_NCHW
        return level_NCHW, x_NCHW


def _conv_down(config: StageConfig, in_chs: int, out_chs: int, act: Act) -> nn.Module:
    if config.stride == 1 and config.kind != "dark":
        return nn.Identity()
    if config.avg_down:
        pool = nn.AvgPool2d(2) if config.stride == 2 else nn.Identity()
        return nn.Sequential(pool, ConvNormAct(in_chs, out_chs, 1, groups=config.groups, act=act))
    return ConvNormAct(in_chs, out_chs, 3, stride=config.stride, groups=config.groups, act=act)


def _blocks(config: StageConfig, in_chs: int, act: Act) -> nn.Sequential:
    out_chs = config.block_chs
    if out_chs != in_chs and (config.block_in_chs is None or in_chs > out_chs):
        raise ValueError(f"stage: blocks from {in_chs} to {out_chs} channels, expected them as wide as their input")
    blocks = []
    for _ in range(config.depth):
        block = BLOCKS[config.block](
            in_chs, out_chs, bottle_ratio=config.bottle_ratio, groups=config.groups, se_ratio=config.se_ratio, act=act
        )
        blocks.append(block)
        in_chs = out_chs
    return nn.Sequential(*blocks)


class CspStage(nn.Module):
    """Cross-stage partial stage with both transitions; the second half of the channels goes through the blocks."""

    def __init__(self, config: StageConfig, in_chs: int, act: Act) -> None:
        super().__init__()
        down_chs = config.out_chs if config.down_growth else in_chs
        cross_chs = config.cross_chs
        self.path_chs = [cross_chs, config.block_in_chs or cross_chs]
        self.conv_down = _conv_down(config, in_chs, down_chs, act)
        down_chs = down_chs if config.stride != 1 else in_chs
        self.conv_exp = ConvNormAct(down_chs, sum(self.path_chs), 1, act=None if config.cross_linear else act)
        self.blocks = _blocks(config, self.path_chs[1], act)
        self.conv_transition_b = ConvNormAct(config.block_chs, cross_chs, 1, act=act)
        self.conv_transition = ConvNormAct(2 * cross_chs, config.out_chs, 1, act=act)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        cross, block = self.conv_exp(self.conv_down(x_NCHW)).split(self.path_chs, dim=1)
        block = self.conv_transition_b(self.blocks(block))
        return self.conv_transition(torch.cat([cross, block], dim=1))


class Cs3Stage(nn.Module):
    """Cross-stage partial stage, fusion first (YOLOv5's C3); the first half of the channels goes through the blocks."""

    def __init__(self, config: StageConfig, in_chs: int, act: Act) -> None:
        super().__init__()
        down_chs = config.out_chs if config.down_growth else in_chs
        self.path_chs = [config.cross_chs, config.cross_chs]
        self.conv_down = _conv_down(config, in_chs, down_chs, act)
        down_chs = down_chs if config.stride != 1 else in_chs
        self.conv_exp = ConvNormAct(down_chs, sum(self.path_chs), 1, act=None if config.cross_linear else act)
        self.blocks = _blocks(config, self.path_chs[0], act)
        self.conv_transition = ConvNormAct(self.path_chs[1] + config.block_chs, config.out_chs, 1, act=act)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        block, cross = self.conv_exp(self.conv_down(x_NCHW)).split(self.path_chs, dim=1)
        return self.conv_transition(torch.cat([self.blocks(block), cross], dim=1))


class DarkStage(nn.Module):
    """A plain Darknet stage: down-sample, then blocks over all channels."""

    def __init__(self, config: StageConfig, in_chs: int, act: Act) -> None:
        super().__init__()
        self.conv_down = _conv_down(config, in_chs, config.out_chs, act)
        self.blocks = _blocks(config, config.out_chs, act)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.blocks(self.conv_down(x_NCHW))


STAGES: dict[str, type[CspStage] | type[Cs3Stage] | type[DarkStage]] = {
    "csp": CspStage,
    "cs3": Cs3Stage,
    "dark": DarkStage,
}


class ClassifierHead(nn.Module):
    """Global average pooling and one linear layer."""

    def __init__(self, in_chs: int, num_classes: int) -> None:
        super().__init__()
        self.fc = make_classifier(in_chs, num_classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.fc(global_mean(x_NCHW))


def _levels(config: CspNetConfig) -> dict[int, FeatureLevel]:
    """Levels by the index of their map: 0 the stem before its pool, then the stages; of one stride, the last."""
    stem = config.stem
    levels = [FeatureLevel(stem.stride if stem.pool == "none" else stem.stride // 2, stem.out_chs[-1])]
    stride: int = stem.stride
    for stage in config.stages:
        stride *= stage.stride
        levels.append(FeatureLevel(stride, stage.out_chs))
    last_of_stride = {level.stride: i for i, level in enumerate(levels)}
    return {i: levels[i] for i in last_of_stride.values()}


def level_strides(config: CspNetConfig) -> list[int]:
    """Strides of the network's `feature_levels`, finest first."""
    return [level.stride for level in _levels(config).values()]


class CspNet(nn.Module):
    """`[N, 3, H, W]` float to logits `[N, num_classes]`.

    `feature_levels` are the stem, before its pool, and the stages. Convolutions start from He's normal distribution,
    batch norms from identity.
    """

    def __init__(self, config: CspNetConfig, *, num_classes: int) -> None:
        super().__init__()
        act = make_activation(config.activation, config.leaky_slope)
        self.config = config
        self.stem = Stem(config.stem, act)
        in_chs = config.stem.out_chs[-1]
        stages = []
        for stage in config.stages:
            stages.append(STAGES[stage.kind](stage, in_chs, act))
            in_chs = stage.out_chs
        self.stages = nn.Sequential(*stages)
        self.head = ClassifierHead(in_chs, num_classes)
        levels = _levels(config)
        self.feature_levels = tuple(levels.values())
        self._level_maps = tuple(levels)

    def zero_init_residual(self) -> None:
        """Start every residual block as an identity, which makes deep networks easier to train from nothing."""
        for module in self.modules():
            if isinstance(module, (DarkBlock, BottleBlock, EdgeBlock)):
                nn.init.zeros_(module.last_norm.weight)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x_NCHW)))

    def forward_features(self, x_NCHW: Tensor) -> tuple[Tensor, ...]:
        """One map `[N, num_chs, H / stride, W / stride]` for each of `feature_levels`, finest first."""
        level_NCHW, x_NCHW = self.stem.forward_level(x_NCHW)
        maps = [level_NCHW]
        for stage in self.stages:
            x_NCHW = stage(x_NCHW)
            maps.append(x_NCHW)
        return tuple(maps[i] for i in self._level_maps)
