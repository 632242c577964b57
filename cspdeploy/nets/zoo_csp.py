"""Rows of the registry: the CSP classifiers of the family `cspnet`, in their PyTorch and their Darknet forms.

Sources: the configurations of timm's `CspNet` (Apache-2.0), whose checkpoints load into them, and the cfg files of
CrossStagePartialNetworks for the Darknet forms. Accuracy of the latter: README of that repository, at 256 px.
"""

from __future__ import annotations

from typing import Any, Literal

from cspdeploy.nets.cspnet import CspNetConfig, StageConfig, StemConfig
from cspdeploy.nets.network import (
    Network,
    PublishedAccuracy,
    darknet_contract,
    imagenet_contract,
    imagenet_network,
)

__all__ = ["CSDARKNET53_MISH", "CSP_NETWORKS", "DARKNET_SLOPE", "NO_SLOPE", "stages"]

PYTORCH_SLOPE = 0.01
DARKNET_SLOPE = 0.1
NO_SLOPE = 0.0  # silu and mish have none

DARKNET_README = "CrossStagePartialNetworks"


def stages(*, depth: tuple[int, ...], out_chs: tuple[int, ...], **fields: Any) -> tuple[StageConfig, ...]:
    """Stages from one value or one tuple for each field; a tuple shorter than `depth` goes on with its last value."""
    rows = []
    for i, (blocks, width) in enumerate(zip(depth, out_chs, strict=True)):
        row = {name: value[min(i, len(value) - 1)] if isinstance(value, tuple) else value
               for name, value in fields.items()}  # fmt: skip
        rows.append(StageConfig(depth=blocks, out_chs=width, **row))
    return tuple(rows)


def _cspres(
    stem: tuple[int, ...], out_chs: tuple[int, ...], *, expand: float, block: float, bottle: float, groups: int = 1
) -> CspNetConfig:
    """CSPResNet and CSPResNeXt as the PyTorch checkpoints have them."""
    return CspNetConfig(
        stem=StemConfig(out_chs=stem, kernel=7 if len(stem) == 1 else 3, stride=4, pool="max3", padding=None),
        stages=stages(
            depth=(3, 3, 5, 2), out_chs=out_chs, stride=(1, 2), kind="csp", block="bottle", groups=groups,
            expand_ratio=expand, block_ratio=block, bottle_ratio=bottle, cross_linear=True, down_growth=False,
            avg_down=False, se_ratio=0.0,
        ),
        activation="leaky_relu",
        leaky_slope=PYTORCH_SLOPE,
    )  # fmt: skip


def _csres_darknet(
    out_chs: tuple[int, ...], *, expand: float, block: float, bottle: float, groups: int,
    activation: Literal["leaky_relu", "mish"],
) -> CspNetConfig:  # fmt: skip
    """CSPResNet and CSPResNeXt as the official cfg files have them.

    2x2 pool, 64 channels into the first blocks, and a linear conv_exp in stages 2 and 3 alone.
    """
    return CspNetConfig(
        stem=StemConfig(out_chs=(64,), kernel=7, stride=4, pool="max2", padding=None),
        stages=stages(
            depth=(3, 3, 5, 2), out_chs=out_chs, stride=(1, 2), kind="csp", block="bottle", groups=groups,
            expand_ratio=expand, block_ratio=block, bottle_ratio=bottle, cross_linear=(False, True, True, False),
            down_growth=False, avg_down=False, se_ratio=0.0, block_in_chs=(64, None),
        ),
        activation=activation,
        leaky_slope=DARKNET_SLOPE if activation == "leaky_relu" else NO_SLOPE,
    )  # fmt: skip


def _cspdarknet(depth: tuple[int, ...], activation: Literal["leaky_relu", "mish"], slope: float) -> CspNetConfig:
    # The first stage is the exception: its paths are not halved and its block has a bottleneck.
    return CspNetConfig(
        stem=StemConfig(out_chs=(32,), kernel=3, stride=1, pool="none", padding=None),
        stages=stages(
            depth=depth, out_chs=(64, 128, 256, 512, 1024), stride=2, kind="csp", block="dark", groups=1,
            expand_ratio=(2.0, 1.0), block_ratio=(1.0, 0.5), bottle_ratio=(0.5, 1.0), cross_linear=False,
            down_growth=True, avg_down=False, se_ratio=0.0,
        ),
        activation=activation,
        leaky_slope=slope,
    )  # fmt: skip


