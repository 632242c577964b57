from __future__ import annotations

import io
from pathlib import Path

import onnx
import pytest
from rich.console import Console

from cspdeploy.check.lint import lint_file
from cspdeploy.core.targets import find_target
from cspdeploy.report.lint import render_lint


@pytest.fixture
def leaky(tmp_path: Path) -> Path:
    """Five LeakyRelus behind a Relu, opset 17."""
    nodes = "\n".join(f"t{i + 1} = LeakyRelu(t{i})" for i in range(5))
    text = f'<ir_version: 8, opset_import: ["" : 17]> g (float[1,3] x) => (float[1,3] t5) {{ t0 = Relu(x)\n{nodes} }}'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "leaky.onnx")
    return tmp_path / "leaky.onnx"


def _text(path: Path, *targets: str) -> str:
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(render_lint(lint_file(path, [find_target(target) for target in targets])))
    return console.export_text()


def test_equal_findings_are_one_line_with_the_first_nodes(leaky: Path) -> None:
    text = _text(leaky, "nnapi-via-ort")
    assert "warning: operator LeakyRelu (5 nodes); nnapi-via-ort takes no such operator, the CPU runs it" in text
    assert "at: LeakyRelu 1, LeakyRelu 2, LeakyRelu 3 and 2 more" in text
    assert "1 of 6 nodes can run on the accelerator, in 1 pieces; 5 stay on the CPU" in text
    assert "source: microsoft/onnxruntime" in text
    assert "PASS: 1 of 1 target takes it, 1 with warnings" in text


def test_what_is_refused_is_the_last_line(leaky: Path) -> None:
    text = _text(leaky, "ort-1.16", "opencv-4")
    assert "violation: opset 17; opencv-4 takes opset 12 at most" in text
    assert "fix: cspdeploy export MODEL --target opencv-4" in text
    assert text.strip().splitlines()[-1] == "FAIL: 1 of 2 targets does not take it: opencv-4"
