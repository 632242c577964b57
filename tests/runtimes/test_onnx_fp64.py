"""The FP64 reference: the operators that it computes itself, subgraphs, FP16 and quantised graphs, bad graphs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import parser

from cspdeploy.core.errors import InputError
from cspdeploy.runtimes import all_runtimes
from cspdeploy.runtimes.base import SessionRequest
from cspdeploy.runtimes.onnx_fp64 import open_exact

RUNTIME = all_runtimes()["onnx-fp64"]

OPERATORS = {
    "conv": "y = Conv<pads=[1,0,2,1], strides=[2,1], dilations=[1,2], group=2>(x, w)",
    "conv auto_pad": 'y = Conv<auto_pad="SAME_LOWER", strides=[2,2], group=2>(x, w)',
    "conv_transpose": "y = ConvTranspose<strides=[2,2], pads=[1,1,1,1], output_padding=[1,1]>(x, w)",
    "max_pool": "y = MaxPool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,0,1]>(x)",
    "max_pool ceil": "y = MaxPool<kernel_shape=[3,3], strides=[2,2], ceil_mode=1>(x)",
    "average_pool": "y = AveragePool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,0,1]>(x)",
    "average_pool with pad": "y = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad=1>(x)",
    "resize nearest": 'y = Resize<mode="nearest", nearest_mode="floor", '
    'coordinate_transformation_mode="asymmetric">(x, , scales)',
    "resize linear": 'y = Resize<mode="linear">(x, , scales)',
    "resize cubic": 'y = Resize<mode="cubic", coordinate_transformation_mode="align_corners">(x, , , sizes)',
    "cast": "h = Cast<to=10>(x) y = Cast<to=1>(h)",
    "quantise": "q = QuantizeLinear(x, step, zero) y = DequantizeLinear(q, step, zero)",
    "quantise by channel": "q = QuantizeLinear<axis=1>(x, steps, zeros) y = DequantizeLinear<axis=1>(q, steps, zeros)",
    "if": "c = Greater(one, half) y = If(c) <then_branch = t () => (float[N] a) { a = Mul(x, one) }, "
    "else_branch = e () => (float[N] b) { b = Neg(x) }>",
}


def _model(tmp_path: Path, body: str) -> Path:
    model = parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 18]>
        g (float[1,4,9,10] x) => (float[A,B,C,D] y)
        <float[4] scales = {{1.0, 1.0, 2.0, 1.5}}, int64[4] sizes = {{1, 4, 7, 21}}, float[1] one = {{1.0}},
         float[1] half = {{0.5}}, float step = {{0.05}}, uint8 zero = {{120}},
         float[4] steps = {{0.05, 0.1, 0.02, 0.04}},
         int8[4] zeros = {{0, 3, -4, 5}}> {{ {body} }}"""
    )
    rng = np.random.default_rng(0)
    if "(x, w)" in body:
        weight = rng.standard_normal((4, 2, 3, 3)).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("operator", OPERATORS)
def test_agrees_with_the_engine_to_its_rounding(tmp_path: Path, operator: str) -> None:
    path = _model(tmp_path, OPERATORS[operator])
    x = np.random.default_rng(1).standard_normal((1, 4, 9, 10)).astype(np.float32)
    expected = onnxruntime.InferenceSession(path).run(None, {"x": x})[0]
    found = RUNTIME.open(SessionRequest(path=path)).run({"x": x})["y"]
    assert (found.dtype, found.shape) == (np.float64, expected.shape)
    # FP16 is not rounded to here: half a unit of its 11 bits
    limit = 5e-4 if operator == "cast" else 1e-5
    np.testing.assert_allclose(found, expected, rtol=limit, atol=1e-5)


def test_computes_in_float64(tmp_path: Path) -> None:
    path = _model(tmp_path, "a = Conv<group=2>(x, w) y = Identity(a)")
    x = np.random.default_rng(1).standard_normal((1, 4, 9, 10)).astype(np.float32)
    exact, rounded = (open_exact(path, real=real).run({"x": x})["y"] for real in (np.float64, np.float32))
    assert (exact.dtype, rounded.dtype) == (np.float64, np.float32)
    assert 1e-9 < np.abs(exact - rounded).max() < 1e-5
    assert np.abs(exact - exact.astype(np.float32)).max() > 1e-9


def test_is_no_rung_and_reads_every_precision() -> None:
    assert RUNTIME.role == "reference"
    assert all(RUNTIME.reads(format_="onnx", precision=name) for name in ("fp32", "fp16", "int8"))
    assert RUNTIME.missing() is None
    RUNTIME.probe()


@pytest.mark.parametrize(
    ("body", "feeds", "message"),
    [
        ("y = Mystery(x)", {"x": (1, 4, 9, 10)}, "Mystery"),
        ("y = Identity(x)", {"z": (1, 4, 9, 10)}, "expected \\['x'\\]"),
        ("y = MatMul(x, x)", {"x": (1, 4, 9, 10)}, "MatMul"),
    ],
)
def test_says_which_node_it_cannot_compute(
    tmp_path: Path, body: str, feeds: dict[str, tuple[int, ...]], message: str
) -> None:
    path = _model(tmp_path, body)
    with pytest.raises(InputError, match=message):
        open_exact(path).run({name: np.ones(shape, np.float32) for name, shape in feeds.items()})


def test_refuses_what_is_no_onnx_file(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"never an ONNX file")
    with pytest.raises(InputError, match="not a"):
        open_exact(path)
