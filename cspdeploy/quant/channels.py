"""Channel classes: which channels of a graph can only be multiplied by a factor together.

The factor of a channel passes unchanged through whatever is positively homogeneous (LeakyRelu, pooling, resizing), is
the same for all that an Add joins, follows its values through Concat, Split and Reshape, and is free again behind every
convolution, whose weights take the difference in. What is none of this (Sigmoid, a bounded Clip, the graph's input and
outputs) holds its channels at 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from cspdeploy.quant.torch_graph import GraphNode, TorchGraph
from cspdeploy.quant.torch_shapes import axes_of

__all__ = ["ChannelClasses", "find_channel_classes"]

Indices = npt.NDArray[np.int64]

HOMOGENEOUS = frozenset({
    "Abs", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LeakyRelu", "MaxPool", "Neg", "PRelu", "Relu",
})  # fmt: skip
"""f(k x) = k f(x) for k > 0, channel by channel. PRelu as long as its slopes do not depend on the image."""

MOVES = frozenset({
    "Concat", "DepthToSpace", "Dropout", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "SpaceToDepth",
    "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
})  # fmt: skip
"""Every value that comes out is one that went in."""

JOINS = frozenset({"Add", "Max", "Min", "Sub", "Sum"})
"""f(k x, k y) = k f(x, y) for k > 0."""

LINEAR_REDUCTIONS = frozenset({"ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChannelClasses:
    """Which channels go together.

    Attributes:
        of: by tensor, the class of each channel, int64 `[C]` (axis 1).
        pinned: whether a class has to keep factor 1, bool `[num_classes]`.
        weighted: nodes with weights that take the difference of their input's and their output's factors in.
    """

    of: Mapping[str, Indices]
    pinned: npt.NDArray[np.bool_]
    weighted: tuple[GraphNode, ...]


def find_channel_classes(graph: TorchGraph) -> ChannelClasses:
    """Of every tensor that depends on the image and has channels (axis 1)."""
    finder = _Finder(graph)
    for node in graph.nodes:
        if any(name in finder.of for name in node.inputs):
            finder.visit(node)
    finder.pin(graph.output_names)
    return finder.classes()


class _Finder:
    """Walks the graph in order; a union-find over channels."""

    def __init__(self, graph: TorchGraph) -> None:
        self.graph, self.shapes = graph, graph.probe.shapes
        self.of: dict[str, Indices] = {}
        self.weighted: list[GraphNode] = []
        self._parents: list[int] = []
        self._pinned: set[int] = set()
        self._fresh(graph.input_name, pinned=True)

    def visit(self, node: GraphNode) -> None:
        rule = self._rule(node)
        if not rule(node):
            self.pin(node.inputs)
            for name in node.outputs:
                if name:
                    self._fresh(name, pinned=True)

    def pin(self, names: Iterable[str]) -> None:
        for name in names:
            self._pinned.update(int(channel) for channel in self.of.get(name, ()))

    def classes(self) -> ChannelClasses:
        roots = np.array([self._root(channel) for channel in range(len(self._parents))], np.int64)
        _, compact = np.unique(roots, return_inverse=True)
        pinned = np.zeros(int(compact.max(initial=-1)) + 1, np.bool_)
        pinned[compact[sorted(self._pinned)]] = True
        found = {name: compact[channels] for name, channels in self.of.items()}
        return ChannelClasses(of=found, pinned=pinned, weighted=tuple(self.weighted))

    def _rule(self, node: GraphNode) -> Callable[[GraphNode], bool]:
        operator = node.operator if node.domain in ("", "ai.onnx") else ""
        rules: dict[str, Callable[[GraphNode], bool]] = {
            "Conv": self._weighted, "ConvTranspose": self._weighted, "Gemm": self._weighted, "MatMul": self._weighted,
            "Mul": self._product, "Div": self._product, "Clip": self._clip, "Resize": self._resize,
            "Upsample": self._resize, "Pad": self._pad, "Shape": lambda node: True, "Size": lambda node: True,
            **dict.fromkeys(HOMOGENEOUS, self._keep), **dict.fromkeys(MOVES, self._move),
            **dict.fromkeys(JOINS, self._join), **dict.fromkeys(LINEAR_REDUCTIONS, self._reduce),
        }  # fmt: skip
        return rules.get(operator, lambda node: False)

    def _keep(self, node: GraphNode) -> bool:
        if any(name in self.of for name in node.inputs[1:]):
            return False
        return self._pass_on(node.inputs[0], node.outputs[0])

    def _pass_on(self, source: str, target: str) -> bool:
        if self.shapes[source][:2] != self.shapes[target][:2]:
            return False
        self.of[target] = self.of[source]
        return True

    def _weighted(self, node: GraphNode) -> bool:
        """Weights and bias of its own, or nothing can be folded into them."""
        own = [name for name in node.inputs[1:] if name]
        if not all(name in self.graph.weights and len(self.graph.consumers[name]) == 1 for name in own):
            return False
        if node.operator in ("Gemm", "MatMul"):
            two_axes = len(self.shapes[node.inputs[0]]) == 2 and self.graph.weights[own[0]].dim() == 2
            if not two_axes or node.attributes.get("transA", 0):
                return False
        channels = self.shapes[node.outputs[0]][1]
        if len(own) > 1 and self.graph.weights[own[1]].numel() != channels:
            return False
        self.weighted.append(node)
        self._fresh(node.outputs[0], pinned=False)
        return True

    def _product(self, node: GraphNode) -> bool:
        """By a constant, or by a gate that is itself held at 1 (squeeze-and-excitation): linear in the other one."""
        first, second = node.inputs
        if first in self.of and self._is_held(second):
            return self._pass_on(first, node.outputs[0])
        if node.operator == "Mul" and second in self.of and self._is_held(first):
            return self._pass_on(second, node.outputs[0])
        return False

    def _is_held(self, name: str) -> bool:
        held = {self._root(channel) for channel in self._pinned}
        return all(self._root(int(channel)) in held for channel in self.of.get(name, ()))

    def _clip(self, node: GraphNode) -> bool:
        """Relu by another name, and nothing else."""
        low, high = self._bound(node, "min", 1), self._bound(node, "max", 2)
        at_zero = low in (0.0, float("-inf")) and high == float("inf")
        return at_zero and self._pass_on(node.inputs[0], node.outputs[0])

    def _bound(self, node: GraphNode, name: str, position: int) -> float:
        given = node.inputs[position] if len(node.inputs) > position else ""
        if given:
            return float(self.graph.weights[given]) if given in self.graph.weights else float("nan")
        return float(node.attributes.get(name, float("-inf") if name == "min" else float("inf")))

    def _resize(self, node: GraphNode) -> bool:
        outside = node.attributes.get("coordinate_transformation_mode", b"") == b"tf_crop_and_resize"
        return not outside and self._keep(node)

    def _pad(self, node: GraphNode) -> bool:
        value = (
            self._constant(node, 2) if len(node.inputs) > 2 and node.inputs[2] else node.attributes.get("value", 0.0)
        )
        zeros = node.attributes.get("mode", b"constant") != b"constant" or value == 0.0
        return zeros and self._keep(node)

    def _constant(self, node: GraphNode, position: int) -> float | None:
        weight = self.graph.weights.get(node.inputs[position])
        return None if weight is None else float(weight)

    def _reduce(self, node: GraphNode) -> bool:
        given = [self.graph.weights.get(name) for name in node.inputs]
        axes = axes_of(node.attributes, given) or []
        rank = len(self.shapes[node.inputs[0]])
        return len(axes) > 0 and all(axis % rank > 1 for axis in axes) and self._keep(node)

    def _join(self, node: GraphNode) -> bool:
        """Of computed tensors with the same channels; what is broadcast along height and width is no harm."""
        if not all(name in self.of for name in node.inputs):
            return False
        shapes = [self.shapes[name] for name in node.inputs]
        if len({(len(shape), *shape[:2]) for shape in shapes}) != 1:
            return False
        for name in node.inputs[1:]:
            self._unite(self.of[node.inputs[0]], self.of[name])
        return self._pass_on(node.inputs[0], node.outputs[0])

    def _move(self, node: GraphNode) -> bool:
        """The channels' numbers go the way of the values; those that meet in one channel become one class."""
        moved = [name in self.of for name in node.inputs]
        if not (all(moved) if node.operator == "Concat" else moved[0] and not any(moved[1:])):
            return False
        taken = [self._numbers(name) if name in self.of else self._given(name) for name in node.inputs]
        for name, value in zip(node.outputs, self.graph.compute(node, taken), strict=False):
            if name and name in self.shapes:
                self._number(name, value)
        return True

    def _given(self, name: str) -> torch.Tensor | None:
        """An operator's second input: constant, or computed from the image's shape."""
        return self.graph.weights.get(name, self.graph.probe.integers.get(name))

    def _numbers(self, name: str) -> torch.Tensor:
        """A tensor of that shape that holds the number of each value's channel (float32 has them exactly)."""
        shape = self.shapes[name]
        along = torch.from_numpy(self.of[name].astype(np.float32))
        return along.reshape(1, -1, *[1] * (len(shape) - 2)).expand(shape).contiguous()

    def _number(self, name: str, value: torch.Tensor) -> None:
        if value.dim() < 2:
            self._pinned.update(int(number) for number in np.unique(value.numpy()))
            return
        rows = value.transpose(0, 1).flatten(1).numpy().astype(np.int64)
        for row in rows[rows.min(axis=1) != rows.max(axis=1)]:
            present = np.unique(row)
            self._unite(present[:-1], present[1:])
        self.of[name] = rows[:, 0].copy()

    def _fresh(self, name: str, *, pinned: bool) -> None:
        shape = self.shapes.get(name, ())
        if len(shape) < 2:
            return
        start = len(self._parents)
        self._parents.extend(range(start, start + shape[1]))
        self.of[name] = np.arange(start, start + shape[1])
        if pinned:
            self.pin([name])

    def _root(self, channel: int) -> int:
        while self._parents[channel] != channel:
            self._parents[channel] = self._parents[self._parents[channel]]
            channel = self._parents[channel]
        return channel

    def _unite(self, some: Indices, others: Indices) -> None:
        for one, other in zip(some.tolist(), others.tolist(), strict=True):
            self._parents[self._root(other)] = self._root(one)
