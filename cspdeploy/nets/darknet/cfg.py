"""Darknet's `.cfg`: text to `DarknetConfig`.

The grammar is Darknet's own: blanks go anywhere in a line, only lines that start with # or ; are comments, sections
repeat, of a key given twice the first counts, a missing key has Darknet's default. Keys that no inference reads are
ignored. What would change the outputs and is not supported here is refused, with the file, the line and the layer.

Reference: AlexeyAB/darknet, src/parser.c and src/option_list.c.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, get_args

from cspdeploy.core.errors import InputError
from cspdeploy.nets.darknet.options import Section, shortened
from cspdeploy.nets.darknet.plan import LayerError, plan_network
from cspdeploy.nets.darknet.sections import (
    MAX_LAYERS,
    ActivationName,
    AvgPool,
    Convolutional,
    Cost,
    DarknetConfig,
    Dropout,
    FieldError,
    Layer,
    MaxPool,
    NetSection,
    NmsKind,
    Route,
    Shortcut,
    Softmax,
    Upsample,
    Yolo,
)

__all__ = ["parse_cfg", "read_cfg"]

T = TypeVar("T")

MAX_CFG_BYTES = 2**22  # the largest published cfg has 40 kB

_BLANKS = str.maketrans("", "", " \t\r\n\v\f")


def read_cfg(path: Path) -> DarknetConfig:
    """The network that a `.cfg` file describes, checked down to the shape of every layer.

    Raises:
        InputError: no such file, not a cfg, or a network that is not supported.
    """
    if not path.is_file():
        raise InputError(f"{path}: not found, expected a Darknet cfg", fix="name a .cfg file")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CFG_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if len(data) > MAX_CFG_BYTES:
        raise InputError(f"{path}: larger than {MAX_CFG_BYTES} bytes, expected a Darknet cfg", fix="name a .cfg file")
    if b"\0" in data:
        raise InputError(f"{path}: a binary file, expected a Darknet cfg", fix="name a .cfg file; weights: --weights")
    return parse_cfg(data.decode("utf-8-sig", errors="replace"), source=str(path))  # comments are in any encoding


def parse_cfg(text: str, *, source: str = "cfg") -> DarknetConfig:
    """The network that the text of a cfg describes.

    Args:
        source: the text's name, for messages.

    Raises:
        InputError: as `read_cfg`.
    """
    sections = _split(text, source)
    if not sections:
        raise InputError(f"{source}: no sections, expected [net] and its layers", fix="name a Darknet .cfg file")
    head, *rest = sections
    if head.type not in ("net", "network"):
        raise InputError(f"{head.where}: expected [net] first", fix="start the cfg with its [net] section")
    if not rest:
        raise InputError(f"{head.where}: no layers follow", fix="name a Darknet .cfg file")
    net = _build(head, _net)
    layers = tuple(_layer(section) for section in rest)
    config = DarknetConfig(net=net, layers=layers)
    try:
        plan_network(config)
    except LayerError as error:
        raise InputError(f"{rest[error.index].where}: {error.problem}", fix=_fix(layers[error.index])) from error
    return config


def _fix(layer: Layer) -> str:
    """Of a layer that does not fit the ones before it."""
    if not isinstance(layer, Yolo):
        return "mend the cfg"
    return f"filters={layer.num_chs} in the [convolutional] before it, and the same classes= in every [yolo]"


def _split(text: str, source: str) -> list[Section]:
    """The sections as written."""
    sections: list[Section] = []
    for number, raw in enumerate(text.split("\n"), start=1):
        line = raw.translate(_BLANKS)
        if not line or line[0] in "#;":
            continue
        if line[0] == "[":
            if not line.endswith("]"):
                raise InputError(f"{source}:{number}: got {shortened(line)}, expected [section]", fix="mend the cfg")
            if len(sections) > MAX_LAYERS:
                raise InputError(f"{source}:{number}: more than {MAX_LAYERS} layers", fix="name a Darknet .cfg file")
            sections.append(Section(type=line[1:-1], line=number, index=len(sections) - 1, source=source))
            continue
        key, equals, value = line.partition("=")
        if not (key and equals and sections):
            expected = "key=value" if sections else "[net]"
            raise InputError(
                f"{source}:{number}: got {shortened(line)}, expected {expected}", fix="name a Darknet .cfg file"
            )
        sections[-1].options.setdefault(key, (value, number))
    return sections


def _build(section: Section, read: Callable[[Section], T]) -> T:
    try:
        return read(section)
    except FieldError as error:
        section.fail(error.field, str(error).removeprefix(f"{error.field}: "))


def _layer(section: Section) -> Layer:
    if section.type not in LAYERS:
        raise InputError(
            f"{section.where}: not supported, expected one of {', '.join(LAYERS)}",
            fix="use a classifier or a detector that is made of these",
        )
    return _build(section, LAYERS[section.type])


# --- one reader for each kind of section, with Darknet's defaults ---


def _net(section: Section) -> NetSection:
    return NetSection(
        height=section.integer("height"), width=section.integer("width"), channels=section.integer("channels"),
        letter_box=section.flag("letter_box"),
    )  # fmt: skip


def _activation(section: Section, *, default: str) -> ActivationName:
    return section.choice("activation", default, get_args(ActivationName))  # type: ignore[return-value]


def _stride(section: Section) -> int:
    """`stride`, or stride_x and stride_y where both are given and the same."""
    stride = section.integer("stride", 1)
    stride_x, stride_y = (section.integer(key, -1) for key in ("stride_x", "stride_y"))
    stride_x, stride_y = (stride if one < 1 else one for one in (stride_x, stride_y))
    if stride_x != stride_y:
        section.fail("stride_x", f"got {stride_x} beside stride_y={stride_y}, only equal strides are supported")
    return stride_x


def _convolutional(section: Section) -> Convolutional:
    section.refuse(
        unless={
            "dilation": "1", "antialiasing": "0", "share_index": "", "flipped": "0", "binary": "0", "xnor": "0",
            "bin_output": "0", "sway": "0", "rotate": "0", "stretch": "0", "stretch_sway": "0", "deform": "0",
            "coordconv": "0", "dontload": "0", "dontloadscales": "0", "dontsave": "0",
        }
    )  # fmt: skip
    size = section.integer("size", 1)
    padding = section.integer("padding", 0)
    return Convolutional(
        filters=section.integer("filters", 1), size=size, stride=_stride(section),
        padding=size // 2 if section.flag("pad") else padding, groups=section.integer("groups", 1),
        batch_normalize=section.flag("batch_normalize") or section.flag("cbn"),
        activation=_activation(section, default="logistic"),
    )  # fmt: skip


def _sources(section: Section, key: str) -> tuple[int, ...]:
    """Layer indices, absolute; a negative one counts back from this layer."""
    absolute = []
    for given in section.integers(key):
        source = section.index + given if given < 0 else given
        if not 0 <= source < section.index:
            section.fail(key, f"got {given}, which is no layer before this one")
        absolute.append(source)
    return tuple(absolute)


def _shortcut(section: Section) -> Shortcut:
    section.refuse(unless={"weights_type": "none", "alpha": "1", "beta": "1"})
    return Shortcut(sources=_sources(section, "from"), activation=_activation(section, default="linear"))


def _route(section: Section) -> Route:
    return Route(
        sources=_sources(section, "layers"),
        groups=section.integer("groups", 1),
        group_id=section.integer("group_id", 0),
    )


def _maxpool(section: Section) -> MaxPool:
    section.refuse(unless={"maxpool_depth": "0", "antialiasing": "0"})
    stride = _stride(section)
    size = section.integer("size", stride)
    return MaxPool(size=size, stride=stride, padding=section.integer("padding", size - 1))


def _upsample(section: Section) -> Upsample:
    section.refuse(unless={"scale": "1"})
    return Upsample(stride=section.integer("stride", 2))


def _softmax(section: Section) -> Softmax:
    section.refuse(unless={"groups": "1", "temperature": "1", "tree": "", "spatial": "0"})
    return Softmax()


def _yolo(section: Section) -> Yolo:
    sides = section.numbers("anchors")
    num = section.integer("num", 1)
    if len(sides) != 2 * num:
        section.fail("anchors", f"got {len(sides)} numbers, expected {2 * num}, two for each of num={num}")
    return Yolo(
        classes=section.integer("classes", 20), anchors=tuple(zip(sides[::2], sides[1::2], strict=True)),
        mask=section.integers("mask") if "mask" in section.options else tuple(range(num)),
        scale_x_y=section.number("scale_x_y", 1.0), new_coords=section.flag("new_coords"),
        nms_kind=section.choice("nms_kind", "default", get_args(NmsKind)),  # type: ignore[arg-type]
        beta_nms=section.number("beta_nms", 0.6),
    )  # fmt: skip


LAYERS: dict[str, Callable[[Section], Layer]] = {
    "convolutional": _convolutional,
    "conv": _convolutional,
    "shortcut": _shortcut,
    "route": _route,
    "maxpool": _maxpool,
    "max": _maxpool,
    "avgpool": lambda _: AvgPool(),
    "avg": lambda _: AvgPool(),
    "upsample": _upsample,
    "dropout": lambda _: Dropout(),
    "softmax": _softmax,
    "soft": _softmax,
    "cost": lambda _: Cost(),
    "yolo": _yolo,
}
