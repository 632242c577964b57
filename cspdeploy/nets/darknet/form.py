"""The Darknet form of a native CSP network: its cfg, and which convolution of one is which of the other.

Darknet has no split: the two halves of `conv_exp` are two 1x1 convolutions over the same map ("cross", then
"block-in"), and the joined map has the block's path first. What both forms can say is the same function.

Reference: csdarknet53, csresnet50 and csresnext50 of CrossStagePartialNetworks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cspdeploy.core.errors import InputError
from cspdeploy.nets.cspnet import CspNetConfig, StageConfig
from cspdeploy.nets.darknet.network import LEAKY_SLOPE
from cspdeploy.nets.darknet.sections import (
    ActivationName,
    AvgPool,
    Convolutional,
    DarknetConfig,
    Layer,
    MaxPool,
    NetSection,
    Route,
    Shortcut,
    Softmax,
    Yolo,
)

__all__ = [
    "ACTIVATIONS",
    "CfgWriter",
    "DarknetForm",
    "Part",
    "Unit",
    "darknet_form",
    "format_cfg",
    "native_to_cfg",
    "require_expressible",
    "require_slope",
    "write_stage",
    "write_stem",
]

Part = Literal["unit", "block_in", "first_of_block", "classes", "head"]
"""block_in: 1x1 convolution ahead of the blocks; first_of_block: the convolution that reads it. In official networks
both may be narrower than in the native one. classes: the linear layer. head: the last convolution of a detector's head,
which has a bias. unit: any other."""

ACTIVATIONS: dict[str, ActivationName] = {"leaky_relu": "leaky", "mish": "mish", "silu": "swish", "relu": "relu"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One Darknet convolution and the native unit that it belongs to."""

    layer: int
    """Index of the Darknet layer."""
    native: str
    """Prefix of the native unit's keys, such as `stages.0.conv_exp`."""
    part: Part
    first_row: int = 0
    """Where its output channels begin in the native unit, which may be made of two of them."""
    swap_chs: int = 0
    """So many first input channels come last in the native unit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DarknetForm:
    """A native network in Darknet's terms."""

    config: DarknetConfig
    units: tuple[Unit, ...]
    """One for each convolution, in the order of the cfg, which is the order of the weights."""


def native_to_cfg(
    config: CspNetConfig, *, num_classes: int, height_px: int = 256, width_px: int = 256
) -> DarknetConfig:
    """The cfg of a native network: the same function, with a softmax at its end; `format_cfg` makes it a text.

    Raises:
        InputError: Darknet has no such network.
    """
    return darknet_form(config, num_classes=num_classes, height_px=height_px, width_px=width_px).config


def darknet_form(config: CspNetConfig, *, num_classes: int, height_px: int = 256, width_px: int = 256) -> DarknetForm:
    """As `native_to_cfg`, and which convolution is which."""
    require_expressible(config)
    writer = CfgWriter(ACTIVATIONS[config.activation])
    write_stem(writer, config)
    for index, stage in enumerate(config.stages):
        write_stage(writer, stage, f"stages.{index}")
    writer.layers.append(AvgPool())
    writer.conv("head.fc", num_classes, 1, act="linear", bias=True, part="classes")
    writer.layers.append(Softmax())
    net = NetSection(height=height_px, width=width_px, channels=3, letter_box=False)
    return DarknetForm(config=DarknetConfig(net=net, layers=tuple(writer.layers)), units=tuple(writer.units))


def require_slope(activation: str, leaky_slope: float) -> None:
    """Guard of activations.

    Raises:
        InputError: a leaky ReLU with another slope than Darknet's.
    """
    if activation == "leaky_relu" and leaky_slope != LEAKY_SLOPE:
        raise InputError(
            f"leaky_slope: got {leaky_slope}, expected {LEAKY_SLOPE}, the only one that Darknet has",
            fix="use a network with Darknet's slope",
        )


