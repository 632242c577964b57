"""Small float graphs with one input "x", and what ONNX Runtime and TorchGraph make of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

from cspdeploy.quant.torch_graph import TorchGraph

Array = np.ndarray[Any, Any]


def graph_of(
    nodes: list[onnx.NodeProto], weights: Mapping[str, Array], *, shape: tuple[Any, ...], opset: int = 18
) -> onnx.ModelProto:
    """Input "x" of that shape (a name where a size is free); the output is the last node's first."""
    graph = helper.make_graph(
        nodes, "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_empty_tensor_value_info(nodes[-1].output[0])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    known = {value.name: value for value in onnx.shape_inference.infer_shapes(model).graph.output}
    model.graph.output[0].CopyFrom(known[nodes[-1].output[0]])  # ONNX Runtime wants the output's type
    return model


def by_onnxruntime(model: onnx.ModelProto, x: Array) -> Array:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: Array = session.run(None, {"x": x})[0]
    return found


def by_torch(model: onnx.ModelProto, x: Array) -> Array:
    (found,) = TorchGraph(model).run(torch.from_numpy(x)).values()
    return found.numpy()


def images(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
