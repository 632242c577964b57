"""A segmenter: a feature pyramid over any backbone of this package, and the logits of every pixel.

Papers: feature pyramid 1612.03144; its use for segmentation, panoptic feature pyramids, 1901.02446, section 3.

Shapes: N images, C classes, H and W of the input, multiples of the coarsest stride.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from cspdeploy.core.spec import NetworkSpec
from cspdeploy.nets.blocks import MAX_CHS, Conv2d, ConvNormAct, FeatureLevel, make_activation, require_range
from cspdeploy.nets.families import make_backbone

__all__ = ["PYRAMID_STRIDES", "FpnConfig", "FpnSegmenter"]

PYRAMID_STRIDES = (4, 8, 16, 32)
"""Of the levels that are joined, as far as the backbone has them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FpnConfig:
    """A whole segmenter without its classes. No field has a default: each one names the architecture."""

    backbone: NetworkSpec
    """A classifier, of which the feature maps are taken."""
    width: int
    """Channels of every level of the pyramid."""

    def __post_init__(self) -> None:
        require_range("width", self.width, 1, MAX_CHS)


class FpnSegmenter(nn.Module):
    """`[N, 3, H, W]` to logits `[N, C, H, W]`.

    Every level gets `width` channels by a 1x1 and the level above it, doubled, added on; then a 3x3. All levels are
    brought to the finest by bilinear interpolation, added, and classified by a 1x1, whose logits are interpolated to
    the input's size.

    Args:
        config: the architecture.
        num_classes: C.

    Raises:
        ValueError: the backbone has fewer than two of `PYRAMID_STRIDES`, or they do not double from one to the next.
    """

    def __init__(self, config: FpnConfig, *, num_classes: int) -> None:
        super().__init__()
        self.backbone = make_backbone(config.backbone)
        levels = self.feature_levels
        self._indices = _pyramid(levels)
        self.finest_stride = levels[self._indices[0]].stride
        act = make_activation("relu", 0.0)
        width = config.width
        self.laterals = nn.ModuleList(Conv2d(levels[i].num_chs, width, 1, bias=True) for i in self._indices)
        self.outs = nn.ModuleList(ConvNormAct(width, width, 3, act=act) for _ in self._indices)
        self.classify = Conv2d(width, num_classes, 1, bias=True)

    @staticmethod
    def check(config: FpnConfig) -> None:
        """Whether such a segmenter can be built, without the memory that one takes.

        Raises:
            ValueError: as the constructor.
        """
        with torch.device("meta"):
            _pyramid(make_backbone(config.backbone).feature_levels)  # type: ignore[arg-type]

    @property
    def feature_levels(self) -> tuple[FeatureLevel, ...]:
        """Of the backbone."""
        return self.backbone.feature_levels  # type: ignore[return-value]

    def forward_features(self, x_NCHW: Tensor) -> tuple[Tensor, ...]:
        """Maps of the backbone, one for each of `feature_levels`."""
        return self.backbone.forward_features(x_NCHW)  # type: ignore[operator]

    def forward(self, x_NCHW: Tensor) -> Tensor:
        features = self.forward_features(x_NCHW)
        above: Tensor | None = None
        levels = []
        for index, lateral, out in list(zip(self._indices, self.laterals, self.outs, strict=True))[::-1]:
            level = lateral(features[index])
            if above is not None:
                level = level + functional.interpolate(above, scale_factor=2.0, mode="nearest")
            above = level
            levels.append(out(level))
        joined: Tensor = levels[-1]  # the finest
        for octaves, level in enumerate(reversed(levels[:-1]), 1):
            joined = joined + _enlarge(level, 2**octaves)
        return _enlarge(self.classify(joined), self.finest_stride)


def _pyramid(levels: tuple[FeatureLevel, ...]) -> tuple[int, ...]:
    """Indices of the levels that are joined, finest first."""
    indices = tuple(i for i, level in enumerate(levels) if level.stride in PYRAMID_STRIDES)
    strides = [levels[i].stride for i in indices]
    if len(strides) < 2 or any(coarse != 2 * fine for fine, coarse in itertools.pairwise(strides)):
        raise ValueError(f"backbone: has feature maps of strides {strides}, expected two or more, each twice the last")
    return indices


def _enlarge(x_NCHW: Tensor, factor: int) -> Tensor:
    return functional.interpolate(x_NCHW, scale_factor=float(factor), mode="bilinear", align_corners=False)
