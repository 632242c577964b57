from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console, RenderableType

from cspdeploy.cli.render import NARROWEST_TABLE, print_renderable
from cspdeploy.core.types import ParityRow, Timing, VerifyReport
from cspdeploy.report.tables import UNTRAINED, format_bytes, render_bench, render_verify

BUNDLE = "exported/cspdarknet53"


def _text(renderable: RenderableType, *, width: int = NARROWEST_TABLE) -> str:
    console = Console(file=io.StringIO(), width=width, markup=False, highlight=False)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def _timing(p50_ms: float, verdict: Any = "faster", ratio: float = 1.37) -> Timing:
    return Timing(
        p50_ms=p50_ms, p95_ms=p50_ms + 1.25, ci_low_ms=p50_ms - 0.11, ci_high_ms=p50_ms + 0.13, num_runs=57,
        verdict=verdict, ratio=ratio, samples_ms=(p50_ms,) * 57,
    )  # fmt: skip


def _row(artifact: str, runtime: str, verdict: Any = "pass", **fields: Any) -> ParityRow:
    return ParityRow(**{"bundle": BUNDLE, "artifact": artifact, "runtime": runtime, "verdict": verdict, **fields})


def _report(*rows: ParityRow, **fields: Any) -> VerifyReport:
    broken = next((row for row in rows if row.failed), None)
    defaults: dict[str, Any] = {
        "verdict": "fail" if broken else "pass", "noise_floor": {BUNDLE: 2e-7}, "untrained": (), "warnings": (),
        "first_break": f"{broken.bundle}: {broken.artifact} on {broken.runtime}: {broken.reason}" if broken else "",
        "environment": {},
    }  # fmt: skip
    return VerifyReport(rows=rows, **{**defaults, **fields})


PREPROCESS = _row("preprocess", "shared", max_abs=0.0, limit=1e-5)
GOOD = _row(
    "onnx", "ort-cpu", num_bytes=110_700_000, rel_l2=2.34e-7, limit=3.21e-6, top1_agreement=0.984375,
    timing=_timing(12.34),
)  # fmt: skip
REFERENCE = _row(
    "eager", "torch-cpu", num_bytes=55_300_000, rel_l2=1.17e-7, limit=3.21e-6, top1_agreement=1.0,
    timing=_timing(22.22, "reference", 1.0),
)  # fmt: skip
FAILED = _row(
    "onnx-fp16", "fp16-rounding", "nan", reason="3 of 640 values are NaN or infinite", num_bytes=55_400_000,
    limit=1e-2, note="every node's result rounded to FP16",
)  # fmt: skip
NOT_CHECKABLE = _row("torchscript", "torchscript-cpu", "not-checkable", reason="torch is not installed")
ALL = (PREPROCESS, REFERENCE, NOT_CHECKABLE, GOOD, FAILED)


def _assert_whole(text: str, *words: str) -> None:
    for word in words:
        assert word in text, f"{word} is not in\n{text}"
    assert "…" not in text


def test_pass() -> None:
    text = _text(render_verify(_report(PREPROCESS, REFERENCE, GOOD)))
    _assert_whole(text, BUNDLE, "preprocess", "eager", "torch-cpu", "onnx", "ort-cpu")
    assert text.rstrip().splitlines()[-1] == "PASS: 3 of 3 rows hold"
    assert "FAIL" not in text


@pytest.mark.parametrize("with_accuracy", [False, True])
def test_no_number_is_lost_in_a_log(with_accuracy: bool) -> None:
    rows = [
        PREPROCESS,
        REFERENCE,
        _row(
            "torchscript", "torchscript-cpu", num_bytes=110_700_000, rel_l2=2.34e-7, limit=3.21e-6,
            top1_agreement=0.984375, timing=_timing(112.34, "indistinguishable", 1.01),
            top1=0.93125 if with_accuracy else None,
        ),
        NOT_CHECKABLE,
    ]  # fmt: skip
    text = _text(render_verify(_report(*rows)))
    _assert_whole(
        text, "110.7 MB", "55.3 MB", "2.3e-07", "1.2e-07", "3.2e-06", "0.0e+00", "1.0e-05", "98.44 %", "100 %",
        "112.34", "113.59", "22.22", "23.47", "1.01x unclear", "not-checkable", "torchscript-cpu",
    )  # fmt: skip
    assert ("93.12 %" in text) == with_accuracy


