"""Where Q/DQ pairs lie: each rule on a graph that breaks it, and on the same graph mended."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from cspdeploy.check.lint import TargetReport, lint_file
from cspdeploy.core.targets import TARGETS, find_target

RNG = np.random.default_rng(0)
# x is quantised by s, weights by v, a scale for each output channel; z and c are zero points of 0.
WEIGHTS: dict[str, np.ndarray] = {
    "s": np.array(0.05, np.float32), "s2": np.array(0.1, np.float32), "z": np.array(0, np.int8),
    "v": np.full(4, 0.01, np.float32), "c": np.zeros(4, np.int8),
    "w": RNG.integers(-127, 128, (4, 4, 1, 1), dtype=np.int8), "b": np.zeros(4, np.float32),
    "f": RNG.normal(size=(4, 4, 1, 1)).astype(np.float32),
}  # fmt: skip
INPUT = "xq = QuantizeLinear(x, s, z)\n xd = DequantizeLinear(xq, s, z)"
WEIGHT = "wd = DequantizeLinear<axis = 0>(w, v, c)"
CONV = f"{INPUT}\n {WEIGHT}\n a = Conv(xd, wd, b)"
SECOND = "wd2 = DequantizeLinear<axis = 0>(w, v, c)\n y = Conv({}, wd2, b)"
GOOD = f"{CONV}\n r = Relu(a)\n rq = QuantizeLinear(r, s, z)\n rd = DequantizeLinear(rq, s, z)\n {SECOND.format('rd')}"


def body_model(body: str, *, opset: int = 17, **changed: np.ndarray) -> onnx.ModelProto:
    text = f'<ir_version: 8, opset_import: ["" : {opset}]> g (float[1,4,8,8] x) => (float[1,4,N,N] y) {{ {body} }}'
    model = onnx.parser.parse_model(text)
    used = {name for node in model.graph.node for name in node.input}
    for name, array in (WEIGHTS | changed).items():
        if name in used:
            model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


def report(folder: Path, body: str, *, target: str = "tensorrt-10", **changed: np.ndarray) -> TargetReport:
    path = folder / "graph.onnx"
    onnx.save(body_model(body, **changed), path)
    return lint_file(path, [find_target(target)]).targets[0]


def rules(folder: Path, body: str, **changed: np.ndarray) -> set[tuple[str, str, str]]:
    return {
        (found.rule, found.severity, found.operator)
        for found in report(folder, body, target="tensorrt-10", **changed).findings
    }


@pytest.mark.parametrize("target", ["tensorrt-8.6", "tensorrt-10"])
def test_a_graph_as_it_should_be_passes(tmp_path: Path, target: str) -> None:
    found = report(tmp_path, GOOD, target=target)
    assert (found.verdict, found.findings) == ("pass", ())


def test_a_float_graph_is_no_matter_of_these_rules(tmp_path: Path) -> None:
    assert rules(tmp_path, "a = Conv(x, f, b)\n c2 = Concat<axis = 1>(a, x)\n y = Relu(c2)") == set()


@pytest.mark.parametrize("value", [0.0, -0.05, np.nan, np.inf])
def test_a_scale_is_positive(tmp_path: Path, value: float) -> None:
    found = report(tmp_path, GOOD, s=np.array(value, np.float32))
    assert found.verdict == "fail"
    assert {one.rule for one in found.findings} == {"scale"}
    assert f"a scale of {value}" in found.findings[0].got


def test_a_scale_is_constant(tmp_path: Path) -> None:
    body = GOOD.replace(INPUT, f"big = ReduceMax<keepdims = 0>(x)\n {INPUT.replace(', s,', ', big,')}")
    assert rules(tmp_path, body) == {
        ("scale", "violation", "QuantizeLinear"), ("scale", "violation", "DequantizeLinear"),
    }  # fmt: skip


@pytest.mark.parametrize(
    "constant",
    [
        "k = Constant<value_float = {}>()", "k = Constant<value_floats = [{}]>()",
        "k = Constant<value = float {{{}}}>()", "k0 = Constant<value_float = {}>()\n k = Identity(k0)",
    ],
)  # fmt: skip
def test_a_scale_of_any_constant_is_read(tmp_path: Path, constant: str) -> None:
    body = GOOD.replace(INPUT, f"{constant}\n {INPUT.replace(', s,', ', k,')}")
    found = report(tmp_path, body.format(-0.5))
    assert {(one.rule, one.got) for one in found.findings} == {("scale", "a scale of -0.5")}
    assert rules(tmp_path, body.format(0.05)) == set()


@pytest.mark.parametrize("cut", [0, 1])
@pytest.mark.parametrize("target", TARGETS)
def test_a_pair_without_scale_is_a_finding(tmp_path: Path, target: str, cut: int) -> None:
    model = body_model(GOOD)
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            del node.input[cut:]
    onnx.save(model, tmp_path / "graph.onnx")
    found = lint_file(tmp_path / "graph.onnx", [TARGETS[target]]).targets[0].findings
    assert sum(one.got == "no scale" for one in found) == (6 if target.startswith("tensorrt") else 0)


def test_weights_have_their_scales_along_output_channels(tmp_path: Path) -> None:
    found = report(tmp_path, GOOD.replace("axis = 0", "axis = 1"))
    assert {(one.rule, one.severity) for one in found.findings} == {("channel-axis", "violation")}
    assert found.findings[0].got == "scales along axis 1 of the weight of Conv"


def test_those_of_a_transposed_convolution_lie_along_axis_1(tmp_path: Path) -> None:
    body = f"{INPUT}\n {WEIGHT}\n y = ConvTranspose(xd, wd, b)"
    assert rules(tmp_path, body) == {("channel-axis", "violation", "DequantizeLinear")}
    assert rules(tmp_path, body.replace("axis = 0", "axis = 1")) == set()


def test_an_activation_has_one_scale(tmp_path: Path) -> None:
    body = GOOD.replace(INPUT, INPUT.replace("(x, s, z)", "(x, v, c)").replace("(xq, s, z)", "(xq, v, c)"))
    found = report(tmp_path, body)
    assert {(one.rule, one.got) for one in found.findings} == {("channel-axis", "4 scales on an activation")}


def test_a_weight_may_pass_through_a_pair(tmp_path: Path) -> None:
    pair = "wq = QuantizeLinear<axis = 0>(f, v, c)\n wd = DequantizeLinear<axis = 0>(wq, v, c)"
    assert rules(tmp_path, f"{INPUT}\n {pair}\n y = Conv(xd, wd, b)") == set()
    assert rules(tmp_path, f"{INPUT}\n {pair}\n y = Conv(xd, wd, b)".replace("axis = 0", "axis = 1")) == {
        ("channel-axis", "violation", "DequantizeLinear")
    }


MATRIX = WEIGHTS["w"][:, :, 0, 0]
FLOAT_MATRIX = WEIGHTS["f"][:, :, 0, 0]


def product(weight: str, last: str) -> str:
    return f"{INPUT}\n {weight}\n {last}"


@pytest.mark.parametrize(
    "weight",
    [
        "fi = Identity(f)\n wq = QuantizeLinear<axis = {0}>(fi, v, c)\n wd = DequantizeLinear<axis = {0}>(wq, v, c)",
        "wi = Identity(w)\n wd0 = DequantizeLinear<axis = {0}>(wi, v, c)\n wd = Identity(wd0)",
        "two = Constant<value_float = 2.0>()\n fm = Mul(f, two)\n "
        "wq = QuantizeLinear<axis = {0}>(fm, v, c)\n wd = DequantizeLinear<axis = {0}>(wq, v, c)",
    ],
)
def test_a_weight_is_known_behind_what_engines_fold(tmp_path: Path, weight: str) -> None:
    assert rules(tmp_path, product(weight.format(0), "y = Conv(xd, wd, b)")) == set()
    assert rules(tmp_path, product(weight.format(-4), "y = Conv(xd, wd, b)")) == set()
    found = report(tmp_path, product(weight.format(1), "y = Conv(xd, wd, b)"))
    assert [(one.rule, one.got) for one in found.findings] == [
        ("channel-axis", "scales along axis 1 of the weight of Conv")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("weight", "last", "right", "changed"),
    [
        ("wd = DequantizeLinear<axis = {}>(m, v, c)", "y = MatMul(xd, wd)", 1, {"m": MATRIX}),
        ("wd = DequantizeLinear<axis = {}>(m, v, c)", "y = MatMul(xd, wd)", 2, {"m": np.stack([MATRIX] * 4)}),
        ("wd = DequantizeLinear<axis = {}>(m, v, c)", "y = MatMul(wd, xd)", 0, {"m": MATRIX}),
        ("wd = DequantizeLinear<axis = {}>(m, v, c)", "y = Gemm(xd, wd)", 1, {"m": MATRIX}),
        ("wd = DequantizeLinear<axis = {}>(m, v, c)", "y = Gemm<transB = 1>(xd, wd)", 0, {"m": MATRIX}),
        ("wd0 = DequantizeLinear<axis = {}>(m, v, c)\n wd = Transpose<perm = [1, 0]>(wd0)", "y = MatMul(xd, wd)", 0,
         {"m": MATRIX}),
        ("wd0 = DequantizeLinear<axis = {}>(m, v, c)\n wd = Transpose(wd0)", "y = MatMul(xd, wd)", 0, {"m": MATRIX}),
        ("mt = Transpose<perm = [1, 0]>(m)\n wq = QuantizeLinear<axis = {0}>(mt, v, c)\n "
         "wd = DequantizeLinear<axis = {0}>(wq, v, c)", "y = Gemm(xd, wd)", 1, {"m": FLOAT_MATRIX}),
    ],
)  # fmt: skip
def test_the_output_channels_of_a_matrix_product(
    tmp_path: Path, weight: str, last: str, right: int, changed: dict[str, np.ndarray]
) -> None:
    rank = changed["m"].ndim
    assert rules(tmp_path, product(weight.format(right), last), **changed) == set()
    assert rules(tmp_path, product(weight.format(right - rank), last), **changed) == set()
    for wrong in set(range(rank)) - {right}:
        found = report(tmp_path, product(weight.format(wrong), last), **changed)
        assert {one.rule for one in found.findings} == {"channel-axis"}
        assert f"scales along axis {wrong}" in found.findings[0].got


def test_behind_a_transpose_both_axes_are_told(tmp_path: Path) -> None:
    weight = "wd0 = DequantizeLinear<axis = 1>(m, v, c)\n wd = Transpose(wd0)"
    found = report(tmp_path, product(weight, "y = MatMul(xd, wd)"), m=MATRIX)
    assert found.findings[0].got == "scales along axis 1 (axis 0 behind Transpose) of the weight of MatMul"


def test_the_scales_of_blocks_have_no_axis_of_channels(tmp_path: Path) -> None:
    weight = "wd = DequantizeLinear<axis = 0{}>(m, vb, cb)"
    blocks = {"vb": np.full((2, 4), 0.01, np.float32), "cb": np.zeros((2, 4), np.int8), "m": MATRIX}
    assert rules(tmp_path, product(weight.format(", block_size = 2"), "y = MatMul(xd, wd)"), **blocks) == set()
    assert ("channel-axis", "violation", "DequantizeLinear") in rules(
        tmp_path, product(weight.format(""), "y = MatMul(xd, wd)"), **blocks
    )


def test_the_scales_of_a_bias_lie_along_its_one_axis(tmp_path: Path) -> None:
    weight = "wd = DequantizeLinear<axis = 1>(m, v, c)\n bd = DequantizeLinear<axis = 0>(b8, v, c)"
    assert rules(tmp_path, product(weight, "y = Gemm(xd, wd, bd)"), m=MATRIX, b8=np.zeros(4, np.int8)) == set()


def test_a_bias_in_int32_is_refused(tmp_path: Path) -> None:
    bias = "bd = DequantizeLinear<axis = 0>(b32, v)"
    body = f"{INPUT}\n {WEIGHT}\n {bias}\n y = Conv(xd, wd, bd)"
    found = report(tmp_path, body, b32=np.zeros(4, np.int32))
    assert {(one.rule, one.severity, one.got) for one in found.findings} == {
        ("zero-point-dtype", "violation", "quantised values of int32")
    }


def test_nothing_stands_within_a_pair(tmp_path: Path) -> None:
    within = "xq = QuantizeLinear(x, s, z)\n m = MaxPool<kernel_shape = [1, 1]>(xq)\n xd = DequantizeLinear(m, s, z)"
    assert rules(tmp_path, GOOD.replace(INPUT, within)) == {
        ("pair", "warning", "QuantizeLinear"), ("pair", "warning", "DequantizeLinear"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("behind", "got"),
    [
        ("s2", "a scale of 0.05, the DequantizeLinear behind it a scale of 0.1"),
        ("v1", "a scale of 0.05, the DequantizeLinear behind it 2 scales"),
    ],
)
def test_both_of_a_pair_have_one_scale(tmp_path: Path, behind: str, got: str) -> None:
    body = GOOD.replace(INPUT, INPUT.replace("DequantizeLinear(xq, s,", f"DequantizeLinear(xq, {behind},"))
    found = report(tmp_path, body, v1=np.full(2, 0.05, np.float32))
    assert ("pair", "warning", got) in [(one.rule, one.severity, one.got) for one in found.findings]


def test_one_scale_in_two_types_is_one(tmp_path: Path) -> None:
    """From opset 19 on QuantizeLinear may take FP16 where the scale behind it is FP32."""
    body = GOOD.replace(INPUT, INPUT.replace("DequantizeLinear(xq, s,", "DequantizeLinear(xq, h,"))
    assert rules(tmp_path, body, h=np.array(0.05, np.float16)) == set()


@pytest.mark.parametrize(
    ("body", "got"),
    [
        (f"{INPUT}\n y = Conv(xd, f, b)", "its input on a grid, its weight not"),
        (f"{INPUT}\n {WEIGHT}\n a = Conv(x, wd, b)\n {SECOND.format('xd')}", "its weight on a grid, its input not"),
    ],
)
def test_a_product_has_pairs_on_both_inputs_or_on_none(tmp_path: Path, body: str, got: str) -> None:
    found = report(tmp_path, body)
    assert [(one.rule, one.severity, one.operator, one.got) for one in found.findings] == [
        ("half-quantised", "warning", "Conv", got)
    ]


@pytest.mark.parametrize(
    "weight", [WEIGHT, "wq = QuantizeLinear<axis = 0>(f, v, c)\n wd = DequantizeLinear<axis = 0>(wq, v, c)"]
)
def test_a_file_with_weights_alone_on_grids_computes_in_float_on_purpose(tmp_path: Path, weight: str) -> None:
    assert rules(tmp_path, f"{weight}\n y = Conv(x, wd, b)") == set()


def test_weights_of_4_bits_are_on_grids_to_be_small(tmp_path: Path) -> None:
    """Beside a product in INT8 too. int4 came with opset 21."""
    body = f"{CONV}\n md = DequantizeLinear<axis = 1>(m, v)\n y = MatMul(a, md)"
    for kind, expected in ((onnx.TensorProto.INT4, False), (onnx.TensorProto.INT8, True)):
        model = body_model(body, opset=21)
        model.graph.initializer.append(onnx.helper.make_tensor("m", kind, (4, 4), [1, -2, 3, -4] * 4))
        onnx.save(model, tmp_path / "graph.onnx")
        found = lint_file(tmp_path / "graph.onnx", [TARGETS["tensorrt-10"]]).targets[0].findings
        assert ("half-quantised" in {one.rule for one in found}) == expected


@pytest.mark.parametrize("activation", ["Relu", "LeakyRelu", "Sigmoid", "HardSwish"])
def test_no_pair_parts_a_convolution_from_its_activation(tmp_path: Path, activation: str) -> None:
    parted = f"{CONV}\n aq = QuantizeLinear(a, s, z)\n ad = DequantizeLinear(aq, s, z)\n y = {activation}(ad)"
    assert rules(tmp_path, parted) == {("activation", "warning", activation)}


ADD = f"{CONV}\n t = Add({{}}, {{}})\n tq = QuantizeLinear(t, s, z)\n td = DequantizeLinear(tq, s, z)\n "
ADD += SECOND.format("td")


def test_the_branch_around_has_a_pair_and_that_of_the_convolution_none(tmp_path: Path) -> None:
    assert rules(tmp_path, ADD.format("a", "xd")) == set()
    own = ADD.replace("t = Add", "aq = QuantizeLinear(a, s, z)\n ad = DequantizeLinear(aq, s, z)\n t = Add")
    assert rules(tmp_path, own.format("ad", "xd")) == {("residual", "warning", "Add")}
    two = ADD.replace("t = Add", f"{WEIGHT.replace('wd', 'wd3')}\n a3 = Conv(xd, wd3, b)\n r3 = Relu(a3)\n t = Add")
    found = report(tmp_path, two.format("a", "r3"))
    assert [(one.rule, one.got) for one in found.findings] == [("residual", "no pair on either branch")]


def test_an_add_in_the_head_is_left_alone(tmp_path: Path) -> None:
    body = f"{CONV}\n {WEIGHT.replace('wd', 'wd3')}\n a3 = Conv(xd, wd3, b)\n y = Add(a, a3)"
    assert rules(tmp_path, body) == set()


CONCAT = f"""{INPUT}
    {WEIGHT}
    a = Conv(xd, wd, b)
    aq = QuantizeLinear(a, {{}}, z)
    ad = DequantizeLinear(aq, {{}}, z)
    j = Concat<axis = 2>({{}}, xd)
    """


def test_what_is_joined_lies_on_one_grid_or_is_quantised_behind(tmp_path: Path) -> None:
    after = SECOND.format("j")
    assert rules(tmp_path, CONCAT.format("s", "s", "ad") + after) == set()
    found = report(tmp_path, CONCAT.format("s2", "s2", "ad") + after)
    assert [(one.rule, one.operator, one.got) for one in found.findings] == [("concat", "Concat", "2 scales")]
    mixed = f"{CONV}\n j = Concat<axis = 2>(a, xd)\n {after}"
    assert ("concat", "warning", "Concat") in rules(tmp_path, mixed)
    behind = "jq = QuantizeLinear(j, s, z)\n jd = DequantizeLinear(jq, s, z)\n " + SECOND.format("jd")
    assert rules(tmp_path, CONCAT.format("s2", "s2", "ad") + behind) == set()
    assert rules(tmp_path, f"{CONV}\n j = Concat<axis = 2>(a, xd)\n {behind}") == set()


@pytest.mark.parametrize(
    "mover",
    [
        "MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(xd)", "Transpose<perm = [0, 1, 3, 2]>(xd)",
        'Resize<mode = "nearest">(xd, , twice)',
    ],
)  # fmt: skip
def test_what_moves_values_keeps_their_grid(tmp_path: Path, mover: str) -> None:
    body = f"""{INPUT}
        m = {mover}
        mq = QuantizeLinear(m, {{0}}, z)
        md = DequantizeLinear(mq, {{0}}, z)
        {SECOND.format("md")}"""
    twice = np.array([1, 1, 2, 2], np.float32)
    assert rules(tmp_path, body.format("s"), twice=twice) == set()
    operator = mover.split("<", maxsplit=1)[0]
    assert rules(tmp_path, body.format("s2"), twice=twice) == {("grid-kept", "warning", operator)}


def test_an_output_is_not_rounded(tmp_path: Path) -> None:
    body = f"{CONV}\n aq = QuantizeLinear(a, s, z)\n y = DequantizeLinear(aq, s, z)"
    assert rules(tmp_path, body) == {("output", "warning", "DequantizeLinear")}


@pytest.mark.parametrize("mover", ["Flatten(d)", "Transpose<perm = [0, 2, 3, 1]>(d)", "Concat<axis = 1>(d, d)"])
def test_an_output_is_not_rounded_before_it_is_laid_out_either(tmp_path: Path, mover: str) -> None:
    body = f"{CONV}\n aq = QuantizeLinear(a, s, z)\n d = DequantizeLinear(aq, s, z)\n y = {mover}"
    assert rules(tmp_path, body) == {("output", "warning", "DequantizeLinear")}
    assert rules(tmp_path, f"{CONV}\n y = {mover.replace('d)', 'a)').replace('(d,', '(a,')}") == set()


def test_many_nested_concats_are_looked_at_once_each(tmp_path: Path) -> None:
    """A dense block nests 48. Each way through them would be 2 to the power of their number."""
    joins = "\n ".join(f"j{i + 1} = Concat<axis = 2>(j{i}, xd)" for i in range(60))
    body = f"{INPUT}\n j0 = Identity(xd)\n {joins}\n {WEIGHT}\n y = Conv(j60, wd, b)"
    assert rules(tmp_path, body) == set()
    other = INPUT.replace("xq", "xq2").replace("xd", "xd2").replace("s, z", "s2, z")
    found = report(tmp_path, body.replace("Concat<axis = 2>(j0, xd)", "Concat<axis = 2>(j0, xd2)").replace(
        INPUT, f"{INPUT}\n {other}"))  # fmt: skip
    assert [(one.rule, one.got) for one in found.findings] == [("concat", "2 scales")]


def test_on_cuda_pairs_are_computed_around_a_float_convolution(tmp_path: Path) -> None:
    found = report(tmp_path, GOOD, target="ort-cuda")
    assert (found.verdict, found.num_elsewhere) == ("warn", 0)
    assert [one.rule for one in found.findings] == ["quantised-product"]
    assert found.findings[0].got == "2 of 2 convolutions and matrix products between Q/DQ pairs"
    assert "no INT8 convolution" in found.findings[0].takes
    assert report(tmp_path, "y = Conv(x, f, b)", target="ort-cuda").findings == ()


def test_a_bias_in_int32_stays_on_the_cpu(tmp_path: Path) -> None:
    bias = "bd = DequantizeLinear<axis = 0>(b32, v)"
    body = f"{INPUT}\n {WEIGHT}\n {bias}\n y = Conv(xd, wd, bd)"
    found = report(tmp_path, body, target="ort-cuda", b32=np.zeros(4, np.int32))
    assert (found.verdict, found.num_elsewhere) == ("warn", 1)
    left = next(one for one in found.findings if one.rule == "element-type")
    assert left.got == "input 0 of int32"
    assert "no CUDA kernel: runs on the CPU with copies at each side" in left.takes


def test_other_targets_have_no_such_rules() -> None:
    assert {name for name, target in TARGETS.items() if target.patterns} == {"tensorrt-8.6", "tensorrt-10", "ort-cuda"}
