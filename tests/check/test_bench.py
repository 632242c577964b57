from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

import cspdeploy.runtimes
from cspdeploy.check import roofline
from cspdeploy.check import worker as worker_module
from cspdeploy.check.bench import BenchReport, BenchSettings, bench_subjects, feeds_of_batch
from cspdeploy.check.bench_group import BenchGroup
from cspdeploy.check.gpu_record import record_of
from cspdeploy.check.latency import LatencySettings
from cspdeploy.check.loose_file import file_subject
from cspdeploy.check.subject import bundle_subject
from cspdeploy.check.time_limits import COMPILE_LIMIT_S, time_limit_of
from cspdeploy.core.codec import to_json
from cspdeploy.core.errors import InputError, RuntimeUnavailableError
from cspdeploy.core.gpu import GpuSummary, Spread
from cspdeploy.runtimes import all_runtimes
from cspdeploy.runtimes.base import CudaOptions, SessionRequest
from cspdeploy.runtimes.tf32 import TF32_VARIABLE

SHORT = LatencySettings(
    min_runs=5, min_seconds=0.0, warmup_runs=1, warmup_seconds=0.0, max_warmup_seconds=0.0, lead_in_seconds=0.0, burst=1
)
QUICK = BenchSettings(runtimes=("ort-cpu",), latency=SHORT, time_limit_s=60.0)

FIXED = '<ir_version: 8, opset_import: ["" : 17]> g (float[1, 4] x) => (float[1, 4] y) { y = Add(x, x) }'
FREE = '<ir_version: 8, opset_import: ["" : 17]> g (float[N, 4] x) => (float[N, 4] y) { y = Add(x, x) }'


@pytest.fixture(autouse=True)
def small_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's peak by a product of a moment: its value means nothing here."""
    monkeypatch.setattr(roofline, "PRODUCT_SIDE", {"cpu": 64})
    monkeypatch.setattr(roofline, "STREAM_VALUES", 1 << 20)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    def call(name: str, text: str) -> Path:
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(onnx.parser.parse_model(text).SerializeToString())
        return path

    return call


def test_every_artifact_is_timed_against_the_first(tiny_bundle: Path) -> None:
    report = bench_subjects([("tiny", [bundle_subject(tiny_bundle)])], QUICK)
    assert report.verdict == "done"
    assert [(row.artifact, row.runtime, row.verdict) for row in report.rows] == [
        ("onnx", "ort-cpu", "timed"), ("onnx-fp16", "ort-cpu", "timed")
    ]  # fmt: skip
    first, second = report.rows
    assert first.timing is not None
    assert second.timing is not None
    assert first.timing.verdict == "reference"
    assert second.timing.verdict in ("faster", "slower", "indistinguishable")
    for row in report.rows:
        assert row.timing is not None
        assert len(row.rounds_ms) >= SHORT.min_rounds
        assert tuple(value for samples in row.rounds_ms for value in samples) == row.timing.samples_ms
        assert row.cold is not None
        assert min(row.cold.import_ms, row.cold.open_ms, row.cold.first_run_ms) > 0
        assert row.memory is not None
        assert row.memory.peak_bytes >= row.memory.opened_bytes > 0
        assert row.num_bytes > 0
        assert sum(row.placement.values()) > 0
    assert {found.artifact for found in report.rooflines} == {"onnx", "onnx-fp16"}
    assert len(report.peaks) == 1
    assert report.environment["load_1min"]
    assert report.settings["latency"]["min_runs"] == 5
    to_json(report)


def test_files_are_compared_with_each_other(write: Callable[[str, str], Path]) -> None:
    paths = [write("a", FIXED), write("b", FREE)]
    report = bench_subjects([("files", [file_subject(path, reference=False) for path in paths])], QUICK)
    assert [(row.artifact, row.group) for row in report.rows] == [("a.onnx", "files"), ("b.onnx", "files")]
    assert [row.timing.verdict == "reference" for row in report.rows if row.timing] == [True, False]
    assert report.rooflines == ()  # an addition multiplies nothing


