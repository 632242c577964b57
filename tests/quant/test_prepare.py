from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cspdeploy.core.errors import InputError
from cspdeploy.quant.place import lay_out
from cspdeploy.quant.prepare import prepare_float
from cspdeploy.quant.torch_graph import TorchGraph
from cspdeploy.quant.write import write_qdq
from tests.quant.placed_graphs import ROWS, chain, images, make, plan_by_extremes, run_ort

NORMED = "c = Conv (x, w) n = BatchNormalization <epsilon = 0.001> (c, g, s, m, v) y = Relu (n)"
NORM_SHAPES = {"w": (4, 3, 3, 3), "g": (4,), "s": (4,), "m": (4,)}
VARIANCE = {"v": np.array([0.5, 1.0, 2.0, 0.1], np.float32)}


def weights_of(model: onnx.ModelProto) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def assert_same(model: onnx.ModelProto, ready: onnx.ModelProto) -> None:
    onnx.checker.check_model(ready, full_check=True)
    x = images()
    expected, found = run_ort(model, x), run_ort(ready, x)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5)


def test_batch_norm_is_folded_into_the_convolution_before_it() -> None:
    model = make(NORMED, NORM_SHAPES, values=VARIANCE)
    ready = prepare_float(model)
    assert [node.op_type for node in ready.graph.node] == ["Conv", "Relu"]
    assert_same(model, ready)


def test_batch_norm_of_a_tensor_that_others_take_is_left() -> None:
    model = make(f"{NORMED} z = Sigmoid (c)", NORM_SHAPES, values=VARIANCE, outputs=("y", "z"))
    ready = prepare_float(model)
    assert "BatchNormalization" in {node.op_type for node in ready.graph.node}
    assert_same(model, ready)


def test_every_product_gets_weights_and_a_bias_of_its_own() -> None:
    model = make("c = Conv (x, w) r = Relu (c) y = Conv (r, w)", {"w": (3, 3, 1, 1)})
    ready = prepare_float(model)
    convs = [node for node in ready.graph.node if node.op_type == "Conv"]
    names = [name for node in convs for name in node.input[1:]]
    assert len(names) == len(set(names)) == 4
    assert not weights_of(ready)[convs[0].input[2]].any()
    assert_same(model, ready)


def test_factors_of_a_gemm_go_into_its_weights() -> None:
    body = "f = Flatten (x) y = Gemm <alpha = 0.5, beta = 2.0, transB = 1> (f, m, n)"
    model = make(body, {"m": (4, 192), "n": (1,)})
    ready = prepare_float(model)
    gemm = ready.graph.node[-1]
    assert {attribute.name for attribute in gemm.attribute} == {"transB"}
    assert weights_of(ready)[gemm.input[2]].shape == (4,)
    assert_same(model, ready)


def test_constants_become_initializers() -> None:
    model = make("k = Constant <value_float = 0.5> () h = Mul (x, k) y = Conv (h, w)", {"w": (2, 3, 1, 1)})
    ready = prepare_float(model)
    assert weights_of(ready)["k"] == np.float32(0.5)
    assert_same(model, ready)


def test_weights_that_are_inputs_as_well_are_weights_alone() -> None:
    model = chain()
    model.ir_version = 3
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, tensor.dims))
    ready = prepare_float(model)
    assert [value.name for value in ready.graph.input] == ["x"]
    assert ready.ir_version >= 4


def test_scales_for_each_channel_on_an_opset_11_file_give_a_valid_model() -> None:
    body = "c = Conv (x, w, b) a = LeakyRelu (c) d = Conv (a, v, b) e = LeakyRelu (d) p = GlobalAveragePool (e) " \
        "f = Flatten (p) y = Gemm (f, m, n)"  # fmt: skip
    shapes = {"w": (4, 3, 3, 3), "v": (4, 4, 1, 1), "b": (4,), "m": (4, 2), "n": (2,)}
    model = make(body, shapes, opset=11)
    ready = prepare_float(model)
    assert ready.opset_import[0].version == 13
    assert_same(model, ready)
    graph = TorchGraph(ready)
    layout = lay_out(graph, ROWS["ort-cpu"])
    written = write_qdq(ready, plan_by_extremes(graph, layout, ROWS["ort-cpu"], images()))
    onnx.checker.check_model(written, full_check=True)
    np.testing.assert_allclose(run_ort(written, images())["y"], run_ort(model, images())["y"], atol=0.5)


def test_source_is_left_alone() -> None:
    model = make(NORMED, NORM_SHAPES, values=VARIANCE)
    before = model.SerializeToString(deterministic=True)
    prepare_float(model)
    assert model.SerializeToString(deterministic=True) == before


def test_subgraphs_keep_what_they_capture() -> None:
    model = make("c = Conv (x, w, b) y = Relu (c)", {"w": (4, 3, 1, 1), "b": (4,)})
    branch = helper.make_graph(
        [helper.make_node("Mul", ["y", "unused"], ["inner"])], "branch", [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
    )  # fmt: skip
    model.graph.initializer.append(numpy_helper.from_array(np.float32(2.0), "unused"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "always"))
    model.graph.node.append(helper.make_node("If", ["always"], ["z"], then_branch=branch, else_branch=branch))
    assert "unused" in weights_of(prepare_float(model))


@pytest.mark.parametrize("operator", ["QuantizeLinear", "QLinearConv", "ConvInteger", "DynamicQuantizeLinear"])
def test_quantised_file_is_refused(operator: str) -> None:
    model = chain()
    model.graph.node.append(helper.make_node(operator, ["x"], ["q"], name="already"))
    with pytest.raises(InputError, match=f"node already is a {operator}"):
        prepare_float(model)


def test_graph_without_a_product_is_refused() -> None:
    with pytest.raises(InputError, match="none of its 1 nodes"):
        prepare_float(make("y = Relu (x)", {}))


def test_other_floats_are_refused() -> None:
    model = chain()
    half = numpy_helper.to_array(model.graph.initializer[0]).astype(np.float16)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(half, "w1"))
    with pytest.raises(InputError, match="w1: float16, expected float32"):
        prepare_float(model)


def test_opset_beyond_the_placement_is_refused() -> None:
    model = chain()
    model.opset_import[0].version = 21
    with pytest.raises(InputError, match="opset 21: ort-cpu takes 20 at most"):
        prepare_float(model, placement=ROWS["ort-cpu"])


def test_opset_that_cannot_be_raised_is_refused() -> None:
    model = chain()
    model.opset_import[0].version = 11
    model.graph.node[1].op_type = "Unheard"
    with pytest.raises(InputError, match="opset 11 cannot be raised to 13"):
        prepare_float(model)


def test_bias_that_torch_shares_by_an_identity_is_an_initializer() -> None:
    body = "b2 = Identity (b) c = Conv (x, w, b) d = Conv (c, v, b2) y = Relu (d)"
    model = make(body, {"w": (4, 3, 1, 1), "v": (4, 4, 1, 1), "b": (4,)})
    ready = prepare_float(model)
    assert [node.op_type for node in ready.graph.node] == ["Conv", "Conv", "Relu"]
    assert_same(model, ready)
