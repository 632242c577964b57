"""One input, run after run: sessions that are the same to the bit, and sessions that go bad on the way."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cspdeploy.runtimes
from cspdeploy.check import opening, worker
from cspdeploy.check.ladder import VerifySettings, verify_bundles
from cspdeploy.check.latency import LatencySettings
from cspdeploy.check.repeats import DEVICE_REPEATS, check_repeats, num_repeats
from cspdeploy.core.errors import InputError
from cspdeploy.core.results import Verdict
from cspdeploy.runtimes import all_runtimes
from cspdeploy.runtimes.base import Outputs

HERE = Path(__file__).parent
SHORT = LatencySettings(
    min_runs=5, min_seconds=0.0, min_rounds=1, warmup_runs=1, warmup_seconds=0.0, max_warmup_seconds=0.0,
    lead_in_seconds=0.0, burst=1,
)  # fmt: skip


@pytest.fixture
def worn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sessions of `faulty_runtimes/worn.py`, here and in the children."""
    monkeypatch.setattr(worker, "CHILD", (sys.executable, "-P", str(HERE / "faulty_child.py")))
    monkeypatch.setattr(cspdeploy.runtimes, "__path__", [*cspdeploy.runtimes.__path__, str(HERE / "faulty_runtimes")])
    all_runtimes.cache_clear()
    yield
    monkeypatch.undo()
    all_runtimes.cache_clear()


# --- the figures ---

FIRST: Outputs = {"logits": np.array([[1.0, -2.0, 4.0]], np.float32)}


def _holds(outputs: Outputs) -> tuple[Verdict, str]:
    far = float(np.abs(outputs["logits"].astype(np.float64) - FIRST["logits"].astype(np.float64)).max()) > 0.1
    return ("numeric", "too far") if far else ("pass", "")


def _runs(*outputs: Outputs) -> Callable[[], Outputs]:
    given = iter(outputs)
    return lambda: next(given)


def _with(*values: float) -> Outputs:
    return {"logits": np.array([values], np.float32)}


def test_the_same_bits_each_time() -> None:
    found = check_repeats(_runs(*(dict(FIRST) for _ in range(9))), FIRST, num_runs=10, judge=_holds)
    assert (found.figures.num_runs, found.figures.num_different, found.figures.max_rel_l2) == (10, 0, 0.0)
    assert (found.verdict, found.reason, found.remark) == ("pass", "", "")


def test_other_bits_within_the_limit_are_a_remark() -> None:
    near = _with(1.0, -2.0, np.nextafter(np.float32(4), np.float32(5)))
    found = check_repeats(_runs(FIRST, near, FIRST), FIRST, num_runs=4, judge=_holds)
    assert found.figures.num_different == 1
    assert found.figures.max_rel_l2 == pytest.approx(2**-21 / math.sqrt(21), rel=1e-3)
    assert (found.verdict, found.figures.first_bad_run) == ("pass", 0)
    assert "1 of 4 runs" in found.remark


def test_minus_zero_is_another_zero() -> None:
    first: Outputs = {"logits": np.array([0.0], np.float32)}
    found = check_repeats(
        _runs({"logits": np.array([-0.0], np.float32)}), first, num_runs=2, judge=lambda outputs: ("pass", "")
    )
    assert (found.figures.num_different, found.figures.max_rel_l2) == (1, 0.0)


@pytest.mark.parametrize(("value", "word"), [(np.nan, "NaN"), (-np.inf, "infinite")])
def test_a_later_run_that_is_not_finite(value: float, word: str) -> None:
    found = check_repeats(_runs(FIRST, _with(1.0, value, 4.0), FIRST), FIRST, num_runs=4, judge=_holds)
    assert found.verdict == "nan"
    assert found.reason == f"finite in run 1, {word} in run 3 of 4: 1 of 3 values of logits"
    assert found.figures.first_bad_run == 3
    assert found.figures.max_rel_l2 == math.inf


def test_what_was_not_finite_from_the_start_is_not_the_fault_of_a_later_run() -> None:
    first = _with(1.0, np.nan, 4.0)
    found = check_repeats(_runs(first, _with(1.1, np.nan, 4.0)), first, num_runs=3, judge=lambda outputs: ("nan", "."))
    assert (found.verdict, found.figures.first_bad_run, found.figures.num_different) == ("pass", 0, 1)


