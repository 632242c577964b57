"""The sections of a Darknet cfg, as data: what each kind of layer is, without its place in a file.

A layer's index counts every section after [net], as Darknet's own messages and file names (`yolov4.conv.137`) do.
Indices in `Shortcut` and `Route` are absolute, whatever the cfg wrote. What `.weights` hold follows from these fields
alone, except the activations: two networks that differ in them alone load each other's weights without complaint.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = [
    "ActivationName",
    "AvgPool",
    "Convolutional",
    "Cost",
    "DarknetConfig",
    "Dropout",
    "FieldError",
    "Layer",
    "MaxPool",
    "NetSection",
    "NmsKind",
    "Route",
    "Shortcut",
    "Softmax",
    "Upsample",
    "Yolo",
]

ActivationName = Literal["leaky", "mish", "swish", "logistic", "linear", "relu"]
"""leaky: slope 0.1. mish: x tanh(softplus(x)). swish: x sigmoid(x). logistic: sigmoid."""
NmsKind = Literal["default", "greedynms", "diounms", "cornersnms"]

# Far above any published network, and low enough that a hostile cfg takes neither memory nor time.
MAX_SIDE_PX = 8192
MAX_LAYERS = 4096
MAX_CHS = 65_536
MAX_KERNEL = 255
MAX_ANCHORS = 256
MAX_FACTOR = 1e6  # of scale_x_y, of an anchor in pixels: a finite float, and no overflow in float32


class FieldError(ValueError):
    """A field of a section has a value that it cannot have."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


def _check_range(section: object, low: int, high: int, *fields: str) -> None:
    for field in fields:
        value = getattr(section, field)
        if not low <= value <= high:
            raise FieldError(field, f"got {value}, expected {low} to {high}")


