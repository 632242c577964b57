from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cspdeploy.core.metrics import relative_l2
from cspdeploy.core.types import StepRecord
from cspdeploy.export import fp16_plan
from cspdeploy.export.fp16 import convert_fp16
from cspdeploy.runtimes import require_runtime
from cspdeploy.runtimes.base import SessionRequest
from cspdeploy.runtimes.ort import CPU, OrtSession, open_cpu_session

Array = npt.NDArray[np.float32]
Make = Callable[..., Path]

RNG = np.random.default_rng(0)
X_NCHW = RNG.uniform(-1, 1, (4, 3, 8, 8)).astype(np.float32)
HEAD = "(float[1, 3, 8, 8] input) => (float[1, 3, 8, 8] y)"


def _convert(source: Path, x_NCHW: Array = X_NCHW, *, batch: int = 1) -> tuple[onnx.ModelProto, StepRecord]:
    """Convert to fp16.onnx beside `source`. Whatever the graph: valid, opened by an engine, float32 at its borders."""
    target = source.with_name("fp16.onnx")
    record = convert_fp16(source, target, x_NCHW, batch=batch)
    if record.outcome == "kept":
        assert not target.exists()
        return onnx.load(source), record
    onnx.checker.check_model(target, full_check=True)
    open_cpu_session(target)
    model, before = onnx.load(target), onnx.load(source)
    for got, expected in ((model.graph.input, before.graph.input), (model.graph.output, before.graph.output)):
        assert list(got) == list(expected)
    return model, record


def _run(path: Path, x_NCHW: Array, runtime: str = "fp16-rounding") -> dict[str, npt.NDArray[np.generic]]:
    return require_runtime(runtime).open(SessionRequest(path=path)).run({"input": x_NCHW})


def _assert_close(source: Path, x_NCHW: Array = X_NCHW, limit: float = 2e-3) -> None:
    """The converted graph, computed with FP16 rounding, against its source."""
    expected, got = _run(source, x_NCHW[:1], "ort-cpu"), _run(source.with_name("fp16.onnx"), x_NCHW[:1])
    assert list(got) == list(expected)
    for name, array in expected.items():
        assert got[name].dtype == array.dtype
        assert relative_l2(got[name], array) < limit  # type: ignore[arg-type]


def _reasons(record: StepRecord) -> dict[str, str]:
    return {item["node"]: item["reason"] for item in record.facts["fp32_nodes"]}


def _operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def _dtypes(model: onnx.ModelProto) -> dict[str, int]:
    return {tensor.name: tensor.data_type for tensor in model.graph.initializer}


def _assert_told_truly(path: Path, x_NCHW: Array = X_NCHW[:1]) -> None:
    """The file tells element type and shape of all that flows between its nodes, as the engine then finds them."""
    model = onnx.load(path)
    told = {value.name: value.type.tensor_type for value in model.graph.value_info}
    finals = {value.name for value in model.graph.output}
    assert told.keys() == {name for node in model.graph.node for name in node.output} - finals
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in told)
    for name, array in (
        OrtSession(model.SerializeToString(), provider=CPU, optimise=False).run({"input": x_NCHW}).items()
    ):
        if name in told:
            assert [dim.dim_value for dim in told[name].shape.dim] == list(array.shape), name
            assert helper.tensor_dtype_to_np_dtype(told[name].elem_type) == array.dtype, name


# --- a graph that fits ---


