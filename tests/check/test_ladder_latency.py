"""Latency in `verify`."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from cspdeploy.check.ladder import VerifySettings, verify_bundles
from cspdeploy.check.latency import LatencySettings
from cspdeploy.check.machine import MachineWatch
from cspdeploy.runtimes.ort import OrtSession

SHORT = LatencySettings(
    min_runs=5, min_seconds=0.0, min_rounds=1, warmup_runs=1, warmup_seconds=0.0, max_warmup_seconds=0.0,
    lead_in_seconds=0.0, burst=1,
)  # fmt: skip
GARBAGE = b"this was never an ONNX file"


def test_latency_fills_the_rows_that_are_timed(tiny_bundle: Path, ladder: Any) -> None:
    report = ladder.verify(tiny_bundle, "torchscript-cpu", "ort-cpu", "fp16-rounding", latency=SHORT)
    for row in report.rows:
        if row.runtime in ("shared", "fp16-rounding"):
            assert (row.p50_ms, row.p95_ms, row.timing) == (None, None, None)
            continue
        assert row.timing is not None
        assert row.timing.num_runs >= SHORT.min_runs
        assert row.p50_ms == round(row.timing.p50_ms, 4)
        assert row.p50_ms > 0
        assert row.p95_ms == (None if row.timing.p95_ms is None else round(row.timing.p95_ms, 4))
        assert (row.cold, row.memory) == (None, None)  # of this process nothing can be said
    timed = [row for row in report.rows if row.timing]
    verdicts = [row.timing.verdict for row in timed if row.timing]
    assert [row.artifact for row in timed] == ["torchscript", "onnx", "onnx-fp16"]
    assert verdicts[0] == "reference"
    assert "reference" not in verdicts[1:]


def test_broken_artifact_does_not_stop_the_timing_of_others(bundle: Path, ladder: Any) -> None:
    (bundle / "tiny.onnx").write_bytes(GARBAGE)
    ladder.rehash(bundle)
    report = ladder.verify(bundle, "ort-cpu", latency=SHORT)
    assert ladder.row(report, "onnx", "ort-cpu").p50_ms is None
    assert ladder.row(report, "onnx-fp16", "ort-cpu").p50_ms is not None


def test_what_breaks_while_it_is_timed_breaks_alone(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, ladder: Any
) -> None:
    """A device that is lost after good runs: its row says so, and the others are timed without it."""
    bind = OrtSession.bind

    def bind_once(session: OrtSession, feeds: Any) -> Callable[[], None]:
        call, runs = bind(session, feeds), []

        def compute() -> None:
            runs.append(1)
            if len(runs) > 3:
                raise RuntimeError("device lost\nand much more")
            call()

        return compute

    monkeypatch.setattr(OrtSession, "bind", bind_once)
    told: list[str] = []
    settings = VerifySettings(latency=SHORT, isolate=False, audit=False)
    report = verify_bundles([tiny_bundle], settings, progress=lambda what, done, total: told.append(what))
    assert sum("warm-up of eager" in what for what in told) == 1  # what was measured up to then is not thrown away
    for artifact in ("onnx", "onnx-fp16"):
        row = ladder.row(report, artifact, "ort-cpu")
        assert (row.verdict, row.reason, row.timing) == ("error", "device lost", None)
        assert row.rel_l2 is not None
    for artifact, runtime in (("eager", "torch-cpu"), ("torchscript", "torchscript-cpu")):
        assert ladder.row(report, artifact, runtime).timing is not None


def test_noise_is_told_with_what_disturbed_meanwhile(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, ladder: Any
) -> None:
    bind = OrtSession.bind

    def bind_restless(session: OrtSession, feeds: Any) -> Callable[[], None]:
        call, naps = (
            bind(session, feeds),
            cycle((0.001, 0.02, 0.04)),
        )  # of which a burst of two takes another one each time

        def compute() -> None:
            time.sleep(next(naps))
            call()

        return compute

    monkeypatch.setattr(OrtSession, "bind", bind_restless)
    monkeypatch.setattr(MachineWatch, "findings", lambda self: ("the host took 9 %: move",))
    report = ladder.verify(tiny_bundle, "ort-cpu", latency=SHORT)
    assert [warning.endswith("the host took 9 %: move") for warning in report.warnings] == [True]
