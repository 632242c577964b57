"""`verify` with each session in a process of its own: what crashes or hangs is a row, and the rest goes on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import cspdeploy.runtimes
from cspdeploy.check import worker
from cspdeploy.check.latency import LatencySettings
from cspdeploy.core.results import VerifyReport
from cspdeploy.runtimes import all_runtimes

HERE = Path(__file__).parent
SHORT = LatencySettings(
    min_runs=5, min_seconds=0.0, min_rounds=1, warmup_runs=1, warmup_seconds=0.0, max_warmup_seconds=0.0,
    lead_in_seconds=0.0, burst=1,
)  # fmt: skip
LONG_S = 60.0
"""For what must answer: the machine may be busy."""


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Engines that abort, sleep and raise, here and in the children."""
    monkeypatch.setattr(worker, "CHILD", (sys.executable, "-P", str(HERE / "faulty_child.py")))
    monkeypatch.setattr(cspdeploy.runtimes, "__path__", [*cspdeploy.runtimes.__path__, str(HERE / "faulty_runtimes")])
    all_runtimes.cache_clear()
    yield
    monkeypatch.undo()
    all_runtimes.cache_clear()


def _verify(ladder: Any, make_mean_bundle: Callable[[int], Path], *runtimes: str, **settings: Any) -> VerifyReport:
    report: VerifyReport = ladder.verify(make_mean_bundle(1), *runtimes, isolate=True, **settings)
    return report


def test_rows_are_those_of_this_process_with_start_and_memory(
    make_mean_bundle: Callable[[int], Path], ladder: Any
) -> None:
    folder = make_mean_bundle(1)
    alone = ladder.row(ladder.verify(folder, "ort-cpu", isolate=True, latency=SHORT), "onnx", "ort-cpu")
    here = ladder.row(ladder.verify(folder, "ort-cpu"), "onnx", "ort-cpu")
    assert (alone.verdict, alone.rel_l2, alone.placement) == ("pass", here.rel_l2, here.placement)
    assert alone.decisions == here.decisions
    assert alone.timing is not None
    assert alone.cold is not None
    assert min(alone.cold.import_ms, alone.cold.open_ms, alone.cold.first_run_ms) > 0
    assert alone.memory is not None
    assert alone.memory.peak_bytes > 0


@pytest.mark.usefixtures("faulty")
def test_crash_is_a_row_and_the_others_are_judged_and_timed(
    make_mean_bundle: Callable[[int], Path], ladder: Any
) -> None:
    report = _verify(ladder, make_mean_bundle, "abort-run", "ort-cpu", latency=SHORT, time_limit_s=LONG_S)
    row, other = ladder.row(report, "onnx", "abort-run"), ladder.row(report, "onnx", "ort-cpu")
    assert (row.verdict, row.timing) == ("crash", None)
    assert "SIGABRT" in row.reason
    assert "the last words of an engine" in row.reason
    assert other.verdict == "pass"
    assert other.timing is not None
    assert report.verdict == "fail"
    assert "onnx on abort-run" in report.first_break


@pytest.mark.usefixtures("faulty")
def test_hang_is_a_row_after_the_time_limit(make_mean_bundle: Callable[[int], Path], ladder: Any) -> None:
    report = _verify(ladder, make_mean_bundle, "sleep-run", "torchscript-cpu", time_limit_s=3.0)
    row = ladder.row(report, "onnx", "sleep-run")
    assert row.verdict == "hang"
    assert "within 3 s" in row.reason
    assert "--time-limit" in row.reason


@pytest.mark.usefixtures("faulty")
def test_exception_of_an_engine_is_one_line(make_mean_bundle: Callable[[int], Path], ladder: Any) -> None:
    report = _verify(ladder, make_mean_bundle, "raise-run", time_limit_s=LONG_S)
    row = ladder.row(report, "onnx", "raise-run")
    assert row.verdict == "error"
    assert "device lost" in row.reason
    assert "much more" not in row.reason