def require_expressible(config: CspNetConfig) -> None:
    """Guard of what a cfg can say.

    Raises:
        InputError: Darknet has no such network.
    """
    require_slope(config.activation, config.leaky_slope)
    for index, stage in enumerate(config.stages):
        for has, what in ((stage.se_ratio, "squeeze-and-excitation"), (stage.avg_down, "down-sampling by mean")):
            if has:
                raise InputError(
                    f"stages[{index}]: {what} has no form in a Darknet cfg", fix="use a network without it"
                )


class CfgWriter:
    """Layers in the order of a cfg.

    Attributes:
        act: of the convolutions that name none.
        prefix: of the native units' keys.
    """

    def __init__(self, act: ActivationName, *, prefix: str = "") -> None:
        self.act = act
        self.prefix = prefix
        self.layers: list[Layer] = []
        self.units: list[Unit] = []
        self.num_chs = 3
        """Of the last convolution."""

    @property
    def last(self) -> int:
        """Index of the last layer."""
        return len(self.layers) - 1

    def conv(
        self, native: str, filters: int, size: int, *, stride: int = 1, groups: int = 1, padding: int | None = None,
        act: ActivationName | None = None, bias: bool = False, part: Part = "unit", first_row: int = 0,
        swap_chs: int = 0,
    ) -> int:  # fmt: skip
        """Append a convolution, and its unit. Gives its index."""
        symmetric = ((stride - 1) + (size - 1)) // 2
        layer = Convolutional(
            filters=filters, size=size, stride=stride, padding=symmetric if padding is None else padding,
            groups=groups, batch_normalize=not bias, activation=act or self.act,
        )  # fmt: skip
        self.layers.append(layer)
        self.units.append(
            Unit(layer=self.last, native=f"{self.prefix}{native}", part=part, first_row=first_row, swap_chs=swap_chs)
        )
        self.num_chs = filters
        return self.last

    def route(self, *sources: int) -> None:
        """Append a [route] that joins `sources`."""
        self.layers.append(Route(sources=sources, groups=1, group_id=0))

    def add(self, source: int, act: ActivationName) -> None:
        """Append a [shortcut]."""
        self.layers.append(Shortcut(sources=(source,), activation=act))


def write_stem(writer: CfgWriter, config: CspNetConfig) -> None:
    """Append the layers of a native stem."""
    stem = config.stem
    last = len(stem.out_chs) - 1
    for i, out_chs in enumerate(stem.out_chs):
        strided = (i == 0 and stem.stride > 1) or (i == last and stem.stride > 2 and stem.pool == "none")
        padding = stem.padding if i == 0 else None
        writer.conv(f"stem.conv{i + 1}", out_chs, stem.kernel, stride=2 if strided else 1, padding=padding)
    if stem.pool != "none":
        size = 2 if stem.pool == "max2" else 3
        writer.layers.append(MaxPool(size=size, stride=2, padding=size - 1))


def write_stage(writer: CfgWriter, stage: StageConfig, name: str) -> None:
    """Append the layers of a native stage, the last of which gives its map."""
    if stage.kind == "dark" or stage.stride != 1:
        down_chs = stage.out_chs if stage.kind == "dark" or stage.down_growth else writer.num_chs
        writer.conv(f"{name}.conv_down", down_chs, 3, stride=stage.stride, groups=stage.groups)
    if stage.kind == "dark":
        _blocks(writer, stage, name)
        return
    path_chs = round(stage.out_chs * stage.expand_ratio) // 2
    block_in_chs = stage.block_in_chs or path_chs
    csp = stage.kind == "csp"  # conv_exp = [cross; block-in]; a cs3 stage has [block-in; cross]
    act: ActivationName | None = "linear" if stage.cross_linear else None
    writer.conv(f"{name}.conv_exp", path_chs, 1, act=act, first_row=0 if csp else block_in_chs)
    cross = writer.last
    writer.route(cross - 1)
    writer.conv(
        f"{name}.conv_exp", block_in_chs, 1, act=act, part="block_in", first_row=path_chs if csp else 0
    )  # fmt: skip
    _blocks(writer, stage, name)
    if csp:
        writer.conv(f"{name}.conv_transition_b", path_chs, 1)
    writer.route(writer.last, cross)
    writer.conv(f"{name}.conv_transition", stage.out_chs, 1, swap_chs=path_chs if csp else 0)


