"""A float32 ONNX graph as PyTorch computes it, with a hand on every tensor.

One executor serves observation, simulation of INT8, repair, sensitivity and training: it runs any number of images at
once whatever batch the file fixes, lets a function change any tensor on its way, and can be differentiated. Operators
that PyTorch is not taught here are computed by the onnx package's reference implementation (without a gradient).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper

from cspdeploy.core.errors import InputError
from cspdeploy.quant.torch_operators import OPERATORS, by_reference

__all__ = ["GraphNode", "Probe", "TorchGraph"]

ANY_SIZE_PX = 256
"""Of a probe where the file leaves height and width free: a multiple of every stride that detectors have."""

BATCHWISE = frozenset({
    "Abs", "Add", "AveragePool", "BatchNormalization", "Clip", "Constant", "Conv", "ConvTranspose", "Div", "Dropout",
    "Elu", "Exp", "GlobalAveragePool", "GlobalMaxPool", "HardSigmoid", "HardSwish", "Identity",
    "InstanceNormalization", "LeakyRelu", "MaxPool", "Mish", "Mul", "Neg", "PRelu", "Relu", "Resize", "Sigmoid",
    "Softplus", "Sqrt", "Sub", "Tanh", "Upsample",
})  # fmt: skip
"""Each image's result comes from that image alone, whatever the attributes."""

SAME = 1e-4
"""Relative: PyTorch's kernels for other batches differ by rounding, a value of another image differs wholly."""