def test_batch_that_an_artifact_does_not_take_is_said(write: Callable[[str, str], Path]) -> None:
    subjects = [file_subject(path, reference=False) for path in (write("fixed", FIXED), write("free", FREE))]
    report = bench_subjects([("files", subjects)], dataclasses.replace(QUICK, batch=3))
    fixed, free = report.rows
    assert (fixed.verdict, fixed.reason) == (
        "not-checkable", "the first axis of its input x is fixed (fix: leave out --batch)"
    )  # fmt: skip
    assert (free.verdict, free.batch) == ("timed", 3)
    assert report.verdict == "done"


def test_batch_repeats_the_images(tiny_bundle: Path, write: Callable[[str, str], Path]) -> None:
    subject = bundle_subject(tiny_bundle)
    eager, onnx_fixed = subject.candidates[0], next(made for made in subject.candidates if made.artifact == "onnx")
    x = feeds_of_batch(subject, eager, 3)["input"]
    assert x.shape[0] == 3
    assert x.flags["C_CONTIGUOUS"]
    assert np.array_equal(x[0], x[2])
    assert len(feeds_of_batch(subject, onnx_fixed, 0)["input"]) == 1
    with pytest.raises(InputError, match="takes 1 images a call, not 3"):
        feeds_of_batch(subject, onnx_fixed, 3)
    loose = file_subject(write("free", FREE), reference=False)
    assert feeds_of_batch(loose, loose.candidates[0], 5)["x"].shape == (5, 4)


