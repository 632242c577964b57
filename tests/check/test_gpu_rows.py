"""Rows of sessions that pass for ones on a GPU: what fails there fails its row, and what is to be known is said."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

import cspdeploy.runtimes
from cspdeploy.check import bench_group, bench_parts, gpu_record, roofline, rungs, subject_check, variants, worker
from cspdeploy.check.bench import BenchSettings, bench_subjects
from cspdeploy.check.gpu_record import unwatched
from cspdeploy.check.integer_note import integer_note
from cspdeploy.check.latency import LatencySettings, timing_warnings
from cspdeploy.check.loose_file import file_subject
from cspdeploy.check.rungs import RUNTIMES_VARIABLE
from cspdeploy.check.subject import Subject
from cspdeploy.check.variants import Variant
from cspdeploy.core.errors import InputError, RuntimeUnavailableError
from cspdeploy.core.results import Timing
from cspdeploy.core.types import PlacedNode
from cspdeploy.report.bench import render_bench
from cspdeploy.runtimes import all_runtimes
from cspdeploy.runtimes.base import SessionRequest
from cspdeploy.runtimes.ort import CPU, OrtSession
from tests.core import smi

HERE = Path(__file__).parent
SHORT = LatencySettings(
    min_runs=5, min_seconds=0.0, min_rounds=1, warmup_runs=1, warmup_seconds=0.0, max_warmup_seconds=0.0,
    lead_in_seconds=0.0, burst=1,
)  # fmt: skip
ILLEGAL = "CUDA error: an illegal memory access was encountered"
INTEGERS = (
    "0 of 3 convolutions and matrix products in INT8 on CUDA: Q/DQ pairs are computed around float ones; FP16 is the "
    "format there"
)
MODEL = '<ir_version: 8, opset_import: ["" : 17]> g (float[1, 4] x) => (float[1, 4] y) { y = Add(x, x) }'


@pytest.fixture(autouse=True)
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sessions of `faulty_runtimes/failing_gpu.py`, here and in the children; no warm-up for a ramp that none has."""
    monkeypatch.setattr(worker, "CHILD", (sys.executable, "-P", str(HERE / "faulty_child.py")))
    monkeypatch.setattr(cspdeploy.runtimes, "__path__", [*cspdeploy.runtimes.__path__, str(HERE / "faulty_runtimes")])
    for module in (bench_group, bench_parts, subject_check):
        monkeypatch.setattr(module, "gpu_settings", lambda settings: SHORT)
    monkeypatch.setattr(roofline, "PRODUCT_SIDE", {"cpu": 64})
    monkeypatch.setattr(roofline, "STREAM_VALUES", 1 << 20)
    all_runtimes.cache_clear()
    yield
    monkeypatch.undo()
    all_runtimes.cache_clear()


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    path = tmp_path / "net.onnx"
    path.write_bytes(onnx.parser.parse_model(MODEL).SerializeToString())
    return file_subject(path, reference=False)


def _bench(subject: Subject, *runtimes: str, **changes: Any) -> Any:
    settings = BenchSettings(runtimes=runtimes, latency=SHORT, time_limit_s=60.0, rotate=False)
    return bench_subjects([("net", [subject])], dataclasses.replace(settings, **changes))


# --- a kernel that crashes the GPU ---


@pytest.mark.usefixtures("process_settings")
@pytest.mark.parametrize("isolate", [False, True])
def test_kernel_that_crashes_the_gpu_fails_its_row_and_no_other(
    make_mean_bundle: Callable[[int], Path], isolate: bool, ladder: Any
) -> None:
    report = ladder.verify(make_mean_bundle(1), "illegal-access", "ort-cpu", isolate=isolate, time_limit_s=60.0)
    row = ladder.row(report, "onnx", "illegal-access")
    assert (row.failed, row.verdict) == (True, "error")
    assert row.reason == ILLEGAL
    assert ladder.row(report, "onnx", "ort-cpu").verdict == "pass"
    assert report.verdict == "fail"


def test_kernel_that_crashes_the_gpu_fails_bench(subject: Subject) -> None:
    report = _bench(subject, "illegal-access", "ort-cpu")
    assert [row.verdict for row in report.rows] == ["error", "timed"]
    assert report.rows[0].reason == ILLEGAL
    assert report.verdict == "fail"


