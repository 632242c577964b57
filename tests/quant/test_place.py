from __future__ import annotations

import dataclasses

import onnx
import pytest

from cspdeploy.quant.place import EXCLUDED, LAST_MATRIX, LAST_PRODUCT, NARROW, Layout, lay_out
from cspdeploy.quant.placements import PLACEMENTS, Placement
from cspdeploy.quant.prepare import prepare_float
from cspdeploy.quant.torch_graph import TorchGraph
from tests.quant.placed_graphs import ROWS, chain, make

ORT = ROWS["ort-cpu"]


def placed(model: onnx.ModelProto, row: Placement = ORT, *, exclude: frozenset[str] = frozenset()) -> Layout:
    return lay_out(TorchGraph(prepare_float(model)), row, exclude=exclude)


def test_onnx_runtime_has_a_grid_wherever_an_integer_kernel_gives_one() -> None:
    layout = placed(chain())
    assert layout.tensors == ("x", "c1", "a1", "c2", "a2", "s", "j", "a3")
    assert layout.nodes == {"c1", "a1", "c2", "a2", "s", "j", "c3", "a3"}
    assert layout.float_nodes == {"y": LAST_MATRIX}
    assert layout.weights == {"w1": 0, "w2": 0, "w3": 0}
    assert layout.biases == {"b1": ("x", "w1"), "b2": ("a1", "w2"), "b3": ("j", "w3")}


def test_what_one_step_serves() -> None:
    layout = placed(chain())
    assert layout.groups == (frozenset({"c1", "a1", "c2", "a2", "s", "j"}),)
    assert layout.followed_by == {"c1": "a1", "c2": "a2"}


def test_tensor_that_others_take_before_its_activation_is_not_followed() -> None:
    body = "c = Conv (x, w, b) a = LeakyRelu (c) k = Concat <axis = 1> (c, a) y = Conv (k, v, u) z = Relu (y) " \
        "g = GlobalAveragePool (z) h = Conv (g, t, u)"  # fmt: skip
    shapes = {"w": (4, 3, 1, 1), "b": (4,), "v": (4, 8, 1, 1), "u": (4,), "t": (4, 4, 1, 1)}
    layout = placed(make(body, shapes, outputs=("h",)))
    assert {"c", "a"} <= set(layout.tensors)
    assert layout.followed_by == {}


@pytest.mark.parametrize("name", ["openvino", "tensorrt"])
def test_no_pair_between_convolution_and_activation_where_the_engine_fuses(name: str) -> None:
    layout = placed(chain(), ROWS[name])
    assert not {"c1", "c2", "c3", "a3"} & set(layout.tensors)
    assert layout.followed_by == {}
    assert {"x", "a1", "j"} <= set(layout.tensors)
    assert layout.biases == {}


def test_openvino_grids_at_inputs_of_convolutions_unless_joins_are_asked_for() -> None:
    row = ROWS["openvino"]
    assert placed(chain(), dataclasses.replace(row, joins=False)).tensors == ("x", "a1", "j")
    joined = placed(chain(), dataclasses.replace(row, joins=True))
    assert joined.tensors == ("x", "a1", "a2", "s", "j")
    assert joined.groups == (frozenset({"a1", "a2", "s", "j"}),)


def test_tensorrt_pairs_the_residual_branch_alone() -> None:
    body = "c1 = Conv (x, w, b) r1 = Relu (c1) c2 = Conv (r1, v, b) s = Add (c2, r1) r2 = Relu (s) " \
        "c3 = Conv (r2, v, b) y = Relu (c3)"  # fmt: skip
    layout = placed(make(body, {"w": (4, 3, 1, 1), "v": (4, 4, 1, 1), "b": (4,)}), ROWS["tensorrt"])
    assert layout.tensors == ("x", "r1", "r2")


def test_relu_is_absorbed_by_the_grid_behind_it() -> None:
    body = "c1 = Conv (x, w, b) r1 = Relu (c1) c2 = Conv (r1, v, b) s = Add (r1, c2) r2 = Relu (s) " \
        "c3 = Conv (r2, v, b) p = GlobalAveragePool (c3) f = Flatten (p) y = Gemm (f, m, n)"  # fmt: skip
    layout = placed(make(body, {"w": (4, 3, 1, 1), "v": (4, 4, 1, 1), "b": (4,), "m": (4, 2), "n": (2,)}))
    assert layout.tensors == ("x", "r1", "c2", "r2", "c3")
    assert layout.groups == (frozenset({"r1", "c2", "r2"}),)


def test_movers_lie_on_the_grid_of_what_they_take() -> None:
    body = "c = Conv (x, w, b) r = Relu (c) m = MaxPool <kernel_shape = [2, 2]> (r) " \
        "t = Transpose <perm = [0, 1, 3, 2]> (m) d = Conv (t, v, b) y = Relu (d)"  # fmt: skip
    layout = placed(make(body, {"w": (4, 3, 1, 1), "v": (4, 4, 1, 1), "b": (4,)}), ROWS["openvino"])
    assert layout.tensors == ("x", "r")
    assert layout.nodes >= {"m", "t"}


