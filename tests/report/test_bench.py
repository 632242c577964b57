from __future__ import annotations

import dataclasses

import pytest
from rich.console import Console

from cspdeploy.check.bench import BenchReport, BenchRow
from cspdeploy.check.gpu_record import GpuRecord
from cspdeploy.check.profile import KernelTime, NodeTime, OperatorTime, Profile
from cspdeploy.check.roofline import Peak, Roofline
from cspdeploy.check.stats import EventTime
from cspdeploy.check.sweep import Copies, SweepCell
from cspdeploy.core.results import ColdStart, MemoryUse, Timing
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


ON_GPU = dataclasses.replace(
    ROW, runtime="ort-cuda", variant="cuda-graph", inputs="rotated: 64 sets, 50 MB",
    settings={"use_tf32": "1", "enable_cuda_graph": "1"},
    timing=dataclasses.replace(FIRST, p50_ms=0.25, ci_low_ms=0.24, ci_high_ms=0.26),
    events=EventTime(p50_ms=0.2, ci_low_ms=0.19, ci_high_ms=0.21, wait_ms=0.05),
)  # fmt: skip


def test_events_have_columns_only_where_some_row_has_them() -> None:
    assert not any(name in _text(REPORT) for name in ("between events", "host's wait"))
    text = _text(dataclasses.replace(REPORT, rows=(ROW, ON_GPU)), width=180)
    assert "host p50 ms" in text
    assert "between events" in text
    assert "host's wait" in text
    assert "launch" not in text  # which is between the events: said by the profile of kernels alone
    on_gpu = next(line for line in text.splitlines() if "ort-cuda [cuda-graph]" in line)
    for value in ("0.250", "0.240 to 0.260", "0.200", "0.050"):
        assert value in on_gpu


def test_row_without_a_device_leaves_its_cells_empty() -> None:
    broken = dataclasses.replace(ON_GPU, verdict="error", reason="out of GPU memory", timing=None, events=None)
    text = _text(dataclasses.replace(REPORT, rows=(ROW, ON_GPU, broken)), width=180)
    assert "onnx on ort-cuda [cuda-graph]: error: out of GPU memory" in text
    first = _line(text, "onnx  ")
    assert "10.000" in first
    assert "0.200" not in first
    assert "0.050" not in first


def test_how_a_session_was_set_is_one_line_for_all_its_rows() -> None:
    other = dataclasses.replace(ON_GPU, artifact="onnx-fp16")
    text = " ".join(_text(dataclasses.replace(REPORT, rows=(ROW, ON_GPU, other)), width=180).split())
    line = "onnx, onnx-fp16 on ort-cuda [cuda-graph]: inputs rotated: 64 sets, 50 MB; use_tf32 1, enable_cuda_graph 1"
    assert text.count(line) == 1


def test_gpu_is_told_with_what_held_it() -> None:
    record = GpuRecord(group="tiny", gpu="NVIDIA A GPU", num_samples=50, sm_clock_mhz=(1200.0, 1900.0, 1980.0),
                       power_w=(90.0, 650.0, 700.0), limits=("power limit",))  # fmt: skip
    environment = REPORT.environment | {"gpu": "NVIDIA A GPU", "gpu_driver": "580.1 (CUDA 13.0)"}
    report = dataclasses.replace(REPORT, gpus=(record,), environment=environment)
    text = " ".join(_text(report).split())
    assert "NVIDIA A GPU while tiny was timed: SM clock 1900 MHz (1200 to 1980), power 650 W (90 to 700)" in text
    assert "held by power limit" in text
    assert "read, not set" in text
    assert "580.1 (CUDA 13.0)" in text
    assert "580.1" not in _text(dataclasses.replace(REPORT, environment=environment))  # it was not used


@pytest.mark.parametrize(("bound", "share", "words"), [("launch-bound", 0.25, "waits for the host"),
                                                       ("kernel-bound", 0.9, "most of the run")])  # fmt: skip
def test_kernels_and_whether_the_gpu_waits(bound: str, share: float, words: str) -> None:
    kernel = "void cutlass::Kernel2<" + "x" * 200 + ">"
    profile = Profile(
        subject="s", artifact="onnx", runtime="ort-cuda", variant="nhwc", nodes_ms=0.0, run_ms=2.0, operators=(),
        nodes=(), kernels=(KernelTime(kernel=kernel, num_calls=53, ms=0.4, share=0.8),), busy_ms=2.0 * share,
        busy_share=share, bound=bound,  # type: ignore[arg-type]
    )  # fmt: skip
    text = _text(dataclasses.replace(REPORT, profiles=(profile,)))
    assert "onnx on ort-cuda [nhwc]" in text
    assert "80.0 %" in text
    assert "..." in text
    assert f"({100 * share:.0f} %): {bound}" in " ".join(text.split())
    assert words in " ".join(text.split())


def test_peaks_name_their_arithmetic() -> None:
    names = {"subject": "s", "artifact": "onnx", "runtime": "ort-cuda"}
    roof = Roofline(**names, gflop=1.0, gflops=1.0, peak_share=0.5, arithmetic_ms=1.0, weights_ms=1.0, roof_share=0.5,
                    bound="memory", variant="nhwc")  # fmt: skip
    peaks = tuple(
        Peak(runtime="ort-cuda", num_threads=0, gflops=gflops, gbytes_per_s=1.0, precision=precision, tf32=tf32)
        for gflops, precision, tf32 in ((300.0, "fp32", True), (700.0, "fp16", False))
    )
    text = _text(dataclasses.replace(REPORT, rooflines=(roof,), peaks=peaks))
    assert "300 GFLOP/s in float32, rounded to TF32" in " ".join(text.split())
    assert "700 GFLOP/s in float16" in " ".join(text.split())
    assert "ort-cuda [nhwc]" in text


def test_sweep_holds_the_device_beside_the_host() -> None:
    cell = SweepCell(subject="s", artifact="onnx", runtime="ort-cuda", variant="nhwc", batch=8, num_threads=0,
                     p50_ms=2.0, images_per_s=4000.0, events_p50_ms=1.75)  # fmt: skip
    text = _text(dataclasses.replace(REPORT, sweep=(cell,)))
    assert "onnx on ort-cuda [nhwc]: images/s" in text
    assert "4000 (2.00, between events 1.750)" in text
