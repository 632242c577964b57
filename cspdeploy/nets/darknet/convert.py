"""Darknet weights into the native CSP networks and detectors, and back. The numbers are moved, never computed with.

    conv_exp         rows = [cross; block-in] of Darknet's two convolutions ([block-in; cross] in a cs3 stage)
    conv_transition  Darknet joins [block, cross]; a csp stage joins [cross, block]: the input columns change halves
    padding          a native block path wider than Darknet's block-in: new rows with weight, scale, shift and mean 0,
                     variance 1, so that they give 0, and input columns of 0 in the convolution that reads them
    head             1x1 convolution [C, F, 1, 1] = linear layer [C, F], its rows in the order of the other's classes;
                     a detector's heads are the same convolutions in both

What weights cannot tell is compared in the cfgs: layers, activations, slope.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cspdeploy.core.errors import InputError
from cspdeploy.nets.cspnet import CspNetConfig
from cspdeploy.nets.darknet.detector_form import detector_form
from cspdeploy.nets.darknet.form import DarknetForm, Unit, darknet_form
from cspdeploy.nets.darknet.network import DarknetNet
from cspdeploy.nets.darknet.plan import IMAGE, plan_network
from cspdeploy.nets.darknet.sections import Convolutional, Cost, DarknetConfig, Dropout, Layer, Softmax, Yolo
from cspdeploy.nets.darknet.weights import read_darknet_state
from cspdeploy.nets.yolov4 import YoloV4Config

__all__ = ["darknet_to_native", "native_to_darknet", "read_darknet_into_native"]

State = dict[str, Tensor]
NativeConfig = CspNetConfig | YoloV4Config

_IDLE = {"conv.weight": 0.0, "bn.weight": 0.0, "bn.bias": 0.0, "bn.running_mean": 0.0, "bn.running_var": 1.0}
"""A unit's tensors, with the values that make a channel give 0."""
COUNTER = "num_batches_tracked"
OTHER_NETWORK = "name the native network that these weights were made for"


def read_darknet_into_native(
    path: Path, config: NativeConfig, *, num_classes: int, class_order: Sequence[int] | None = None,
    cfg: DarknetConfig | None = None,
) -> State:  # fmt: skip
    """The state dict of the native network `config` from a `.weights` file.

    Args:
        class_order: as in `darknet_to_native`.
        cfg: of the file, where it is not `native_to_cfg(config)` itself: where the native network is the padded form.

    Raises:
        InputError: as `read_darknet` and `darknet_to_native`.
    """
    cfg = cfg or _form(config, num_classes).config
    _, state = read_darknet_state(path, cfg)
    return _to_native(state, cfg, config, class_order)


def darknet_to_native(
    source: DarknetNet | Mapping[str, Tensor], config: NativeConfig, *, class_order: Sequence[int] | None = None
) -> State:
    """The state dict of the native network `config` that is the same function as a Darknet network.

    Args:
        source: the network, or its state dict; a state dict cannot be checked for its activations.
        class_order: native class i is class `class_order[i]` of the cfg; for the ImageNet networks
            `cspdeploy.core.imagenet.wnid_from_devkit()`. None: the same order.

    Raises:
        InputError: not the same network; names the first layer that differs. Or `class_order` is no permutation.
    """
    if isinstance(source, DarknetNet):
        return _to_native(source.state_dict(), source.config, config, class_order)
    return _to_native(source, None, config, class_order)


def native_to_darknet(
    state: Mapping[str, Tensor], config: NativeConfig, *, class_order: Sequence[int] | None = None
) -> State:
    """The state dict of `DarknetNet(native_to_cfg(config, ...))` that is the same function as a native network.

    Args:
        state: of the native network.
        class_order: the same one as in `darknet_to_native`, whose inverse this is.

    Raises:
        InputError: a tensor is missing or has another shape; Darknet has no such network; `class_order` is no
            permutation.
    """
    last = _form(config, 1).units[-1].native
    form = _form(config, _num_classes(config, len(_take(state, f"{last}.bias", None))))
    order = _permutation(class_order, _conv_of(form, form.units[-1]).filters)
    in_chs, num_rows = _widths(form)
    result: State = {}
    used: set[str] = set()
    for unit in form.units:
        layer, prefix = _conv_of(form, unit), f"layers.{unit.layer}"
        rows = slice(unit.first_row, unit.first_row + layer.filters)
        for name, shape in _native_shapes(unit, layer, in_chs[unit.layer], num_rows[unit.native]).items():
            key = f"{unit.native}.{name}"
            used.add(key)
            values = _take(state, key, shape)
            if unit.part == "classes":
                values = values[torch.argsort(order)]
                result[f"{prefix}.conv.{name}"] = values[:, :, None, None] if name == "weight" else values
            elif unit.part == "head":
                result[f"{prefix}.conv.{name}"] = values.clone()
            elif name == "conv.weight":
                split = values.shape[1] - unit.swap_chs
                result[f"{prefix}.{name}"] = torch.cat([values[rows, split:], values[rows, :split]], dim=1)
            else:
                result[f"{prefix}.{name}"] = values[rows].clone()
    _require_all_used(state, used)
    return _with_counters(result)


