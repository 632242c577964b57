"""DarknetNet: the network of a Darknet cfg, layer for layer.

Module `layers.{i}` is Darknet's layer i, so that an error, a key of the state dict or a node of a graph names the
section of the cfg that it comes from. Semantics: AlexeyAB/darknet, src/*_layer.c.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from cspdeploy.nets.blocks import BN_EPS, FeatureLevel
from cspdeploy.nets.darknet.plan import IMAGE, NetworkPlan, plan_network
from cspdeploy.nets.darknet.sections import (
    AvgPool,
    Convolutional,
    DarknetConfig,
    Layer,
    MaxPool,
    Route,
    Shortcut,
    Upsample,
)

__all__ = ["LEAKY_SLOPE", "DarknetNet"]

LEAKY_SLOPE = 0.1  # Darknet's; PyTorch's own default is 0.01

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "leaky": lambda: nn.LeakyReLU(LEAKY_SLOPE, inplace=True),
    "mish": lambda: nn.Mish(inplace=True),
    "swish": lambda: nn.SiLU(inplace=True),
    "logistic": nn.Sigmoid,
    "linear": nn.Identity,
    "relu": lambda: nn.ReLU(inplace=True),
}


class _Conv2d(nn.Conv2d):
    """A convolution that starts as Darknet's do: uniform, standard deviation sqrt(2 / (3 fan_in))."""

    def reset_parameters(self) -> None:
        bound = math.sqrt(2.0 / self.weight[0].numel())
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class ConvolutionalLayer(nn.Module):
    """Convolution, batch norm (then without bias), activation."""

    def __init__(self, layer: Convolutional, in_chs: int) -> None:
        super().__init__()
        self.conv = _Conv2d(
            in_chs, layer.filters, layer.size, stride=layer.stride, padding=layer.padding, groups=layer.groups,
            bias=not layer.batch_normalize,
        )  # fmt: skip
        self.bn = nn.BatchNorm2d(layer.filters, eps=BN_EPS) if layer.batch_normalize else nn.Identity()
        self.act = ACTIVATIONS[layer.activation]()

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x_NCHW)))


class ShortcutLayer(nn.Module):
    """The first argument plus the others, each on the first channels that both have; then the activation."""

    def __init__(self, layer: Shortcut, chs: Sequence[int]) -> None:
        super().__init__()
        self.chs = tuple(chs)
        self.act = ACTIVATIONS[layer.activation]()

    def forward(self, *x_NCHW: Tensor) -> Tensor:
        total = x_NCHW[0]
        for source, num_chs in zip(x_NCHW[1:], self.chs[1:], strict=True):
            if num_chs >= self.chs[0]:
                total = total + (source if num_chs == self.chs[0] else source.narrow(1, 0, self.chs[0]))
            else:  # what the source lacks counts as zero
                both, rest = total.split([num_chs, self.chs[0] - num_chs], dim=1)
                total = torch.cat([both + source, rest], dim=1)
        return self.act(total)


