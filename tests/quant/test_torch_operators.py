"""Every operator against ONNX Runtime, in the forms that exporters write."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from cspdeploy.quant.torch_graph import TorchGraph
from tests.quant.small_graphs import by_onnxruntime, by_torch, graph_of, images

RNG = np.random.default_rng(1)


def f32(*shape: int) -> np.ndarray[Any, Any]:
    return RNG.standard_normal(shape).astype(np.float32)


def i64(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, np.int64)


Case = tuple[str, dict[str, np.ndarray[Any, Any]], dict[str, Any]]

CASES: dict[str, Case] = {
    "conv": ("Conv", {"w": f32(4, 6, 3, 3), "b": f32(4)}, {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
    "conv, groups": ("Conv", {"w": f32(4, 3, 3, 3)}, {"group": 2, "dilations": [2, 2]}),
    "conv, one-sided": ("Conv", {"w": f32(4, 6, 3, 3), "b": f32(4)}, {"pads": [0, 1, 2, 0]}),
    "conv, same upper": ("Conv", {"w": f32(4, 6, 4, 3)}, {"auto_pad": "SAME_UPPER", "strides": [2, 3]}),
    "conv, same lower": ("Conv", {"w": f32(4, 6, 4, 3)}, {"auto_pad": "SAME_LOWER", "strides": [1, 2]}),
    "conv, valid": ("Conv", {"w": f32(4, 6, 3, 3)}, {"auto_pad": "VALID"}),
    "deconv": ("ConvTranspose", {"w": f32(6, 4, 3, 3), "b": f32(4)}, {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
    "deconv, groups": ("ConvTranspose", {"w": f32(6, 2, 2, 2), "b": f32(4)}, {"group": 2, "strides": [2, 2]}),
    "deconv, extra": (
        "ConvTranspose", {"w": f32(6, 4, 3, 3)},
        {"strides": [2, 2], "pads": [1, 0, 0, 1], "output_padding": [1, 1], "dilations": [1, 2]},
    ),
    "deconv, shape": ("ConvTranspose", {"w": f32(6, 4, 3, 3)}, {"strides": [2, 2], "output_shape": [18, 16]}),
    "deconv, same": ("ConvTranspose", {"w": f32(6, 4, 4, 3)}, {"strides": [3, 2], "auto_pad": "SAME_UPPER"}),
    "max pool": ("MaxPool", {}, {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    "max pool, one-sided": ("MaxPool", {}, {"kernel_shape": [2, 2], "pads": [0, 0, 1, 1]}),
    "max pool, ceil": ("MaxPool", {}, {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}),
    "max pool, same": ("MaxPool", {}, {"kernel_shape": [5, 5], "auto_pad": "SAME_UPPER"}),
    "average pool": ("AveragePool", {}, {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    "average pool, counted": (
        "AveragePool", {}, {"kernel_shape": [3, 3], "pads": [1, 0, 1, 2], "count_include_pad": 1},
    ),
    "average pool, one-sided": ("AveragePool", {}, {"kernel_shape": [3, 2], "pads": [0, 1, 2, 0]}),
    "average pool, ceil": ("AveragePool", {}, {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}),
    "pad": ("Pad", {"p": i64(0, 0, 1, 2, 0, 1, 0, 3), "v": np.float32(1.5)}, {}),
    "pad, reflect": ("Pad", {"p": i64(0, 0, 1, 2, 0, 0, 0, 3)}, {"mode": "reflect"}),
    "flatten": ("Flatten", {}, {}),
    "flatten, axis": ("Flatten", {}, {"axis": -1}),
    "reshape": ("Reshape", {"s": i64(0, 3, -1)}, {}),
    "transpose": ("Transpose", {}, {"perm": [0, 2, 3, 1]}),
    "transpose, all": ("Transpose", {}, {}),
    "unsqueeze": ("Unsqueeze", {"a": i64(-1, 1)}, {}),
    "slice": ("Slice", {"s": i64(1, -6), "e": i64(2**62, -1), "a": i64(1, -1), "t": i64(2, 3)}, {}),
    "slice, backwards": ("Slice", {"s": i64(-1), "e": i64(-(2**62)), "a": i64(2), "t": i64(-1)}, {}),
    "split": ("Split", {"n": i64(2, 4)}, {"axis": 1}),
    "gather": ("Gather", {"i": np.array([[0, -1], [3, 1]], np.int64)}, {"axis": 1}),
    "gather, one": ("Gather", {"i": np.array(-2, np.int64)}, {"axis": 2}),
    "mean": ("ReduceMean", {"a": i64(2, -1)}, {"keepdims": 1}),
    "sum": ("ReduceSum", {"a": i64(1)}, {"keepdims": 0}),
    "max": ("ReduceMax", {"a": i64(1)}, {}),
    "min of all": ("ReduceMin", {}, {"keepdims": 0}),
    "softmax": ("Softmax", {}, {"axis": -1}),
    "softmax, channels": ("Softmax", {}, {"axis": 1}),
    "softmax, default": ("Softmax", {}, {}),
    "prelu": ("PRelu", {"s": f32(6, 1, 1)}, {}),
    "leaky relu": ("LeakyRelu", {}, {"alpha": 0.1}),
    "leaky relu, default": ("LeakyRelu", {}, {}),
    "elu": ("Elu", {}, {"alpha": 0.7}),
    "relu": ("Relu", {}, {}),
    "sigmoid": ("Sigmoid", {}, {}),
    "hard sigmoid": ("HardSigmoid", {}, {"alpha": 0.25}),
    "hard swish": ("HardSwish", {}, {}),
    "tanh": ("Tanh", {}, {}),
    "exp": ("Exp", {}, {}),
    "abs": ("Abs", {}, {}),
    "neg": ("Neg", {}, {}),
    "erf": ("Erf", {}, {}),
    "softplus": ("Softplus", {}, {}),
    "mish": ("Mish", {}, {}),
    "selu": ("Selu", {}, {}),  # nobody taught it to PyTorch here
    "lrn": ("LRN", {}, {"size": 3}),
    "clip": ("Clip", {"l": np.float32(-0.5), "h": np.float32(0.75)}, {}),
    "clip, open": ("Clip", {"l": np.float32(0)}, {}),
    "batch norm": (
        "BatchNormalization", {"s": f32(6), "b": f32(6), "m": f32(6), "v": np.square(f32(6))}, {"epsilon": 1e-3},
    ),
    "instance norm": ("InstanceNormalization", {"s": f32(6), "b": f32(6)}, {"epsilon": 1e-3}),
    "global average pool": ("GlobalAveragePool", {}, {}),
    "global max pool": ("GlobalMaxPool", {}, {}),
    "cast": ("Cast", {}, {"to": TensorProto.INT32}),
    "shape": ("Shape", {}, {"start": 1}),
    "expand": ("Expand", {"s": i64(2, 1, 6, 1, 1)}, {}),
    "add": ("Add", {"y": f32(6, 1, 1)}, {}),
    "sub": ("Sub", {"y": f32(1)}, {}),
    "mul": ("Mul", {"y": f32(1, 6, 1, 1)}, {}),
    "div": ("Div", {"y": 1 + np.square(f32(9))}, {}),
    "pow": ("Pow", {"y": np.float32(2)}, {}),
    "matmul": ("MatMul", {"y": f32(9, 4)}, {}),
    "concat": ("Concat", {"y": f32(2, 1, 8, 9)}, {"axis": -3}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_operator_against_onnxruntime(name: str) -> None:
    operator, weights, attributes = CASES[name]
    outputs = ["y0", "y1"] if operator == "Split" else ["y0"]
    opset = 18 if operator in ("ReduceMean", "ReduceMax", "ReduceMin", "Mish", "Split") else 17
    model = graph_of(
        [helper.make_node(operator, ["x", *weights], outputs, **attributes)], weights, shape=(2, 6, 8, 9), opset=opset
    )
    x = images(2, 6, 8, 9)
    expected = by_onnxruntime(model, x)
    found = by_torch(model, x)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_older_forms_with_attributes() -> None:
    x = images(2, 6, 8, 9)
    nodes = [
        helper.make_node("Pad", ["x"], ["p"], pads=[0, 0, 1, 0, 0, 0, 0, 1]),
        helper.make_node("Slice", ["p"], ["s"], axes=[1], starts=[1], ends=[5]),
        helper.make_node("Unsqueeze", ["s"], ["u"], axes=[0]),
        helper.make_node("Squeeze", ["u"], ["q"], axes=[0]),
        helper.make_node("Clip", ["q"], ["c"], min=-1.0, max=1.0),
        helper.make_node("Split", ["c"], ["a", "b"], axis=1),
        helper.make_node("Add", ["a", "b"], ["d"]),
        helper.make_node("ReduceMean", ["d"], ["y"], axes=[2, 3], keepdims=0),
    ]
    model = graph_of(nodes, {}, shape=(2, 6, 8, 9), opset=9)
    np.testing.assert_allclose(by_torch(model, x), by_onnxruntime(model, x), rtol=1e-5, atol=1e-6)


RESIZES = st.fixed_dictionaries({
    "mode": st.sampled_from(["nearest", "linear"]),
    "coordinate_transformation_mode": st.sampled_from(
        ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"]
    ),
    "nearest_mode": st.sampled_from(["floor", "ceil", "round_prefer_floor", "round_prefer_ceil"]),
})  # fmt: skip


@given(RESIZES, st.sampled_from([0.5, 1.0, 1.5, 2.0, 3.0, 4.0]), st.sampled_from([(4, 6), (5, 7), (1, 2)]))
def test_resize_against_onnxruntime(attributes: dict[str, str], scale: float, size: tuple[int, int]) -> None:
    """Whether torch or the reference computes it."""
    x = images(1, 2, *size)
    # One pixel wide: engines do not agree on where its centre is.
    assume(all(float(side * scale).is_integer() and side * scale > 1 for side in size))
    weights = {"r": np.empty(0, np.float32), "s": np.array([1, 1, scale, scale], np.float32)}
    model = graph_of([helper.make_node("Resize", ["x", *weights], ["y"], **attributes)], weights, shape=(1, 2, *size))
    np.testing.assert_allclose(by_torch(model, x), by_onnxruntime(model, x), rtol=1e-5, atol=1e-5)


def test_resize_by_sizes_and_upsample() -> None:
    x = images(1, 2, 4, 6)
    sizes = {"s": i64(1, 2, 8, 18)}
    model = graph_of([helper.make_node("Resize", ["x", "", "", "s"], ["y"])], sizes, shape=(1, 2, 4, 6))
    np.testing.assert_array_equal(by_torch(model, x), by_onnxruntime(model, x))
    scales = {"s": np.array([1, 1, 2, 3], np.float32)}
    model = graph_of([helper.make_node("Upsample", ["x", "s"], ["y"])], scales, shape=(1, 2, 4, 6), opset=9)
    np.testing.assert_array_equal(by_torch(model, x), by_onnxruntime(model, x))


def test_second_output_that_torch_does_not_give_comes_from_the_reference() -> None:
    nodes = [
        helper.make_node("MaxPool", ["x"], ["m", "i"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Cast", ["i"], ["y"], to=TensorProto.FLOAT),
    ]
    model, x = graph_of(nodes, {}, shape=(1, 2, 4, 4)), images(1, 2, 4, 4)
    np.testing.assert_array_equal(by_torch(model, x), by_onnxruntime(model, x))


def test_gradients_flow_to_weights() -> None:
    weights = {"w": f32(4, 6, 3, 3), "b": f32(4)}
    nodes = [helper.make_node("Conv", ["x", "w", "b"], ["c"]), helper.make_node("LeakyRelu", ["c"], ["y"])]
    graph = TorchGraph(graph_of(nodes, weights, shape=(2, 6, 8, 9)))
    weight = torch.from_numpy(weights["w"].copy()).requires_grad_()
    graph.run(torch.from_numpy(images(2, 6, 8, 9)), weights={"w": weight})["y"].square().sum().backward()
    assert weight.grad is not None
    assert float(weight.grad.abs().max()) > 0
