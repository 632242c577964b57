"""YOLOv4: detectors with three forms of neck, over any backbone of this package.

    panet   SPP, then 1x1 and 3x3 convolutions in turn, top-down and bottom-up         yolov4
    csp     the same with cross-stage partial blocks, also around the SPP                    yolov4-csp
    tiny    top-down only, two heads, the coarse one first                                    yolov4-tiny

Layer for layer the published networks: activations, the order in which maps are joined, the order of the heads. Papers:
YOLOv4 2004.10934, Scaled-YOLOv4 2011.08036. Reference: the cfgs of AlexeyAB/darknet, whose weights load into these
(`cspdeploy.nets.darknet.detector_form` says which convolution is which).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from cspdeploy.core.spec import NetworkSpec
from cspdeploy.nets.blocks import MAX_CHS, Act, Conv2d, ConvNormAct, FeatureLevel, make_activation, require_range
from cspdeploy.nets.families import make_backbone

__all__ = ["NECK_STRIDES", "SPP_SIZES", "YoloV4", "YoloV4Config", "head_name"]

NECK_STRIDES: dict[str, tuple[int, ...]] = {"panet": (8, 16, 32), "csp": (8, 16, 32), "tiny": (32, 16)}
"""Strides of the heads, in the order of the network's outputs."""
SPP_SIZES = (13, 9, 5)
"""Windows of the pools, in the order in which they are joined, before the map itself."""
MAX_ANCHORS = 256


def head_name(stride: int) -> str:
    """Name of the raw map of a head, as `DarknetNet` has it."""
    return f"head_s{stride}"


