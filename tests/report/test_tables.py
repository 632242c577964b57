from __future__ import annotations

import dataclasses
import io
from typing import Any

import pytest
from rich.console import Console, RenderableType

from cspdeploy.cli.render import NARROWEST_TABLE, print_renderable
from cspdeploy.core.results import ColdStart, Limit, MemoryUse, ParityRow, Regression, Timing, VerifyReport
from cspdeploy.core.types import PlacedNode
from cspdeploy.report.tables import UNTRAINED, format_bytes, render_verify

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
    assert "warning: noisy machine" in _text(render_verify(_report(GOOD, warnings=("noisy machine",))))


def test_speed_is_against_the_reference() -> None:
    text = _text(render_verify(_report(REFERENCE, GOOD)))
    _assert_whole(text, "1.00x", "1.37x faster")


@pytest.mark.parametrize("width", [1, 8, 20, 40, 79])
def test_narrow_terminal_does_not_crash(width: int) -> None:
    report = _report(*ALL, warnings=("noisy machine",), untrained=(BUNDLE,))
    text = _text(render_verify(report), width=width)
    assert max(len(line) for line in text.splitlines()) <= max(width, 8)


@pytest.mark.parametrize("name", ["exported/tiny[old]", "exported/[/tiny]", "exported/[bold]tiny", "exported/:cat:"])
def test_names_are_not_markup(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    good = _row("onnx", "ort-cpu", bundle=name, timing=_timing(1.0, "reference", 1.0))
    broken = _row("onnx-fp16", "ort-cpu", "error", bundle=name, reason="got [n, 3], expected [/n]")
    report = _report(good, broken, untrained=(name,), warnings=("[red]",))
    print_renderable(render_verify(report))
    text = capsys.readouterr().out
    assert name in text
    assert "[/n]" in text
    assert "[red]" in text


def test_nothing_in_it() -> None:
    assert "PASS: 0 of 0" in _text(render_verify(_report()))


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, ""), (1, "0.0 MB"), (110_700_000, "110.7 MB"), (1_234_567_890, "1234.6 MB")]
)
def test_bytes(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


# --- as wide as the terminal ---

FULL = _row(
    "torchscript", "torchscript-cpu", num_bytes=110_700_000, rel_l2=2.34e-7, limit=3.21e-6, top1_agreement=0.984375,
    timing=_timing(112.34, "indistinguishable", 1.01), top1=0.93125,
    cold=ColdStart(import_ms=1000.0, open_ms=200.0, first_run_ms=34.0),
    memory=MemoryUse(opened_bytes=300_000_000, peak_bytes=456_700_000),
)  # fmt: skip


def test_everything_fits_into_a_log() -> None:
    row = dataclasses.replace(FULL, top1=None)
    text = _text(render_verify(_report(PREPROCESS, row, NOT_CHECKABLE)))
    _assert_whole(text, "110.7 MB", "98.44 %", "112.34", "113.59", "1.01x unclear", "1234", "456.7 MB")
    assert max(len(line.rstrip()) for line in text.splitlines()) <= NARROWEST_TABLE


@pytest.mark.parametrize("width", [NARROWEST_TABLE, 120, 100])
def test_narrower_terminal_shows_fewer_columns_and_cuts_no_number(width: int) -> None:
    text = _text(render_verify(_report(PREPROCESS, FULL, NOT_CHECKABLE)), width=width)
    _assert_whole(text, "torchscript-cpu", "2.3e-07", "3.2e-06", "93.12 %", "112.34", "1.01x unclear")
    assert "456.7 MB" not in text


# --- limits that were given, nodes elsewhere, TF32, what to do next ---


def test_given_limit_is_told_in_its_cell_below_and_in_the_last_line() -> None:
    limit = Limit(output="logits", rel_l2=0.02, why="given", overridden=True)
    given = _row("onnx-fp16", "ort-cpu", rel_l2=1e-3, limit=0.02, limits=(limit,))
    text = _text(render_verify(_report(GOOD, given)))
    _assert_whole(text, "2.0e-02*", "* limit given with --tolerance for onnx-fp16")
    assert text.rstrip().splitlines()[-1] == "PASS: 2 of 2 rows hold; 1 judged by limits given with --tolerance"
    assert "*" not in _text(render_verify(_report(GOOD)))


@pytest.mark.parametrize(("count", "more"), [(3, ""), (12, ""), (15, "and 3 more")])
def test_nodes_elsewhere_are_named_up_to_a_number(count: int, more: str) -> None:
    nodes = tuple(PlacedNode(provider="CPU", node=f"node_{i:02}", operator="Resize") for i in range(count))
    row = _row("onnx", "ort-cuda", nodes_elsewhere=nodes, num_copies=4)
    text = " ".join(_text(render_verify(_report(row))).split())
    assert f"onnx on ort-cuda: {count} nodes run elsewhere: node_00 (Resize) on CPU; node_01" in text
    assert text.count("(Resize)") == min(count, 12)
    assert (more or "and") in text or not more
    assert "onnx on ort-cuda: 4 copies between devices" in text


def test_tf32_drift_is_told() -> None:
    text = _text(render_verify(_report(_row("onnx", "ort-cuda", tf32_rel_l2=3.1e-4))))
    assert "onnx on ort-cuda: timed with TF32 on, where its relative L2 is 3.1e-04" in text


def test_what_a_gpu_gives_has_columns_of_its_own_where_it_is_there() -> None:
    row = _row(
        "onnx-fp16", "ort-cuda", rel_l2=1.1e-3, limit=1e-2, rounding_rel_l2=4.2e-4, tf32_rel_l2=1.2e-3,
        events_p50_ms=0.613, timing=_timing(0.75),
    )  # fmt: skip
    text = _text(render_verify(_report(row)), width=160)
    _assert_whole(text, "with TF32", "FP16 drift", "events ms", "1.2e-03", "4.2e-04", "0.61")
    _assert_whole(
        " ".join(text.split()),
        "onnx-fp16 on ort-cuda: relative L2 4.2e-04 from the same file with every node's result rounded to FP16, "
        "1.1e-03 from the original",
    )
    text = _text(render_verify(_report(GOOD)), width=160)
    assert not any(name in text for name in ("TF32", "FP16 drift", "events ms"))


def test_next_step_stands_last_after_a_failure() -> None:
    step = {"next_step": "cspdeploy blame exported/tiny.onnx --runtime ort-cpu"}
    broken = _row("onnx", "ort-cpu", "numeric", reason="too far")
    last = _text(render_verify(_report(broken, settings=step))).rstrip().splitlines()[-1]
    assert last == f"next: {step['next_step']}"
    assert "next:" not in _text(render_verify(_report(GOOD, settings=step)))


def test_regressions_have_a_table() -> None:
    worse = Regression(
        artifact="onnx-fp16", runtime="ort-cpu", verdict="worse", reason="12.0 % larger", rel_l2=1.5e-3,
        top1_agreement=0.99, old_bytes=100, new_bytes=112, latency="slower", ratio=0.8,
    )  # fmt: skip
    gone = Regression(artifact="onnx-int8", runtime="ort-cpu", verdict="gone")
    text = _text(render_verify(_report(GOOD, against="old/tiny", regressions=(worse, gone))))
    _assert_whole(
        text, "against old/tiny", "worse", "12.0 % larger", "+12.0 %", "0.80x slower", "1.5e-03", "99 %", "gone"
    )  # fmt: skip