def test_parts_that_are_asked_for(write: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cspdeploy.check.bench_parts.SWEPT_BATCHES", (1, 2))
    monkeypatch.setattr("cspdeploy.check.bench_parts.swept_threads", lambda: (1, 2))
    subjects = [file_subject(write("free", FREE), reference=False)]
    report = bench_subjects([("files", subjects)], dataclasses.replace(QUICK, sweep=True, profile=True))
    assert [(cell.batch, cell.num_threads) for cell in report.sweep] == [(1, 1), (2, 1), (1, 2), (2, 2)]
    assert all(cell.images_per_s and not cell.reason for cell in report.sweep)
    (profile,) = report.profiles
    assert [found.operator for found in profile.operators] == ["Add"]
    assert report.copies == ()  # there is nothing to copy to


def test_sweep_of_a_fixed_batch_is_over_threads(
    write: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cspdeploy.check.bench_parts.swept_threads", lambda: (1,))
    subjects = [file_subject(write("fixed", FIXED), reference=False)]
    report = bench_subjects([("files", subjects)], dataclasses.replace(QUICK, sweep=True))
    assert [(cell.batch, cell.num_threads) for cell in report.sweep] == [(1, 1)]
    assert any("first axis of its input x is fixed" in note for note in report.notes)


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines that break, known here and in the children."""
    folder = Path(__file__).parent
    monkeypatch.setattr(cspdeploy.runtimes, "__path__", [*cspdeploy.runtimes.__path__, str(folder / "faulty_runtimes")])
    monkeypatch.setattr(worker_module, "CHILD", (sys.executable, "-P", str(folder / "faulty_child.py")))
    all_runtimes.cache_clear()


@pytest.mark.usefixtures("faults")
@pytest.mark.parametrize(
    ("engine", "verdict", "reason"),
    [("abort-run", "crash", "SIGABRT"), ("abort-open", "crash", "SIGABRT"), ("raise-run", "error", "device lost"),
     ("sleep-open", "hang", "within 4 s")],
)  # fmt: skip
def test_engine_that_breaks_is_a_row_and_the_rest_goes_on(
    write: Callable[[str, str], Path], engine: str, verdict: str, reason: str
) -> None:
    subjects = [file_subject(write("fixed", FIXED), reference=False)]
    settings = dataclasses.replace(QUICK, runtimes=(engine, "ort-cpu"), time_limit_s=4.0 if verdict == "hang" else 60.0)
    try:
        report = bench_subjects([("files", subjects)], settings)
    finally:
        all_runtimes.cache_clear()
    assert report.verdict == "fail"
    broken, sound = report.rows
    assert (broken.runtime, broken.verdict) == (engine, verdict)
    assert reason in broken.reason
    assert broken.timing is None
    assert sound.timing is not None
    assert sound.timing.verdict == "reference"


def test_file_that_the_engine_refuses_is_an_error_row(write: Callable[[str, str], Path]) -> None:
    bad = write("bad", FIXED.replace("Add(x, x)", "Frobnicate(x)"))
    subjects = [file_subject(path, reference=False) for path in (bad, write("good", FIXED))]
    report = bench_subjects([("files", subjects)], QUICK)
    assert [row.verdict for row in report.rows] == ["error", "timed"]
    assert report.verdict == "fail"


def test_runtime_that_is_not_here(write: Callable[[str, str], Path]) -> None:
    subjects = [file_subject(write("fixed", FIXED), reference=False)]
    with pytest.raises(InputError, match="unknown"):
        bench_subjects([("files", subjects)], dataclasses.replace(QUICK, runtimes=("abacus",)))
    if all_runtimes()["ort-cuda"].missing() is not None:
        with pytest.raises(RuntimeUnavailableError):
            bench_subjects([("files", subjects)], dataclasses.replace(QUICK, runtimes=("ort-cuda",)))


def test_nothing_to_time(write: Callable[[str, str], Path]) -> None:
    subjects = [file_subject(write("fixed", FIXED), reference=False)]
    with pytest.raises(InputError, match="nothing could be timed"):
        bench_subjects([("files", subjects)], dataclasses.replace(QUICK, runtimes=("fp16-rounding",)))


def _on_clocked(write: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch, **changes: object) -> BenchReport:
    """An engine that computes here and says that it has a clock of its own, as one on a GPU does."""
    for module in ("bench_group", "bench_parts"):  # a warm-up for a ramp that no clock here has
        monkeypatch.setattr(f"cspdeploy.check.{module}.gpu_settings", lambda settings: SHORT)
    subjects = [file_subject(write("free", FREE), reference=False)]
    settings = dataclasses.replace(QUICK, **changes)  # type: ignore[arg-type]
    try:
        return bench_subjects([("files", subjects)], settings)
    finally:
        all_runtimes.cache_clear()


@pytest.mark.usefixtures("faults")
def test_time_between_events_is_beside_the_hosts(
    write: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = _on_clocked(write, monkeypatch, runtimes=("ort-cpu", "clocked"), conv_search="exhaustive")
    cpu, gpu = report.rows
    assert (cpu.events, cpu.events_rounds_ms, cpu.inputs) == (None, (), "")
    assert gpu.events is not None
    assert gpu.timing is not None
    assert gpu.events.ci_low_ms <= gpu.events.p50_ms <= gpu.events.ci_high_ms < gpu.timing.p50_ms
    assert 0.4 < gpu.events.wait_ms / gpu.timing.p50_ms < 1
    assert [len(found) for found in gpu.events_rounds_ms] == [len(found) for found in gpu.rounds_ms]
    assert gpu.inputs.startswith("rotated: 256 sets, ")
    assert gpu.settings == {"graph": "False", "search": "exhaustive"}
    assert "TF32 on, as in use" in gpu.note
    assert cpu.note == ""
    assert [found.runtime for found in report.copies] == ["clocked"]
    assert report.gpus == ()  # nothing here tells of clocks
    to_json(report)


@pytest.mark.usefixtures("faults")
def test_tf32_and_rotation_can_be_turned_off(
    write: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = _on_clocked(write, monkeypatch, runtimes=("clocked",), tf32=False, rotate=False)
    assert (report.rows[0].note, report.rows[0].inputs) == ("", "")
    assert report.settings["tf32"] is False


@pytest.mark.usefixtures("faults")
def test_tf32_that_the_environment_forbids_is_not_said_to_be_on(
    write: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TF32_VARIABLE, "0")
    report = _on_clocked(write, monkeypatch, runtimes=("clocked",))
    assert report.rows[0].settings[TF32_VARIABLE] == "0"
    assert f"TF32 off by {TF32_VARIABLE}=0" in report.rows[0].note
    assert "TF32 on" not in report.rows[0].note


@pytest.mark.usefixtures("faults")
def test_gpu_without_room_for_the_batch_is_a_row_that_says_what_fits(
    write: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = _on_clocked(write, monkeypatch, runtimes=("clocked-small", "clocked"), batch=4096)
    full, other = report.rows
    assert (full.verdict, other.verdict, report.verdict) == ("error", "timed", "fail")
    assert full.reason == "out of GPU memory (2.00 GiB asked for, 1.10 GiB free) (fix: --batch 4)"


@pytest.mark.usefixtures("faults")
def test_sweep_on_a_gpu_is_over_its_batches_and_survives_a_full_memory(
    write: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = _on_clocked(write, monkeypatch, runtimes=("clocked-small",), sweep=True)
    assert [(cell.batch, bool(cell.images_per_s), bool(cell.reason)) for cell in report.sweep] == [
        (1, True, False), (8, True, False), (32, False, True)
    ]  # fmt: skip


@pytest.mark.slow
def test_variants_are_rows_of_their_own(tiny_bundle: Path) -> None:
    """The eager network in both of its layouts; other runtimes have no such variant."""
    subject = bundle_subject(tiny_bundle)
    settings = dataclasses.replace(QUICK, runtimes=("torch-cpu", "ort-cpu"), variants=("channels-last",))
    report = bench_subjects([("tiny", [subject])], settings)
    assert [row.title for row in report.rows] == [
        "eager on torch-cpu", "eager on torch-cpu [channels-last]", "onnx on ort-cpu", "onnx-fp16 on ort-cpu"
    ]  # fmt: skip
    assert all(row.timing for row in report.rows)
    assert "NHWC" in report.rows[1].note


def test_variants_of_each_runtime_are_asked_of_it(tiny_bundle: Path) -> None:
    group = BenchGroup("tiny", dataclasses.replace(QUICK, runtimes=(), every_variant=True), lambda what, done, of: None)
    ways = [(rung.runtime.name, one.name) for _, rung, one in group._ways(bundle_subject(tiny_bundle))]
    assert [name for runtime, name in ways if runtime == "torch-cpu"] == ["", "channels-last", "compile"]
    assert [name for runtime, name in ways if runtime == "ort-cpu"] == ["", ""]  # FP32 and FP16


def test_compiling_has_longer_than_a_hang() -> None:
    compiled = SessionRequest(path=Path("net"), cuda=CudaOptions(compile="max-autotune"))
    eager = all_runtimes()["torch-cpu"]
    plain = SessionRequest(path=Path("net"))
    assert time_limit_of(eager, compiled, 60.0) == COMPILE_LIMIT_S > 60.0
    assert time_limit_of(eager, plain, 60.0) == 60.0
    assert time_limit_of(eager, compiled, 5000.0) == 5000.0
    assert time_limit_of(all_runtimes()["ort-tensorrt"], plain, 60.0) == COMPILE_LIMIT_S


def test_gpu_that_was_asked_for_is_never_a_cpu(write: Callable[[str, str], Path]) -> None:
    subjects = [file_subject(write("fixed", FIXED), reference=False)]
    for changes, option in (({"device": 1}, "--device 1"), ({"cuda_graph": True}, "--cuda-graph")):
        with pytest.raises(InputError, match=f"{option}: got ort-cpu, expected a runtime that computes on a GPU"):
            bench_subjects([("files", subjects)], dataclasses.replace(QUICK, **changes))  # type: ignore[arg-type]
        if all(one.missing() for one in all_runtimes().values() if one.device == "cuda"):
            settings = dataclasses.replace(QUICK, runtimes=(), **changes)  # type: ignore[arg-type]
            with pytest.raises(RuntimeUnavailableError, match=f"{option}: no runtime here computes on a GPU") as caught:
                bench_subjects([("files", subjects)], settings)
            assert "ort-cuda: " in caught.value.message
            assert caught.value.fix


def test_variant_that_no_runtime_has(write: Callable[[str, str], Path]) -> None:
    subjects = [file_subject(write("fixed", FIXED), reference=False)]
    with pytest.raises(InputError, match="--variant nhcw: unknown"):
        bench_subjects([("files", subjects)], dataclasses.replace(QUICK, variants=("nhcw",)))


def test_record_of_a_gpu_keeps_what_was_seen() -> None:
    summary = GpuSummary(gpu="A GPU", num_samples=9, sm_clock_mhz=Spread(1200.0, 1900.0, 1980.0), pstates=("P0",),
                         reasons=("power limit",))  # fmt: skip
    found = record_of(summary, group="tiny")
    assert found is not None
    assert (found.gpu, found.group, found.sm_clock_mhz, found.power_w) == (
        "A GPU",
        "tiny",
        (1200.0, 1900.0, 1980.0),
        (),
    )
    assert found.limits == ("power limit",)
    assert record_of(GpuSummary(), group="tiny") is None
