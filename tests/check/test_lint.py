from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from cspdeploy.check.lint import Finding, LintReport, TargetReport, lint_file
from cspdeploy.core.errors import InputError
from cspdeploy.core.targets import TARGETS, find_target

Lint = Callable[..., TargetReport]


@pytest.fixture
def lint(tmp_path: Path) -> Lint:
    """`lint("tensorrt-10", text, opset=17)`: the report of a graph written as ONNX text, without its header."""

    def call(
        target: str, text: str, *, opset: int = 17, ir: int = 8, domains: str = "", **weights: np.ndarray
    ) -> TargetReport:
        model = onnx.parser.parse_model(f'<ir_version: {ir}, opset_import: ["" : {opset}{domains}]>\n{text}')
        model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
        path = tmp_path / "graph.onnx"
        onnx.save(model, path)
        report = lint_file(path, [find_target(target)])
        assert isinstance(report, LintReport)
        assert report.failed == (report.targets[0].verdict == "fail")
        return report.targets[0]

    return call


def _only(report: TargetReport) -> Finding:
    assert len(report.findings) == 1, report.findings
    return report.findings[0]


RELU = "g (float[1,3,8,8] x) => (float[1,3,8,8] y) { y = Relu(x) }"


def test_a_file_that_fits_passes(lint: Lint) -> None:
    for name, target in TARGETS.items():
        report = lint(name, RELU, opset=min(target.max_opset, 12))
        assert (report.target, report.verdict, report.findings, report.num_nodes) == (name, "pass", (), 1)


@pytest.mark.parametrize(("opset", "passes"), [(12, True), (13, False)])
def test_opset_above_the_cap(lint: Lint, opset: int, passes: bool) -> None:
    report = lint("opencv-4", RELU, opset=opset)
    assert (report.verdict == "pass") == passes
    if not passes:
        found = _only(report)
        assert (found.severity, found.rule, found.got) == ("violation", "opset", "opset 13")
        assert "opset 12" in found.takes
        assert "cspdeploy export MODEL --target opencv-4" in found.fix
        assert "opencv/opencv#23137" in found.source


def test_opset_below_what_a_reduced_package_knows(lint: Lint) -> None:
    assert _only(lint("ort-mobile", RELU, opset=11)).takes == "opset 12 to 15"


@pytest.mark.parametrize(("ir", "verdict"), [(9, "pass"), (10, "fail")])
def test_ir_version_above_the_cap(lint: Lint, ir: int, verdict: str) -> None:
    report = lint("ort-1.16", RELU, ir=ir)
    assert report.verdict == verdict
    if verdict == "fail":
        assert (_only(report).rule, _only(report).got) == ("ir-version", "IR version 10")


def test_an_operator_that_the_target_lacks_is_named_with_its_node_and_module(lint: Lint) -> None:
    report = lint("opencv-4.11", "g (float[1,3,8,8] x) => (float[1,3,8,8] y) { y = Mish(x) }", opset=18)
    found = _only(report)
    assert (report.verdict, found.severity, found.rule, found.operator) == ("fail", "violation", "operator", "Mish")
    assert found.node == "Mish 0"  # it has no name
    assert "writes it as Softplus, Tanh and Mul" in found.fix


