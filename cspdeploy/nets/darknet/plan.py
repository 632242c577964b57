"""What follows from a Darknet cfg before any network is built: shapes, outputs, feature levels, costs.

Plain arithmetic on the cfg, so that a network which cannot be, or which would take all memory, is refused first.
Semantics: AlexeyAB/darknet, the make_*_layer functions of src/.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cspdeploy.nets.darknet.sections import (
    AvgPool,
    Convolutional,
    Cost,
    DarknetConfig,
    Dropout,
    Layer,
    MaxPool,
    Route,
    Shortcut,
    Softmax,
    Upsample,
    Yolo,
)

__all__ = ["IMAGE", "LayerError", "LayerPlan", "NetworkPlan", "plan_network"]

IMAGE = -1
"""Stands for the network's input among layer indices."""

MAX_PARAMETERS = 2**30  # 4 GiB in float32; the largest published Darknet network has 0.29 * 10^9
MAX_MAP_VALUES = 2**30  # of one layer's output for one image


class LayerError(ValueError):
    """A layer does not fit the ones before it."""

    def __init__(self, index: int, layer: Layer, problem: str) -> None:
        super().__init__(f"layer {index} [{layer.type}]: {problem}")
        self.index = index
        self.problem = problem


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """One layer at the size that the cfg states."""

    inputs: tuple[int, ...]
    """Indices of the layers it reads, in the order of its arguments."""
    num_chs: int
    height: int
    width: int
    stride: int
    """Pixels of the input to one step of the map."""
    num_weights: int = 0
    """Values in a `.weights` file: learnable ones, and the running statistics of a batch norm."""
    num_parameters: int = 0
    """The learnable ones."""
    num_macs: int = 0
    """Multiply-accumulates of a convolution."""
    num_other_flops: int = 0
    """What Darknet counts for pools and shortcuts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkPlan:
    """A whole network at the size that the cfg states."""

    layers: tuple[LayerPlan, ...]
    task: Literal["classify", "detect"]
    outputs: tuple[int, ...]
    """Layers whose maps are the outputs: the logits, or what goes into each [yolo], in the order of the cfg."""
    output_names: tuple[str, ...]
    num_classes: int
    levels: tuple[int, ...]
    """Layers whose maps are the feature levels, finest first. See `_levels`."""

    @property
    def num_parameters(self) -> int:
        """Learnable values."""
        return sum(layer.num_parameters for layer in self.layers)

    @property
    def num_macs(self) -> int:
        """Multiply-accumulates of the convolutions for one image."""
        return sum(layer.num_macs for layer in self.layers)

    @property
    def bflops(self) -> float:
        """Darknet's own "Total BFLOPS": twice the MACs, and its count for pools and shortcuts, in 10^9."""
        return (2 * self.num_macs + sum(layer.num_other_flops for layer in self.layers)) / 1e9


def plan_network(config: DarknetConfig) -> NetworkPlan:
    """Infer and check every layer.

    Raises:
        LayerError: a layer that does not fit, reads what is not there, or is beyond all bounds.
    """
    net = config.net
    image = LayerPlan(inputs=(), num_chs=net.channels, height=net.height, width=net.width, stride=1)
    done: list[LayerPlan] = []
    num_weights = 0
    for index, layer in enumerate(config.layers):
        inputs = _inputs(config.layers, index)
        sources = [image if one == IMAGE else done[one] for one in inputs]
        try:
            plan = _plan(layer, inputs, sources)
        except ValueError as error:
            raise LayerError(index, layer, str(error)) from error
        num_weights += plan.num_weights
        if num_weights > MAX_PARAMETERS:
            raise LayerError(index, layer, f"{num_weights} weights up to here, expected at most {MAX_PARAMETERS}")
        if plan.num_chs * plan.height * plan.width > MAX_MAP_VALUES:
            shape = f"{plan.num_chs}x{plan.height}x{plan.width}"
            raise LayerError(index, layer, f"a map of {shape}, expected at most {MAX_MAP_VALUES} values")
        done.append(plan)
    heads = [index for index, layer in enumerate(config.layers) if isinstance(layer, Yolo)]
    return _detector(config.layers, done, heads) if heads else _classifier(config.layers, done)


