from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest

from cspdeploy.export.rewrite import split_expansion_convolutions, write_model
from cspdeploy.runtimes.base import Outputs
from cspdeploy.runtimes.ort import CPU, OrtSession, open_cpu_session

Array = npt.NDArray[np.float32]
Make = Callable[..., Path]

RNG = np.random.default_rng(0)
W = RNG.normal(size=(8, 4, 3, 3)).astype(np.float32)
B = RNG.normal(size=8).astype(np.float32)
CONV = "c = Conv<pads = [1, 1, 1, 1]>(input, w, b)"
HEAD = "(float[1, 4, 6, 6] input) => (float[1, {}, 6, 6] p, float[1, {}, 6, 6] q)"
EQUAL, UNEQUAL = HEAD.format(4, 4), HEAD.format(3, 5)


def _operators(path: Path) -> list[str]:
    return sorted(node.op_type for node in onnx.load(path).graph.node)


def _run(path: Path, x_NCHW: Array) -> Outputs:
    """As the graph is written: the optimiser would choose other kernels, which sum in another order."""
    return OrtSession(path, provider=CPU, optimise=False).run({"input": x_NCHW})


def _assert_rewritten(source: Path, *, convolutions: int = 1) -> onnx.ModelProto:
    """It says so, the result is a valid model without a Split, and its outputs are the same bit for bit."""
    target = source.with_name("target.onnx")
    assert split_expansion_convolutions(source, target) == convolutions
    onnx.checker.check_model(target, full_check=True)
    assert "Split" not in _operators(target)
    x_NCHW = RNG.normal(size=(1, 4, 6, 6)).astype(np.float32)
    before, after = (_run(path, x_NCHW) for path in (source, target))
    assert list(before) == list(after)
    for name, expected in before.items():
        np.testing.assert_array_equal(after[name], expected, strict=True)
    return onnx.load(target)


def _assert_untouched(source: Path) -> None:
    target = source.with_name("target.onnx")
    assert split_expansion_convolutions(source, target) == 0
    assert not target.exists()


# --- what is rewritten ---


@pytest.mark.parametrize(
    "nodes",
    [
        CONV + "  p, q = Split<axis = 1, num_outputs = 2>(c)",
        CONV + "  a = LeakyRelu<alpha = 0.2>(c)  p, q = Split<axis = 1, num_outputs = 2>(a)",
        CONV + "  a = Relu(c)  s = Sigmoid(a)  p, q = Split<axis = 1, num_outputs = 2>(s)",
    ],
    ids=["conv", "activation", "two activations"],
)
def test_convolution_before_a_split_becomes_two(make_onnx: Make, nodes: str) -> None:
    model = _assert_rewritten(make_onnx(f"{EQUAL} {{ {nodes} }}", w=W, b=B))
    assert [node.op_type for node in model.graph.node].count("Conv") == 2
    assert {node.name for node in model.graph.node} >= {"c/part0", "c/part1"}
    assert (
        sum(len(tensor.raw_data) for tensor in model.graph.initializer) == W.nbytes + B.nbytes
    )  # the old ones are gone


def test_shapes_that_are_known_stay_known(make_onnx: Make) -> None:
    nodes = CONV + "  a = LeakyRelu(c)  p, q = Split<axis = 1>(a, s)"
    source = make_onnx(f"{UNEQUAL} {{ {nodes} }}", w=W, b=B, s=np.array([3, 5]))
    onnx.save(onnx.shape_inference.infer_shapes(onnx.load(source)), source)
    model = _assert_rewritten(source)
    told = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in model.graph.value_info}
    assert told == {"c/part0": [1, 3, 6, 6], "c/part1": [1, 5, 6, 6]}


def test_alpha_of_the_activation_is_kept(make_onnx: Make) -> None:
    nodes = CONV + "  a = LeakyRelu<alpha = 0.2>(c)  p, q = Split<axis = 1, num_outputs = 2>(a)"
    model = _assert_rewritten(make_onnx(f"{EQUAL} {{ {nodes} }}", w=W, b=B))
    alphas = [node.attribute[0].f for node in model.graph.node if node.op_type == "LeakyRelu"]
    assert alphas == [pytest.approx(0.2)] * 2


def test_unequal_parts(make_onnx: Make) -> None:
    nodes = CONV + "  a = Relu(c)  p, q = Split<axis = 1>(a, sizes)"
    model = _assert_rewritten(make_onnx(f"{UNEQUAL} {{ {nodes} }}", w=W, b=B, sizes=np.array([3, 5])))
    assert sorted(list(tensor.dims) for tensor in model.graph.initializer) == [[3], [3, 4, 3, 3], [5], [5, 4, 3, 3]]


