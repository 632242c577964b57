"""The published checkpoints: for which network, how they want their images, how accurate they are, whose they are.

Accuracy is on the 50,000 images of the ImageNet-1k validation set, in [0, 1], each at the setting that stands beside
it. Sources: `results/results-imagenet.csv` and the configurations of timm (Apache-2.0) for the checkpoints that timm
trained; the weight descriptions of torchvision (BSD-3-Clause) for those ending in `.tv_in1k`. For these torchvision's
setting is given (bilinear), also where timm evaluates the same weights with another filter and gets another figure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cspdeploy.core.contracts import IMAGENET_MEAN, IMAGENET_STD
from cspdeploy.core.spec import Preprocess

__all__ = ["CHECKPOINTS", "NUM_VALIDATION_IMAGES", "PUBLISHED_DATASET", "Checkpoint", "published_for"]

HALF = (0.5, 0.5, 0.5)
PUBLISHED_DATASET = "ImageNet-1k validation"
NUM_VALIDATION_IMAGES = 50_000

Interpolation = Literal["bilinear", "bicubic"]

_TIMM_RELEASES = "https://github.com/rwightman/pytorch-image-models/releases/download"
_GPU = f"{_TIMM_RELEASES}/v0.1-weights"
_TPU = f"{_TIMM_RELEASES}/v0.1-tpu-weights"
_TORCHVISION = "https://download.pytorch.org/models"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A published checkpoint of one network, 1000 classes in the order of sorted WordNet ids.

    Attributes:
        tag: its name on the Hugging Face Hub, below "timm/".
        network: its name in `cspdeploy.nets.registry.NETWORKS`.
        preprocess: the setting at which it was trained or is usually run.
        top1: ImageNet accuracy at `preprocess`, in [0, 1]; `top5` likewise.
        test_preprocess: a larger setting at which it is more accurate, or None where none is published.
        test_top1: accuracy at `test_preprocess`, or None; `test_top5` likewise.
        licence: SPDX identifier under which the weights are published.
        origin: the file that its authors published; the hub has the same tensors.
    """

    tag: str
    network: str
    preprocess: Preprocess
    top1: float
    top5: float
    test_preprocess: Preprocess | None
    test_top1: float | None
    test_top5: float | None
    licence: str
    origin: str


@dataclass(frozen=True, slots=True)
class _Eval:
    size_px: int
    crop_pct: float
    top1: float
    top5: float


def _preprocess(setting: _Eval, interpolation: Interpolation, *, half: bool) -> Preprocess:
    return Preprocess(
        height_px=setting.size_px, width_px=setting.size_px, resize="crop", crop_pct=setting.crop_pct,
        interpolation=interpolation, channel_order="rgb",
        mean=HALF if half else IMAGENET_MEAN, std=HALF if half else IMAGENET_STD,
    )  # fmt: skip


def _row(
    tag: str, interpolation: Interpolation, usual: _Eval, test: _Eval | None, origin: str,
    *, half: bool = False, licence: str = "Apache-2.0",
) -> Checkpoint:  # fmt: skip
    """`half`: mean and standard deviation 0.5 instead of ImageNet's."""
    return Checkpoint(
        tag=tag,
        network=tag.partition(".")[0],
        preprocess=_preprocess(usual, interpolation, half=half),
        top1=usual.top1,
        top5=usual.top5,
        test_preprocess=_preprocess(test, interpolation, half=half) if test else None,
        test_top1=test.top1 if test else None,
        test_top5=test.top5 if test else None,
        licence=licence,
        origin=origin,
    )


