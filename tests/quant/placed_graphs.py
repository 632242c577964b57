"""Graphs that are small enough to see through, with weights drawn at random from a fixed seed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import numpy_helper, parser, shape_inference

from cspdeploy.quant.place import Layout
from cspdeploy.quant.placements import PLACEMENTS, Placement
from cspdeploy.quant.plan import Grid, QuantPlan, fit_weight_grid
from cspdeploy.quant.torch_graph import TorchGraph

Floats = npt.NDArray[np.float32]

ROWS = {name: dataclasses.replace(row, narrow_in_float=False) for name, row in PLACEMENTS.items()}
"""The first convolution of a small graph takes few channels; that it then stays in float is a test of its own."""

CHAIN = """
    c1 = Conv <pads = [1, 1, 1, 1], kernel_shape = [3, 3]> (x, w1, b1)
    a1 = LeakyRelu <alpha = 0.1> (c1)
    c2 = Conv (a1, w2, b2)
    a2 = LeakyRelu <alpha = 0.1> (c2)
    s = Add (a1, a2)
    j = Concat <axis = 1> (s, a1)
    c3 = Conv (j, w3, b3)
    a3 = Relu (c3)
    p = GlobalAveragePool (a3)
    f = Flatten (p)
    y = Gemm (f, w4, b4)
"""
CHAIN_WEIGHTS = {
    "w1": (8, 3, 3, 3), "b1": (8,), "w2": (8, 8, 1, 1), "b2": (8,), "w3": (6, 16, 1, 1), "b3": (6,), "w4": (6, 5),
    "b4": (5,),
}  # fmt: skip


def make(
    body: str,
    weights: dict[str, tuple[int, ...]],
    *,
    outputs: tuple[str, ...] = ("y",),
    opset: int = 17,
    x: str = "float[2, 3, 8, 8]",
    values: dict[str, npt.NDArray[np.generic]] | None = None,
) -> onnx.ModelProto:
    """A model in ONNX's text form; outputs are float32, of shapes that inference finds."""
    made = ", ".join(f"float[N] {name}" for name in outputs)
    text = f'<ir_version: 8, opset_import: ["" : {opset}]> net ({x} x) => ({made}) {{ {body} }}'
    model = parser.parse_model(text)
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in weights.items()} | (values or {})
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    for index, node in enumerate(model.graph.node):
        node.name = f"node{index}"
    del model.graph.output[:]
    known = {value.name: value for value in shape_inference.infer_shapes(model).graph.value_info}
    model.graph.output.extend(known[name] for name in outputs)
    return model


def chain() -> onnx.ModelProto:
    return make(CHAIN, CHAIN_WEIGHTS)


def images(num: int = 4, *, shape: tuple[int, ...] = (3, 8, 8)) -> Floats:
    return np.random.default_rng(1).normal(size=(num, *shape)).astype(np.float32)


def plan_by_extremes(graph: TorchGraph, layout: Layout, placement: Placement, x: Floats) -> QuantPlan:
    """Smallest and largest value of each tensor, the coarsest step of each group."""
    low, high = dict.fromkeys(layout.tensors, 0.0), dict.fromkeys(layout.tensors, 0.0)

    def visit(name: str, value: torch.Tensor) -> None:
        if name in low:
            low[name], high[name] = min(low[name], float(value.min())), max(high[name], float(value.max()))

    with torch.inference_mode():
        graph.run(torch.from_numpy(x), visit=visit)
    steps = {
        name: max(high[name], -low[name]) / 127 if placement.symmetric else (high[name] - low[name]) / 254
        for name in layout.tensors
    }
    for group in layout.groups:
        steps |= dict.fromkeys(group, max(steps[name] for name in group))
    first = 0 if placement.activation == "uint8" else -128
    zeros = {name: 0 if placement.symmetric else first + int(np.ceil(-low[name] / steps[name])) for name in steps}
    return QuantPlan(
        grids={
            name: Grid(scale=float(np.float32(steps[name])), zero_point=zeros[name], dtype=placement.activation)
            for name in layout.tensors
        },
        weights={
            name: fit_weight_grid(graph.weights[name].numpy(), axis=axis, limit=placement.weight_limit)
            for name, axis in layout.weights.items()
        },
        biases=layout.biases,
    )


def run_ort(model: onnx.ModelProto | Path, x: Floats, *, batch: int = 2) -> dict[str, Floats]:
    import onnxruntime

    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    found = [session.run(None, {"x": x[i : i + batch]}) for i in range(0, len(x), batch)]
    return {name: np.concatenate([outputs[i] for outputs in found]) for i, name in enumerate(names)}
