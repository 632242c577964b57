"""Small ONNX files, written as text."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT

HEADER = '<ir_version: 8, opset_import: ["" : 18, "com.example": 2]>'

NET = f"""{HEADER} net (float[N, 3, 8, 8] x) => (float[N, 4, 6, 6] y) {{
    c = Conv<pads = [0, 0, 0, 0], group = 1>(x, w, b)
    r = LeakyRelu<alpha = 0.125>(c)
    y = Clip(r, low)
}}"""

IF = f"""{HEADER} net (float[2] x, bool flag) => (float[2] y) {{
    outer = Relu(x)
    y = If(flag) <
        then_branch = then () => (float[2] t) {{ t = Neg(outer) }},
        else_branch = otherwise () => (float[2] e) {{ deeper = Abs(outer)  e = Add(deeper, k) }}
    >
}}"""


def arrays() -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    return {
        "w": rng.normal(size=(4, 3, 3, 3)).astype(np.float32), "b": np.zeros(4, np.float32),
        "low": np.float32(0.0), "k": np.ones(2, np.float32),
    }  # fmt: skip


def model_of(text: str, *weights: str) -> onnx.ModelProto:
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(arrays()[name]), name) for name in weights)
    return model


@functools.cache
def net() -> bytes:
    return bytes(model_of(NET, "w", "b", "low").SerializeToString())


Write = Callable[[onnx.ModelProto | bytes], Path]


def tensor_model(tensor: TensorProto) -> onnx.ModelProto:
    output = helper.make_tensor_value_info("y", FLOAT, [1])
    node = helper.make_node("Identity", [tensor.name], ["y"])
    return helper.make_model(helper.make_graph([node], "g", [], [output], [tensor]))