def test_the_module_comes_from_the_name_that_torch_gave(tmp_path: Path) -> None:
    node = onnx.helper.make_node("Mish", ["x"], ["y"], name="/stages/stages.0/conv1/act/Mish")
    value = [onnx.helper.make_tensor_value_info(name, 1, [1, 3]) for name in "xy"]
    graph = onnx.helper.make_graph([node], "g", value[:1], value[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, tmp_path / "m.onnx")
    report = lint_file(tmp_path / "m.onnx", [find_target("opencv-4.11")])
    assert report.targets[0].findings[0].module == "stages.0.conv1.act"


def test_an_operator_newer_than_the_file_says_is_no_operator(lint: Lint) -> None:
    found = _only(lint("ort-1.16", "g (float[1,3] x) => (float[1,3] y) { y = Mish(x) }", opset=17))
    assert found.got == "an operator that ONNX does not define at opset 17"
    assert (found.takes, found.fix) == ("Mish from opset 18 on", "export it again with --opset 18")


def test_an_unknown_operator(lint: Lint) -> None:
    found = _only(lint("ort-1.16", "g (float[1,3] x) => (float[1,3] y) { y = Relux(x) }"))
    assert (found.severity, found.operator, found.takes) == ("violation", "Relux", "operators that ONNX defines")


@pytest.mark.parametrize(("target", "verdict"), [("ort-1.16", "fail"), ("openvino", "fail"), ("nnapi-via-ort", "fail")])
def test_a_custom_domain_is_refused(lint: Lint, target: str, verdict: str) -> None:
    text = "g (float[1,3] x) => (float[1,3] y) { z = Relu(x)\n y = my.own.Thing(z) }"
    report = lint(target, text, domains=', "my.own" : 1')
    found = next(finding for finding in report.findings if finding.rule == "domain")
    assert (report.verdict, found.severity) == (verdict, "violation")
    assert "operator Thing of domain my.own" in found.got


@pytest.mark.parametrize(("target", "verdict"), [("ort-1.16", "pass"), ("openvino", "pass"), ("tensorrt-10", "fail")])
def test_an_engines_own_operator(lint: Lint, target: str, verdict: str) -> None:
    text = "g (float[1,3] x) => (float[1,3] y) { y = com.microsoft.Gelu(x) }"
    assert lint(target, text, domains=', "com.microsoft" : 1').verdict == verdict


def test_functions_of_the_file(tmp_path: Path) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17, "own" : 1]>
    g (float[1,3] x) => (float[1,3] y) { y = own.Twice(x) }
    <domain: "own", opset_import: ["" : 17]> Twice (a) => (b) { b = Add(a, a) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    runtime, opencv = lint_file(tmp_path / "m.onnx", [find_target("ort-1.16"), find_target("opencv-4.11")]).targets
    assert runtime.verdict == "pass"
    assert (opencv.verdict, _only(opencv).got) == ("warn", "a function that the file defines itself")


@pytest.mark.parametrize(
    ("target", "shape", "severity"),
    [
        ("ort-1.16", '"N",3,"H","W"', None), ("tensorrt-10", '"N",3,8,8', None), ("opencv-4.11", '"N",3,8,8', None),
        ("opencv-4.11", '1,3,"H",8', "violation"), ("nnapi-via-ort", '"N",3,8,8', "violation"),
        ("coreml-via-ort", '"N",3,8,8', "warning"),
    ],
)  # fmt: skip
def test_free_dimensions(lint: Lint, target: str, shape: str, severity: str | None) -> None:
    shape = shape.replace('"', "")
    report = lint(target, f"g (float[{shape}] x) => (float[{shape}] y) {{ y = Relu(x) }}")
    assert [(found.rule, found.severity, found.node) for found in report.findings] == (
        [] if severity is None else [("free-dimension", severity, "x")]
    )


@pytest.mark.parametrize(
    ("target", "dtype", "severity"),
    [
        ("tensorrt-8.6", "double", "warning"), ("tensorrt-10", "double", "warning"), ("ort-1.16", "double", None),
        ("ort-mobile", "float16", "violation"), ("tensorrt-10", "float16", None),
        ("tensorrt-8.6", "bfloat16", "violation"),
    ],
)  # fmt: skip
def test_element_types(lint: Lint, target: str, dtype: str, severity: str | None) -> None:
    report = lint(target, f"g ({dtype}[1,3] x) => ({dtype}[1,3] y) {{ y = Relu(x) }}", opset=15)
    found = {(finding.rule, finding.severity) for finding in report.findings}
    assert found == (set() if severity is None else {("dtype", severity)})


def test_an_int64_input_is_cast_by_tensorrt_8_but_shapes_are_not_its_matter(lint: Lint) -> None:
    text = "g (int64[1,3] x) => (int64[3] y) { y = Reshape(x, shape) }"
    assert _only(lint("tensorrt-8.6", text, shape=np.array([3]))).got == "an input of int64"
    assert lint("tensorrt-10", text, shape=np.array([3])).verdict == "pass"
    text = "g (float[1,3] x) => (float[3] y) { y = Reshape(x, shape) }"
    assert lint("tensorrt-8.6", text, shape=np.array([3])).verdict == "pass"


SPLIT = "g (float[1,4] x, int64[2] sizes) => (float[1,2] y, float[1,2] z) {{ y, z = Split<axis = 1>(x, {}) }}"


def test_an_input_that_must_be_constant(lint: Lint) -> None:
    found = _only(lint("opencv-4.11", SPLIT.format("sizes")))
    assert (found.rule, found.got) == ("constant", "input 1 ('sizes') is computed while it runs")
    text = SPLIT.format("both").replace(" { ", " { both = Concat<axis = 0>(half, half)\n")
    assert lint("opencv-4.11", text, half=np.array([2])).verdict == "pass"  # what depends on constants is constant


QUANTISE = """g (float[1,4] x) => (float[1,4] y) {
    q = QuantizeLinear(x, s, z)
    d = DequantizeLinear(q, s, z)
    y = Relu(d)
}"""


@pytest.mark.parametrize(
    ("target", "zero", "rules"),
    [
        ("tensorrt-10", np.int8(0), set()), ("tensorrt-10", np.int8(3), {"zero-point"}),
        ("tensorrt-8.6", np.uint8(128), {"zero-point", "zero-point-dtype"}), ("ort-1.16", np.uint8(128), set()),
        ("opencv-4.11", np.uint8(128), {"zero-point-dtype"}), ("opencv-4.11", np.int8(3), set()),
        ("openvino", np.uint8(7), set()),
    ],
)  # fmt: skip
def test_quantisation(lint: Lint, target: str, zero: np.generic, rules: set[str]) -> None:
    report = lint(target, QUANTISE, s=np.array(0.1, np.float32), z=np.array(zero))
    assert {found.rule for found in report.findings} == rules
    assert {found.operator for found in report.findings} == ({"QuantizeLinear", "DequantizeLinear"} if rules else set())


def test_a_zero_point_in_a_constant_node_is_read(lint: Lint) -> None:
    text = QUANTISE.replace("{\n", "{ z = Constant<value = int8 {5}>()\n ")
    report = lint("tensorrt-10", text, s=np.array(0.1, np.float32))
    assert {found.got for found in report.findings} == {"1 of 1 zero points are not 0, the first 5"}


def test_without_a_zero_point_quantised_values_are_uint8(lint: Lint) -> None:
    text = "g (float[1,4] x) => (uint8[1,4] y) { y = QuantizeLinear(x, s) }"
    assert _only(lint("opencv-4.11", text, s=np.array(0.1, np.float32))).got == "quantised values of uint8"


@pytest.mark.parametrize(("target", "refused"), [("ort-web", True), ("nnapi-via-ort", True), ("tensorrt-10", False)])
def test_convolutions_in_three_dimensions(lint: Lint, target: str, refused: bool) -> None:
    text = "g (float[1,1,4,4,4] x) => (float[1,1,2,2,2] y) { y = Conv(x, w) }"
    report = lint(target, text, w=np.ones((1, 1, 3, 3, 3), np.float32))
    assert ("spatial" in {found.rule for found in report.findings}) == refused


def test_resize_modes(lint: Lint) -> None:
    text = 'g (float[1,3,4,4] x) => (float[1,3,8,8] y) {{ y = Resize<mode = "{}"{}>(x, , scales) }}'
    scales = np.array([1, 1, 2, 2], np.float32)
    assert lint("tensorrt-10", text.format("linear", ""), scales=scales).verdict == "pass"
    assert _only(lint("tensorrt-10", text.format("cubic", ""), scales=scales)).got == "mode 'cubic'"
    antialias = text.format("linear", ", antialias = 1")
    assert _only(lint("tensorrt-10", antialias, opset=18, scales=scales)).got == "antialias 1"


def test_an_output_that_nobody_may_use(lint: Lint) -> None:
    text = "g (float[1,1,4,4] x) => (float[1,1,2,2] y, int64[1,1,2,2] i) { y, i = MaxPool<kernel_shape = [3, 3]>(x) }"
    assert _only(lint("tensorrt-10", text)).rule == "unused-output"


def test_a_rank_that_is_not_taken(lint: Lint) -> None:
    text = "g (float[1,1,2,2,2] x) => (float[1,1,1,1,1] y) { y = GlobalAveragePool(x) }"
    assert "an input of 5 dimensions" in {found.got for found in lint("nnapi-via-ort", text).findings}


def test_reductions_that_openvino_gets_wrong_silently(lint: Lint) -> None:
    text = "g (float[1,4] x) => (float[1,1] y) { y = ReduceL1<axes = [1]>(x) }"
    assert _only(lint("openvino", text, opset=13)).source == "openvinotoolkit/openvino#38241"
    assert lint("openvino", text, opset=12).verdict == "pass"


def test_an_accelerator_leaves_nodes_to_the_cpu(lint: Lint) -> None:
    text = """g (float[1,3,8,8] x) => (float[1,3,8,8] y) {
        a = Relu(x)
        b = LeakyRelu(a)
        c = Relu(b)
        y = LeakyRelu(c)
    }"""
    report = lint("nnapi-via-ort", text)
    assert (report.verdict, report.num_nodes, report.num_elsewhere, report.num_pieces) == ("warn", 4, 2, 2)
    assert {found.severity for found in report.findings} == {"warning"}


def test_an_accelerator_that_takes_nothing_is_none(lint: Lint) -> None:
    report = lint("nnapi-via-ort", "g (float[1,3] x) => (float[1,3] y) { y = LeakyRelu(x) }")
    assert (report.verdict, report.num_elsewhere, report.num_pieces) == ("fail", 1, 0)
    assert "none of its 1 nodes can run there" in {found.got for found in report.findings}


def test_nodes_of_subgraphs_are_checked_with_the_tensors_around_them(lint: Lint) -> None:
    text = """g (float[1,4] x, bool c) => (float[1,2] y) {
        y = If (c) <
            then_branch = then () => (float[1,2] a) { a, a2 = Split<axis = 1>(x, half) },
            else_branch = other () => (float[1,2] b) { b = Thing(x) }
        >
    }"""
    report = lint("tensorrt-10", text, half=np.array([2, 2]))
    assert report.num_nodes == 3
    assert _only(report).operator == "Thing"


def test_a_graph_without_inputs_or_nodes(lint: Lint) -> None:
    assert lint("nnapi-via-ort", "g () => (float[2] y) {}", y=np.zeros(2, np.float32)).verdict == "pass"


def test_what_is_no_onnx_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "no.onnx").write_bytes(b"\x00\x01\x02")
    with pytest.raises(InputError, match=r"no\.onnx"):
        lint_file(tmp_path / "no.onnx", TARGETS.values())


def test_the_files_of_a_bundle_fit_the_runtime_that_they_are_proven_on(tiny_bundle: Path) -> None:
    for path in tiny_bundle.glob("*.onnx"):
        assert [target.verdict for target in lint_file(path, [find_target("ort-1.16")]).targets] == ["pass"]
