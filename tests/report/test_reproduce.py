from __future__ import annotations

import io

from rich.console import Console

from cspdeploy.pipeline.reproduce import ReproducedFile, ReproduceReport, ToolChange
from cspdeploy.report.reproduce import render_reproduction


def _text(report: ReproduceReport) -> list[str]:
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(render_reproduction(report))
    return [line.rstrip() for line in console.export_text().splitlines()]


def _file(name: str, verdict: str, recorded: str, rebuilt: str) -> ReproducedFile:
    return ReproducedFile(file=name, verdict=verdict, recorded_sha256=recorded, rebuilt_sha256=rebuilt)  # type: ignore[arg-type]


SAME = _file("tiny.onnx", "equal", "a" * 64, "a" * 64)
OTHER = _file("tiny.fp16.onnx", "differs", "b" * 64, "c" * 64)


def test_all_equal_is_one_line_at_the_end() -> None:
    lines = _text(ReproduceReport(bundle="exported/tiny", verdict="equal", files=(SAME,), tools=(), remarks=()))
    assert lines[-1] == "EQUAL: all 1 files have the same bytes"
    assert any(line.split() == ["tiny.onnx", "equal", "a" * 16] for line in lines)


def test_versions_come_before_everything_else_that_may_explain_a_difference() -> None:
    tools = (ToolChange(name="onnx", recorded="1.22", here="1.23"), ToolChange(name="onnxsim", recorded="0.8", here=""))
    lines = _text(ReproduceReport(
        bundle="exported/tiny", verdict="differs", files=(SAME, OTHER), tools=tools, remarks=("step fp16: other",)
    ))  # fmt: skip
    assert lines[-4:] == [
        "onnx 1.23 here, 1.22 then", "onnxsim not here, 0.8 then", "step fp16: other",
        "DIFFERS: 1 of 2 files have the same bytes",
    ]  # fmt: skip
    assert any(line.split() == ["tiny.fp16.onnx", "differs", "b" * 16, "c" * 16] for line in lines)


def test_without_other_versions_it_says_so() -> None:
    report = ReproduceReport(bundle="b", verdict="differs", files=(OTHER,), tools=(), remarks=())
    assert _text(report)[-1] == "DIFFERS: 0 of 1 files have the same bytes; the tools are of the same versions"