CHECKPOINTS: dict[str, Checkpoint] = {
    row.tag: row
    for row in (
        # CSP with residual and dark blocks, cross stage first.
        _row("cspresnet50.ra_in1k", "bilinear",
             _Eval(256, 0.887, 0.79578, 0.94698), None, f"{_GPU}/cspresnet50_ra-d3e8d487.pth"),
        # Trained at 224 px; the published figure and the setting are for 256 px, where it is more accurate.
        _row("cspresnext50.ra_in1k", "bilinear",
             _Eval(256, 0.887, 0.80548, 0.95330), None, f"{_GPU}/cspresnext50_ra_224-648b4713.pth"),
        _row("cspdarknet53.ra_in1k", "bilinear",
             _Eval(256, 0.887, 0.80078, 0.95060), None, f"{_GPU}/cspdarknet53_ra_256-d05c7c21.pth"),
        # CSP with three transitions (C3).
        _row("cs3darknet_m.c2ns_in1k", "bicubic", _Eval(256, 0.887, 0.76974, 0.93582),
             _Eval(288, 0.95, 0.77636, 0.94016), f"{_TPU}/cs3darknet_m_c2ns-43f06604.pth"),
        _row("cs3darknet_l.c2ns_in1k", "bicubic", _Eval(256, 0.887, 0.80350, 0.95304),
             _Eval(288, 0.95, 0.80882, 0.95662), f"{_TPU}/cs3darknet_l_c2ns-16220c5d.pth"),
        _row("cs3darknet_x.c2ns_in1k", "bicubic", _Eval(256, 0.95, 0.81856, 0.95956),
             _Eval(288, 1.0, 0.82234, 0.96234), f"{_TPU}/cs3darknet_x_c2ns-4e4490aa.pth"),
        _row("cs3darknet_focus_s.ra4_e3600_r256_in1k", "bicubic", _Eval(256, 0.887, 0.72178, 0.90830),
             _Eval(320, 1.0, 0.73158, 0.91458),
             "https://huggingface.co/timm/cs3darknet_focus_s.ra4_e3600_r256_in1k", half=True),
        _row("cs3darknet_focus_m.c2ns_in1k", "bicubic", _Eval(256, 0.887, 0.76754, 0.93550),
             _Eval(288, 0.95, 0.77286, 0.93966), f"{_TPU}/cs3darknet_focus_m_c2ns-e23bed41.pth"),
        _row("cs3darknet_focus_l.c2ns_in1k", "bicubic", _Eval(256, 0.887, 0.80254, 0.95294),
             _Eval(288, 0.95, 0.80894, 0.95674), f"{_TPU}/cs3darknet_focus_l_c2ns-65ef8888.pth"),
        _row("cs3sedarknet_l.c2ns_in1k", "bicubic", _Eval(256, 0.887, 0.81208, 0.95798),
             _Eval(288, 0.95, 0.81770, 0.95962), f"{_TPU}/cs3sedarknet_l_c2ns-e8d1dc13.pth"),
        _row("cs3sedarknet_x.c2ns_in1k", "bicubic", _Eval(256, 0.887, 0.81926, 0.96022),
             _Eval(288, 1.0, 0.82654, 0.96348), f"{_TPU}/cs3sedarknet_x_c2ns-b4d0abc0.pth"),
        _row("cs3edgenet_x.c2_in1k", "bicubic", _Eval(256, 0.887, 0.82198, 0.95956),
             _Eval(288, 1.0, 0.82734, 0.96374), f"{_TPU}/cs3edgenet_x_c2-2e1610a9.pth"),
        _row("cs3se_edgenet_x.c2ns_in1k", "bicubic", _Eval(256, 0.95, 0.82768, 0.96306),
             _Eval(320, 1.0, 0.83550, 0.96662), f"{_TPU}/cs3se_edgenet_x_c2ns-76f8e3ac.pth"),
        # Baselines.
        _row("darknet53.c2ns_in1k", "bicubic", _Eval(256, 0.887, 0.80008, 0.95046),
             _Eval(288, 1.0, 0.80542, 0.95428), f"{_TPU}/darknet53_256_c2ns-3aeff817.pth"),
        _row("darknetaa53.c2ns_in1k", "bilinear", _Eval(256, 0.887, 0.79754, 0.94904),
             _Eval(288, 1.0, 0.80528, 0.95328), f"{_TPU}/darknetaa53_c2ns-5c28ec8a.pth"),
        _row("resnet50.tv_in1k", "bilinear", _Eval(224, 0.875, 0.76130, 0.92862), None,
             f"{_TORCHVISION}/resnet50-0676ba61.pth", licence="BSD-3-Clause"),
        _row("resnext50_32x4d.tv_in1k", "bilinear", _Eval(224, 0.875, 0.77618, 0.93698), None,
             f"{_TORCHVISION}/resnext50_32x4d-7cdf4587.pth", licence="BSD-3-Clause"),
        _row("densenet121.tv_in1k", "bilinear", _Eval(224, 0.875, 0.74434, 0.91972), None,
             f"{_TORCHVISION}/densenet121-a639ec97.pth"),
        _row("densenet169.tv_in1k", "bilinear", _Eval(224, 0.875, 0.75600, 0.92806), None,
             f"{_TORCHVISION}/densenet169-b2777c0a.pth"),
        _row("densenet201.tv_in1k", "bilinear", _Eval(224, 0.875, 0.76896, 0.93370), None,
             f"{_TORCHVISION}/densenet201-c1103571.pth"),
    )
}  # fmt: skip
"""By tag. The licence is the one that timm states for the tag."""


def published_for(network: str) -> tuple[Checkpoint, ...]:
    """The published checkpoints of a network, in the order of the table; empty where there is none."""
    return tuple(row for row in CHECKPOINTS.values() if row.network == network)
