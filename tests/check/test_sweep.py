from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from cspdeploy.check import worker as worker_module
from cspdeploy.check.latency import LatencySettings
from cspdeploy.check.sweep import SweepCell, measure_copies, measure_sweep, swept_threads
from cspdeploy.check.worker import Worker
from cspdeploy.runtimes.base import SessionRequest

ADD = '<ir_version: 8, opset_import: ["" : 17]> g (float[N, 4] x) => (float[N, 4] y) { y = Add(x, x) }'
QUICK = LatencySettings(
    min_runs=6, min_seconds=0.0, burst=1, warmup_runs=1, warmup_seconds=0.0, max_warmup_seconds=0.0, lead_in_seconds=0.0
)
CELL = SweepCell(subject="s", artifact="onnx", runtime="ort-cpu", batch=0, num_threads=0)


@pytest.fixture
def request_(tmp_path: Path) -> SessionRequest:
    path = tmp_path / "add.onnx"
    path.write_bytes(onnx.parser.parse_model(ADD).SerializeToString())
    return SessionRequest(path=path)


@pytest.mark.parametrize(
    ("num_cpus", "threads"), [(1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (6, (1, 2, 4, 6)), (8, (1, 2, 4, 8))]
)
def test_threads_double_up_to_the_cpus(num_cpus: int, threads: tuple[int, ...]) -> None:
    assert swept_threads(num_cpus) == threads


def test_cells_hold_throughput_and_what_cannot_run_says_why(request_: SessionRequest) -> None:
    feeds = {1: {"x": np.ones((1, 4), np.float32)}, 4: {"x": np.ones((4, 4), np.float32)},
             9: {"x": np.ones((9, 5), np.float32)}}  # fmt: skip
    cells = measure_sweep(CELL, request_, runtime_name="ort-cpu", feeds=feeds, threads=(1, 2), time_limit_s=60.0,
                          settings=QUICK)  # fmt: skip
    assert [(cell.batch, cell.num_threads) for cell in cells] == [(1, 1), (4, 1), (9, 1), (1, 2), (4, 2), (9, 2)]
    for cell in cells:
        if cell.batch == 9:
            assert cell.images_per_s is None
            assert "invalid dimensions for input: x" in cell.reason
        else:
            assert cell.p50_ms is not None
            assert cell.images_per_s == pytest.approx(1e3 * cell.batch / cell.p50_ms)


def test_copies_and_compute_are_apart(request_: SessionRequest) -> None:
    with Worker("ort-cpu", request_, time_limit_s=60.0) as worker:
        found = measure_copies(worker, {"x": np.ones((1, 4), np.float32)}, names=("s", "onnx", "ort-cpu"), graph=None,
                               time_limit_s=60.0, settings=QUICK)  # fmt: skip
    assert found.compute_ms > 0
    assert found.with_copies_ms > 0
    assert (found.cuda_graph_ms, found.graph_reason) == (None, "")


def test_cuda_graph_that_cannot_be_had_says_why(request_: SessionRequest) -> None:
    with Worker("ort-cpu", request_, time_limit_s=60.0) as worker:
        found = measure_copies(worker, {"x": np.ones((1, 4), np.float32)}, names=("s", "onnx", "ort-cpu"),
                               graph=("ort-cpu", request_), time_limit_s=60.0, settings=QUICK)  # fmt: skip
    assert found.cuda_graph_ms is None
    assert "CUDA graph was asked for on CPUExecutionProvider" in found.graph_reason
    assert found.compute_ms > 0


@pytest.fixture
def clocked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children that know engines with a clock of their own."""
    monkeypatch.setattr(worker_module, "CHILD", (sys.executable, "-P", str(Path(__file__).parent / "faulty_child.py")))


@pytest.mark.usefixtures("clocked")
def test_batch_that_does_not_fit_is_a_cell_and_the_others_are_measured(request_: SessionRequest) -> None:
    """Its process has ended, with all that it held on the GPU: each batch has one of its own."""
    feeds = {batch: {"x": np.ones((batch, 4), np.float32)} for batch in (1, 32, 8)}
    cells = measure_sweep(CELL, request_, runtime_name="clocked-small", feeds=feeds, threads=(0,), time_limit_s=60.0,
                          settings=QUICK, apart=True, rotate=True)  # fmt: skip
    assert [cell.batch for cell in cells] == [1, 32, 8]
    one, full, eight = cells
    assert full.reason == "out of GPU memory (2.00 GiB asked for, 1.10 GiB free) (fix: --batch 4)"
    assert (full.p50_ms, full.events_p50_ms) == (None, None)
    for cell in (one, eight):
        assert cell.p50_ms is not None
        assert cell.events_p50_ms is not None
        assert cell.events_p50_ms < cell.p50_ms