def _inputs(layers: Sequence[Layer], index: int) -> tuple[int, ...]:
    """The layers that layer `index` reads; refuses what is no map of features."""
    layer = layers[index]
    if isinstance(layer, Route):
        inputs = layer.sources
    elif isinstance(layer, Shortcut):
        inputs = (index - 1, *layer.sources)
    else:
        inputs = (index - 1,)
    for one in inputs:
        if not (IMAGE if index == 0 else 0) <= one < index or (one == IMAGE and isinstance(layer, Route | Shortcut)):
            raise LayerError(index, layer, f"reads layer {one}, expected one of the layers before it")
        source = layers[one] if one >= 0 else None
        if isinstance(source, Yolo) or (isinstance(source, Softmax | Cost) and not isinstance(layer, Cost)):
            raise LayerError(
                index, layer, f"reads layer {one}, a [{source.type}], whose result is not part of the built network"
            )
    return inputs


def _plan(layer: Layer, inputs: tuple[int, ...], sources: Sequence[LayerPlan]) -> LayerPlan:
    first = sources[0]
    match layer:
        case Convolutional():
            return _convolutional(layer, inputs, first)
        case MaxPool():
            return _maxpool(layer, inputs, first)
        case Shortcut():
            return _shortcut(inputs, sources)
        case Route():
            return _route(layer, inputs, sources)
        case Upsample():
            return _upsample(layer, inputs, first)
        case AvgPool():
            stride = first.stride * max(first.height, first.width)
            return LayerPlan(inputs=inputs, num_chs=first.num_chs, height=1, width=1, stride=stride)
        case Yolo() if first.num_chs != layer.num_chs:
            parts = f"{len(layer.mask)} anchors x (5 + {layer.classes})"
            raise ValueError(f"got {first.num_chs} channels, expected {layer.num_chs}: {parts}")
    return LayerPlan(inputs=inputs, num_chs=first.num_chs, height=first.height, width=first.width, stride=first.stride)