def test_plain_graph_is_converted_whole_and_half_as_large(make_onnx: Make) -> None:
    source = make_onnx(
        "(float[1, 3, 8, 8] input) => (float[1, 128, 1, 1] y) {"
        "  c = Conv<pads = [1, 1, 1, 1]>(input, w1, b1)  r = LeakyRelu(c)  d = Conv(r, w2)  y = GlobalAveragePool(d) }",
        w1=RNG.normal(0, 0.1, (64, 3, 3, 3)).astype(np.float32), b1=RNG.normal(size=64).astype(np.float32),
        w2=RNG.normal(0, 0.1, (128, 64, 1, 1)).astype(np.float32),
    )  # fmt: skip
    model, record = _convert(source)
    _assert_told_truly(source.with_name("fp16.onnx"))
    assert set(_dtypes(model).values()) == {TensorProto.FLOAT16}
    assert _operators(model) == ["Cast", "Conv", "LeakyRelu", "Conv", "GlobalAveragePool", "Cast"]
    assert (record.name, record.outcome) == ("fp16", "done")
    assert record.facts == {
        "num_images": 4, "fp32_nodes": [], "clamped_weights": [],
        "operators_before": {"Conv": 2, "GlobalAveragePool": 1, "LeakyRelu": 1},
        "operators_after": {"Cast": 2, "Conv": 2, "GlobalAveragePool": 1, "LeakyRelu": 1},
    }  # fmt: skip
    assert "4 of 4 nodes in FP16" in record.detail
    assert "no weight clamped" in record.detail
    assert 0.48 < source.with_name("fp16.onnx").stat().st_size / source.stat().st_size < 0.54
    _assert_close(source)


def test_tiny_network(tiny_raw: Path, tiny_x_NCHW: Array, tmp_path: Path) -> None:
    target = tmp_path / "tiny.fp16.onnx"
    convert_fp16(tiny_raw, target, tiny_x_NCHW, batch=1)
    onnx.checker.check_model(target, full_check=True)
    halved, whole = (
        sum(len(tensor.raw_data) for tensor in onnx.load(path).graph.initializer) for path in (target, tiny_raw)
    )
    assert 0.49 < halved / whole < 0.51
    _assert_told_truly(target, tiny_x_NCHW[:1])
    for runtime in ("ort-cpu", "fp16-rounding"):
        got, expected = _run(target, tiny_x_NCHW[:1], runtime), _run(tiny_raw, tiny_x_NCHW[:1], "ort-cpu")
        assert relative_l2(got["logits"], expected["logits"]) < 1e-2  # type: ignore[arg-type]


def test_same_graph_gives_the_same_bytes(tiny_raw: Path, tiny_x_NCHW: Array, tmp_path: Path) -> None:
    for name in ("a.onnx", "b.onnx"):
        convert_fp16(tiny_raw, tmp_path / name, tiny_x_NCHW, batch=1)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_free_batch_stays_free(make_onnx: Make) -> None:
    source = make_onnx("(float[N, 3, 8, 8] input) => (float[N, 3, 8, 8] y) { y = Mul(input, k) }", k=np.float32([2.5]))
    _convert(source, batch=2)
    for batch in (1, 3):
        assert _run(source.with_name("fp16.onnx"), X_NCHW[:batch])["y"].shape == (batch, 3, 8, 8)


def test_fixed_batch_of_two(make_onnx: Make) -> None:
    _convert(make_onnx("(float[2, 3, 8, 8] input) => (float[2, 3, 8, 8] y) { y = Relu(input) }"), batch=2)


# --- nodes that stay float32 ---

OVERFLOW = HEAD + " { h = Mul(input, up)  s = Add(h, h)  d = Mul(s, down)  y = Relu(d) }"
UP_DOWN = {"up": np.float32([60000.0]), "down": np.float32([1e-5])}


def test_overflow_keeps_its_nodes_in_float32(make_onnx: Make) -> None:
    source = make_onnx(OVERFLOW, **UP_DOWN)
    model, record = _convert(source)
    reasons = _reasons(record)
    assert list(reasons) == ["h", "s", "d"]  # all that make or take a tensor of such values
    assert all(reason.startswith("overflow: reaches") and reason.endswith("of 65504") for reason in reasons.values())
    assert "overflow: reaches" in record.detail
    assert _dtypes(model) == {"up": TensorProto.FLOAT, "down": TensorProto.FLOAT}
    assert np.isfinite(_run(source.with_name("fp16.onnx"), X_NCHW[:1])["y"]).all()  # type: ignore[arg-type]
    _assert_close(source)