def _to_native(
    state: Mapping[str, Tensor], cfg: DarknetConfig | None, config: NativeConfig, class_order: Sequence[int] | None
) -> State:
    form = _form_of(state, cfg, config)
    order = _permutation(class_order, _conv_of(form, form.units[-1]).filters)
    in_chs, num_rows = _widths(form)
    result: State = {}
    used: set[str] = set()
    block_in_chs = 0  # of the stage at hand, as the Darknet network has it
    for unit in form.units:
        native, prefix = _conv_of(form, unit), f"layers.{unit.layer}"
        layer, source_chs = native, in_chs[unit.layer]
        if unit.part == "block_in":
            block_in_chs = _narrow(state, unit, native)
            layer = dataclasses.replace(native, filters=block_in_chs)
        elif unit.part == "first_of_block" and block_in_chs != source_chs:
            source_chs = block_in_chs
            if native.groups > 1:
                raise InputError(f"{prefix}: {source_chs} channels in groups cannot be padded", fix=OTHER_NETWORK)
        shapes = _darknet_shapes(layer, source_chs)
        values = {name: _take(state, f"{prefix}.{name}", shape) for name, shape in shapes.items()}
        used.update(f"{prefix}.{name}" for name in shapes)
        if unit.part == "classes":
            result["head.fc.weight"] = values["conv.weight"][order].flatten(1)
            result["head.fc.bias"] = values["conv.bias"][order]
        elif unit.part == "head":
            result.update({f"{unit.native}.{name.removeprefix('conv.')}": value for name, value in values.items()})
        else:
            _put(result, unit, values, shapes=_native_shapes(unit, native, in_chs[unit.layer], num_rows[unit.native]))
    _require_all_used(state, used)
    return _with_counters(result)


def _form_of(state: Mapping[str, Tensor], cfg: DarknetConfig | None, config: NativeConfig) -> DarknetForm:
    """Darknet's form of the native network, with the classes that the weights have."""
    if cfg is not None:
        form = _form(config, plan_network(cfg).num_classes)
        _require_same(cfg, form)
        return form
    head = _form(config, 1).units[-1].layer
    return _form(config, _num_classes(config, len(_take(state, f"layers.{head}.conv.bias", None))))


def _form(config: NativeConfig, num_classes: int) -> DarknetForm:
    if isinstance(config, YoloV4Config):
        return detector_form(config, num_classes=num_classes)
    return darknet_form(config, num_classes=num_classes)


