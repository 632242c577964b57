"""What describes a model: its network, its classes, its preprocessing and where its weights come from."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Literal

from cspdeploy.core.codec import JsonObject
from cspdeploy.core.detection.spec import Detection

__all__ = ["Accuracy", "ModelSpec", "NetworkSpec", "Preprocess", "Provenance", "Task"]

SPEC_SCHEMA_VERSION = 1
MAX_SIDE_PX = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocess:
    """The contract between an image file and the tensor `[N, 3, H, W]` float32 that the network takes.

    Every part of cspdeploy (training, calibration, golden images, prediction) goes through
    `cspdeploy.core.preprocess`, which reads nothing but this.
    """

    height_px: int
    width_px: int
    resize: Literal["crop", "stretch", "letterbox"]
    """crop: shorter side to floor(size / crop_pct), then the centre. stretch: both sides to size, ratio not kept.
    letterbox: the whole image with its ratio kept, centred on grey."""
    crop_pct: float
    interpolation: Literal["bilinear", "bicubic", "nearest"]
    """Pillow's filters, which antialias when they shrink."""
    channel_order: Literal["rgb", "bgr"]
    mean: tuple[float, float, float]
    """In units of [0, 1], in `channel_order`."""
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        if not (1 <= self.height_px <= MAX_SIDE_PX and 1 <= self.width_px <= MAX_SIDE_PX):
            raise ValueError(f"size: got {self.height_px}x{self.width_px} px, expected 1 to {MAX_SIDE_PX} a side")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct: got {self.crop_pct}, expected a number in (0, 1]")
        if not all(math.isfinite(value) for value in (*self.mean, *self.std)):
            raise ValueError(f"mean, std: got {self.mean}, {self.std}, expected finite numbers")
        if min(self.std) <= 0:
            raise ValueError(f"std: got {self.std}, expected positive numbers")

    def with_size(self, height_px: int, width_px: int) -> Preprocess:
        """The same contract for another input size."""
        return dataclasses.replace(self, height_px=height_px, width_px=width_px)


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSpec:
    """Which network to build: a family of `cspdeploy.nets` and the JSON form of that family's configuration."""

    family: str
    config: JsonObject


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Share of labelled images whose class is first (top1) or among the first five (top5), in [0, 1].

    Of a detector: mean average precision at an overlap of 0.5 (map50) and over 0.5 to 0.95 (map); None for others.
    """

    dataset: str
    num_images: int
    top1: float = 0.0
    top5: float = 0.0
    map50: float | None = None
    map: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where weights come from. `source` "random" means UNTRAINED, and everything made from them says so."""

    source: Literal["trained", "published", "user", "random"]
    weights_sha256: str = ""
    """Of the file the weights were read from; empty for random weights."""
    origin: str = ""
    """File, checkpoint name or seed."""
    dataset: str = ""
    command: str = ""
    licence: str = ""
    accuracy: Accuracy | None = None

    @property
    def untrained(self) -> bool:
        """Whether the weights have never seen data."""
        return self.source == "random"


Task = Literal["classify", "features", "detect", "segment"]
"""What the outputs are: logits `[N, C]`; feature maps `[N, C, H / stride, W / stride]`, finest first; candidates of
boxes, or the raw maps that they are made of; logits of each pixel `[N, C, H, W]`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A model without its weights: `models/<name>/spec.json`."""

    schema_version: int = SPEC_SCHEMA_VERSION
    name: str
    network: NetworkSpec
    num_classes: int
    preprocess: Preprocess
    provenance: Provenance
    task: Task = "classify"
    outputs: tuple[str, ...] = ("logits",)
    """Names of the network's outputs, in their order."""
    detection: Detection | None = None
    """Of a detector, and of nothing else: how boxes come of its outputs."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):  # it names files and folders
            raise ValueError(f"name: got {self.name!r}, expected letters, digits, '.', '_', '-'")
        if self.num_classes < 1:
            raise ValueError(f"num_classes: got {self.num_classes}, expected at least 1")
        if not self.outputs or len(set(self.outputs)) != len(self.outputs):
            raise ValueError(f"outputs: got {list(self.outputs)}, expected different names")
        if self.task == "classify" and len(self.outputs) != 1:
            raise ValueError(f"outputs: got {list(self.outputs)}, expected one for the task 'classify'")
        if (self.detection is not None) != (self.task == "detect"):
            raise ValueError(f"detection: expected for the task 'detect' and for no other, got task '{self.task}'")
        if self.detection is not None and self.outputs != self.detection.network_outputs:
            raise ValueError(
                f"outputs: got {list(self.outputs)}, expected {list(self.detection.network_outputs)} with "
                f"detection.decode '{self.detection.decode}'"
            )
