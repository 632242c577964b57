"""In which order the CUDA benchmark measures, what it leaves out, and what it keeps of tests that had to be ended."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import cuda_tests  # noqa: E402
from cuda_budget import Budget  # noqa: E402
from cuda_latency import QUICK  # noqa: E402
from cuda_outcomes import read_outcomes  # noqa: E402
from cuda_plan import Plan, num_rows  # noqa: E402
from cuda_regimes import NETWORK_PAIRS, REGIMES, Regime, find_regimes  # noqa: E402
from cuda_result import Result  # noqa: E402
from cuda_run import PARTS, SECONDS_A_ROW, TESTS_S, Run  # noqa: E402


def _plan(batches: tuple[int, ...] = (1, 32, 8)) -> Plan:
    return Plan(
        kind="cuda", groups=NETWORK_PAIRS, batches=batches, regimes=REGIMES["cuda"], parts=PARTS, settings=QUICK,
        size_px=256,
    )  # fmt: skip


def test_batches_of_figures_come_first_and_are_compiled_for() -> None:
    plan = _plan()
    assert (plan.first_batches, _plan((8,)).first_batches) == ((1, 32), (8,))
    assert "compile-fp16-nhwc" in {one.name for one in plan.possible(32)}
    assert "compile-fp16-nhwc" not in {one.name for one in plan.possible(8)}  # it would compile while it is timed
    assert not any(one.extra or one.with_copies for one in plan.needed(1))
    named = find_regimes("cuda", ("ort-fp32-graph",))
    assert [one.extra for one in named] == [False]  # what is asked for is wanted


def test_rows_that_no_figure_needs_are_left_to_the_pairs_to_come() -> None:
    plan = _plan()
    every, needed = 2 * num_rows(plan.possible(1)), 2 * num_rows(plan.needed(1))
    to_come = 5 * needed
    assert every > needed

    def affordable(num_rows_of_time: float) -> tuple[Regime, ...]:
        budget = Budget(TESTS_S + SECONDS_A_ROW * num_rows_of_time, clock=lambda: 0.0)
        run = Run(plan, Result(kind="cuda", commands=(), size_px=256, facts={}), budget, lambda result: None)
        return run._affordable(2, 1, keep_s=TESTS_S, rows_to_come=to_come)

    assert affordable(every + to_come) == plan.possible(1)
    assert affordable(every + to_come - 1) == affordable(needed) == plan.needed(1)
    assert affordable(needed - 1) == ()  # the tests have what is left


TESTS = """
import os, pytest
pytestmark = pytest.mark.cuda
def test_passes(): pass
def test_fails(): assert 1 == 2
def test_skips(): pytest.skip("TensorRT is not installed")
@pytest.mark.slow
def test_slow(): raise RuntimeError
@pytest.fixture
def broken():
    yield
    raise RuntimeError("not closed")
def test_left_open(broken): pass
def test_dies(): os._exit(7)
"""


def test_outcomes_are_kept_of_a_run_that_dies(tmp_path: Path) -> None:
    file = tmp_path / "test_these.py"
    file.write_text(TESTS)
    found, problem = cuda_tests._run([file], 60.0, tmp_path, tmp_path / "outcomes.jsonl")
    assert [(one.name, one.outcome) for one in found] == [
        ("test_these::test_passes", "passed"), ("test_these::test_fails", "failed"),
        ("test_these::test_skips", "skipped"), ("test_these::test_left_open", "failed"),
    ]  # fmt: skip
    assert "assert 1 == 2" in found[1].detail
    assert "TensorRT is not installed" in found[2].detail
    assert problem == "pytest ended with 7 and 4 tests, in test_these::test_dies"
    with (tmp_path / "outcomes.jsonl").open("a") as broken:
        broken.write('{"name": "test_th')  # of a process that was killed while it wrote
    assert read_outcomes(tmp_path / "outcomes.jsonl") == (found, "test_these::test_dies")


def test_what_tests_had_started_is_ended_with_them() -> None:
    """Else it holds the GPU while latency is measured."""
    code = "import subprocess, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    grandchild = int(process.stdout.readline())
    os.kill(grandchild, 0)
    cuda_tests._end(process)
    process.stdout.close()
    assert process.returncode is not None
    for _ in range(500):  # its new parent takes note of it when it gets to it
        with contextlib.suppress(FileNotFoundError):
            if "\nState:\tZ" not in Path(f"/proc/{grandchild}/status").read_text():
                time.sleep(0.01)
                continue
        break
    else:
        pytest.fail("it is alive")