@dataclass(frozen=True, slots=True, kw_only=True)
class YoloV4Config:
    """A whole detector without its classes. No field has a default: each one names the architecture."""

    backbone: NetworkSpec
    """A classifier, of which the feature maps are taken."""
    neck: Literal["panet", "csp", "tiny"]
    width: int
    """Channels of the neck at stride 32; half of them at 16, a quarter at 8."""
    activation: Literal["leaky_relu", "relu", "silu", "mish"]
    """Of the neck; the backbone has its own."""
    leaky_slope: float
    num_anchors: int
    """Of each head."""
    new_coords: bool
    """Whether the heads end in a sigmoid: Scaled-YOLOv4's form of coordinates."""

    def __post_init__(self) -> None:
        require_range("width", self.width, 4, MAX_CHS // 2)
        require_range("leaky_slope", self.leaky_slope, 0.0, 1.0)
        require_range("num_anchors", self.num_anchors, 1, MAX_ANCHORS)
        if self.width % 4:
            raise ValueError(f"width: got {self.width}, expected a multiple of 4, for stride 8 has a quarter of it")


class SpatialPyramid(nn.Module):
    """Pools of 13, 9 and 5 at stride 1, and the map itself, joined in this order: `[N, 4 * C, H, W]`.

    The wider ones are made of the narrower: two pools of 5 are one of 9, three are one of 13, value for value, as no
    padding wins a maximum. That is 75 comparisons for each value instead of 275.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(SPP_SIZES[-1], stride=1, padding=SPP_SIZES[-1] // 2)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        pool5 = self.pool(x_NCHW)
        pool9 = self.pool(pool5)
        return torch.cat([self.pool(pool9), pool9, pool5, x_NCHW], dim=1)


class PyramidBlock(nn.Module):
    """1x1, 3x3, 1x1, SPP, 1x1, 3x3, 1x1."""

    def __init__(self, in_chs: int, chs: int, act: Act) -> None:
        super().__init__()
        self.conv1 = ConvNormAct(in_chs, chs, 1, act=act)
        self.conv2 = ConvNormAct(chs, 2 * chs, 3, act=act)
        self.conv3 = ConvNormAct(2 * chs, chs, 1, act=act)
        self.spp = SpatialPyramid()
        self.conv4 = ConvNormAct(4 * chs, chs, 1, act=act)
        self.conv5 = ConvNormAct(chs, 2 * chs, 3, act=act)
        self.conv6 = ConvNormAct(2 * chs, chs, 1, act=act)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        pooled = self.spp(self.conv3(self.conv2(self.conv1(x_NCHW))))
        return self.conv6(self.conv5(self.conv4(pooled)))


class CspPyramidBlock(nn.Module):
    """A cross path of 1x1 beside 1x1, 3x3, 1x1, SPP, 1x1, 3x3; joined as [block, cross] and mixed by a 1x1."""

    def __init__(self, in_chs: int, chs: int, act: Act) -> None:
        super().__init__()
        self.cross = ConvNormAct(in_chs, chs, 1, act=act)
        self.conv1 = ConvNormAct(in_chs, chs, 1, act=act)
        self.conv2 = ConvNormAct(chs, chs, 3, act=act)
        self.conv3 = ConvNormAct(chs, chs, 1, act=act)
        self.spp = SpatialPyramid()
        self.conv4 = ConvNormAct(4 * chs, chs, 1, act=act)
        self.conv5 = ConvNormAct(chs, chs, 3, act=act)
        self.conv6 = ConvNormAct(2 * chs, chs, 1, act=act)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        pooled = self.spp(self.conv3(self.conv2(self.conv1(x_NCHW))))
        return self.conv6(torch.cat([self.conv5(self.conv4(pooled)), self.cross(x_NCHW)], dim=1))


class PathBlock(nn.Sequential):
    """1x1 to `chs` and 3x3 to twice as many in turn, five convolutions: `conv1`..`conv5`."""

    def __init__(self, in_chs: int, chs: int, act: Act) -> None:
        super().__init__()
        widths = (in_chs, chs, 2 * chs, chs, 2 * chs, chs)
        for i in range(5):
            kernel = 3 if i % 2 else 1
            self.add_module(f"conv{i + 1}", ConvNormAct(widths[i], widths[i + 1], kernel, act=act))


class CspPathBlock(nn.Module):
    """1x1 to `chs`; a cross path of 1x1 beside 1x1, 3x3, 1x1, 3x3 without shortcuts; [block, cross], mixed by a 1x1."""

    def __init__(self, in_chs: int, chs: int, act: Act) -> None:
        super().__init__()
        self.conv1 = ConvNormAct(in_chs, chs, 1, act=act)
        self.cross = ConvNormAct(chs, chs, 1, act=act)
        self.conv2 = ConvNormAct(chs, chs, 1, act=act)
        self.conv3 = ConvNormAct(chs, chs, 3, act=act)
        self.conv4 = ConvNormAct(chs, chs, 1, act=act)
        self.conv5 = ConvNormAct(chs, chs, 3, act=act)
        self.conv6 = ConvNormAct(2 * chs, chs, 1, act=act)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x_NCHW = self.conv1(x_NCHW)
        block = self.conv5(self.conv4(self.conv3(self.conv2(x_NCHW))))
        return self.conv6(torch.cat([block, self.cross(x_NCHW)], dim=1))


class TopDown(nn.Module):
    """From a coarse map to the next finer one: [1x1 of the fine map, 1x1 of the coarse one twice as large], block."""

    def __init__(
        self, coarse_chs: int, fine_chs: int, chs: int, act: Act, block: type[PathBlock] | type[CspPathBlock]
    ) -> None:
        super().__init__()
        self.reduce = ConvNormAct(coarse_chs, chs, 1, act=act)
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.lateral = ConvNormAct(fine_chs, chs, 1, act=act)
        self.block = block(2 * chs, chs, act)

    def forward(self, coarse_NCHW: Tensor, fine_NCHW: Tensor) -> Tensor:
        up_NCHW = self.upsample(self.reduce(coarse_NCHW))
        return self.block(torch.cat([self.lateral(fine_NCHW), up_NCHW], dim=1))


class BottomUp(nn.Module):
    """From a fine map to the next coarser one: [strided 3x3 of the fine map, the coarse map], block."""

    def __init__(self, chs: int, act: Act, block: type[PathBlock] | type[CspPathBlock]) -> None:
        super().__init__()
        self.shrink = ConvNormAct(chs // 2, chs, 3, stride=2, act=act)
        self.block = block(2 * chs, chs, act)

    def forward(self, fine_NCHW: Tensor, coarse_NCHW: Tensor) -> Tensor:
        return self.block(torch.cat([self.shrink(fine_NCHW), coarse_NCHW], dim=1))


class PathAggregation(nn.Module):
    """SPP on the coarsest map, a top-down path to stride 8 and a bottom-up one back: maps for the heads 8, 16, 32."""

    def __init__(self, config: YoloV4Config, level_chs: dict[int, int], act: Act) -> None:
        super().__init__()
        width, csp = config.width, config.neck == "csp"
        block = CspPathBlock if csp else PathBlock
        self.pyramid = (CspPyramidBlock if csp else PyramidBlock)(level_chs[32], width, act)
        self.top_down16 = TopDown(width, level_chs[16], width // 2, act, block)
        self.top_down8 = TopDown(width // 2, level_chs[8], width // 4, act, block)
        self.bottom_up16 = BottomUp(width // 2, act, block)
        self.bottom_up32 = BottomUp(width, act, block)
        self.head_chs = ((width // 4, width // 2), (width // 2, width), (width, 2 * width))

    def forward(self, maps: dict[int, Tensor]) -> tuple[Tensor, ...]:
        p32 = self.pyramid(maps[32])
        p16 = self.top_down16(p32, maps[16])
        p8 = self.top_down8(p16, maps[8])
        n16 = self.bottom_up16(p8, p16)
        return p8, n16, self.bottom_up32(n16, p32)


class TinyNeck(nn.Module):
    """1x1 on the coarsest map; of that a 1x1, twice as large, joined with the map of stride 16: the heads 32, 16."""

    def __init__(self, config: YoloV4Config, level_chs: dict[int, int], act: Act) -> None:
        super().__init__()
        width = config.width
        self.conv1 = ConvNormAct(level_chs[32], width, 1, act=act)
        self.reduce = ConvNormAct(width, width // 2, 1, act=act)
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.head_chs = ((width, 2 * width), (width // 2 + level_chs[16], width))

    def forward(self, maps: dict[int, Tensor]) -> tuple[Tensor, ...]:
        coarse = self.conv1(maps[32])
        return coarse, torch.cat([self.upsample(self.reduce(coarse)), maps[16]], dim=1)


class Head(nn.Module):
    """3x3, then a 1x1 with bias that gives the raw map; with `new_coords` through a sigmoid."""

    def __init__(self, in_chs: int, mid_chs: int, out_chs: int, *, act: Act, new_coords: bool) -> None:
        super().__init__()
        self.conv = ConvNormAct(in_chs, mid_chs, 3, act=act)
        self.pred = Conv2d(mid_chs, out_chs, 1)
        self.act = nn.Sigmoid() if new_coords else nn.Identity()

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.act(self.pred(self.conv(x_NCHW)))


class YoloV4(nn.Module):
    """`[N, 3, H, W]` float, H and W multiples of 32, to the raw map of each head, in the order of `output_names`.

    A map is `[N, num_anchors * (5 + num_classes), H / stride, W / stride]`, channels `[x, y, w, h, objectness,
    classes...]` for one anchor after the other. `feature_levels` and `forward_features` are those of the backbone.

    Raises:
        ValueError: the backbone has no map of a stride that the neck takes.
    """

    def __init__(self, config: YoloV4Config, *, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.backbone = make_backbone(config.backbone)
        self.feature_levels: tuple[FeatureLevel, ...] = self.backbone.feature_levels  # type: ignore[assignment]
        level_chs = {level.stride: level.num_chs for level in self.feature_levels}
        self.strides = NECK_STRIDES[config.neck]
        missing = sorted(set(self.strides) - set(level_chs))
        if missing:
            raise ValueError(f"backbone: no map of stride {missing}, it has {sorted(level_chs)}")
        act = make_activation(config.activation, config.leaky_slope)
        neck = TinyNeck if config.neck == "tiny" else PathAggregation
        self.neck = neck(config, level_chs, act)
        out_chs = config.num_anchors * (5 + num_classes)
        self.heads = nn.ModuleList(
            Head(in_chs, mid_chs, out_chs, act=act, new_coords=config.new_coords)
            for in_chs, mid_chs in self.neck.head_chs
        )

    @property
    def output_names(self) -> tuple[str, ...]:
        """`head_s8` and so on by stride."""
        return tuple(head_name(stride) for stride in self.strides)

    def forward(self, x_NCHW: Tensor) -> tuple[Tensor, ...]:
        features = self.forward_features(x_NCHW)
        maps = {level.stride: found for level, found in zip(self.feature_levels, features, strict=True)}
        return tuple(head(one) for head, one in zip(self.heads, self.neck(maps), strict=True))

    def forward_features(self, x_NCHW: Tensor) -> tuple[Tensor, ...]:
        """One map `[N, num_chs, H / stride, W / stride]` for each of `feature_levels`, finest first."""
        return self.backbone.forward_features(x_NCHW)  # type: ignore[operator]