def test_three_parts_of_which_the_last_is_smaller(make_onnx: Make) -> None:
    head = "(float[1, 4, 6, 6] input) => (float[1, 3, 6, 6] p, float[1, 3, 6, 6] q, float[1, 2, 6, 6] r)"
    _assert_rewritten(make_onnx(f"{head} {{ {CONV}  p, q, r = Split<axis = 1, num_outputs = 3>(c) }}", w=W, b=B))


def test_no_bias(make_onnx: Make) -> None:
    nodes = "c = Conv<pads = [1, 1, 1, 1]>(input, w)  a = LeakyRelu(c)  p, q = Split<axis = 1, num_outputs = 2>(a)"
    model = _assert_rewritten(make_onnx(f"{EQUAL} {{ {nodes} }}", w=W))
    assert [len(node.input) for node in model.graph.node if node.op_type == "Conv"] == [2, 2]


def test_parts_are_used_further_on(make_onnx: Make) -> None:
    head = "(float[1, 4, 6, 6] input) => (float[1, 8, 6, 6] y)"
    nodes = CONV + "  p, q = Split<axis = 1, num_outputs = 2>(c)  r = Relu(p)  y = Concat<axis = 1>(q, r)"
    _assert_rewritten(make_onnx(f"{head} {{ {nodes} }}", w=W, b=B))


@pytest.mark.parametrize("shared", [False, True], ids=["own biases", "one bias for both"])
def test_every_split_of_a_graph(make_onnx: Make, shared: bool) -> None:
    nodes = (
        CONV + "  s, t = Split<axis = 1, num_outputs = 2>(c)  m = Add(s, t)"
        "  d = Conv<pads = [1, 1, 1, 1]>(m, v, b2)  e = Relu(d)  p, q = Split<axis = 1, num_outputs = 2>(e)"
    )
    weights = {"w": W, "v": W[::-1].copy(), "b": B, "b2": B + 1}
    if shared:
        nodes = nodes.replace("b2", "b")
        del weights["b2"]
    _assert_rewritten(make_onnx(f"{EQUAL} {{ {nodes} }}", **weights), convolutions=2)


def test_weight_that_another_node_uses_too_is_kept(make_onnx: Make) -> None:
    head = "(float[1, 4, 6, 6] input) => (float[1, 4, 6, 6] p, float[1, 4, 6, 6] q, float[1, 8, 4, 4] y)"
    nodes = CONV + "  p, q = Split<axis = 1, num_outputs = 2>(c)  y = Conv(input, w, b)"
    _assert_rewritten(make_onnx(f"{head} {{ {nodes} }}", w=W, b=B))


def test_tiny_network_loses_its_three_splits(tiny_simplified: Path, tiny_x_NCHW: Array, tmp_path: Path) -> None:
    target = tmp_path / "target.onnx"
    assert _operators(tiny_simplified).count("Split") == 3
    assert split_expansion_convolutions(tiny_simplified, target) == 3
    assert "Split" not in _operators(target)
    before, after = (_run(path, tiny_x_NCHW[:1]) for path in (tiny_simplified, target))
    np.testing.assert_array_equal(after["logits"], before["logits"], strict=True)


def test_same_graph_gives_the_same_bytes(tiny_simplified: Path, tmp_path: Path) -> None:
    for name in ("a.onnx", "b.onnx"):
        split_expansion_convolutions(tiny_simplified, tmp_path / name)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


# --- what is not ---


@pytest.mark.parametrize(
    "nodes",
    [
        "c = Conv<pads = [1, 1, 1, 1], group = 2>(input, grouped, b)  p, q = Split<axis = 1, num_outputs = 2>(c)",
        CONV + "  a = Relu(c)  p, t = Split<axis = 1, num_outputs = 2>(a)  u = ReduceMean(a)  q = Add(t, u)",
        CONV + "  p, t = Split<axis = 1, num_outputs = 2>(c)  u = ReduceMean(c)  q = Add(t, u)",
        CONV + "  a = PRelu(c, slope)  p, q = Split<axis = 1, num_outputs = 2>(a)",
        CONV + "  a = Softmax<axis = 1>(c)  p, q = Split<axis = 1, num_outputs = 2>(a)",
        "z = Mul(w, two)  c = Conv<pads = [1, 1, 1, 1]>(input, z, b)  p, q = Split<axis = 1, num_outputs = 2>(c)",
        "c = Concat<axis = 1>(input, input)  p, q = Split<axis = 1, num_outputs = 2>(c)",
        "p = Identity(input)  q = Relu(input)",
    ],
    ids=["grouped", "activation used twice", "convolution used twice", "parameter of the channel", "across channels",
         "computed weight", "no convolution", "nothing to do"],
)  # fmt: skip
def test_other_graphs_are_left_alone(make_onnx: Make, nodes: str) -> None:
    slope, two = np.full((8, 1, 1), 0.1, np.float32), np.float32([2.0])
    weights = {"w": W, "b": B, "grouped": W[:, :2], "slope": slope, "two": two}
    used = {name: array for name, array in weights.items() if name in re.findall(r"\w+", nodes)}
    _assert_untouched(make_onnx(f"{EQUAL} {{ {nodes} }}", **used))


