from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from cspdeploy.core.results import Limit, ParityRow, Repeats, VerifyReport
from cspdeploy.report.explain import render_explain
from cspdeploy.report.sessions import tf32_words

LIMIT = Limit(
    output="logits", rel_l2=6.7e-3, why="4 x 8192 x the noise floor 2.1e-07",
    terms={"noise_floor": 2.05e-7, "ratio": 8192.0, "cap": 0.01},
)  # fmt: skip


def _row(artifact: str, runtime: str, **fields: Any) -> ParityRow:
    return ParityRow(bundle="exported/tiny", artifact=artifact, runtime=runtime, verdict="pass", **fields)


def _text(*rows: ParityRow) -> str:
    report = VerifyReport(
        verdict="pass", first_break="", noise_floor={"exported/tiny": 2.05e-7}, untrained=(), rows=rows, warnings=(),
        environment={},
    )  # fmt: skip
    console = Console(file=io.StringIO(), width=140, markup=False, highlight=False)
    console.print(render_explain(report))
    assert isinstance(console.file, io.StringIO)
    return " ".join(console.file.getvalue().split())


def test_limit_with_its_numbers_and_what_was_measured() -> None:
    text = _text(
        _row("preprocess", "shared", limit=1e-5),
        _row("onnx-fp16", "ort-cpu", limits=(LIMIT,), limit=6.7e-3, rel_l2=6.7e-4, top1_agreement=1.0),
        _row("onnx-fp16", "fp16-rounding", limits=(LIMIT,), limit=6.7e-3, rel_l2=1.34e-3, top1_agreement=1.0),
    )
    assert "limits of exported/tiny (noise floor 2.05e-07" in text
    assert text.count("onnx-fp16, logits: 6.70e-03 = 4 x 8192 x the noise floor 2.1e-07") == 1
    assert "noise_floor 2.05e-07, ratio 8192, cap 0.01" in text
    assert "6.70e-04 on ort-cpu (10 % of the limit); 1.34e-03 on fp16-rounding (20 % of the limit)" in text
    assert "decisions: " in text
    assert "preprocess" not in text
    assert "INT8" not in text


def test_each_output_has_its_line() -> None:
    limits = tuple(Limit(output=name, rel_l2=1e-6, why="why " + name) for name in ("features_s8", "features_s16"))
    text = _text(_row("onnx", "ort-cpu", limits=limits, limit=1e-6, rel_l2=1e-7))
    assert "onnx, features_s8: 1.00e-06 = why features_s8" in text
    assert "onnx, features_s16: 1.00e-06 = why features_s16" in text
    assert "decisions" not in text


def test_int8_and_accuracy_have_their_rules() -> None:
    limit = Limit(output="logits", rel_l2=0.1, why="", terms={"num_quantised": 77.0})
    text = _text(_row("onnx-int8", "ort-cpu", limits=(limit,), limit=0.1, rel_l2=0.02, top1_agreement=1.0, top1=0.93))
    assert "of an INT8 artifact, on 5 % of the images at most" in text
    assert "fp32 0.05 points, fp16 0.1 points, int8 1 points" in text


def test_sessions_say_how_they_were_set_and_what_they_gave_again() -> None:
    text = _text(
        _row("onnx", "ort-cuda", settings={"tf32": "off", "tf32 (timed)": "on"}, tf32_rel_l2=3e-4, events_p50_ms=0.61,
             repeats=Repeats(num_runs=10, num_different=9, max_rel_l2=1.2e-7)),
        _row("onnx-fp16", "ort-cuda", rel_l2=1e-3, rounding_rel_l2=2e-4,
             repeats=Repeats(num_runs=10, num_different=9, max_rel_l2=float("inf"), first_bad_run=2)),
        _row("onnx", "ort-cpu", repeats=Repeats(num_runs=10, num_different=0, max_rel_l2=0.0)),
        _row("torchscript", "torchscript-cpu"),
    )  # fmt: skip
    assert "onnx on ort-cuda: set: tf32 off, tf32 (timed) on" in text
    assert "9 of 10 runs of one input differ in their bits from the first, by a relative L2 of 1.2e-07 at most" in text
    assert "onnx on ort-cuda: timed with TF32 on, where its relative L2 is 3.0e-04; judged with TF32 off" in text
    assert "onnx on ort-cuda: median between events on the GPU's stream 0.61 ms" in text
    assert "9 of 10 runs of one input differ in their bits from the first, run 2 in numbers that are none" in text
    assert "onnx-fp16 on ort-cuda: relative L2 2.0e-04 from the same file" in text
    assert "onnx on ort-cpu: 10 runs of one input give the same bits" in text
    assert "torchscript-cpu" not in text


def test_nothing_to_explain() -> None:
    assert _text(_row("preprocess", "shared")).strip() == ""


def test_tf32_that_the_environment_forbids_is_not_said_to_be_on() -> None:
    row = _row("onnx", "ort-cuda", settings={"NVIDIA_TF32_OVERRIDE": "0"}, tf32_rel_l2=3e-7)
    words = "TF32 off by NVIDIA_TF32_OVERRIDE=0 of the environment, whatever was asked for"
    assert tf32_words(row) == f"{words}: timed with a relative L2 of 3.0e-07"
