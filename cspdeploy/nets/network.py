"""What a named network is: the row type of the registry, and how its images are prepared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cspdeploy.core.contracts import CONTRACTS, IMAGENET_MEAN, IMAGENET_STD
from cspdeploy.core.detection.spec import Detection
from cspdeploy.core.spec import Preprocess
from cspdeploy.nets.checkpoints import published_for
from cspdeploy.nets.cspnet import CspNetConfig
from cspdeploy.nets.densenet import DenseNetConfig
from cspdeploy.nets.resnet import ResNetConfig
from cspdeploy.nets.segmentation import FpnConfig
from cspdeploy.nets.yolov4 import YoloV4Config

__all__ = ["Network", "NetworkConfig", "PublishedAccuracy", "darknet_contract", "imagenet_contract", "imagenet_network"]

NetworkConfig = CspNetConfig | ResNetConfig | DenseNetConfig | YoloV4Config | FpnConfig

IMAGENET_CLASSES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedAccuracy:
    """ImageNet-1k validation accuracy, in [0, 1], as its authors give it."""

    top1: float
    top5: float
    size_px: int
    source: str
    """Tag of the checkpoint, or who published the figure."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.top1 <= self.top5 <= 1.0:
            raise ValueError(f"top1, top5: got {self.top1}, {self.top5}, expected 0 <= top1 <= top5 <= 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A named network: its configuration, how it wants its images, and what is published about it."""

    name: str
    family: str
    config: NetworkConfig
    num_classes: int
    preprocess: Preprocess
    checkpoint: str = ""
    """Tag of the published checkpoint, or empty."""
    published: PublishedAccuracy | None = None
    """Of that checkpoint; without one, of the authors' own weights."""
    summary: str
    baseline: str = ""
    """Name of the network that this one is compared with, or empty."""
    kind: Literal["csp", "baseline"]
    detection: Detection | None = None
    """Of a detector: how its heads are decoded."""


def imagenet_contract(
    size_px: int = 256, *, crop_pct: float, interpolation: Literal["bilinear", "bicubic"] = "bilinear"
) -> Preprocess:
    """RGB, centre crop, ImageNet mean and standard deviation: what the PyTorch checkpoints were trained with."""
    return Preprocess(
        height_px=size_px, width_px=size_px, resize="crop", crop_pct=crop_pct, interpolation=interpolation,
        channel_order="rgb", mean=IMAGENET_MEAN, std=IMAGENET_STD,
    )  # fmt: skip


def darknet_contract(size_px: int = 256) -> Preprocess:
    """Darknet's classifiers: RGB in [0, 1], shorter side to the input size, centre crop; no mean, no deviation."""
    return CONTRACTS["darknet"].with_size(size_px, size_px)


def imagenet_network(
    name: str, family: str, config: NetworkConfig, *, kind: Literal["csp", "baseline"], summary: str,
    contract: Preprocess, baseline: str = "", published: PublishedAccuracy | None = None,
) -> Network:  # fmt: skip
    """A row of 1000 classes. A published PyTorch checkpoint, where there is one, gives contract and accuracy.

    Args:
        contract: of a network without a checkpoint.
        published: likewise; None where the authors' weights or their figures do not exist.
    """
    checkpoint = next(iter(published_for(name)), None)
    if checkpoint is not None:
        contract = checkpoint.preprocess
        published = PublishedAccuracy(
            top1=checkpoint.top1, top5=checkpoint.top5, size_px=contract.height_px, source=checkpoint.tag
        )
    return Network(
        name=name, family=family, config=config, num_classes=IMAGENET_CLASSES, preprocess=contract,
        checkpoint=checkpoint.tag if checkpoint else "", published=published, summary=summary, baseline=baseline,
        kind=kind,
    )  # fmt: skip