def test_without_the_island_it_does_overflow(make_onnx: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the test above sees a guard at work, and the rounding runtime can see the fault."""
    monkeypatch.setattr(fp16_plan, "HEADROOM", 1e-9)
    source = make_onnx(OVERFLOW, **UP_DOWN)
    _, record = _convert(source)
    assert "s" not in _reasons(record)
    assert not np.isfinite(_run(source.with_name("fp16.onnx"), X_NCHW[:1])["y"]).all()  # type: ignore[arg-type]


@pytest.mark.parametrize(("gain", "kept"), [(16000.0, []), (17000.0, ["h", "y"])])
def test_a_factor_of_four_is_left_for_unseen_images(make_onnx: Make, gain: float, kept: list[str]) -> None:
    x_NCHW = np.concatenate([X_NCHW, np.ones((1, 3, 8, 8), np.float32)])  # the last image has the largest value
    source = make_onnx(HEAD + " { h = Mul(input, k)  y = Sigmoid(h) }", k=np.float32([gain]))
    _, record = _convert(source, x_NCHW)
    assert list(_reasons(record)) == kept


def test_input_that_is_out_of_range(make_onnx: Make) -> None:
    source = make_onnx(HEAD + " { h = Mul(input, k)  y = Sigmoid(h) }", k=np.float32([1e-5]))
    _, record = _convert(source, 1e5 * X_NCHW)
    assert "overflow" in _reasons(record)["h"]


@pytest.mark.parametrize(
    ("nodes", "size", "gain", "kept"),
    [
        ("y = GlobalAveragePool(h)", 1, 1200, True),
        ("y = GlobalAveragePool(h)", 1, 1000, False),
        ("y = ReduceMean<keepdims = 1>(h, axes)", 1, 1200, True),
        ("y = ReduceSum<keepdims = 1>(h, axes)", 1, 1200, True),
        ("y = AveragePool<kernel_shape = [8, 8]>(h)", 1, 1200, True),
        ("y = AveragePool<kernel_shape = [5, 5], pads = [2, 2, 2, 2], strides = [1, 1]>(h)", 8, 8000, True),
        ("y = AveragePool<kernel_shape = [2, 2], strides = [2, 2]>(h)", 4, 8000, False),
        ("y = MaxPool<kernel_shape = [8, 8]>(h)", 1, 8000, False),
    ],
    ids=["global", "global, small", "mean", "sum", "whole map", "overlapping windows", "small windows", "no sum"],
)
def test_sum_that_may_overflow_on_the_way(make_onnx: Make, nodes: str, size: int, gain: float, kept: bool) -> None:
    """A map has 64 values: each one fits, and all together do not, or just do."""
    text = f"(float[1, 3, 8, 8] input) => (float[1, 3, {size}, {size}] y) {{ h = Mul(input, k)  {nodes} }}"
    weights: dict[str, Any] = {"k": np.float32([gain])}
    if "axes" in nodes:
        weights["axes"] = np.array([2, 3])
    _, record = _convert(make_onnx(text, **weights))
    reasons = _reasons(record)
    assert list(reasons) == (["y"] if kept else [])
    assert all(reason.startswith("sum: may reach") for reason in reasons.values())


def test_underflow(make_onnx: Make) -> None:
    source = make_onnx(HEAD + " { h = Mul(input, k)  y = Mul(h, big) }", k=np.float32([1e-5]), big=np.float32([1e4]))
    _, record = _convert(source)
    assert list(_reasons(record)) == ["h"]
    assert _reasons(record)["h"].startswith("underflow: root mean square")


def test_values_that_vanish_in_the_square_are_underflow_too(make_onnx: Make) -> None:
    weights = {"k": np.float32([1e-25]), "big": np.float32([1e25])}
    source = make_onnx(HEAD + " { h = Mul(input, k)  y = Mul(h, big) }", **weights)
    _, record = _convert(source)
    assert _reasons(record)["h"].startswith("underflow")


def test_tensor_of_zeros_is_no_underflow(make_onnx: Make) -> None:
    _, record = _convert(make_onnx(HEAD + " { h = Mul(input, k)  y = Add(h, input) }", k=np.float32([0.0])))
    assert _reasons(record) == {}


def test_weight_beyond_the_largest_number(make_onnx: Make) -> None:
    source = make_onnx(HEAD + " { h = Mul(input, k)  y = Relu(h) }", k=np.float32([1e5]))
    model, record = _convert(source, 0.01 * X_NCHW)
    assert _reasons(record) == {"h": "weights: 1e+05 is beyond 65504"}
    assert _dtypes(model) == {"k": TensorProto.FLOAT}
    _assert_close(source, 0.01 * X_NCHW)


def test_weight_that_rounding_spoils(make_onnx: Make) -> None:
    w = RNG.uniform(-5e-7, 5e-7, (3, 3, 1, 1)).astype(np.float32)
    source = make_onnx(HEAD + " { h = Conv(input, w)  y = Relu(h) }", w=w)
    _, record = _convert(source, 1e4 * X_NCHW)
    assert list(_reasons(record)) == ["h"]
    assert _reasons(record)["h"].startswith("weights: rounding error")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weight_that_is_not_finite(make_onnx: Make, bad: float) -> None:
    k = np.float32([[[[1.0]], [[1.0]], [[bad]]]])
    _, record = _convert(make_onnx(HEAD + " { h = Mul(input, k)  y = Relu(h) }", k=k))
    assert "h" in _reasons(record)


def test_tiny_weights_that_become_zero_are_listed(make_onnx: Make) -> None:
    w = RNG.uniform(0.5, 1, (3, 3, 1, 1)).astype(np.float32)
    w.flat[:2] = 1e-9, -2e-8
    source = make_onnx(HEAD + " { h = Conv(input, w)  y = Conv(h, v) }", w=w, v=np.ones((3, 3, 1, 1), np.float32))
    _, record = _convert(source)
    assert _reasons(record) == {}
    assert record.facts["clamped_weights"] == [{"tensor": "w", "to_zero": 2}]
    assert "2 weights below 3e-8 became 0" in record.detail
    _assert_close(source)


def test_operator_for_float32_alone(make_onnx: Make) -> None:
    text = HEAD + " { r = Relu(input)  q = QuantizeLinear(r, s, z)  d = DequantizeLinear(q, s, z)  y = Relu(d) }"
    source = make_onnx(text, s=np.float32(1 / 255), z=np.uint8(0))
    _, record = _convert(source)
    assert _reasons(record) == dict.fromkeys(("q", "d"), "operator: defined for float32")
    _assert_close(source)


def test_detail_names_four_nodes_and_counts_the_rest(make_onnx: Make) -> None:
    nodes = "a = Mul(input, k)  b = Neg(a)  c = Neg(b)  d = Neg(c)  e = Neg(d)  y = Neg(e)"
    _, record = _convert(make_onnx(f"{HEAD} {{ {nodes} }}", k=np.float32([50000.0])))
    assert len(_reasons(record)) == 6
    assert "a (overflow" in record.detail
    assert "e (overflow" not in record.detail
    assert "and 2 more" in record.detail


# --- FP16 in name alone ---


def test_no_file_where_every_node_would_stay_float32(make_onnx: Make) -> None:
    source = make_onnx(HEAD + " { h = Mul(input, k)  y = Neg(h) }", k=np.float32([50000.0]))
    _, record = _convert(source)
    assert (record.name, record.outcome) == ("fp16", "kept")
    assert record.detail.startswith(
        "no FP16 file: nothing that computes can be in FP16; 2 of 2 nodes stay FP32: h (over"
    )
    assert not source.with_name("fp16.onnx").exists()


def test_no_file_where_all_convolutions_would_stay_float32(make_onnx: Make) -> None:
    """The activation alone would be in FP16: the weights, which are the file, would not."""
    w = np.full((3, 3, 1, 1), 60000.0, np.float32)
    text = HEAD + " { c = Conv(input, w)  s = Mul(c, down)  y = Relu(s) }"
    _, record = _convert(make_onnx(text, w=w, down=np.float32([1e-6])))
    assert record.outcome == "kept"
    assert "y" not in _reasons(record)


def test_node_of_another_domain_stays_float32(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["": 18, "com.microsoft": 1]> graph
        (float[1, 3, 8, 8] input) => (float[1, 3, 8, 8] y) <float[1, 3, 8, 8] h> {
            [named] h = com.microsoft.QuickGelu(input)  [after] y = Relu(h) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "source.onnx")
    record = convert_fp16(tmp_path / "source.onnx", tmp_path / "fp16.onnx", X_NCHW, batch=1)
    assert record.outcome == "done"
    assert _reasons(record) == {"named": "operator: of com.microsoft, which may know float32 alone"}
    _assert_close(tmp_path / "source.onnx")


# --- forms of graphs ---


def test_scales_of_resize_stay_float32(make_onnx: Make) -> None:
    head = "(float[1, 3, 8, 8] input) => (float[1, 3, 16, 16] y)"
    source = make_onnx(
        head + ' { r = Relu(input)  y = Resize<mode = "nearest">(r, roi, scales) }',
        roi=np.zeros(0, np.float32), scales=np.float32([1, 1, 2, 2]),
    )  # fmt: skip
    model, record = _convert(source)
    assert _reasons(record) == {}
    assert _dtypes(model)["scales"] == TensorProto.FLOAT
    _assert_close(source)


def test_scales_of_resize_that_the_graph_computes(make_onnx: Make) -> None:
    head = "(float[1, 3, 8, 8] input) => (float[A, B, C, D] y)"
    source = make_onnx(
        head + ' { r = Relu(input)  scales = Add(ones, ones)  y = Resize<mode = "nearest">(r, roi, scales) }',
        roi=np.zeros(0, np.float32), ones=np.float32([0.5, 0.5, 1, 1]),
    )  # fmt: skip
    _convert(source)
    assert _run(source.with_name("fp16.onnx"), X_NCHW[:1])["y"].shape == (1, 3, 16, 16)


def test_cast_to_float_inside(make_onnx: Make) -> None:
    source = make_onnx(HEAD + " { m = Mul(input, k)  i = Cast<to = 7>(m)  f = Cast<to = 1>(i)  y = Mul(f, k) }",
                       k=np.float32([5.5]))  # fmt: skip
    _, record = _convert(source, np.round(X_NCHW))  # 5.5 is exact in FP16, and so is where the integers begin
    assert _reasons(record) == {}
    _assert_close(source, np.round(X_NCHW))


def test_tensor_that_is_an_output_and_is_used(make_onnx: Make) -> None:
    head = "(float[1, 3, 8, 8] input) => (float[1, 3, 8, 8] h, float[1, 3, 8, 8] y, float[1, 3, 8, 8] z)"
    source = make_onnx(
        head + " { h = Mul(input, k)  y = Neg(h)  g = Mul(h, up)  z = Sigmoid(g) }",
        k=np.float32([1.5]), up=np.float32([5e4]),
    )  # fmt: skip
    model, record = _convert(source)
    assert list(_reasons(record)) == ["g", "z"]  # so that h is wanted in both precisions
    assert [value.name for value in model.graph.output] == ["h", "y", "z"]
    _assert_close(source)


@pytest.mark.parametrize(
    "constant",
    [
        "<value = float[1] {2.5}>", "<value_float = 2.5>", "<value_floats = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]>",
    ],
    ids=["tensor", "number", "list"],
)  # fmt: skip
def test_constant_nodes(make_onnx: Make, constant: str) -> None:
    source = make_onnx(f"{HEAD} {{ c = Constant {constant} ()  h = Mul(input, c)  y = Relu(h) }}")
    _, record = _convert(source)
    assert _reasons(record) == {}
    _assert_close(source)


def test_constant_of_whole_numbers_is_left_alone(make_onnx: Make) -> None:
    head = "(float[1, 3, 8, 8] input) => (float[1, 192] y)"
    source = make_onnx(head + " { s = Constant <value_ints = [1, -1]> ()  y = Reshape(input, s) }")
    _convert(source)
    _assert_close(source)


def test_weight_of_an_fp16_and_an_fp32_node(make_onnx: Make) -> None:
    source = make_onnx(HEAD + " { h = Mul(input, k)  d = Mul(h, down)  y = Mul(d, down) }",
                       k=np.float32([6e4]), down=np.float32([1e-2]))  # fmt: skip
    model, record = _convert(source)
    assert list(_reasons(record)) == ["h", "d"]
    assert sorted(_dtypes(model).items()) == [
        ("down", TensorProto.FLOAT), ("down/fp16", TensorProto.FLOAT16), ("k", TensorProto.FLOAT),
    ]  # fmt: skip
    _assert_close(source)


def test_a_tensor_is_cast_once_for_all_that_want_it(make_onnx: Make) -> None:
    nodes = "h = Mul(input, k)  a = Neg(h)  b = Abs(h)  s = Add(a, b)  y = Sigmoid(s)"
    model, _ = _convert(make_onnx(f"{HEAD} {{ {nodes} }}", k=np.float32([2.0])))
    assert _operators(model).count("Cast") == 2  # of the input and of the output


def test_node_with_subgraphs_stays_float32(make_onnx: Make) -> None:
    branches = (
        "then_branch = one () => (float[1, 3, 8, 8] t) { n = Neg(h)  t = Mul(n, k) }, "
        "else_branch = two () => (float[1, 3, 8, 8] e) { e = Identity(h) }"
    )
    condition = "m = ReduceMax<keepdims = 0>(h)  c = Greater(m, zero)"
    nodes = f"a = Relu(input)  h = Mul(a, k)  {condition}  i = If(c) <{branches}>  y = Neg(i)"
    source = make_onnx(f"{HEAD} {{ {nodes} }}", k=np.float32([0.7]), zero=np.float32(0))
    model, record = _convert(source)
    assert _reasons(record) == dict.fromkeys(("h", "i"), "operator: has or feeds a subgraph")
    assert _dtypes(model)["k"] == TensorProto.FLOAT
    _assert_close(source)


def test_weight_that_only_a_subgraph_uses(make_onnx: Make) -> None:
    branches = (
        "then_branch = one () => (float[1, 3, 8, 8] t) { t = Mul(input, k) }, "
        "else_branch = two () => (float[1, 3, 8, 8] e) { e = Neg(input) }"
    )
    source = make_onnx(
        f"{HEAD} {{ i = If(c) <{branches}>  y = Relu(i) }}", k=np.float32([0.7]), c=np.array(True),
    )  # fmt: skip
    _convert(source)
    _assert_close(source)


def test_operands_that_are_not_floats_are_left_alone(make_onnx: Make) -> None:
    head = "(float[1, 3, 8, 8] input) => (float[1, 3, 8, 2] y, int64[1, 3, 8, 2] i)"
    source = make_onnx(head + " { y, i = TopK(input, two) }", two=np.array([2]))
    model, _ = _convert(source)
    assert _dtypes(model) == {"two": TensorProto.INT64}
    got = _run(source.with_name("fp16.onnx"), X_NCHW[:1])
    assert got["i"].dtype == np.int64


def test_fp16_part_that_is_there_already(make_onnx: Make) -> None:
    """10 is FLOAT16: the graph casts by itself, with a weight of its own."""
    source = make_onnx(HEAD + " { c = Cast<to = 10>(input)  h = Mul(c, k)  f = Cast<to = 1>(h)  y = Relu(f) }",
                       k=np.float16([2.0]))  # fmt: skip
    model, _ = _convert(source)
    assert numpy_helper.to_array(model.graph.initializer[0]) == np.float16([2.0])
    _assert_close(source)