def _num_classes(config: NativeConfig, num_rows: int) -> int:
    """Classes of a last layer with so many output channels; 1 where none fit, which the shapes then show."""
    if not isinstance(config, YoloV4Config):
        return num_rows
    return max(1, num_rows // config.num_anchors - 5)


def _put(result: State, unit: Unit, values: State, *, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """One Darknet convolution into its rows of the native unit, whose other channels are idle until they come."""
    for name, value in values.items():
        target = result.setdefault(f"{unit.native}.{name}", value.new_full(shapes[name], _IDLE[name]))
        rows = target[unit.first_row : unit.first_row + len(value)]
        if name == "conv.weight":
            rows[:, : value.shape[1]] = torch.cat([value[:, unit.swap_chs :], value[:, : unit.swap_chs]], dim=1)
        else:
            rows.copy_(value)


def _conv_of(form: DarknetForm, unit: Unit) -> Convolutional:
    layer = form.config.layers[unit.layer]
    if not isinstance(layer, Convolutional):
        raise TypeError(f"layer {unit.layer} is a [{layer.type}], expected a [convolutional]")
    return layer


def _widths(form: DarknetForm) -> tuple[dict[int, int], dict[str, int]]:
    """Input channels by Darknet layer, and output channels by native unit."""
    plan = plan_network(form.config)
    in_chs, num_rows = {}, dict[str, int]()
    for unit in form.units:
        (source,) = plan.layers[unit.layer].inputs
        in_chs[unit.layer] = plan.layers[source].num_chs if source != IMAGE else form.config.net.channels
        num_rows[unit.native] = num_rows.get(unit.native, 0) + _conv_of(form, unit).filters
    return in_chs, num_rows


def _darknet_shapes(layer: Convolutional, in_chs: int) -> dict[str, tuple[int, ...]]:
    kernel = (layer.filters, in_chs // layer.groups, layer.size, layer.size)
    vectors = [name for name in _IDLE if name.startswith("bn.")] if layer.batch_normalize else ["conv.bias"]
    return {"conv.weight": kernel, **dict.fromkeys(vectors, (layer.filters,))}


def _native_shapes(unit: Unit, layer: Convolutional, in_chs: int, num_rows: int) -> dict[str, tuple[int, ...]]:
    if unit.part == "head":
        return {"weight": (num_rows, in_chs, 1, 1), "bias": (num_rows,)}
    if unit.part == "classes":  # the linear layer
        return {"weight": (num_rows, in_chs), "bias": (num_rows,)}
    return _darknet_shapes(dataclasses.replace(layer, filters=num_rows), in_chs)


def _narrow(state: Mapping[str, Tensor], unit: Unit, layer: Convolutional) -> int:
    """Channels of block-in: at most those of the native path."""
    key = f"layers.{unit.layer}.bn.bias"
    num_chs = len(_take(state, key, None))
    if not 1 <= num_chs <= layer.filters:
        raise InputError(f"{key}: got {num_chs} channels, expected at most {layer.filters}", fix=OTHER_NETWORK)
    return num_chs


def _take(state: Mapping[str, Tensor], key: str, shape: tuple[int, ...] | None) -> Tensor:
    """A tensor of the state; of one dimension where `shape` is None."""
    if key not in state:
        raise InputError(f"{key}: missing, weights of another network", fix=OTHER_NETWORK)
    value = state[key].detach()
    if (value.ndim != 1) if shape is None else (tuple(value.shape) != shape):
        expected = "one dimension" if shape is None else list(shape)
        raise InputError(f"{key}: got {list(value.shape)}, expected {expected}", fix=OTHER_NETWORK)
    return value


def _require_all_used(state: Mapping[str, Tensor], used: set[str]) -> None:
    left = sorted(key for key in state if key not in used and not key.endswith(COUNTER))
    if left:
        raise InputError(f"{left[0]}: unexpected, weights of another network", fix=OTHER_NETWORK)


def _with_counters(state: State) -> State:
    """Batch norms count their training steps, which Darknet does not."""
    counters = {f"{key.removesuffix('running_var')}{COUNTER}" for key in state if key.endswith("running_var")}
    return {**state, **{key: torch.zeros((), dtype=torch.int64) for key in sorted(counters)}}


def _permutation(class_order: Sequence[int] | None, num_classes: int) -> Tensor:
    order = range(num_classes) if class_order is None else [int(index) for index in class_order]
    if sorted(order) != list(range(num_classes)):
        raise InputError(
            f"class_order: {len(order)} entries, expected each of 0 to {num_classes - 1} once",
            fix="give the permutation that belongs to these classes",
        )
    return torch.tensor(order, dtype=torch.int64)


def _require_same(cfg: DarknetConfig, form: DarknetForm) -> None:
    """Layer for layer, but for the width of block-in and what follows the classes."""
    narrow = {unit.layer for unit in form.units if unit.part == "block_in"}
    got, expected = _without_tail(cfg.layers), _without_tail(form.config.layers)
    for index, (one, other) in enumerate(zip(got, expected, strict=False)):
        if index in narrow and isinstance(one, Convolutional) and isinstance(other, Convolutional):
            other = dataclasses.replace(other, filters=one.filters)  # noqa: PLW2901  checked with the weights
        if isinstance(one, Yolo) and isinstance(other, Yolo):
            continue  # how the maps are decoded is no part of the network; their channels are the convolutions'
        if one != other:
            raise InputError(f"layer {index} of the cfg: {_difference(one, other)}", fix=OTHER_NETWORK)
    if len(got) != len(expected):
        raise InputError(
            f"the cfg has {len(got)} layers up to its classes, expected {len(expected)}", fix=OTHER_NETWORK
        )


def _without_tail(layers: Sequence[Layer]) -> Sequence[Layer]:
    end = len(layers)
    while end > 0 and isinstance(layers[end - 1], Softmax | Cost | Dropout):
        end -= 1
    return layers[:end]


def _difference(got: Layer, expected: Layer) -> str:
    if type(got) is not type(expected):
        return f"got [{got.type}], expected [{expected.type}]"
    fields = [field.name for field in dataclasses.fields(got)]
    field = next(name for name in fields if getattr(got, name) != getattr(expected, name))
    return f"[{got.type}] {field}: got {getattr(got, field)}, expected {getattr(expected, field)}"
