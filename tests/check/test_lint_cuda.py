"""Operators that ONNX Runtime's CUDA provider has no kernel for: told, and no reason to refuse the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from cspdeploy.check.lint import Finding, TargetReport, lint_file
from cspdeploy.core.targets import OPERATOR_SINCE, TARGETS, find_target

LEFT = "no CUDA kernel: runs on the CPU with copies at each side"


def report(folder: Path, text: str, *, opset: int = 17, **weights: np.ndarray) -> TargetReport:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> g {text}')
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    path = folder / "graph.onnx"
    onnx.save(model, path)
    return lint_file(path, [find_target("ort-cuda")]).targets[0]


def only(found: TargetReport) -> Finding:
    assert len(found.findings) == 1, found.findings
    return found.findings[0]


@pytest.mark.parametrize("operator", ["Celu", "Hardmax"])
def test_an_operator_without_a_kernel_is_a_warning(tmp_path: Path, operator: str) -> None:
    text = f"(float[1,4] x) => (float[1,4] y) {{ a = Relu(x)\n b = {operator}(a)\n y = Relu(b) }}"
    found = report(tmp_path, text)
    assert (found.verdict, found.num_elsewhere, found.num_pieces) == ("warn", 1, 2)
    assert (only(found).severity, only(found).operator, only(found).takes) == ("warning", operator, LEFT)
    assert "OperatorKernels.md" in only(found).source


def test_a_graph_of_nothing_but_such_operators_is_refused(tmp_path: Path) -> None:
    found = report(tmp_path, "(float[1,4] x) => (float[1,4] y) { y = Celu(x) }")
    assert found.verdict == "fail"
    assert "none of its 1 nodes" in found.findings[-1].got


@pytest.mark.parametrize(
    ("dtype", "node", "opset", "left"),
    [
        ("int32", "Clip(x)", 13, True), ("int64", "Clip(x)", 13, False), ("float16", "Clip(x)", 11, True),
        ("float", "Clip(x)", 11, False), ("int8", "Add(x, x)", 13, True), ("int8", "Add(x, x)", 14, False),
        ("int32", "TopK(x, k)", 13, False), ("int8", "MaxPool<kernel_shape = [1, 1]>(x)", 12, False),
        ("uint8", "Concat<axis = 0>(x, x)", 13, False), ("int32", "Relu(x)", 14, True),
        ("bfloat16", "Sigmoid(x)", 13, False), ("bfloat16", "LeakyRelu(x)", 16, True),
        ("int32", "Mul(x, x)", 13, False), ("int64", "ReduceMean(x)", 13, True), ("int64", "ReduceMax(x)", 13, False),
    ],
)  # fmt: skip
def test_element_types_without_a_kernel(tmp_path: Path, dtype: str, node: str, opset: int, left: bool) -> None:
    names = "v, i" if node.startswith("TopK") else "y"
    outputs = f"({dtype}[N] v, int64[N] i)" if node.startswith("TopK") else f"({dtype}[N] y)"
    weights = {"k": np.array([1])} if node.startswith("TopK") else {}
    text = f"({dtype}[1,4,2,2] x) => {outputs} {{ a = Identity(x)\n {names} = {node} }}"
    found = report(tmp_path, text, opset=opset, **weights)
    assert found.verdict == ("warn" if left else "pass"), found.findings
    if left:
        assert (only(found).rule, found.num_elsewhere) == ("element-type", 1)
        assert LEFT in only(found).takes


def test_half_precision_sampling_stays_on_the_cpu(tmp_path: Path) -> None:
    text = "({0}[1,1,4,4] x, {0}[1,2,2,2] g) => ({0}[1,1,2,2] y) {{ a = GridSample(x, g)\n y = Relu(a) }}"
    assert report(tmp_path, text.format("float")).verdict == "pass"
    assert only(report(tmp_path, text.format("float16"))).rule == "element-type"


BOXES = """(float[1,8,4] boxes, float[1,1,8] scores) => (int64[N,3] y) {
    s = Sigmoid(scores)
    y = NonMaxSuppression(boxes, s, num, iou)
}"""


def test_suppression_has_a_kernel(tmp_path: Path) -> None:
    found = report(tmp_path, BOXES, num=np.array([10]), iou=np.array([0.5], np.float32))
    assert found.verdict == "pass", found.findings


@pytest.mark.parametrize(
    ("node", "opset", "got"),
    [
        ("Pad(x, p)", 18, ""), ("Pad(x, p)", 19, "Pad of opset 19"), ("Flatten(x)", 20, ""),
        ("Flatten(x)", 21, "Flatten of opset 21"), ("ReduceMax(x)", 19, ""),
        ("ReduceMax(x)", 20, "ReduceMax of opset 20"),
    ],
)  # fmt: skip
def test_newer_forms_that_some_versions_have_no_kernel_for(tmp_path: Path, node: str, opset: int, got: str) -> None:
    weights = {"p": np.zeros(8, np.int64)} if node.startswith("Pad") else {}
    found = report(
        tmp_path, f"(float[1,4,2,2] x) => (float[N] y) {{ a = Relu(x)\n y = {node} }}", opset=opset, **weights
    )
    assert [one.got for one in found.findings] == ([got] if got else [])
    assert found.verdict == ("warn" if got else "pass")


def test_those_forms_are_the_ones_that_onnx_made_anew() -> None:
    history: dict[str, set[int]] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "":
            history.setdefault(schema.name, set()).add(schema.since_version)
    forms = [rule for rule in TARGETS["ort-cuda"].rules if rule.kind == "form"]
    assert forms
    for rule in forms:
        assert all(rule.opsets[0] in history[name] for name in rule.operators), rule


RESIZE = "(float[1,4,2,2] x) => (float[N] y) {{ a = Resize<{}>(x, , s)\n y = Relu(a) }}"


@pytest.mark.parametrize(
    ("attributes", "rule"),
    [
        ('mode = "linear"', ""), ('mode = "nearest"', ""), ('mode = "cubic"', ""),
        ('mode = "linear", antialias = 1', ""), ('mode = "nearest", antialias = 1', "attribute"),
    ],
)  # fmt: skip
def test_resize(tmp_path: Path, attributes: str, rule: str) -> None:
    scales = np.array([1, 1, 2, 2], np.float32)
    found = report(tmp_path, RESIZE.format(attributes), opset=18, s=scales)
    assert [one.rule for one in found.findings] == ([rule] if rule else [])


def test_cubic_interpolation_in_three_dimensions_gives_up_when_it_runs(tmp_path: Path) -> None:
    text = RESIZE.replace("[1,4,2,2]", "[1,4,2,2,2]").format('mode = "cubic"')
    found = report(tmp_path, text, s=np.array([1, 1, 2, 2, 2], np.float32))
    assert (found.verdict, only(found).severity, only(found).rule) == ("fail", "violation", "rank")
    linear = text.replace("cubic", "linear")
    assert report(tmp_path, linear, s=np.array([1, 1, 2, 2, 2], np.float32)).verdict == "pass"


def test_quantised_operators_have_none(tmp_path: Path) -> None:
    target = TARGETS["ort-cuda"]
    for name in ("QLinearConv", "QLinearMatMul", "ConvInteger", "DynamicQuantizeLinear"):
        assert name in OPERATOR_SINCE
        assert name not in (target.operators or ())
    assert not any(name.startswith("QLinear") for name in target.domains["com.microsoft"] or ())


def test_the_files_of_a_bundle_run_on_cuda_whole(tiny_int8_bundle: Path) -> None:
    for path in sorted(tiny_int8_bundle.glob("*.onnx")):
        found = lint_file(path, [find_target("cuda")]).targets[0]
        if "int8" not in path.name:
            assert (found.verdict, found.num_elsewhere) == ("pass", 0), (path.name, found.findings)
            continue
        # Made for the CPU: its biases are integers.
        assert found.verdict == "warn"
        assert found.num_elsewhere > 0