def _convolutional(layer: Convolutional, inputs: tuple[int, ...], source: LayerPlan) -> LayerPlan:
    if source.num_chs % layer.groups or layer.filters % layer.groups:
        raise ValueError(f"{source.num_chs} to {layer.filters} channels, expected multiples of groups={layer.groups}")
    height, width = _slide(source, layer.size, layer.stride, 2 * layer.padding)
    num_kernel = layer.filters * (source.num_chs // layer.groups) * layer.size**2
    num_learnt = num_kernel + layer.filters * (2 if layer.batch_normalize else 1)
    return LayerPlan(
        inputs=inputs, num_chs=layer.filters, height=height, width=width, stride=source.stride * layer.stride,
        num_weights=num_learnt + (2 * layer.filters if layer.batch_normalize else 0), num_parameters=num_learnt,
        num_macs=num_kernel * height * width,
    )  # fmt: skip


def _maxpool(layer: MaxPool, inputs: tuple[int, ...], source: LayerPlan) -> LayerPlan:
    height, width = _slide(source, layer.size, layer.stride, layer.padding)
    return LayerPlan(
        inputs=inputs, num_chs=source.num_chs, height=height, width=width, stride=source.stride * layer.stride,
        num_other_flops=layer.size**2 * source.num_chs * height * width,
    )  # fmt: skip


def _slide(source: LayerPlan, size: int, stride: int, padding: int) -> tuple[int, int]:
    """Height and width after a window of `size` has gone over the map; `padding` is the total of both sides."""
    height, width = ((side + padding - size) // stride + 1 for side in (source.height, source.width))
    if height < 1 or width < 1:
        raise ValueError(f"a map of {source.height}x{source.width} is too small for a window of {size}")
    return height, width


def _shortcut(inputs: tuple[int, ...], sources: Sequence[LayerPlan]) -> LayerPlan:
    first = sources[0]
    _require_same_size(inputs, sources)
    return LayerPlan(
        inputs=inputs, num_chs=first.num_chs, height=first.height, width=first.width, stride=first.stride,
        num_other_flops=(len(inputs) - 1) * first.num_chs * first.height * first.width,
    )  # fmt: skip


def _route(layer: Route, inputs: tuple[int, ...], sources: Sequence[LayerPlan]) -> LayerPlan:
    _require_same_size(inputs, sources)
    for index, source in zip(inputs, sources, strict=True):
        if source.num_chs % layer.groups:
            raise ValueError(
                f"layer {index} has {source.num_chs} channels, expected a multiple of groups={layer.groups}"
            )
    first = sources[0]
    return LayerPlan(
        inputs=inputs, num_chs=sum(source.num_chs // layer.groups for source in sources), height=first.height,
        width=first.width, stride=first.stride,
    )  # fmt: skip


def _require_same_size(inputs: Sequence[int], sources: Sequence[LayerPlan]) -> None:
    first = sources[0]
    for index, source in zip(inputs, sources, strict=True):
        if (source.height, source.width) != (first.height, first.width):
            raise ValueError(
                f"layer {index} has a map of {source.height}x{source.width}, "
                f"layer {inputs[0]} one of {first.height}x{first.width}, expected the same"
            )


def _upsample(layer: Upsample, inputs: tuple[int, ...], source: LayerPlan) -> LayerPlan:
    if source.stride % layer.stride:
        raise ValueError(f"a map of stride {source.stride} times {layer.stride} is finer than the image")
    return LayerPlan(
        inputs=inputs, num_chs=source.num_chs, height=source.height * layer.stride,
        width=source.width * layer.stride, stride=source.stride // layer.stride,
    )  # fmt: skip


# --- outputs and feature levels ---


def _detector(layers: Sequence[Layer], done: Sequence[LayerPlan], heads: Sequence[int]) -> NetworkPlan:
    num_classes = layers[heads[0]].classes  # type: ignore[union-attr]
    for index in heads:
        classes = layers[index].classes  # type: ignore[union-attr]
        if classes != num_classes:
            raise LayerError(index, layers[index], f"{classes} classes, layer {heads[0]} has {num_classes}")
    strides = [done[index].stride for index in heads]
    repeated = {stride for stride, count in Counter(strides).items() if count > 1}
    names = [
        f"head_s{stride}" + (f"_{strides[:place].count(stride)}" if stride in repeated else "")
        for place, stride in enumerate(strides)
    ]
    return NetworkPlan(
        layers=tuple(done), task="detect", outputs=tuple(index - 1 for index in heads), output_names=tuple(names),
        num_classes=num_classes, levels=_levels(layers, done),
    )  # fmt: skip


def _classifier(layers: Sequence[Layer], done: Sequence[LayerPlan]) -> NetworkPlan:
    output = len(layers) - 1
    while output > 0 and isinstance(layers[output], Cost | Dropout | Softmax):
        output -= 1
    last = done[output]
    if (last.height, last.width) != (1, 1):
        shape = f"{last.num_chs}x{last.height}x{last.width}"
        raise LayerError(
            output,
            layers[output],
            f"the network ends in a map of {shape}, expected a [yolo], or classes after an [avgpool]",
        )
    return NetworkPlan(
        layers=tuple(done), task="classify", outputs=(output,), output_names=("logits",), num_classes=last.num_chs,
        levels=_levels(layers, done),
    )  # fmt: skip


def _levels(layers: Sequence[Layer], done: Sequence[LayerPlan]) -> tuple[int, ...]:
    """The last layer of each stride in the backbone, finest first.

    The backbone ends before the first [upsample] or [yolo], or before the last [avgpool] and the convolution that
    gives the classes. Of a detector only layers count that are read after its backbone: what its neck takes in.
    """
    ends = [index for index, layer in enumerate(layers) if isinstance(layer, Upsample | Yolo)]
    end = ends[0] if ends else _end_of_classifier_backbone(layers, done)
    backbone = [index for index in range(end) if not isinstance(layers[index], AvgPool)]
    read_later = {one for plan in done[end + 1 :] for one in plan.inputs} if ends else set()
    taps = [index for index in backbone if index in read_later]
    last = {done[index].stride: index for index in taps or backbone}
    return tuple(index for _, index in sorted(last.items()))


def _end_of_classifier_backbone(layers: Sequence[Layer], done: Sequence[LayerPlan]) -> int:
    pools = [index for index, layer in enumerate(layers) if isinstance(layer, AvgPool)]
    end = pools[-1] if pools else len(layers)
    while end > 0 and isinstance(layers[end - 1], Cost | Dropout | Softmax):
        end -= 1
    before = layers[end - 1] if end > 0 else None
    gives_classes = isinstance(before, Convolutional) and not before.batch_normalize
    return end - 1 if gives_classes and done[end - 1].num_chs == done[-1].num_chs else end