def test_failure_is_named_in_its_row_below_and_in_the_last_line() -> None:
    text = _text(render_verify(_report(*ALL)))
    _assert_whole(text, "onnx-fp16 on fp16-rounding: nan: 3 of 640 values are NaN or infinite")
    row = next(line for line in text.splitlines() if "fp16-rounding" in line)
    assert "nan" in row
    last = text[text.index("FAIL:") :]
    assert " ".join(last.split()) == (
        f"FAIL: first broken rung: {BUNDLE}: onnx-fp16 on fp16-rounding: 3 of 640 values are NaN or infinite, "
        "1 not checkable here"
    )
    assert "PASS" not in text


def test_not_checkable_is_neither_passed_nor_hidden() -> None:
    text = _text(render_verify(_report(PREPROCESS, NOT_CHECKABLE, GOOD)))
    _assert_whole(text, "torchscript on torchscript-cpu: not-checkable: torch is not installed")
    assert text.rstrip().splitlines()[-1] == "PASS: 2 of 2 rows hold, 1 not checkable here"


def test_note_is_told_even_of_a_row_that_passes() -> None:
    noted = _row("onnx-fp16", "ort-cpu", note="computed in FP32 on the CPU")
    assert "onnx-fp16 on ort-cpu: computed in FP32 on the CPU" in _text(render_verify(_report(noted)))


def test_untrained_is_told_of_its_bundle_alone() -> None:
    other = _row("onnx", "ort-cpu", bundle="exported/other")
    text = _text(render_verify(_report(GOOD, other, untrained=("exported/other",))))
    assert f"exported/other is {UNTRAINED}" in text
    assert text.count("UNTRAINED") == 1
    assert "UNTRAINED" not in _text(render_verify(_report(GOOD, other)))


def test_each_bundle_has_its_table() -> None:
    other = _row("onnx", "ort-cpu", "numeric", bundle="exported/other", reason="too far", rel_l2=0.5)
    text = _text(render_verify(_report(GOOD, other)))
    first, _, second = text.partition("exported/other")
    assert BUNDLE in first
    assert "5.0e-01" not in first
    assert "5.0e-01" in second
    assert "FAIL: first broken rung: exported/other: onnx on ort-cpu: too far" in text


def test_warnings_are_told() -> None:
    for render in (render_verify, render_bench):
        assert "warning: noisy machine" in _text(render(_report(GOOD, warnings=("noisy machine",))))


def test_speed_is_against_the_reference() -> None:
    text = _text(render_verify(_report(REFERENCE, GOOD)))
    _assert_whole(text, "1.00x", "1.37x faster")


def test_bench() -> None:
    report = _report(REFERENCE, GOOD, NOT_CHECKABLE)
    text = _text(render_bench(report))
    _assert_whole(
        text, f"{BUNDLE} (speed against eager on torch-cpu)", "22.22", "22.11 to 22.35", "23.47", "57", "1.00x",
        "12.34", "12.23 to 12.47", "13.59", "1.37x faster",
    )  # fmt: skip
    assert "torchscript-cpu" not in text  # not timed


def test_bench_shows_what_could_not_be_timed() -> None:
    broken = _row("onnx-fp16", "ort-cpu", "error", reason="tiny.fp16.onnx: ONNX Runtime cannot open it")
    text = " ".join(_text(render_bench(_report(REFERENCE, broken))).split())
    assert "onnx-fp16" in text
    assert "cannot open it" in text


@pytest.mark.parametrize("width", [1, 8, 20, 40, 79])
def test_narrow_terminal_does_not_crash(width: int) -> None:
    report = _report(*ALL, warnings=("noisy machine",), untrained=(BUNDLE,))
    for render in (render_verify, render_bench):
        text = _text(render(report), width=width)
        assert max(len(line) for line in text.splitlines()) <= max(width, 8)


@pytest.mark.parametrize("name", ["exported/tiny[old]", "exported/[/tiny]", "exported/[bold]tiny", "exported/:cat:"])
def test_names_are_not_markup(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    good = _row("onnx", "ort-cpu", bundle=name, timing=_timing(1.0, "reference", 1.0))
    broken = _row("onnx-fp16", "ort-cpu", "error", bundle=name, reason="got [n, 3], expected [/n]")
    report = _report(good, broken, untrained=(name,), warnings=("[red]",))
    for render in (render_verify, render_bench):
        print_renderable(render(report))
        text = capsys.readouterr().out
        assert name in text
        assert "[/n]" in text
        assert "[red]" in text


def test_nothing_in_it() -> None:
    assert "PASS: 0 of 0" in _text(render_verify(_report()))
    assert _text(render_bench(_report())).strip() == ""


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, ""), (1, "0.0 MB"), (110_700_000, "110.7 MB"), (1_234_567_890, "1234.6 MB")]
)
def test_bytes(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text