def test_split_on_another_axis(make_onnx: Make) -> None:
    head = "(float[1, 4, 6, 6] input) => (float[1, 8, 3, 6] p, float[1, 8, 3, 6] q)"
    _assert_untouched(make_onnx(f"{head} {{ {CONV}  p, q = Split<axis = 2, num_outputs = 2>(c) }}", w=W, b=B))


def test_activation_that_is_an_output_of_the_graph(make_onnx: Make) -> None:
    head = "(float[1, 4, 6, 6] input) => (float[1, 4, 6, 6] p, float[1, 4, 6, 6] q, float[1, 8, 6, 6] a)"
    nodes = CONV + "  a = Relu(c)  p, q = Split<axis = 1, num_outputs = 2>(a)"
    _assert_untouched(make_onnx(f"{head} {{ {nodes} }}", w=W, b=B))


def test_activation_that_a_subgraph_uses(make_onnx: Make) -> None:
    head = "(float[1, 4, 6, 6] input, bool c0) => (float[1, 4, 6, 6] p, float[1, 4, 6, 6] q, float[1, 8, 6, 6] y)"
    branches = (
        "then_branch = one () => (float[1, 8, 6, 6] t) { t = Neg(a) }, "
        "else_branch = two () => (float[1, 8, 6, 6] e) { e = Identity(a) }"
    )
    nodes = CONV + f"  a = Relu(c)  p, q = Split<axis = 1, num_outputs = 2>(a)  y = If(c0) <{branches}>"
    _assert_untouched(make_onnx(f"{head} {{ {nodes} }}", w=W, b=B))


def test_weight_that_a_subgraph_uses_is_kept(make_onnx: Make) -> None:
    head = "(float[1, 4, 6, 6] input) => (float[1, 4, 6, 6] p, float[1, 4, 6, 6] q, float[1, 4, 6, 6] y)"
    branches = (
        "then_branch = one () => (float[1, 4, 6, 6] t) { t = Mul(input, k) }, "
        "else_branch = two () => (float[1, 4, 6, 6] e) { e = Neg(input) }"
    )
    nodes = CONV + f"  p, q = Split<axis = 1, num_outputs = 2>(c)  y = If(yes) <{branches}>"
    _assert_rewritten(make_onnx(f"{head} {{ {nodes} }}", w=W, b=B, k=np.ones(1, np.float32), yes=np.array(True)))


# --- writing ---


def test_ir_version_is_capped(make_onnx: Make, tmp_path: Path) -> None:
    model = onnx.load(make_onnx("(float[1] input) => (float[1] y) { y = Relu(input) }"))
    model.ir_version = 12
    write_model(model, tmp_path / "written.onnx")
    assert onnx.load(tmp_path / "written.onnx").ir_version == 10


def test_sizes_of_an_old_split_are_an_attribute(tmp_path: Path) -> None:
    """Up to opset 12; taken for equal parts, the rewrite would cut the channels elsewhere."""
    text = """<ir_version: 7, opset_import: ["": 12]> graph
        (float[1, 3, 4, 4] input) => (float[1, 2, 4, 4] a, float[1, 6, 4, 4] b) {
            c = Conv(input, w)  a, b = Split<axis = 1, split = [2, 6]>(c) }"""
    model = onnx.parser.parse_model(text)
    w = np.random.default_rng(0).normal(size=(8, 3, 1, 1)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    onnx.save(model, tmp_path / "source.onnx")
    assert split_expansion_convolutions(tmp_path / "source.onnx", tmp_path / "target.onnx") == 1
    feeds = {"input": np.ones((1, 3, 4, 4), np.float32)}
    expected, got = (open_cpu_session(tmp_path / name).run(feeds) for name in ("source.onnx", "target.onnx"))
    for name in ("a", "b"):
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-6)