def test_a_later_run_beyond_the_limit_fails_by_the_name_of_its_run() -> None:
    found = check_repeats(_runs(FIRST, _with(1.0, -2.0, 4.5), FIRST), FIRST, num_runs=4, judge=_holds)
    assert found.verdict == "numeric"
    assert found.reason == "run 1 holds, run 3 of 4 of the same input does not: too far"
    assert found.remark == ""


def test_the_first_fault_is_the_one_that_is_told() -> None:
    found = check_repeats(_runs(_with(1, -2, 5), _with(np.nan, 0, 0)), FIRST, num_runs=3, judge=_holds)
    assert found.verdict == "numeric"
    assert found.figures.first_bad_run == 3


def test_other_shapes_and_names_are_as_far_as_can_be() -> None:
    other: Outputs = {"logits": np.zeros((2, 3), np.float32)}
    assert check_repeats(_runs(other), FIRST, num_runs=2, judge=lambda _: ("pass", "")).figures.max_rel_l2 == math.inf
    other = {"scores": FIRST["logits"]}
    assert check_repeats(_runs(other), FIRST, num_runs=2, judge=lambda _: ("pass", "")).figures.num_different == 1


def test_how_many() -> None:
    runtimes = all_runtimes()
    assert num_repeats(runtimes["ort-cuda"], None) == DEVICE_REPEATS == 10
    assert num_repeats(runtimes["ort-cpu"], None) == 0
    assert num_repeats(runtimes["ort-cuda"], 0) == 0
    assert num_repeats(runtimes["ort-cpu"], 7) == 7


@pytest.mark.parametrize("number", [-1, 1, 1001])
def test_a_number_that_proves_nothing(number: int) -> None:
    with pytest.raises(InputError, match=f"--repeats {number}: expected 0, or 2 to 1000"):
        VerifySettings(repeats=number)


# --- through verify ---


def test_onnx_runtime_on_the_cpu_gives_the_same_bits(tiny_bundle: Path, ladder: Any) -> None:
    report = ladder.verify(tiny_bundle, "ort-cpu", "torchscript-cpu", repeats=5)
    for artifact, runtime in (("onnx", "ort-cpu"), ("onnx-fp16", "ort-cpu"), ("torchscript", "torchscript-cpu")):
        row = ladder.row(report, artifact, runtime)
        assert row.verdict == "pass"
        assert row.repeats is not None
        assert (row.repeats.num_runs, row.repeats.num_different, row.repeats.first_bad_run) == (5, 0, 0)
    assert report.settings["repeats"] == 5
    assert ladder.row(ladder.verify(tiny_bundle, "ort-cpu"), "onnx", "ort-cpu").repeats is None


@pytest.mark.usefixtures("worn")
def test_nan_from_the_second_run_on(tiny_bundle: Path, ladder: Any) -> None:
    row = ladder.row(ladder.verify(tiny_bundle, "nan-from-second", repeats=10), "onnx", "nan-from-second")
    assert row.verdict == "nan"
    assert row.reason.startswith("finite in run 1, NaN in run 2 of 10: 1 of ")
    assert "; on all inputs: " in row.reason
    assert row.repeats is not None
    assert (row.repeats.num_different, row.repeats.first_bad_run) == (9, 2)


@pytest.mark.usefixtures("worn")
@pytest.mark.parametrize(
    ("runtime", "verdict", "told"),
    [("infinite-in-third", "nan", "finite in run 1, infinite in run 3 of 5"),
     ("half-in-fourth", "numeric", "run 1 holds, run 4 of 5 of the same input does not: relative L2 5.0e-01")],
)  # fmt: skip
def test_a_single_bad_run_fails_a_row_whose_other_runs_hold(
    tiny_bundle: Path, runtime: str, verdict: str, told: str, ladder: Any
) -> None:
    row = ladder.row(ladder.verify(tiny_bundle, runtime, repeats=5), "onnx", runtime)
    assert row.verdict == verdict
    assert row.reason.startswith(told)
    assert row.rel_l2 < 1e-5  # of all images, in the runs that came after
    assert "on all inputs" not in row.reason


@pytest.mark.usefixtures("worn")
def test_last_bits_are_a_remark_in_a_row_that_holds(tiny_bundle: Path, ladder: Any) -> None:
    row = ladder.row(ladder.verify(tiny_bundle, "last-bits", repeats=5), "onnx", "last-bits")
    assert row.verdict == "pass"
    assert "2 of 5 runs of one input differ" in row.note
    assert row.repeats is not None
    assert 0 < row.repeats.max_rel_l2 < 1e-6


