"""A small detector with everything that planted faults need: Conv, LeakyRelu, MaxPool, Resize, Concat, Add, Gemm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

_TEXT = """<ir_version: 8, opset_import: ["": 18]>
detector (float[1,3,32,32] image) => (float[1,18,16,16] boxes, float[1,10] scores)
<float[4] twice = {1.0, 1.0, 2.0, 2.0}> {
  a1 = Conv<pads=[1,1,1,1], strides=[2,2]>(image, w1, b1)
  a2 = LeakyRelu<alpha=0.1>(a1)
  a3 = Conv<pads=[1,1,1,1]>(a2, w2, b2)
  a4 = LeakyRelu<alpha=0.1>(a3)
  a5 = MaxPool<kernel_shape=[2,2], strides=[2,2]>(a4)
  a6 = Conv<pads=[0,0,0,0]>(a5, w3, b3)
  a7 = LeakyRelu<alpha=0.1>(a6)
  a8 = Resize<mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor">(a7, , twice)
  a9 = Concat<axis=1>(a8, a4)
  a10 = Conv<pads=[1,1,1,1]>(a9, w4, b4)
  a11 = LeakyRelu<alpha=0.1>(a10)
  a12 = Conv<pads=[1,1,1,1]>(a11, w6, b6)
  a13 = LeakyRelu<alpha=0.1>(a12)
  a14 = Add(a13, a11)
  boxes = Conv(a14, w5, b5)
  pooled = GlobalAveragePool(a14)
  flat = Flatten(pooled)
  scores = Gemm<transB=1>(flat, w7, b7)
}"""

_SHAPES = {"w1": (12, 3, 3, 3), "w2": (16, 12, 3, 3), "w3": (16, 16, 1, 1), "w4": (24, 32, 3, 3), "w5": (18, 24, 1, 1),
           "w6": (24, 24, 3, 3), "w7": (10, 24)}  # fmt: skip


def make_detector(*, seed: int = 0) -> onnx.ModelProto:
    """Random weights of the size that keeps activations near 1; every node is named after its output."""
    rng = np.random.default_rng(seed)
    model = parser.parse_model(_TEXT)
    for name, shape in _SHAPES.items():
        scale = np.sqrt(2 / np.prod(shape[1:]))
        model.graph.initializer.append(
            numpy_helper.from_array((scale * rng.standard_normal(shape)).astype(np.float32), name)
        )
        bias = (0.1 * rng.standard_normal(shape[0])).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(bias, f"b{name[1:]}"))
    for node in model.graph.node:
        node.name = f"/{node.output[0]}/{node.op_type}"
    return model


Edit = Callable[[onnx.ModelProto], None]


@pytest.fixture
def write_pair(tmp_path: Path) -> Callable[[Edit], tuple[Path, Path]]:
    """The detector, and the same after an edit."""

    def write(edit: Edit) -> tuple[Path, Path]:
        reference, faulty = tmp_path / "reference.onnx", tmp_path / "faulty.onnx"
        onnx.save(make_detector(), reference)
        model = make_detector()
        edit(model)
        onnx.save(model, faulty)
        return reference, faulty

    return write