class RouteLayer(nn.Module):
    """The arguments, or one slice of each, joined along the channels."""

    def __init__(self, layer: Route, chs: Sequence[int]) -> None:
        super().__init__()
        self.groups, self.group_id = layer.groups, layer.group_id
        self.widths = tuple(num_chs // layer.groups for num_chs in chs)

    def forward(self, *x_NCHW: Tensor) -> Tensor:
        parts = list(x_NCHW)
        if self.groups > 1:
            parts = [x.narrow(1, self.group_id * width, width) for x, width in zip(x_NCHW, self.widths, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class MaxPoolLayer(nn.Module):
    """Max pool with Darknet's padding: floor(padding / 2) before, the rest after, none of which wins a maximum.

    Where the two differ, by one, no pad is put in front of the pool: it is the pool's own padding (-inf), and what
    that gives too much is cut off.
    """

    def __init__(self, layer: MaxPool) -> None:
        super().__init__()
        self.size, self.stride, self.padding = layer.size, layer.stride, layer.padding

    def forward(self, x_NCHW: Tensor) -> Tensor:
        size, stride = self.size, self.stride
        before = self.padding // 2
        if 2 * before == self.padding:
            return functional.max_pool2d(x_NCHW, size, stride, before)
        if stride == 1:  # one more before as well, and without the first window
            return functional.max_pool2d(x_NCHW, size, 1, before + 1)[:, :, 1:, 1:]
        spans = [side + 2 * before - size for side in _sides(x_NCHW)]
        wanted = [(span + 1) // stride for span in spans]
        if wanted == [span // stride for span in spans]:  # no window reaches the last column of the padding
            return functional.max_pool2d(x_NCHW, size, stride, before)
        pooled = functional.max_pool2d(x_NCHW, size, stride, before, ceil_mode=True)
        exact = wanted == [-(-span // stride) for span in spans]
        return pooled if exact else pooled[:, :, : wanted[0] + 1, : wanted[1] + 1]


def _sides(x_NCHW: Tensor) -> tuple[int, int]:
    """Height and width, also in a trace, which holds for one size and may depend on it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        return int(x_NCHW.shape[2]), int(x_NCHW.shape[3])


@dataclass(frozen=True, slots=True)
class _Step:
    """One layer to run, the maps it reads, and those that nobody reads after it."""

    index: int
    inputs: tuple[int, ...]
    release: tuple[int, ...]


class DarknetNet(nn.Module):
    """The network of a Darknet cfg, from `[N, 3, H, W]` float, RGB in [0, 1].

    - classifier: logits `[N, num_classes]`. A [softmax] of the cfg is LEFT OFF, as in every network here: what follows
      applies it, and the order of the classes is the same. The classes are in the cfg's own order.
    - detector: for each [yolo], in the cfg's order, the raw map before it `[N, masks * (5 + num_classes), H/s, W/s]`,
      with the activation of the convolution that gives it and nothing more.

    Batch norms use eps 1e-5, leaky ReLUs slope 0.1. A layer's map is let go after the last layer that reads it, and
    layers that no output needs do not run.

    Args:
        num_classes: for a check only; None takes the cfg's.

    Raises:
        ValueError: a layer does not fit the ones before it, or `num_classes` is not the cfg's.
    """

    def __init__(self, config: DarknetConfig, *, num_classes: int | None = None) -> None:
        super().__init__()
        plan = plan_network(config)
        if num_classes is not None and num_classes != plan.num_classes:
            raise ValueError(f"num_classes: got {num_classes}, expected {plan.num_classes}, which the cfg has")
        self.config = config
        self.plan = plan
        self.layers = nn.ModuleList(
            _module(layer, _chs(plan, one.inputs, config))
            for layer, one in zip(config.layers, plan.layers, strict=True)
        )
        self._forward_steps = _schedule(plan, plan.outputs)
        self._feature_steps = _schedule(plan, plan.levels)

    @property
    def task(self) -> Literal["classify", "detect"]:
        """What the outputs are: logits, or the raw maps of detection heads."""
        return self.plan.task

    @property
    def num_classes(self) -> int:
        """Classes of the classifier or of every head."""
        return self.plan.num_classes

    @property
    def output_names(self) -> tuple[str, ...]:
        """`("logits",)`, or `head_s8` and so on by stride; `head_s8_0`, `head_s8_1` where two have one stride."""
        return self.plan.output_names

    @property
    def feature_levels(self) -> tuple[FeatureLevel, ...]:
        """The levels of `forward_features`, finest first.

        They are the last layer of each stride in the backbone, which ends before the first [upsample] or [yolo], or
        before the last [avgpool] and the convolution that gives the classes. Of a detector only layers count that are
        read after its backbone: what its neck takes in.
        """
        layers = (self.plan.layers[index] for index in self.plan.levels)
        return tuple(FeatureLevel(layer.stride, layer.num_chs) for layer in layers)

    def forward(self, x_NCHW: Tensor) -> Tensor | tuple[Tensor, ...]:
        maps = self._run(x_NCHW, self._forward_steps, self.plan.outputs)
        return torch.flatten(maps[0], 1) if self.task == "classify" else maps

    def forward_features(self, x_NCHW: Tensor) -> tuple[Tensor, ...]:
        """One map `[N, num_chs, H/stride, W/stride]` for each of `feature_levels`."""
        return self._run(x_NCHW, self._feature_steps, self.plan.levels)

    def _run(self, x_NCHW: Tensor, steps: Sequence[_Step], wanted: Sequence[int]) -> tuple[Tensor, ...]:
        alive = {IMAGE: x_NCHW}
        for step in steps:
            alive[step.index] = self.layers[step.index](*(alive[index] for index in step.inputs))
            for index in step.release:
                del alive[index]
        return tuple(alive[index] for index in wanted)


def _chs(plan: NetworkPlan, inputs: Sequence[int], config: DarknetConfig) -> list[int]:
    return [config.net.channels if index == IMAGE else plan.layers[index].num_chs for index in inputs]


def _module(layer: Layer, chs: Sequence[int]) -> nn.Module:
    match layer:
        case Convolutional():
            return ConvolutionalLayer(layer, chs[0])
        case Shortcut():
            return ShortcutLayer(layer, chs)
        case Route():
            return RouteLayer(layer, chs)
        case MaxPool():
            return MaxPoolLayer(layer)
        case AvgPool():
            return nn.AdaptiveAvgPool2d(1)
        case Upsample():
            return nn.Upsample(scale_factor=layer.stride, mode="nearest")
    return nn.Identity()  # dropout, cost; softmax and yolo, which are no part of the built network


def _schedule(plan: NetworkPlan, wanted: Collection[int]) -> tuple[_Step, ...]:
    """What to run, in order, for the maps of `wanted`, and when each map has had its last reader."""
    needed = set(wanted)
    for index in range(len(plan.layers) - 1, -1, -1):
        if index in needed:
            needed.update(plan.layers[index].inputs)
    order = sorted(needed - {IMAGE})
    last_use: dict[int, int] = {}
    for index in order:
        last_use.update(dict.fromkeys(plan.layers[index].inputs, index))
    steps: list[_Step] = []
    for index in order:
        inputs = plan.layers[index].inputs
        done = tuple(one for one in dict.fromkeys(inputs) if last_use[one] == index and one not in wanted)
        steps.append(_Step(index, inputs, done))
    return tuple(steps)