# Stem, blocks of the stages, channels of the first stage. Depths of m and x are those of l times 0.67 and 1.33, cut
# down to whole numbers; widths are multiples of 8.
_CS3_SIZES: dict[str, tuple[tuple[int, int], tuple[int, ...], int]] = {
    "s": ((16, 32), (1, 3, 4, 1), 64),
    "m": ((24, 48), (2, 4, 6, 2), 96),
    "l": ((32, 64), (3, 6, 9, 3), 128),
    "x": ((40, 80), (3, 7, 11, 3), 160),
}


def _cs3(
    size: str, *, focus: bool = False, se_ratio: float = 0.0, block: Literal["dark", "edge"] = "dark"
) -> CspNetConfig:
    """Fusion first, SiLU. `focus`: one 6x6 convolution in place of the stem's two 3x3."""
    stem, depth, width = _CS3_SIZES[size]
    return CspNetConfig(
        stem=StemConfig(out_chs=stem[-1:], kernel=6, stride=2, pool="none", padding=2)
        if focus
        else StemConfig(out_chs=stem, kernel=3, stride=2, pool="none", padding=None),
        stages=stages(
            depth=depth, out_chs=(width, 2 * width, 4 * width, 8 * width), stride=2, kind="cs3", block=block, groups=1,
            expand_ratio=1.0, block_ratio=0.5, bottle_ratio=1.5 if block == "edge" else 1.0, cross_linear=False,
            down_growth=False, avg_down=False, se_ratio=se_ratio,
        ),
        activation="silu",
        leaky_slope=NO_SLOPE,
    )  # fmt: skip


def _cs3sedarknet_xdw() -> CspNetConfig:
    """Despite its name a csp network of bottlenecks, depthwise in the last two stages."""
    return CspNetConfig(
        stem=StemConfig(out_chs=(32, 64), kernel=3, stride=2, pool="none", padding=None),
        stages=stages(
            depth=(3, 6, 12, 4), out_chs=(256, 512, 1024, 2048), stride=2, kind="csp", block="bottle",
            groups=(1, 1, 256, 512), expand_ratio=1.0, block_ratio=0.5, bottle_ratio=0.5, cross_linear=False,
            down_growth=False, avg_down=False, se_ratio=1 / 16,
        ),
        activation="silu",
        leaky_slope=NO_SLOPE,
    )  # fmt: skip


def _pytorch(name: str, config: CspNetConfig, summary: str, *, baseline: str) -> Network:
    bicubic = name.startswith("cs3")
    contract = imagenet_contract(crop_pct=0.887, interpolation="bicubic" if bicubic else "bilinear")
    return imagenet_network(
        name, "cspnet", config, kind="csp", summary=summary, contract=contract, baseline=baseline
    )  # fmt: skip


def _darknet(
    name: str, config: CspNetConfig, summary: str, *, baseline: str, top1: float, top5: float
) -> Network:  # fmt: skip
    published = PublishedAccuracy(top1=top1, top5=top5, size_px=256, source=DARKNET_README)
    return imagenet_network(
        name, "cspnet", config, kind="csp", summary=summary, contract=darknet_contract(), baseline=baseline,
        published=published,
    )  # fmt: skip


_DARKNET53 = (1, 2, 8, 8, 4)
CSDARKNET53_MISH = _cspdarknet(_DARKNET53, "mish", NO_SLOPE)
"""Also the backbone of YOLOv4."""
_RES_CHS, _WIDE_CHS = (128, 256, 512, 1024), (256, 512, 1024, 2048)
_RESNET50: dict[str, Any] = {"out_chs": _RES_CHS, "expand": 2.0, "block": 1.0, "bottle": 0.5, "groups": 1}
_RESNEXT50: dict[str, Any] = {"out_chs": _WIDE_CHS, "expand": 1.0, "block": 0.5, "bottle": 1.0, "groups": 32}

