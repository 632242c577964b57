"""DenseNet and PeleeNet, and their cross-stage partial forms: CSPDenseNet and CSPPeleeNet.

Papers: DenseNet 1608.06993, PeleeNet 1804.06882, CSPNet 1911.11929 (sections 3.1, 3.2 and 4.2). In a dense block each
layer adds `growth` channels to all that came before it; a transition mixes them with a 1x1 convolution.

    densenet  layers norm-relu-conv 1x1, 3x3; transition norm-relu-conv to `compression` of the channels, mean pool
    peleenet  layers of two ways, conv-norm-relu, the second with two 3x3; transition of unchanged width, mean pool

State dict, where gamma is 0: the published layouts, key for key, of torchvision's DenseNet and of the PeleeNet of its
authors (Robert-JunWang/PeleeNet, peleenet.py; its dropout before the classifier is left out).

The partial forms send the share `gamma` of a stage's input around the dense block, and differ in where they join:

    both   [around | dense block -> transition_b] -> pool -> transition     the paper's CSP
    first  [around | dense block]                 -> pool -> transition
    last   [around | dense block -> transition_b] -> pool

The paper's own layer lists of CSPDenseNet and CSPPeleeNet are unpublished: what follows is a reading, not a copy.
Ours are: (1) a stage ends with as many channels as that of the plain network, so that only the fusion differs;
(2) transition_b compresses as the plain network's transition does, except in "last", where it restores that width;
(3) the pool comes before the last transition, which so works on the next stage's map; in a densenet, where only the
convolution stands between, that is the same function as pooling after it; (4) the first channels go around.
Multiply-accumulates at 224 px relative to the plain network, ours and in brackets the paper's:

    gamma          0.5                                                     0.25
                   both          last          first                       both        last
    PeleeNet       -12 % (-13)   -25 % (-21)   -33 % (-26)                 -0 % (-3)   -13 % (-11)
    DenseNet-201   -10 %         -12 %         -18 %     (both -19 with Elastic, which this is not)

CSPPeleeNet has 2.84 million weights of convolutions and classifier and 0.892 BFLOP, where the paper has 2.83 million
and 0.888. The weights speak for (1) and (2), the BFLOP for (3): with the pool after the last transition it would be
1.123 BFLOP, more than PeleeNet's 1.016. What (3) saves, then, is no merit of the split: PeleeNet could have it too.
Nor is half of what CSPDenseNet-201 saves: with the pool after it, as in DenseNet-201, -5 % for "both" and -9 % for
"first". The rows of `compare --paper` say so (`cspdeploy.pipeline.claims`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
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

__all__ = ["DenseNet", "DenseNetConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseNetConfig:
    """A whole network without its head size. No field has a default: each one names the architecture."""

    style: Literal["densenet", "peleenet"]
    """Which stem, layers and transitions, see the top of this file."""
    stem_chs: int
    growth: int
    """Channels that a layer adds."""
    depths: tuple[int, ...]
    """Layers of each dense block."""
    bottleneck: tuple[int, ...]
    """Width of a layer's 1x1 convolution, for each block, as a multiple of the channels its 3x3 convolution gives."""
    compression: float
    """Share of the channels that a transition leaves."""
    gamma: float
    """Share of a stage's input that goes around its dense block; 0: the plain network."""
    fusion: Literal["both", "first", "last"]
    """Which transitions a partial stage has, see the top of this file; of no effect where gamma is 0."""

    def __post_init__(self) -> None:
        require_range("stem_chs", self.stem_chs, 2, MAX_CHS)
        require_range("growth", self.growth, 2, MAX_CHS)
        require_range("stages", len(self.depths), 1, 8)  # each one halves the map
        for depth in self.depths:
            require_range("depth", depth, 1, MAX_DEPTH)
        for width in self.bottleneck:
            require_range("bottleneck", width, 1, MAX_CHS // self.growth)
        require_range("compression", self.compression, 0.0, 1.0)
        require_range("gamma", self.gamma, 0.0, 1.0)
        if len(self.bottleneck) != len(self.depths):
            raise ValueError(f"bottleneck: got {len(self.bottleneck)} items, expected one for each of the depths")
        if self.style == "peleenet" and (self.growth % 2 or self.stem_chs % 2):
            raise ValueError(f"growth, stem_chs: got {self.growth}, {self.stem_chs}, expected even for two ways")


class DenseLayer(nn.Module):
    """norm, ReLU, 1x1, norm, ReLU, 3x3; the result is joined to the input."""

    def __init__(self, in_chs: int, *, growth: int, bottleneck: int) -> None:
        super().__init__()
        mid_chs = growth * bottleneck
        self.norm1 = nn.BatchNorm2d(in_chs)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = Conv2d(in_chs, mid_chs, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(mid_chs)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = Conv2d(mid_chs, growth, 3, padding=1, bias=False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        y_NCHW = self.conv1(self.relu1(self.norm1(x_NCHW)))
        return torch.cat([x_NCHW, self.conv2(self.relu2(self.norm2(y_NCHW)))], dim=1)


class ConvNormRelu(nn.Module):
    """Convolution without bias, batch norm, ReLU; padding keeps the size of the map at stride 1."""

    def __init__(self, in_chs: int, out_chs: int, kernel: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv = Conv2d(in_chs, out_chs, kernel, stride=stride, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(out_chs)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.relu(self.norm(self.conv(x_NCHW)))


class TwoWayLayer(nn.Module):
    """1x1 and one 3x3 beside 1x1 and two 3x3, each for half of the growth; both are joined to the input."""

    def __init__(self, in_chs: int, *, growth: int, bottleneck: int) -> None:
        super().__init__()
        half = growth // 2
        mid_chs = half * bottleneck
        self.branch1a = ConvNormRelu(in_chs, mid_chs, 1)
        self.branch1b = ConvNormRelu(mid_chs, half, 3)
        self.branch2a = ConvNormRelu(in_chs, mid_chs, 1)
        self.branch2b = ConvNormRelu(mid_chs, half, 3)
        self.branch2c = ConvNormRelu(half, half, 3)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        first = self.branch1b(self.branch1a(x_NCHW))
        second = self.branch2c(self.branch2b(self.branch2a(x_NCHW)))
        return torch.cat([x_NCHW, first, second], dim=1)


class DenseBlock(nn.Sequential):
    """`denselayer1`..`denselayerN`."""

    def __init__(self, config: DenseNetConfig, stage: int, in_chs: int) -> None:
        super().__init__()
        layer: type[DenseLayer] | type[TwoWayLayer] = DenseLayer if config.style == "densenet" else TwoWayLayer
        for i in range(config.depths[stage]):
            layer_in = in_chs + i * config.growth
            self.add_module(
                f"denselayer{i + 1}", layer(layer_in, growth=config.growth, bottleneck=config.bottleneck[stage])
            )


class StemBlock(nn.Module):
    """PeleeNet's stem: a strided 3x3, then a 2x2 maximum beside a strided bottleneck, joined and mixed."""

    def __init__(self, out_chs: int) -> None:
        super().__init__()
        self.stem1 = ConvNormRelu(3, out_chs, 3, stride=2)
        self.stem2a = ConvNormRelu(out_chs, out_chs // 2, 1)
        self.stem2b = ConvNormRelu(out_chs // 2, out_chs, 3, stride=2)
        self.stem3 = ConvNormRelu(2 * out_chs, out_chs, 1)
        self.pool = nn.MaxPool2d(2, stride=2)

    def forward(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """The map of stride 2, and the output."""
        level_NCHW = self.stem1(x_NCHW)
        branch_NCHW = self.stem2b(self.stem2a(level_NCHW))
        return level_NCHW, self.stem3(torch.cat([self.pool(level_NCHW), branch_NCHW], dim=1))


class DenseTransition(nn.Sequential):
    """norm, ReLU, 1x1 convolution, with a 2x2 mean before or after the convolution."""

    def __init__(self, in_chs: int, out_chs: int, *, pool: Literal["none", "before", "after"]) -> None:
        super().__init__()
        self.add_module("norm", nn.BatchNorm2d(in_chs))
        self.add_module("relu", nn.ReLU(inplace=True))
        if pool == "before":
            self.add_module("pool", nn.AvgPool2d(2))
        self.add_module("conv", Conv2d(in_chs, out_chs, 1, bias=False))
        if pool == "after":
            self.add_module("pool", nn.AvgPool2d(2))


@dataclass(frozen=True, slots=True, kw_only=True)
class StageWidths:
    """Channels along one stage."""

    around: int
    """Past the dense block; 0 in the plain network."""
    dense_in: int
    dense_out: int
    transition_b: int | None
    """After transition_b; None: the stage has none."""
    transition: int | None
    """After the last transition; None: the stage has none."""

    @property
    def joined(self) -> int:
        """Where both parts are together again."""
        return self.around + (self.dense_out if self.transition_b is None else self.transition_b)

    @property
    def out(self) -> int:
        """At the end of the stage."""
        return self.joined if self.transition is None else self.transition


def stage_widths(config: DenseNetConfig, stage: int, in_chs: int) -> StageWidths:
    """Channels along stage `stage`, counted from 0, for an input of `in_chs`.

    Raises:
        ValueError: a part would have no channels, or too many.
    """
    around = int(in_chs * config.gamma)
    dense_out = in_chs - around + config.depths[stage] * config.growth
    transition_b: int | None = None
    transition: int | None = None
    # The last stage of a densenet ends with a norm: there is no transition that could be partial.
    if stage < len(config.depths) - 1 or config.style == "peleenet":
        transition = int((around + dense_out) * config.compression)
        if around and config.fusion == "both":
            transition_b = int(dense_out * config.compression)
        elif around and config.fusion == "last":
            transition_b, transition = transition - around, None
    widths = StageWidths(
        around=around, dense_in=in_chs - around, dense_out=dense_out, transition_b=transition_b, transition=transition
    )
    for value in (widths.dense_in, widths.joined, transition_b, transition):
        if value is not None:
            require_range(f"channels in stage {stage + 1}", value, 1, MAX_CHS)
    return widths


def _narrow(config: DenseNetConfig, in_chs: int, out_chs: int) -> nn.Module:
    if config.style == "peleenet":
        return ConvNormRelu(in_chs, out_chs, 1)
    return DenseTransition(in_chs, out_chs, pool="none")


def _tail(config: DenseNetConfig, stage: int, widths: StageWidths) -> dict[str, nn.Module]:
    """What comes after a stage's parts are joined, by its name in the state dict."""
    number, is_last = stage + 1, stage == len(config.depths) - 1
    pool: dict[str, nn.Module] = {} if is_last else {f"transition{number}_pool": nn.AvgPool2d(2)}
    if config.style == "densenet" and is_last:
        return {f"norm{number + 1}": nn.BatchNorm2d(widths.joined), f"relu{number + 1}": nn.ReLU(inplace=True)}
    if widths.transition is None:
        return pool
    if config.style == "densenet":
        where: Literal["before", "after"] = "before" if widths.around else "after"
        return {f"transition{number}": DenseTransition(widths.joined, widths.transition, pool=where)}
    transition: dict[str, nn.Module] = {f"transition{number}": ConvNormRelu(widths.joined, widths.transition, 1)}
    return {**pool, **transition} if widths.around else {**transition, **pool}


class DenseNet(nn.Module):
    """`[N, 3, H, W]` float to logits `[N, num_classes]`.

    `feature_levels` are the stem at stride 2, the stages where their parts are joined, and, as the last one, what the
    classifier sees. Convolutions start from He's normal distribution (fan out), batch norms from identity.
    """

    def __init__(self, config: DenseNetConfig, *, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.features = nn.ModuleDict()
        self._add_stem()
        self._widths: list[StageWidths] = []
        self._tails: list[tuple[str, ...]] = []
        levels = [FeatureLevel(2, config.stem_chs)]
        chs = config.stem_chs
        last = len(config.depths) - 1
        for i in range(last + 1):
            widths = stage_widths(config, i, chs)
            self._add_stage(i, widths)
            chs = widths.out
            levels.append(FeatureLevel(4 * 2**i, chs if i == last else widths.joined))
        self.classifier = make_classifier(chs, num_classes)
        self.feature_levels = tuple(levels)

    def _add_stem(self) -> None:
        chs = self.config.stem_chs
        if self.config.style == "peleenet":
            self.features["stemblock"] = StemBlock(chs)
            return
        self.features["conv0"] = Conv2d(3, chs, 7, stride=2, padding=3, bias=False)
        self.features["norm0"] = nn.BatchNorm2d(chs)
        self.features["relu0"] = nn.ReLU(inplace=True)
        self.features["pool0"] = nn.MaxPool2d(3, stride=2, padding=1)

    def _add_stage(self, i: int, widths: StageWidths) -> None:
        self.features[f"denseblock{i + 1}"] = DenseBlock(self.config, i, widths.dense_in)
        if widths.transition_b is not None:
            self.features[f"transition{i + 1}_b"] = _narrow(self.config, widths.dense_out, widths.transition_b)
        tail = _tail(self.config, i, widths)
        self.features.update(tail)
        self._widths.append(widths)
        self._tails.append(tuple(tail))

    def _stem(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        parts = self.features
        if self.config.style == "peleenet":
            return parts["stemblock"](x_NCHW)
        level_NCHW = parts["relu0"](parts["norm0"](parts["conv0"](x_NCHW)))
        return level_NCHW, parts["pool0"](level_NCHW)

    def _joined(self, i: int, x_NCHW: Tensor) -> Tensor:
        widths = self._widths[i]
        block = self.features[f"denseblock{i + 1}"]
        if not widths.around:
            return block(x_NCHW)
        around_NCHW, dense_NCHW = x_NCHW.split([widths.around, widths.dense_in], dim=1)
        dense_NCHW = block(dense_NCHW)
        if widths.transition_b is not None:
            dense_NCHW = self.features[f"transition{i + 1}_b"](dense_NCHW)
        return torch.cat([around_NCHW, dense_NCHW], dim=1)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.classifier(global_mean(self.forward_features(x_NCHW)[-1]))

    def forward_features(self, x_NCHW: Tensor) -> tuple[Tensor, ...]:
        """One map `[N, num_chs, H / stride, W / stride]` for each of `feature_levels`, finest first."""
        level_NCHW, x_NCHW = self._stem(x_NCHW)
        maps = [level_NCHW]
        for i, tail in enumerate(self._tails):
            x_NCHW = self._joined(i, x_NCHW)
            maps.append(x_NCHW)
            for name in tail:
                x_NCHW = self.features[name](x_NCHW)
        maps[-1] = x_NCHW
        return tuple(maps)
