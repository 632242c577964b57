from __future__ import annotations

import dataclasses

import pytest
from rich.console import Console

from cspdeploy.check.bench import BenchReport, BenchRow
from cspdeploy.check.profile import NodeTime, OperatorTime, Profile
from cspdeploy.check.roofline import Peak, Roofline
from cspdeploy.check.sweep import Copies, SweepCell
from cspdeploy.core.types import ColdStart, MemoryUse, Timing
from cspdeploy.report.bench import render_bench

FIRST = Timing(
    p50_ms=10.0, p90_ms=11.25, ci_low_ms=9.5, ci_high_ms=10.5, num_runs=30, verdict="reference", ratio=1.0,
    samples_ms=(10.0,),
)  # fmt: skip
SECOND = dataclasses.replace(
    FIRST, p50_ms=5.0, p90_ms=None, verdict="faster", ratio=2.0, ratio_low=1.94, ratio_high=2.07
)
ROW = BenchRow(
    group="exported/tiny", artifact="onnx", runtime="ort-cpu", verdict="timed", num_bytes=12_300_000, timing=FIRST,
    cold=ColdStart(import_ms=100.0, open_ms=50.0, first_run_ms=7.4),
    memory=MemoryUse(opened_bytes=45_000_000, peak_bytes=0),
)  # fmt: skip
REPORT = BenchReport(
    verdict="done", rows=(ROW, dataclasses.replace(ROW, artifact="onnx-fp16", timing=SECOND)),
    environment={"cpu": "A Chip", "cpus": "4", "cpu_governor": "powersave", "clock_mhz": "3000", "load_1min": "0.10"},
    settings={"num_threads": 0},
)  # fmt: skip


def _text(report: BenchReport, width: int = 140) -> str:
    console = Console(width=width, record=True, file=None, force_terminal=False, markup=False)
    with console.capture() as captured:
        console.print(render_bench(report))
    return captured.get()


def _line(text: str, start: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(start))


def test_rows_hold_median_interval_tail_speed_start_memory_and_size() -> None:
    text = _text(REPORT)
    assert "exported/tiny (speed against onnx on ort-cpu)" in text
    first = _line(text, "onnx  ")
    for value in ("10.00", "9.50 to 10.50", "11.25", "1.00x", "157", "45 MB", "12.3 MB"):
        assert value in first
    second = _line(text, "onnx-fp16")
    assert "2.00x (1.94 to 2.07) faster" in second
    assert "11.25" not in second


def test_percentiles_that_no_row_knows_have_no_column() -> None:
    text = _text(REPORT)
    assert "p90" in text
    assert "p95" not in text
    assert "p99" not in text


def test_conditions_are_told() -> None:
    last = " ".join(" ".join(_text(REPORT).split("\n")[-4:]).split())
    for fact in ("A Chip", "4 CPUs", "default threads", "governor powersave", "3000 MHz", "load 0.10", "batch 1"):
        assert fact in last
    assert "outputs were not compared: cspdeploy verify does that" in last


@pytest.mark.parametrize("verdict", ["crash", "hang", "error", "not-checkable"])
def test_row_that_could_not_be_timed_says_why(verdict: str) -> None:
    broken = dataclasses.replace(
        ROW, runtime="ort-cuda", verdict=verdict, reason="died of SIGSEGV", timing=None, cold=None, memory=None
    )
    text = _text(dataclasses.replace(REPORT, rows=(*REPORT.rows, broken)))
    assert f"onnx on ort-cuda: {verdict}: died of SIGSEGV" in text


def test_nothing_timed_at_all() -> None:
    broken = dataclasses.replace(ROW, verdict="crash", reason="died", timing=None)
    assert "speed against nothing" in _text(dataclasses.replace(REPORT, rows=(broken,)))


def test_parts_that_were_measured() -> None:
    names = {"subject": "exported/tiny", "artifact": "onnx", "runtime": "ort-cpu"}
    text = _text(dataclasses.replace(
        REPORT,
        sweep=(
            SweepCell(**names, batch=1, num_threads=1, p50_ms=10.0, images_per_s=100.0),
            SweepCell(**names, batch=8, num_threads=1, p50_ms=40.0, images_per_s=200.0),
            SweepCell(**names, batch=1, num_threads=2, reason="out of memory"),
            SweepCell(**names, batch=8, num_threads=2, p50_ms=25.0, images_per_s=320.0),
        ),
        copies=(Copies(**names, compute_ms=1.5, with_copies_ms=2.25, cuda_graph_ms=1.25),),
        profiles=(Profile(
            **names, nodes_ms=9.5, run_ms=10.0, note="so it is",
            operators=(OperatorTime(operator="Conv", num_calls=72, ms=9.0, share=0.947),),
            nodes=(NodeTime(node="/a/Conv", module="stages.4.conv", operator="Conv", provider="CPU", ms=2.5, share=0.26,
                            gbytes_per_s=7.4),),
        ),),
        rooflines=(Roofline(**names, gflop=0.204, gflops=20.4, peak_share=0.12, arithmetic_ms=1.2, weights_ms=8.3,
                            roof_share=0.83, bound="memory"),),
        peaks=(Peak(runtime="ort-cpu", num_threads=0, gflops=170.0, gbytes_per_s=12.9),),
        notes=("a note",), warnings=("noisy machine: buy another",), untrained=("exported/tiny",),
    ))  # fmt: skip
    for part in ("images/s", "320 (25.00)", "out of memory", "1.500", "0.750", "1.250", "9.50 ms in nodes of 10.00 ms",
                 "94.7 %", "stages.4.conv", "so it is", "170 GFLOP/s in float32, 12.9 GB/s", "20.4", "12 %", "8.30",
                 "a note", "warning: noisy machine: buy another", "UNTRAINED"):  # fmt: skip
        assert part in text
    assert text.index("onnx on ort-cpu: images/s") < text.index("320 (25.00)")