CSP_NETWORKS: tuple[Network, ...] = (
    _pytorch("cspresnet50", _cspres((64,), **_RESNET50), "CSPResNet-50", baseline="resnet50"),
    _pytorch("cspresnet50d", _cspres((32, 32, 64), **_RESNET50), "CSPResNet-50 with a deep stem", baseline="resnet50"),
    _pytorch(
        "cspresnet50w",
        _cspres((32, 32, 64), _WIDE_CHS, expand=1.0, block=0.5, bottle=0.25),
        "CSPResNet-50 with a deep stem and wide outputs",
        baseline="resnet50",
    ),
    _pytorch("cspresnext50", _cspres((64,), **_RESNEXT50), "CSPResNeXt-50", baseline="resnext50_32x4d"),
    _pytorch(
        "cspdarknet53",
        _cspdarknet(_DARKNET53, "leaky_relu", PYTORCH_SLOPE),
        "CSPDarknet53, the backbone of YOLOv4",
        baseline="darknet53",
    ),
    _pytorch(
        "cspdarknet21",
        _cspdarknet((1, 1, 1, 2, 2), "leaky_relu", PYTORCH_SLOPE),
        "CSPDarknet as deep as Darknet21, small enough to train for a comparison",
        baseline="darknet21",
    ),
    *(
        _pytorch(f"cs3darknet_{size}", _cs3(size), f"CS3 Darknet {size}, fusion first as in YOLOv5's C3", baseline="")
        for size in _CS3_SIZES
    ),
    *(
        _pytorch(
            f"cs3darknet_focus_{size}",
            _cs3(size, focus=True),
            f"CS3 Darknet {size} with a 6x6 stem",
            baseline=f"cs3darknet_{size}",
        )
        for size in _CS3_SIZES
    ),
    _pytorch(
        "cs3sedarknet_l",
        _cs3("l", se_ratio=0.25),
        "CS3 Darknet l with squeeze and excitation",
        baseline="cs3darknet_l",
    ),
    _pytorch(
        "cs3sedarknet_x",
        _cs3("x", se_ratio=1 / 16),
        "CS3 Darknet x with squeeze and excitation",
        baseline="cs3darknet_x",
    ),
    _pytorch(
        "cs3sedarknet_xdw", _cs3sedarknet_xdw(), "CSP bottlenecks, depthwise, with squeeze and excitation", baseline=""
    ),
    _pytorch("cs3edgenet_x", _cs3("x", block="edge"), "CS3 x with edge blocks", baseline="cs3darknet_x"),
    _pytorch(
        "cs3se_edgenet_x",
        _cs3("x", block="edge", se_ratio=0.25),
        "CS3 x with edge blocks, squeeze and excitation",
        baseline="cs3edgenet_x",
    ),
    _darknet(
        "csdarknet53",
        _cspdarknet(_DARKNET53, "leaky_relu", DARKNET_SLOPE),
        "CSPDarknet53, Darknet's form",
        baseline="darknet53",
        top1=0.772,
        top5=0.936,
    ),
    _darknet(
        "csdarknet53-omega",
        CSDARKNET53_MISH,
        "CSPDarknet53, Darknet's form with Mish",
        baseline="darknet53",
        top1=0.787,
        top5=0.948,
    ),
    _darknet(
        "csresnet50",
        _csres_darknet(**_RESNET50, activation="leaky_relu"),
        "CSPResNet-50, Darknet's form",
        baseline="resnet50",
        top1=0.766,
        top5=0.933,
    ),
    _darknet(
        "csresnet50-omega",
        _csres_darknet(**_RESNET50, activation="mish"),
        "CSPResNet-50, Darknet's form with Mish",
        baseline="resnet50",
        top1=0.781,
        top5=0.942,
    ),
    _darknet(
        "csresnext50",
        _csres_darknet(**_RESNEXT50, activation="leaky_relu"),
        "CSPResNeXt-50, Darknet's form",
        baseline="resnext50_32x4d",
        top1=0.779,
        top5=0.940,
    ),
    _darknet(
        "csresnext50-omega",
        _csres_darknet(**_RESNEXT50, activation="mish"),
        "CSPResNeXt-50, Darknet's form with Mish",
        baseline="resnext50_32x4d",
        top1=0.798,
        top5=0.952,
    ),
)
