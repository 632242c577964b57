"""Rows of the registry: the networks that CSP networks are compared with.

Sources: timm's `CspNet` for the Darknets (Apache-2.0), torchvision for ResNet, ResNeXt and DenseNet (BSD-3-Clause),
the authors' PyTorch code for PeleeNet. Their state dicts load into these.
"""

from __future__ import annotations

from cspdeploy.nets.cspnet import CspNetConfig, StemConfig
from cspdeploy.nets.densenet import DenseNetConfig
from cspdeploy.nets.network import Network, imagenet_contract, imagenet_network
from cspdeploy.nets.resnet import ResNetConfig
from cspdeploy.nets.zoo_csp import PYTORCH_SLOPE, stages

__all__ = ["BASELINE_NETWORKS", "DENSENET_DEPTHS", "PELEENET", "TORCHVISION_CONTRACT", "densenet"]

TORCHVISION_CONTRACT = imagenet_contract(224, crop_pct=0.875)  # shorter side to 256 px, centre of 224 px

DENSENET_DEPTHS: dict[str, tuple[int, ...]] = {
    "121": (6, 12, 24, 16),
    "169": (6, 12, 32, 32),
    "201": (6, 12, 48, 32),
}

PELEENET = DenseNetConfig(
    style="peleenet", stem_chs=32, growth=32, depths=(3, 4, 8, 6), bottleneck=(1, 2, 4, 4), compression=1.0,
    gamma=0.0, fusion="both",
)  # fmt: skip


def densenet(depths: tuple[int, ...]) -> DenseNetConfig:
    """The plain DenseNet-BC of growth 32."""
    return DenseNetConfig(
        style="densenet", stem_chs=64, growth=32, depths=depths, bottleneck=(4,) * len(depths), compression=0.5,
        gamma=0.0, fusion="both",
    )  # fmt: skip


def _darknet(depth: tuple[int, ...], *, avg_down: bool = False, se_ratio: float = 0.0) -> CspNetConfig:
    return CspNetConfig(
        stem=StemConfig(out_chs=(32,), kernel=3, stride=1, pool="none", padding=None),
        stages=stages(
            depth=depth, out_chs=(64, 128, 256, 512, 1024), stride=2, kind="dark", block="dark", groups=1,
            expand_ratio=1.0, block_ratio=1.0, bottle_ratio=0.5, cross_linear=False, down_growth=False,
            avg_down=avg_down, se_ratio=se_ratio,
        ),
        activation="leaky_relu",
        leaky_slope=PYTORCH_SLOPE,
    )  # fmt: skip


def _dark_row(name: str, config: CspNetConfig, summary: str, *, baseline: str = "") -> Network:
    contract = imagenet_contract(crop_pct=0.887)
    return imagenet_network(
        name, "cspnet", config, kind="baseline", summary=summary, contract=contract, baseline=baseline
    )


def _resnet_row(name: str, config: ResNetConfig, summary: str) -> Network:
    return imagenet_network(name, "resnet", config, kind="baseline", summary=summary, contract=TORCHVISION_CONTRACT)


def _dense_row(name: str, config: DenseNetConfig, summary: str) -> Network:
    return imagenet_network(name, "densenet", config, kind="baseline", summary=summary, contract=TORCHVISION_CONTRACT)


BASELINE_NETWORKS: tuple[Network, ...] = (
    _dark_row("darknet17", _darknet((1, 1, 1, 1, 1)), "Darknet of 17 layers"),
    _dark_row("darknet21", _darknet((1, 1, 1, 2, 2)), "Darknet of 21 layers"),
    _dark_row(
        "sedarknet21",
        _darknet((1, 1, 1, 2, 2), se_ratio=1 / 16),
        "Darknet of 21 layers with squeeze and excitation",
        baseline="darknet21",
    ),
    _dark_row("darknet53", _darknet((1, 2, 8, 8, 4)), "Darknet53, the backbone of YOLOv3"),
    _dark_row(
        "darknetaa53",
        _darknet((1, 2, 8, 8, 4), avg_down=True),
        "Darknet53 that shrinks its maps by their mean",
        baseline="darknet53",
    ),
    _resnet_row("resnet50", ResNetConfig(depths=(3, 4, 6, 3), groups=1, group_width=64), "ResNet-50"),
    _resnet_row("resnext50_32x4d", ResNetConfig(depths=(3, 4, 6, 3), groups=32, group_width=4), "ResNeXt-50, 32x4d"),
    *(_dense_row(f"densenet{size}", densenet(depths), f"DenseNet-{size}") for size, depths in DENSENET_DEPTHS.items()),
    _dense_row("peleenet", PELEENET, "PeleeNet, a DenseNet for mobile devices"),
)