@dataclass(frozen=True, slots=True, kw_only=True)
class NetSection:
    """[net]: the size that the network was made for, in pixels. What only training reads is left out."""

    height: int
    width: int
    channels: int
    letter_box: bool
    """Whether images keep their ratio, on grey borders; else both sides are stretched to the input."""

    def __post_init__(self) -> None:
        _check_range(self, 1, MAX_SIDE_PX, "height", "width")
        if self.channels != 3:
            raise FieldError("channels", f"got {self.channels}, expected 3 (RGB)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Convolutional:
    """[convolutional]: convolution, batch norm (then no bias), activation. `padding` is on every side."""

    type: Literal["convolutional"] = "convolutional"
    filters: int
    size: int
    stride: int
    padding: int
    groups: int
    batch_normalize: bool
    activation: ActivationName

    def __post_init__(self) -> None:
        _check_range(self, 1, MAX_CHS, "filters", "groups")
        _check_range(self, 1, MAX_KERNEL, "size", "stride")
        _check_range(self, 0, MAX_KERNEL, "padding")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortcut:
    """[shortcut]: the layer before plus `sources`, on the first channels that both have; then the activation.

    The output has the shape of the layer before: channels that only a source has are dropped.
    """

    type: Literal["shortcut"] = "shortcut"
    sources: tuple[int, ...]
    activation: ActivationName

    def __post_init__(self) -> None:
        if not 1 <= len(self.sources) <= MAX_LAYERS:
            raise FieldError("from", f"got {len(self.sources)} layers, expected at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """[route]: `sources` joined along the channels in their order; of each only slice `group_id` of `groups`."""

    type: Literal["route"] = "route"
    sources: tuple[int, ...]
    groups: int
    group_id: int

    def __post_init__(self) -> None:
        if not 1 <= len(self.sources) <= MAX_LAYERS:
            raise FieldError("layers", f"got {len(self.sources)} layers, expected at least 1")
        _check_range(self, 1, MAX_CHS, "groups")
        _check_range(self, 0, self.groups - 1, "group_id")


@dataclass(frozen=True, slots=True, kw_only=True)
class MaxPool:
    """[maxpool]: `padding` is the total of both sides, floor(padding / 2) of it before; it never wins a maximum."""

    type: Literal["maxpool"] = "maxpool"
    size: int
    stride: int
    padding: int

    def __post_init__(self) -> None:
        _check_range(self, 1, MAX_KERNEL, "size", "stride")
        _check_range(self, 0, self.size - 1, "padding")  # more, and a window would hold nothing but padding


@dataclass(frozen=True, slots=True, kw_only=True)
class AvgPool:
    """[avgpool]: the mean of the whole map."""

    type: Literal["avgpool"] = "avgpool"


@dataclass(frozen=True, slots=True, kw_only=True)
class Upsample:
    """[upsample]: every value repeated `stride` times in both directions (nearest)."""

    type: Literal["upsample"] = "upsample"
    stride: int

    def __post_init__(self) -> None:
        _check_range(self, 1, MAX_KERNEL, "stride")


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropout:
    """[dropout]: nothing outside training."""

    type: Literal["dropout"] = "dropout"


@dataclass(frozen=True, slots=True, kw_only=True)
class Softmax:
    """[softmax] over all classes. The built network leaves it off: its outputs are logits."""

    type: Literal["softmax"] = "softmax"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """[cost]: nothing outside training."""

    type: Literal["cost"] = "cost"


@dataclass(frozen=True, slots=True, kw_only=True)
class Yolo:
    """[yolo]: how the raw map of the layer before is decoded. The built network gives the raw map.

    Its channels are `[x, y, w, h, objectness, classes...]` for one anchor of `mask` after the other.
    """

    type: Literal["yolo"] = "yolo"
    classes: int
    anchors: tuple[tuple[float, float], ...]
    """Width and height in pixels of the network's input, for all heads."""
    mask: tuple[int, ...]
    """Which of `anchors` this head uses."""
    scale_x_y: float
    new_coords: bool
    """Whether the convolution before has already applied the sigmoid, and sizes are squares instead of exponentials."""
    nms_kind: NmsKind
    beta_nms: float

    def __post_init__(self) -> None:
        _check_range(self, 1, MAX_CHS, "classes")
        if not 1 <= len(self.anchors) <= MAX_ANCHORS:
            raise FieldError("anchors", f"got {len(self.anchors)}, expected 1 to {MAX_ANCHORS} pairs")
        if not all(0 < side <= MAX_FACTOR for pair in self.anchors for side in pair):
            raise FieldError("anchors", f"got {list(self.anchors)}, expected sizes above 0, in pixels")
        if not 1 <= len(self.mask) <= MAX_ANCHORS:
            raise FieldError("mask", f"got {len(self.mask)} anchors, expected 1 to {len(self.anchors)}")
        if not all(0 <= index < len(self.anchors) for index in self.mask):
            raise FieldError("mask", f"got {list(self.mask)}, expected indices of the {len(self.anchors)} anchors")
        for field in ("scale_x_y", "beta_nms"):
            value = getattr(self, field)
            if not (math.isfinite(value) and 0 < value <= MAX_FACTOR):
                raise FieldError(field, f"got {value}, expected a number above 0")

    @property
    def num_chs(self) -> int:
        """Channels of the raw map."""
        return len(self.mask) * (5 + self.classes)


Layer: TypeAlias = (
    Convolutional | Shortcut | Route | MaxPool | AvgPool | Upsample | Dropout | Softmax | Cost | Yolo
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class DarknetConfig:
    """A whole cfg: what the manifest of a bundle holds of it."""

    net: NetSection
    layers: tuple[Layer, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.layers) <= MAX_LAYERS:
            raise ValueError(f"layers: got {len(self.layers)}, expected 1 to {MAX_LAYERS}")

    def with_size(self, height_px: int, width_px: int) -> DarknetConfig:
        """The same network for another input size."""
        return dataclasses.replace(self, net=dataclasses.replace(self.net, height=height_px, width=width_px))