def _blocks(writer: CfgWriter, stage: StageConfig, name: str) -> None:
    block_chs = round(stage.out_chs * stage.block_ratio)
    mid_chs = round(block_chs * stage.bottle_ratio)
    for index in range(stage.depth):
        source, block = writer.last, f"{name}.blocks.{index}"
        first: Part = "first_of_block" if index == 0 and stage.kind != "dark" else "unit"
        if stage.block == "dark":
            writer.conv(f"{block}.conv1", mid_chs, 1, part=first)
            writer.conv(f"{block}.conv2", block_chs, 3, groups=stage.groups)
        elif stage.block == "edge":
            writer.conv(f"{block}.conv1", mid_chs, 3, groups=stage.groups, part=first)
            writer.conv(f"{block}.conv2", block_chs, 1)
        else:
            writer.conv(f"{block}.conv1", mid_chs, 1, part=first)
            writer.conv(f"{block}.conv2", mid_chs, 3, groups=stage.groups)
            writer.conv(f"{block}.conv3", block_chs, 1, act="linear")
        writer.add(source, writer.act if stage.block == "bottle" else "linear")
        writer.num_chs = block_chs


# --- as a text ---


def format_cfg(config: DarknetConfig) -> str:
    """The text of a cfg, which `parse_cfg` reads back to `config`, and Darknet as the same network."""
    net = config.net
    lines = ["[net]", f"height={net.height}", f"width={net.width}", f"channels={net.channels}"]
    lines += ["letter_box=1"] if net.letter_box else []
    for index, layer in enumerate(config.layers):
        lines += ["", f"[{layer.type}]", *(f"{key}={value}" for key, value in _options(layer, index).items())]
    return "\n".join(lines) + "\n"


def _options(layer: Layer, index: int) -> dict[str, object]:
    match layer:
        case Convolutional():
            padding = {"pad": 1} if layer.padding == layer.size // 2 else {"pad": 0, "padding": layer.padding}
            return {
                **({"batch_normalize": 1} if layer.batch_normalize else {}), "filters": layer.filters,
                "size": layer.size, "stride": layer.stride, **padding,
                **({"groups": layer.groups} if layer.groups > 1 else {}), "activation": layer.activation,
            }  # fmt: skip
        case Shortcut():
            return {"from": _relative(layer.sources, index), "activation": layer.activation}
        case Route():
            groups = {"groups": layer.groups, "group_id": layer.group_id} if layer.groups > 1 else {}
            return {"layers": _relative(layer.sources, index), **groups}
        case MaxPool():
            padding = {} if layer.padding == layer.size - 1 else {"padding": layer.padding}
            return {"size": layer.size, "stride": layer.stride, **padding}
        case Yolo():
            return _yolo_options(layer)
    return {"stride": layer.stride} if hasattr(layer, "stride") else {}


def _yolo_options(layer: Yolo) -> dict[str, object]:
    return {
        "mask": ",".join(map(str, layer.mask)),
        "anchors": ", ".join(f"{width:.17g},{height:.17g}" for width, height in layer.anchors),
        "classes": layer.classes, "num": len(layer.anchors), "scale_x_y": layer.scale_x_y,
        "new_coords": int(layer.new_coords), "nms_kind": layer.nms_kind, "beta_nms": layer.beta_nms,
    }  # fmt: skip


def _relative(sources: tuple[int, ...], index: int) -> str:
    return ",".join(str(source - index) for source in sources)
