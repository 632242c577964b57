"""Element types and shapes of a graph's tensors: from the file where it tells, else from one run on ONNX Runtime."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cspdeploy.core.child import child_command, child_environment, describe_exit
from cspdeploy.core.onnx_graph import Graph, Node, OnnxModel, Tensor
from cspdeploy.core.onnx_tensor import ELEMENT_TYPES
from cspdeploy.core.onnx_wire import printable

__all__ = ["InputShapes", "choose_input_shapes", "find_dtypes", "find_shapes", "run_for_shapes"]

Feeds = Mapping[str, npt.NDArray[np.generic]]

FREE_SIZE_PX = 256
"""Height and width that are free: a multiple of the stride of every usual network, and large enough for its pools."""
_IMAGE_RANK = 4  # NCHW or NHWC
TIME_LIMIT_S = 120.0
"""For one run at batch 1 with nothing optimised: a few seconds for the largest networks, so this is a hang."""
MAX_RUN_BYTES = 1 << 29
"""Larger files are not run just to learn shapes: ONNX Runtime needs several times their size in memory, and inspecting
a file must stay quick."""
_FIXED = {"Shape": "int64", "Size": "int64", "NonZero": "int64", "ArgMax": "int64", "ArgMin": "int64",
          "ConvInteger": "int32", "MatMulInteger": "int32", "DynamicQuantizeLinear": "uint8"}  # fmt: skip


class InputShapes(NamedTuple):
    """A shape for every input, and what had to be assumed for that, or an empty text."""

    shapes: dict[str, tuple[int, ...]]
    assumed: str


def choose_input_shapes(model: OnnxModel, *, feeds: Feeds | None = None) -> InputShapes:
    """One image: a free first dimension is 1, other free ones are those of `feeds`, else assumed and said.

    An input of unknown rank, or one that is no tensor, has no shape.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    assumed: list[str] = []
    for value in model.graph.inputs:
        given = feeds[value.name].shape if feeds and value.name in feeds else ()
        if value.shape is None and not given:
            continue
        dims: list[int] = []
        for axis, dim in enumerate(value.shape or given):
            if isinstance(dim, int) and dim >= 0:
                dims.append(dim)
            elif axis == 0:
                dims.append(1)
            elif axis < len(given):
                dims.append(given[axis])
            else:
                rank = len(value.shape or ())
                dims.append(FREE_SIZE_PX if rank == _IMAGE_RANK else 1)
                assumed.append(value.name)
        shapes[value.name] = tuple(dims)
    said = ", ".join(f"{name} {list(shapes[name])}" for name in dict.fromkeys(assumed))
    return InputShapes(shapes, f"sizes that the file leaves free were taken as {said}" if assumed else "")


def find_shapes(model: OnnxModel, inputs: InputShapes) -> dict[str, tuple[int, ...]]:
    """Shapes that the file knows, with the names that its inputs give to free dimensions filled in."""
    sizes: dict[str, int] = {}
    for value in model.graph.inputs:
        for dim, size in zip(value.shape or (), inputs.shapes.get(value.name, ()), strict=False):
            if isinstance(dim, str) and dim != "?":
                sizes.setdefault(dim, size)
    found = {name: tensor.shape for name, tensor in model.graph.initializers.items()}
    for node in model.graph.nodes:
        constant = node.attributes.get("value")
        if node.operator == "Constant" and isinstance(constant, Tensor):
            found[node.outputs[0]] = constant.shape
    for name, value in model.graph.values.items():
        dims = [sizes.get(dim, -1) if isinstance(dim, str) else dim for dim in value.shape or ()]
        if value.shape is not None and all(dim >= 0 for dim in dims):
            found[name] = tuple(dims)
    return {**found, **inputs.shapes}


def find_dtypes(graph: Graph) -> dict[str, str]:
    """Element type of every tensor of a graph, as far as the file and the operators' own rules tell it."""
    found = {name: tensor.dtype for name, tensor in graph.initializers.items()}
    found.update({name: value.dtype for name, value in graph.values.items() if value.dtype != "undefined"})
    for node in graph.nodes:
        dtype = _output_dtype(node, found)
        if dtype:
            for name in node.outputs[:1]:
                found.setdefault(name, dtype)
    return found


def _output_dtype(node: Node, found: Mapping[str, str]) -> str:
    inputs = [found.get(name, "") for name in node.inputs]
    if node.operator in _FIXED:
        return _FIXED[node.operator]
    if node.operator == "Cast":
        return ELEMENT_TYPES.get(_integer(node, "to"), "")
    if node.operator == "Constant":
        constant = node.attributes.get("value")
        return constant.dtype if isinstance(constant, Tensor) else ""
    if node.operator == "QuantizeLinear":
        return ELEMENT_TYPES.get(_integer(node, "output_dtype"), "") or (inputs[2] if len(inputs) > 2 else "uint8")
    if node.operator in ("DequantizeLinear", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"):
        place = 1 if node.operator == "DequantizeLinear" else 2  # a scale has the type of the result
        return inputs[place] if len(inputs) > place else ""
    if node.operator == "Where":  # the condition comes first
        inputs = inputs[1:]
    return next(iter(inputs), "")


def _integer(node: Node, name: str) -> int:
    value = node.attributes.get(name, 0)
    return value if isinstance(value, int) else 0


def run_for_shapes(model: OnnxModel, inputs: InputShapes, *, names: Iterable[str]) -> dict[str, tuple[int, ...]] | str:
    """Shapes of `names`, from one run on zeros in a process of its own; a text that says why there are none."""
    held = model.num_bytes + sum((model.path.parent / name).stat().st_size for name in model.external_data)
    if held > MAX_RUN_BYTES:
        return f"the file holds no shapes, and with {held / 1e9:.1f} GB is too large to be run for them"
    shapeless = [value.name for value in model.graph.inputs if value.name not in inputs.shapes]
    if shapeless:
        return f"the file holds no shapes, not even that of its input '{printable(shapeless[0])}'"
    task = {
        "path": str(model.path), "names": sorted(names),
        "inputs": {value.name: [value.dtype, inputs.shapes[value.name]] for value in model.graph.inputs},
        "outputs": [value.name for value in model.graph.outputs],
    }  # fmt: skip
    command = child_command("cspdeploy.check.shapes_child")
    try:
        done = subprocess.run(
            command, input=json.dumps(task), capture_output=True, text=True, timeout=TIME_LIMIT_S, check=False,
            env=child_environment(),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"ONNX Runtime did not run the file within {TIME_LIMIT_S:.0f} s"
    answer = _answer(done)
    if "shapes" not in answer:
        return f"the file holds no shapes, and ONNX Runtime does not run it ({answer['error']})"
    return {name: tuple(shape) for name, shape in answer["shapes"].items()}


def _answer(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The child's last line; what it died of where there is none."""
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"error": describe_exit(done.returncode)}
    return found