Change = Callable[[torch.Tensor], torch.Tensor]
Visit = Callable[[str, torch.Tensor], None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GraphNode:
    """A node; absent optional inputs are empty strings."""

    index: int
    name: str
    operator: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Probe:
    """What a run of one image, or of the batch that the file fixes, shows: all shapes, and tensors of integers."""

    shapes: Mapping[str, tuple[int, ...]]
    integers: Mapping[str, torch.Tensor]


class TorchGraph:
    """A graph with one image input.

    Attributes:
        nodes: in an order in which they can be computed.
        weights: initializers and constants; float32 ones may be replaced in a run.
        uses: how often nodes take a tensor, the graph's own outputs counted too.
        producers: node that makes a tensor; consumers: nodes and positions that take it.

    Raises:
        InputError: not exactly one input that is not a weight.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        self.model = model
        self.weights = {tensor.name: torch.from_numpy(np.array(numpy_helper.to_array(tensor)))
                        for tensor in graph.initializer}  # fmt: skip
        inputs = [value.name for value in graph.input if value.name not in self.weights]
        if len(inputs) != 1:
            raise InputError(f"inputs {inputs}: expected one, the image", fix="export the network with one input")
        self.input_name, self.output_names = inputs[0], tuple(value.name for value in graph.output)
        self.nodes: tuple[GraphNode, ...] = tuple(_node(i, node) for i, node in enumerate(graph.node))
        for node in self.nodes:
            if node.operator == "Constant" and "value" in node.attributes:
                self.weights[node.outputs[0]] = torch.from_numpy(
                    np.array(numpy_helper.to_array(node.attributes["value"]))
                )
        self.producers = {name: node for node in self.nodes for name in node.outputs if name}
        self.consumers: dict[str, list[tuple[GraphNode, int]]] = {}
        for node in self.nodes:
            for position, name in enumerate(node.inputs):
                if name:
                    self.consumers.setdefault(name, []).append((node, position))
        self._computes = [
            OPERATORS.get(node.operator) if node.domain in ("", "ai.onnx") else None for node in self.nodes
        ]
        self._image_shape: tuple[int, ...] = ()
        self._probed_shape: tuple[int, ...] = ()
        self._references: dict[int, Callable[..., Any]] = {}
        self.uses = Counter(name for node in self.nodes for name in node.inputs) + Counter(self.output_names)

    def run(
        self,
        x_NCHW: torch.Tensor,
        *,
        weights: Mapping[str, torch.Tensor] | None = None,
        changes: Mapping[str, Change] | None = None,
        visit: Visit | None = None,
    ) -> dict[str, torch.Tensor]:
        """Compute all outputs of a batch `[N, C, H, W]` float32, N free.

        Args:
            weights: in place of initializers.
            changes: by tensor, what is done to it before anyone takes it.
            visit: is given every floating-point tensor that depends on the image, in order, before its change.
        """
        self._image_shape = tuple(x_NCHW.shape[1:])
        if any(node.operator == "Reshape" for node in self.nodes):
            _ = self.probe  # the shapes that the file means
        constants = {**self.weights, **(weights or {})}

        def see(name: str, value: torch.Tensor) -> None:
            if visit is not None and value.is_floating_point():
                visit(name, value)

        apart = len(x_NCHW) not in (1, self._declared()[0]) and self.one_by_one
        parts = torch.split(x_NCHW, 1) if apart else (x_NCHW,)
        found = [self._walk(part, dict(constants), changes or {}, see) for part in parts]
        return found[0] if len(found) == 1 else {name: torch.cat([one[name] for one in found]) for name in found[0]}

    def _walk(
        self, x_NCHW: torch.Tensor, constants: dict[str, torch.Tensor], changes: Mapping[str, Change], visit: Visit
    ) -> dict[str, torch.Tensor]:
        known: dict[str, torch.Tensor] = {}
        left = self.uses.copy()

        def keep(name: str, value: torch.Tensor) -> None:
            visit(name, value)
            known[name] = changes[name](value) if name in changes else value

        keep(self.input_name, x_NCHW)
        for node in self.nodes:
            moving = any(name in known for name in node.inputs)
            if not moving and all(name in constants for name in node.outputs):
                continue
            taken = [known.get(name, constants.get(name)) if name else None for name in node.inputs]
            for name, value in zip(node.outputs, self.compute(node, taken), strict=False):
                if name and moving:
                    keep(name, value)
                elif name:
                    constants[name] = value
            for name in node.inputs:
                left[name] -= 1
                if left[name] == 0:
                    known.pop(name, None)
        return {name: known[name] if name in known else constants[name] for name in self.output_names}

    @cached_property
    def probe(self) -> Probe:
        """Of the batch and the size that the file declares; one image, of the last run's size, where it leaves it."""
        shapes: dict[str, tuple[int, ...]] = {}
        integers: dict[str, torch.Tensor] = {}

        def note(name: str, value: torch.Tensor) -> None:
            shapes[name] = tuple(value.shape)
            if not value.is_floating_point():
                integers[name] = value

        with torch.inference_mode():
            self._walk(torch.zeros(self._declared()[0] or 1, *self._image_size()), dict(self.weights), {}, note)
        self._probed_shape = self._image_size()
        return Probe(shapes=shapes, integers=integers)

    @cached_property
    def one_by_one(self) -> bool:
        """Whether several images at once would not give what each gives by itself.

        A file made for one image may move values across the axis of the images. Tried on random images where an
        operator could do so.
        """
        if all(self._keeps_images_apart(node) for node in self.nodes):
            return False
        _ = self.probe
        images = torch.rand(2, *self._image_size(), generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            singly = [self._outputs(image) for image in torch.split(images, 1)]
            try:
                together = self._outputs(images)
            except InputError:
                return True
        return any(
            both.shape != (joined := torch.cat([one[i] for one in singly])).shape
            or not torch.allclose(both, joined, rtol=SAME, atol=SAME * float(joined.abs().max()))
            for i, both in enumerate(together)
        )

    def _keeps_images_apart(self, node: GraphNode) -> bool:
        if node.operator in ("Concat", "Softmax"):
            return int(node.attributes.get("axis", -1)) > 0
        if node.operator == "Flatten":
            return int(node.attributes.get("axis", 1)) == 1
        if node.operator in ("Gemm", "MatMul"):
            return node.inputs[1] in self.weights and not node.attributes.get("transA", 0)
        return node.operator in BATCHWISE

    def _outputs(self, images: torch.Tensor) -> list[torch.Tensor]:
        found = self._walk(images, dict(self.weights), {}, lambda name, value: None)
        return [value.float() for value in found.values()]

    def compute(self, node: GraphNode, taken: list[torch.Tensor | None]) -> list[torch.Tensor]:
        """One node by itself, on the values that it takes.

        Raises:
            InputError: neither PyTorch nor the onnx package's reference can.
        """
        try:
            own = self._computes[node.index]
            found = own(node.attributes, self._for_batch(node, taken)) if own is not None else None
            if found is not None and len(found) >= len([name for name in node.outputs if name]):
                return found
            if node.index not in self._references:
                self._references[node.index] = by_reference(self.model, self.model.graph.node[node.index])
            return list(self._references[node.index](taken))
        except Exception as error:
            shapes = [tuple(value.shape) for value in taken if value is not None]
            raise InputError(
                f"node {node.name or node.outputs[0]} ({node.operator}): inputs of shapes {shapes} cannot be computed: "
                f"{error}",
                fix="check the file with: cspdeploy inspect FILE",
            ) from error

    def _for_batch(self, node: GraphNode, taken: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Reshape to a shape that is written for the file's own batch: its first axis grows as the input has."""
        shape = self.weights.get(node.inputs[1]) if node.operator == "Reshape" and len(node.inputs) > 1 else None
        probed = "probe" in self.__dict__ and self._image_shape in ((), self._probed_shape)
        if shape is None or taken[0] is None or not probed:
            return taken
        sizes = list(self.probe.shapes.get(node.outputs[0], ()))
        expected = math.prod(sizes)
        if not sizes or shape[0] < 1 or expected == 0 or (sizes[0] * taken[0].numel()) % expected:
            return taken
        return [taken[0], torch.tensor([sizes[0] * taken[0].numel() // expected, *sizes[1:]])]

    def _image_size(self) -> tuple[int, ...]:
        """`(C, H, W)`."""
        return self._image_shape or tuple(size or ANY_SIZE_PX for size in self._declared()[1:])

    def _declared(self) -> list[int]:
        """Sizes of the input, 0 where the file leaves one free."""
        declared = next(value for value in self.model.graph.input if value.name == self.input_name)
        return [dim.dim_value for dim in declared.type.tensor_type.shape.dim]


def _node(index: int, node: onnx.NodeProto) -> GraphNode:
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if node.op_type == "Split":
        attributes.setdefault("num_outputs", len(node.output))  # before opset 18 the node's outputs alone tell
    return GraphNode(
        index=index, name=node.name, operator=node.op_type, domain=node.domain, inputs=tuple(node.input),
        outputs=tuple(node.output), attributes=attributes,
    )  # fmt: skip