def test_onnx_runtimes_runs_have_it_alike(make_mean_bundle: Callable[[int], Path]) -> None:
    (path,) = make_mean_bundle(1).glob("*.onnx")
    session = OrtSession(path, provider=CPU)
    error = RuntimeError("CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; hostname=vm")
    with pytest.raises(RuntimeError) as caught:
        session.fail(error, batch=1)
    assert caught.value is error


# --- a session that was judged, and cannot be timed ---


@pytest.mark.parametrize(("runtime", "verdict"), [("halved-then-away", "numeric"), ("right-then-away", "pass")])
def test_verdict_stays_where_the_session_that_is_timed_cannot_be_opened(
    make_mean_bundle: Callable[[int], Path], runtime: str, verdict: str, ladder: Any
) -> None:
    row = ladder.row(ladder.verify(make_mean_bundle(1), runtime, latency=SHORT), "onnx", runtime)
    assert (row.verdict, row.timing) == (verdict, None)
    assert "not timed: the GPU went away" in row.note


# --- a variant that cannot run ---


def _away(request: Any) -> Any:
    return dataclasses.replace(request, tf32=True)


@pytest.mark.parametrize(("asked", "verdict"), [(True, "error"), (False, "not-checkable")])
def test_variant_that_cannot_run_is_a_row_and_the_rest_goes_on(
    subject: Subject, asked: bool, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(variants._VARIANTS, "right-then-away", (Variant(name="away", note="", apply=_away),))
    if not asked:
        monkeypatch.setenv(RUNTIMES_VARIABLE, "ort-cpu,right-then-away")
    names = ("ort-cpu", "right-then-away") if asked else ()
    report = _bench(subject, *names, tf32=False, every_variant=True)
    assert sorted((row.runtime, row.variant, row.verdict) for row in report.rows) == [
        ("ort-cpu", "", "timed"), ("right-then-away", "", "timed"), ("right-then-away", "away", verdict)
    ]  # fmt: skip
    assert report.rows[-1].reason == "the GPU went away"
    assert report.verdict == ("fail" if asked else "done")


def test_runtime_that_was_asked_for_and_went_away_ends_it(subject: Subject) -> None:
    with pytest.raises(RuntimeUnavailableError, match="the GPU went away"):
        _bench(subject, "right-then-away", "ort-cpu")


# --- integers ---


@pytest.fixture
def record(subject: Subject) -> tuple[PlacedNode, ...]:
    """As ONNX Runtime tells of an INT8 network on CUDA."""
    request = SessionRequest(path=subject.candidates[0].path)
    return tuple(all_runtimes()["float-pairs"].open(request).nodes)


def test_int8_on_cuda_says_how_little_of_it_is(
    make_mean_bundle: Callable[[int], Path], subject: Subject, ladder: Any
) -> None:
    folder = make_mean_bundle(1)

    def declare(data: dict[str, Any]) -> None:
        data["artifacts"][0]["precision"] = "int8"

    plain = ladder.row(ladder.verify(folder, "float-pairs"), "onnx", "float-pairs")
    assert "INT8" not in plain.note
    ladder.edit(folder, declare)
    row = ladder.row(ladder.verify(folder, "float-pairs"), "onnx", "float-pairs")
    assert INTEGERS in row.note
    integers = dataclasses.replace(subject.candidates[0], precision="int8")
    report = _bench(dataclasses.replace(subject, candidates=(integers,)), "float-pairs")
    assert report.rows[0].note.startswith("TF32 on, as in use")
    assert report.rows[0].note.endswith(INTEGERS)


@pytest.mark.parametrize(
    ("runtime", "precision", "changes"),
    [
        ("ort-cpu", "int8", {}), ("ort-cuda", "fp32", {}), ("ort-cuda", "int8", {"provider": CPU}),
        ("ort-cuda", "int8", {"operator": "QLinearConv"}), ("ort-cuda", "int8", {"operator": "Conv"}),
    ],
)  # fmt: skip
def test_no_word_of_integers_where_the_record_has_none(
    runtime: str, precision: str, changes: dict[str, str], record: tuple[PlacedNode, ...]
) -> None:
    nodes = [dataclasses.replace(node, **changes) for node in record]
    assert integer_note(all_runtimes()[runtime], precision, nodes) == ""


def test_what_tensorrt_makes_of_it_is_not_in_the_record(record: tuple[PlacedNode, ...]) -> None:
    fused = PlacedNode(provider="TensorrtExecutionProvider", node="TRT_1", operator="TRT_1")
    assert integer_note(all_runtimes()["ort-cuda"], "int8", [*record, fused]) == ""
    assert integer_note(all_runtimes()["ort-cuda"], "int8", record) == INTEGERS


# --- what a GPU did meanwhile ---

LIMIT = "the GPU's clocks were held by its power limit: name it with them"


def _timing(*samples_ms: float) -> Timing:
    return Timing(
        p50_ms=samples_ms[0], p90_ms=None, p95_ms=None, p99_ms=None, ci_low_ms=1.0, ci_high_ms=1.0,
        num_runs=len(samples_ms), verdict="reference", ratio=1.0, ratio_low=1.0, ratio_high=1.0, samples_ms=samples_ms,
    )  # fmt: skip


def test_limit_that_held_the_clocks_is_told_of_runs_that_are_all_alike() -> None:
    found = (LIMIT, "the CPU governor is 'powersave'")
    assert timing_warnings({"a": _timing(*[1.0] * 20)}, found, of_gpu=found[:1]) == [LIMIT]
    (noisy,) = timing_warnings({"a": _timing(*[1.0, 3.0] * 10)}, found, of_gpu=found[:1])
    assert LIMIT in noisy  # once
    assert "powersave" in noisy
    assert timing_warnings({"a": _timing(*[1.0] * 20)}, found[1:]) == []


def test_verify_tells_of_it(
    make_mean_bundle: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ladder: Any
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    line = "2026/11/02 10:20:30.800, 1755, 2619, 698.00, 61, P0, 0x0000000000000004"
    smi.install(tmp_path / "bin", smi.Machine(*smi.H100_580.gpus, heading=smi.H100_580.heading, stream=(line,)))
    slow = dataclasses.replace(SHORT, min_seconds=0.5)
    monkeypatch.setattr(subject_check, "gpu_settings", lambda settings: settings)
    report = ladder.verify(make_mean_bundle(1), "float-pairs", latency=slow)
    assert any("the GPU's clocks were held by its power limit: " in text for text in report.warnings)
    assert not any("were not read" in text for text in report.warnings)


def test_gpu_without_nvidia_smi_is_named_by_its_driver_and_that_is_said(
    make_mean_bundle: Callable[[int], Path], subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    ladder: Any,
) -> None:  # fmt: skip
    monkeypatch.setenv("PATH", str(tmp_path))
    told = "clocks, power and temperature of the GPU were not read: no nvidia-smi"
    assert told in ladder.verify(make_mean_bundle(1), "float-pairs", latency=SHORT).warnings
    report = _bench(subject, "float-pairs")
    assert told in report.warnings

    class Named:
        name = "NVIDIA H100 80GB HBM3"

    monkeypatch.setattr(gpu_record, "open_device", lambda index: Named())
    record, warning = unwatched(0, group="net")
    assert warning == told.replace("the GPU", "NVIDIA H100 80GB HBM3")
    assert record is not None
    words = _words(dataclasses.replace(report, gpus=(record,)))
    assert "NVIDIA H100 80GB HBM3 while net was timed; its clocks were not read" in words


def _words(report: Any) -> str:
    from rich.console import Console

    console = Console(width=400)
    with console.capture() as capture:
        console.print(render_bench(report))
    return capture.get()


# --- the GPU that was asked for ---


def test_device_with_runtimes_that_leave_cuda_out_is_wrong_use(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RUNTIMES_VARIABLE, "ort-cpu")
    words = "CSPDEPLOY_RUNTIMES=ort-cpu leaves out every runtime on CUDA"
    with pytest.raises(InputError, match=f"--device 1: {words}") as caught:
        _bench(subject, device=1)
    assert caught.value.fix == "unset CSPDEPLOY_RUNTIMES, or --runtime ort-cuda"
    with pytest.raises(InputError, match=f"--cuda-graph: {words}"):
        _bench(subject, cuda_graph=True)
    with pytest.raises(InputError, match=f"--device 1: {words}"):
        rungs.list_rungs(subject, runtimes=[], device=1)


def test_bench_asks_for_the_device_of_its_rungs(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(rungs, "open_device", asked.append)
    settings = BenchSettings(runtimes=("float-pairs",), device=2)
    group = bench_group.BenchGroup("net", settings, lambda what, done, total: None)
    ((_, rung, _),) = group._ways(subject)
    assert (asked, rung.request.cuda.device) == ([2], 2)