@pytest.mark.usefixtures("worn")
def test_in_a_process_of_its_own_the_cold_run_is_the_first_of_them(
    make_mean_bundle: Callable[[int], Path], ladder: Any
) -> None:
    report = ladder.verify(
        make_mean_bundle(1), "nan-from-second", "ort-cpu", repeats=3, isolate=True, latency=SHORT, time_limit_s=60.0
    )
    row, other = (ladder.row(report, "onnx", name) for name in ("nan-from-second", "ort-cpu"))
    assert row.verdict == "nan"
    assert row.reason.startswith("finite in run 1, NaN in run 2 of 3: 1 of 3 values of logits")
    assert row.settings == {"tf32": "off", "device": "0"}
    assert other.verdict == "pass"
    assert (other.repeats.num_runs, other.repeats.num_different) == (3, 0)
    assert other.cold is not None


# --- a device without room ---


@pytest.mark.usefixtures("worn")
@pytest.mark.parametrize("runtime", ["full-open", "full-run", "full-timed"])
def test_no_room_is_a_row_with_the_batch_that_may_fit_and_leaves_nothing_behind(
    make_mean_bundle: Callable[[int], Path], runtime: str, ladder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[worker.Worker] = []

    class Recorded(worker.Worker):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr(opening, "Worker", Recorded)
    ended: list[bool] = []

    def progress(what: str, done: int, total: int) -> None:
        if what.endswith(": onnx on ort-cpu"):
            ended.extend(one._process.poll() is not None for one in made)

    report = verify_bundles(
        [make_mean_bundle(1)],
        VerifySettings(runtimes=(runtime, "ort-cpu"), latency=SHORT, audit=False, time_limit_s=60.0),
        progress=progress,
    )
    row = ladder.row(report, "onnx", runtime)
    assert row.verdict == "error"
    assert "out of GPU memory (2.00 GiB asked for, 1.10 GiB free) (fix: --batch 8)" in row.reason
    assert row.timing is None
    assert ladder.row(report, "onnx", "ort-cpu").verdict == "pass"
    assert ladder.row(report, "onnx", "ort-cpu").timing is not None
    if runtime != "full-timed":  # that one holds until it is timed
        assert ended == [True]
    assert (row.rel_l2 is not None) == (runtime == "full-timed")


# --- the device's own clock ---


@pytest.mark.usefixtures("worn")
def test_median_of_the_devices_own_clock(make_mean_bundle: Callable[[int], Path], ladder: Any) -> None:
    report = ladder.verify(make_mean_bundle(1), "with-clock", "ort-cpu", isolate=True, latency=SHORT, time_limit_s=60.0)
    row, other = (ladder.row(report, "onnx", name) for name in ("with-clock", "ort-cpu"))
    assert (row.verdict, row.events_p50_ms) == ("pass", 0.25)
    assert other.timing is not None
    assert other.events_p50_ms is None


# --- on a GPU ---


@pytest.mark.cuda
@pytest.mark.parametrize("runtime", ["ort-cuda", "torchscript-cuda", "torch-cuda"])
def test_on_a_gpu_every_row_is_repeated_and_says_how_it_was_set(tiny_bundle: Path, runtime: str, ladder: Any) -> None:
    report = ladder.verify(tiny_bundle, runtime, isolate=True, latency=SHORT, device=0)
    rows = [row for row in report.rows if row.runtime == runtime]
    assert rows
    for row in rows:
        assert row.verdict == "pass", row.reason
        assert row.repeats is not None
        assert (row.repeats.num_runs, row.repeats.first_bad_run) == (DEVICE_REPEATS, 0)
        assert row.settings
        assert row.tf32_rel_l2 is not None
        assert row.events_p50_ms is not None
        assert row.events_p50_ms > 0
        assert (row.rounding_rel_l2 is not None) == (row.artifact == "onnx-fp16")


@pytest.mark.cuda
def test_on_a_gpu_an_index_too_high_is_bad_input(tiny_bundle: Path, ladder: Any) -> None:
    with pytest.raises(InputError, match=r"--device 99: no such GPU, there (is|are) "):
        ladder.verify(tiny_bundle, "ort-cuda", device=99)
