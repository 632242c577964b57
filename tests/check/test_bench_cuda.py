"""On a real GPU alone: pytest -m cuda."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from cspdeploy.check.bench import BenchSettings, bench_subjects
from cspdeploy.check.latency import LatencySettings
from cspdeploy.check.subject import bundle_subject
from cspdeploy.core.errors import InputError
from cspdeploy.runtimes.cuda_driver import count_devices

pytestmark = pytest.mark.cuda

SETTINGS = BenchSettings(runtimes=("ort-cuda",), latency=LatencySettings(min_runs=20))


def test_device_host_copies_graph_and_kernels_of_one_run(tiny_bundle: Path) -> None:
    settings = dataclasses.replace(SETTINGS, cuda_graph=True, profile=True)
    report = bench_subjects([("tiny", [bundle_subject(tiny_bundle)])], settings)
    assert report.verdict == "done", [row.reason for row in report.rows]
    assert {row.variant for row in report.rows} == {"", "cuda-graph"}
    for row in report.rows:
        assert row.device is not None, row.title
        assert row.timing is not None
        assert 0 < row.device.p50_ms < row.timing.p50_ms
        assert row.inputs.startswith("rotated: ")
        assert row.settings
    assert all(found.with_copies_ms > 0 and found.compute_ms > 0 for found in report.copies)
    assert {found.artifact for found in report.copies} == {row.artifact for row in report.rows}
    assert all(profile.kernels and profile.busy_ms for profile in report.profiles), report.notes
    assert {peak.precision for peak in report.peaks} == {"fp32", "fp16"}
    assert report.gpus
    assert all(record.sm_clock_mhz for record in report.gpus)


def test_every_variant_of_the_eager_network_can_be_timed(tiny_bundle: Path) -> None:
    settings = dataclasses.replace(SETTINGS, runtimes=("torch-cuda",), every_variant=True)
    report = bench_subjects([("tiny", [bundle_subject(tiny_bundle)])], settings)
    assert [(row.variant, row.verdict, row.reason) for row in report.rows if row.verdict != "timed"] == []
    assert len(report.rows) == 5


def test_index_that_no_gpu_has(tiny_bundle: Path) -> None:
    settings = dataclasses.replace(SETTINGS, device=count_devices())
    with pytest.raises(InputError, match="no such GPU"):
        bench_subjects([("tiny", [bundle_subject(tiny_bundle)])], settings)