def test_split_halves_share_the_grid_before_it() -> None:
    body = "c = Conv (x, w, b) a = LeakyRelu (c) p, q = Split <axis = 1> (a) d = Conv (p, v, u) e = LeakyRelu (d) " \
        "k = Concat <axis = 1> (q, e) g = Conv (k, t, u) h = LeakyRelu (g) m = GlobalAveragePool (h) " \
        "f = Flatten (m) y = Gemm (f, s, r)"  # fmt: skip
    shapes = {"w": (4, 3, 1, 1), "b": (4,), "v": (2, 2, 1, 1), "u": (2,), "t": (2, 4, 1, 1), "s": (2, 2), "r": (2,)}
    layout = placed(make(body, shapes, opset=12))
    assert "p" not in layout.tensors
    assert layout.biases[next(name for name in layout.biases if layout.biases[name][1] == "v")][0] == "a"
    assert any(group >= {"c", "a", "d", "e", "k"} for group in layout.groups)


def test_detector_outputs_stay_in_float() -> None:
    body = "c = Conv (x, w, b) a = LeakyRelu (c) d = Conv (a, v, u) scores = Sigmoid (d) e = Conv (a, v, u) " \
        "boxes = Exp (e)"  # fmt: skip
    shapes = {"w": (4, 3, 1, 1), "b": (4,), "v": (2, 4, 1, 1), "u": (2,)}
    model = make(body, shapes, outputs=("scores", "boxes"))
    layout = placed(model)
    assert layout.float_nodes == {"d": LAST_PRODUCT, "e": LAST_PRODUCT}
    assert layout.tensors == ("x", "c", "a")
    # OpenVINO gives float sums from integer products: nothing is rounded on the way out.
    fused = placed(model, ROWS["openvino"])
    assert (fused.float_nodes, fused.tensors) == ({}, ("x", "a"))


def test_what_only_float_nodes_make_and_take_has_no_grid() -> None:
    body = "c = Conv (x, w, b) t = Tanh (c) e = Exp (c) s = Add (t, e) d = Conv (s, v, b) r = Relu (d) " \
        "p = GlobalAveragePool (r) f = Flatten (p) y = Gemm (f, m, n)"  # fmt: skip
    layout = placed(make(body, {"w": (4, 3, 1, 1), "v": (4, 4, 1, 1), "b": (4,), "m": (4, 2), "n": (2,)}))
    assert layout.tensors == ("x", "c", "s", "r")
    assert "s" not in layout.nodes


def test_excluded_nodes_stay_in_float() -> None:
    layout = placed(chain(), exclude=frozenset({"c2", "s"}))
    assert layout.float_nodes["c2"] == EXCLUDED
    assert not {"c2", "a2", "s"} & layout.nodes
    assert "c2" not in layout.tensors
    assert "w2" not in layout.weights


def test_matrix_products_before_the_last_are_quantised() -> None:
    body = "c = Conv (x, w, b) r = Relu (c) f = Flatten (r) g = Gemm (f, m, n) h = Relu (g) " \
        "y = Gemm <transB = 1> (h, q, s)"  # fmt: skip
    shapes = {"w": (4, 3, 1, 1), "b": (4,), "m": (256, 6), "n": (6,), "q": (2, 6), "s": (2,)}
    layout = placed(make(body, shapes))
    assert layout.weights == {"w": 0, "m": 1}
    assert layout.biases["n"] == ("r", "m")
    assert layout.float_nodes == {"y": LAST_MATRIX}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("d = ConvTranspose (c, v)", "transposed"),
        ("v2 = Mul (v, v) d = Conv (c, v2)", "computed in the graph"),
        ("d = Gemm <transA = 1> (x, v)", "transA"),
    ],
)
def test_why_a_product_stays_in_float(body: str, reason: str) -> None:
    gemm = "Gemm" in body
    text = body if gemm else f"c = Conv (x, w, b) {body}"
    last = "e = Gemm (d, t, u) y = Gemm (e, t, u)" if gemm else "e = Conv (d, v, u) y = Conv (e, v, u)"
    shapes: dict[str, tuple[int, ...]] = (
        {"v": (3, 4), "t": (4, 4), "u": (4,)} if gemm else {"w": (4, 3, 1, 1), "b": (4,), "v": (4, 4, 1, 1), "u": (4,)}
    )
    layout = placed(make(f"{text} {last}", shapes, x="float[3, 5]" if gemm else "float[2, 3, 8, 8]"))
    assert reason in layout.float_nodes["d"]


def test_grouped_and_depthwise_convolutions_are_quantised() -> None:
    body = "c = Conv (x, w, b) r = Relu (c) d = Conv <group = 4> (r, v, b) s = Relu (d) " \
        "e = Conv <group = 2> (s, t, b) y = Conv (e, w2, b)"  # fmt: skip
    shapes = {"w": (4, 3, 1, 1), "b": (4,), "v": (4, 1, 1, 1), "t": (4, 2, 1, 1), "w2": (4, 4, 1, 1)}
    assert set(placed(make(body, shapes)).weights) == {"w", "v", "t"}


def test_convolution_of_the_image_stays_in_float_where_that_is_faster() -> None:
    layout = placed(chain(), PLACEMENTS["ort-cpu"])
    assert layout.float_nodes["c1"] == NARROW
    assert "x" not in layout.tensors
    assert "c1" not in layout.tensors
    assert "a1" in layout.tensors
    assert not placed(chain(), PLACEMENTS["openvino"]).float_nodes.keys() & {"c1"}
