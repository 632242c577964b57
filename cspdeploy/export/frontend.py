"""Preprocessing before the network, and softmax with top-k after it, inside one ONNX file.

The network's own nodes are not touched: a float16 or INT8 file keeps its float32 input, which float32 nodes now make.
Shapes: N images, H height, W width, C classes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from cspdeploy.core.catalog import CLASSES_OUTPUT, IMAGE_INPUT, NORMALISED_NODE, PROBABILITIES_OUTPUT
from cspdeploy.core.errors import InputError
from cspdeploy.core.spec import Preprocess
from cspdeploy.core.types import Frontend
from cspdeploy.export.graph_part import GraphPart
from cspdeploy.export.resize_graph import add_resize
from cspdeploy.export.rewrite import subgraphs_of, write_model

__all__ = ["add_frontend", "write_pixel_graph"]

_PREFIX = NORMALISED_NODE.partition("/")[0]
_OUTPUT_OPSET = 18
_PIXELS = "pixels"


def add_frontend(source: Path, target: Path, *, contract: Preprocess, frontend: Frontend) -> None:
    """Write `source` with its preprocessing in the graph into `target`.

    The input is then "image", uint8 `[N, H, W, 3]` in `frontend.channel_order`, of any H and W where it resizes. With
    `frontend.top_k` there are "probabilities" float32 `[N, k]` and "classes" int64 `[N, k]` after the network's
    outputs, the likeliest first.

    Args:
        source: an ONNX file with one input, float32 `[N, 3, H, W]`.

    Raises:
        InputError: the network has tensors of its own under a name that is needed.
    """
    model = onnx.load(source)
    graph = model.graph
    _make_room(source, graph, frontend)
    given = {tensor.name for tensor in graph.initializer}
    taken = next(value for value in graph.input if value.name not in given)
    batch = taken.type.tensor_type.shape.dim[0]
    size: tuple[int | str, int | str] = ("H", "W") if frontend.resize else (contract.height_px, contract.width_px)
    image = helper.make_tensor_value_info(
        IMAGE_INPUT, TensorProto.UINT8, [batch.dim_param or batch.dim_value or "N", *size, 3]
    )
    front = GraphPart(_PREFIX)
    pixels = add_resize(front, IMAGE_INPUT, contract) if frontend.resize else IMAGE_INPUT
    _add_normalise(front, pixels, taken.name, contract, frontend)
    known = onnx.ValueInfoProto()
    known.CopyFrom(taken)  # so that shapes can be inferred behind a resize, whose result has none
    nodes = list(graph.node)
    kept = [value for value in graph.input if value.name in given]
    del graph.node[:], graph.input[:]
    graph.node.extend([*front.nodes, *nodes])
    graph.input.extend([image, *kept])
    graph.value_info.append(known)
    graph.initializer.extend(front.constants)
    if frontend.top_k:
        _add_top_k(graph, frontend.top_k, batch=batch.dim_param or batch.dim_value or "N")
    write_model(model, target)


def write_pixel_graph(target: Path, contract: Preprocess, *, opset: int = _OUTPUT_OPSET) -> None:
    """Write the resize alone: "image" uint8 `[1, H, W, 3]` of any size to "pixels" uint8 of the contract's size."""
    part = GraphPart(_PREFIX)
    pixels = add_resize(part, IMAGE_INPUT, contract)
    part.node("Identity", pixels, name=_PIXELS, output=_PIXELS)
    graph = helper.make_graph(
        part.nodes, _PIXELS,
        [helper.make_tensor_value_info(IMAGE_INPUT, TensorProto.UINT8, [1, "H", "W", 3])],
        [helper.make_tensor_value_info(_PIXELS, TensorProto.UINT8, [1, contract.height_px, contract.width_px, 3])],
        initializer=part.constants,
    )  # fmt: skip
    write_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)]), target)


def _add_normalise(part: GraphPart, pixels: str, output: str, contract: Preprocess, frontend: Frontend) -> None:
    """As `core.preprocess.normalise`: the same two roundings in float32, product and sum, so equal to the bit.

    The bytes are transposed before they are floats: a quarter of the memory to move.
    """
    x_NCHW = part.node("Transpose", pixels, name="transpose", perm=[0, 3, 1, 2])
    if frontend.channel_order != contract.channel_order:
        x_NCHW = part.node("Gather", x_NCHW, part.integers(2, 1, 0, name="reversed"), name="channels", axis=1)
    gain, offset = _constants(contract)
    floats = part.node("Cast", x_NCHW, name="cast", to=TensorProto.FLOAT)
    scaled = part.node("Mul", floats, part.constant(gain, np.float32, name="gain"), name="multiply")
    name = NORMALISED_NODE.removeprefix(f"{_PREFIX}/")
    part.node("Add", scaled, part.constant(offset, np.float32, name="offset"), name=name, output=output)


def _constants(contract: Preprocess) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Gain and offset of each channel, `[3, 1, 1]`, rounded once from float64 as `normalise` does it."""
    std = np.asarray(contract.std, np.float64).reshape(3, 1, 1)
    gain = (1.0 / (255.0 * std)).astype(np.float32)
    return gain, (-np.asarray(contract.mean, np.float64).reshape(3, 1, 1) / std).astype(np.float32)


def _add_top_k(graph: onnx.GraphProto, k: int, *, batch: int | str) -> None:
    """The largest scores, and their softmax. Sorted by the scores: probabilities that round to 0 are all alike."""
    part = GraphPart("topk")
    logits = graph.output[0].name
    largest = "topk/scores"
    part.nodes_of(
        "TopK", logits, part.integers(k, name="k"), name="topk", outputs=(largest, CLASSES_OUTPUT), axis=-1, largest=1,
        sorted=1,
    )  # fmt: skip
    softmax = part.node("Softmax", logits, name="softmax", axis=-1)
    part.node("GatherElements", softmax, CLASSES_OUTPUT, name="pick", output=PROBABILITIES_OUTPUT, axis=1)
    graph.node.extend(part.nodes)
    graph.initializer.extend(part.constants)
    for name, dtype in ((PROBABILITIES_OUTPUT, TensorProto.FLOAT), (CLASSES_OUTPUT, TensorProto.INT64)):
        graph.output.append(helper.make_tensor_value_info(name, dtype, [batch, k]))


def _make_room(source: Path, graph: onnx.GraphProto, frontend: Frontend) -> None:
    """Rename the network's own tensors where the frontend needs their names; an output's name is left as it is."""
    needed = {IMAGE_INPUT, *((PROBABILITIES_OUTPUT, CLASSES_OUTPUT) if frontend.top_k else ())}
    outputs = {value.name for value in graph.output}
    if needed & outputs:
        raise InputError(
            f"{source.name}: has an output '{min(needed & outputs)}' of its own, which preprocessing in the graph adds",
            fix="export it where it was made under another name",
        )
    for name in sorted(needed):
        _rename(graph, name, f"network/{name}")


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    """In the graph and in what its subgraphs capture."""
    for value in (*graph.input, *graph.value_info, *graph.initializer):
        if value.name == old:
            value.name = new
    for node in graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]
        for inner in subgraphs_of(node):
            _rename(inner, old, new)
