"""Real children, real faults: engines of `faulty_runtimes` that abort, sleep for ever, or raise."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from cspdeploy.check import worker as worker_module
from cspdeploy.check.worker import EngineError, Worker, WorkerCrashedError, WorkerHungError
from cspdeploy.core.errors import EXIT_CHECK_FAILED, CspDeployError, InputError, RuntimeUnavailableError
from cspdeploy.runtimes import all_runtimes
from cspdeploy.runtimes.base import SessionRequest

TIME_LIMIT_S = 60.0
"""For what must answer: long, since the machine may be busy."""

ONE = np.ones((1, 2), np.float32)
ONCE = {"min_runs": 1, "min_seconds": 0.0, "max_runs": 1, "lead_in_seconds": 0.0}

DOUBLE = '<ir_version: 8, opset_import: ["" : 17]> double (float[N, 2] x) => (float[N, 2] y) { y = Add(x, x) }'


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "double.onnx"
    path.write_bytes(onnx.parser.parse_model(DOUBLE).SerializeToString())
    return path


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children that know the faulty engines as well."""
    monkeypatch.setattr(worker_module, "CHILD", (sys.executable, "-P", str(Path(__file__).parent / "faulty_child.py")))


@pytest.fixture
def double(model: Path) -> Iterator[Worker]:
    with Worker("ort-cpu", SessionRequest(path=model), time_limit_s=TIME_LIMIT_S) as worker:
        yield worker


def _pid_is_gone(pid: int) -> bool:
    for _ in range(300):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_computes_as_the_engine_does(double: Worker) -> None:
    opened = double.wait_opened()
    assert opened.placement == {"CPUExecutionProvider": 1}
    assert [(node.operator, node.provider) for node in opened.nodes] == [("Add", "CPUExecutionProvider")]
    assert opened.num_copies == 0
    outputs = double.run({"x": ONE})
    assert list(outputs) == ["y"]
    assert outputs["y"].dtype == np.float32
    assert outputs["y"].tolist() == [[2.0, 2.0]]


def test_cold_start_is_apart_and_of_the_first_run(double: Worker) -> None:
    assert double.first_run_ms is None
    assert double.cold is None
    double.bind({"x": ONE})
    double.burst(**ONCE)
    cold = double.cold
    assert cold is not None
    assert min(cold.import_ms, cold.open_ms, cold.first_run_ms) > 0
    assert cold.total_ms == cold.import_ms + cold.open_ms + cold.first_run_ms
    double.burst(**ONCE)
    double.run({"x": ONE})
    assert double.cold == cold


def test_import_of_the_engine_is_really_in_the_cold_start(double: Worker) -> None:
    """The child must not have loaded it before the clock ran."""
    code = (
        "import sys, cspdeploy.check.worker_child;"
        "from cspdeploy.runtimes import all_runtimes; all_runtimes();"
        "print(sorted({'torch', 'onnx', 'onnxruntime'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"


def test_memory_grows_by_what_the_session_holds(tmp_path: Path) -> None:
    """40 MB of weights are 40 MB of memory, at least; a run that needs 80 MB more shows in the peak alone."""
    weights = np.ones((10_000_000,), np.float32)
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    big (float[1] x) => (float[1] y) {
        wide = Add(w, x)
        wider = Mul(wide, wide)
        y = ReduceSum<keepdims = 1>(wider)
    }"""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    (tmp_path / "big.onnx").write_bytes(model.SerializeToString())
    with Worker("ort-cpu", SessionRequest(path=tmp_path / "big.onnx"), time_limit_s=TIME_LIMIT_S) as worker:
        before = worker.memory()
        assert before.opened_bytes > 40e6
        worker.run({"x": np.ones((1,), np.float32)})
        after = worker.memory()
        assert after.opened_bytes == before.opened_bytes
        assert after.peak_bytes > after.opened_bytes + 30e6


def test_several_bindings_are_timed_by_name(double: Worker) -> None:
    small, big = (double.bind({"x": np.ones((num, 2), np.float32)}, name=str(num)) for num in (1, 400_000))
    copied = double.bind({"x": ONE}, name="copied", copies=True)
    times = {"min_runs": 5, "min_seconds": 0.0, "max_runs": 5, "lead_in_seconds": 0.0}
    assert all(len(call.burst(**times)) == 5 for call in (small, big, copied))
    assert np.median(big.burst(**times)) > np.median(small.burst(**times))  # 400,000 times the work


@pytest.mark.usefixtures("faults")
@pytest.mark.parametrize("when", ["open", "run"])
def test_crash_is_contained_and_named(model: Path, when: str) -> None:
    with Worker(f"abort-{when}", SessionRequest(path=model), time_limit_s=TIME_LIMIT_S) as worker:
        with pytest.raises(WorkerCrashedError, match=r"\(SIGABRT\): the last words of an engine") as caught:
            worker.run({"x": ONE})
        assert caught.value.signal_name == "SIGABRT"
        assert caught.value.exit_code == EXIT_CHECK_FAILED
        assert ("opening double.onnx" in caught.value.message) == (when == "open")
        with pytest.raises(WorkerCrashedError):
            worker.run({"safe": ONE})


@pytest.mark.usefixtures("faults")
def test_process_that_leaves_by_itself_has_crashed(model: Path) -> None:
    with (
        Worker("leave-open", SessionRequest(path=model), time_limit_s=TIME_LIMIT_S) as worker,
        pytest.raises(WorkerCrashedError, match=r"exit code 3\): cannot find my library"),
    ):
        worker.wait_opened()


@pytest.mark.usefixtures("faults")
@pytest.mark.parametrize("fault", ["sleep", "hold"])
def test_hang_is_ended_at_the_time_limit(model: Path, fault: str) -> None:
    worker = Worker(f"{fault}-run", SessionRequest(path=model), time_limit_s=TIME_LIMIT_S)
    assert worker.run({"safe": ONE})["safe"].tolist() == [[2.0, 2.0]]
    worker._time_limit_s = 0.3  # only now: the child's start is no matter of this test
    worker.bind({"x": ONE})
    with pytest.raises(WorkerHungError, match=r"did not answer within 0\.3 s while running") as caught:
        worker.burst(**ONCE)
    assert caught.value.exit_code == EXIT_CHECK_FAILED
    assert worker._process.returncode == -signal.SIGKILL
    with pytest.raises(WorkerHungError):
        worker.memory()


@pytest.mark.usefixtures("faults")
def test_hang_in_opening(model: Path) -> None:
    with (
        Worker("sleep-open", SessionRequest(path=model), time_limit_s=1.0) as worker,
        pytest.raises(WorkerHungError, match=r"within 1 s while opening double\.onnx"),
    ):
        worker.wait_opened()


@pytest.mark.usefixtures("faults")
def test_time_limit_is_for_each_run_not_for_a_burst(model: Path) -> None:
    with Worker("slow-run", SessionRequest(path=model), time_limit_s=TIME_LIMIT_S) as worker:
        worker.bind({"x": ONE})
        worker._time_limit_s = 2.0
        # 9 runs of 0.4 s: nearly twice the limit together.
        assert len(worker.burst(min_runs=7, min_seconds=0.0, max_runs=7, lead_in_seconds=0.0)) == 7


@pytest.mark.usefixtures("faults")
def test_error_of_the_engine_is_one_line_and_not_the_end(model: Path) -> None:
    with Worker("raise-run", SessionRequest(path=model), time_limit_s=TIME_LIMIT_S) as worker:
        with pytest.raises(EngineError) as caught:
            worker.run({"x": ONE})
        assert caught.value.message == "device lost"
        assert worker.run({"safe": ONE})["safe"].tolist() == [[2.0, 2.0]]


def test_run_that_the_engine_refuses_leaves_the_session(double: Worker) -> None:
    with pytest.raises(EngineError, match="INVALID_ARGUMENT"):
        double.run({"x": np.ones((1, 3), np.float32)})
    assert double.run({"x": ONE})["y"].tolist() == [[2.0, 2.0]]


def test_unreadable_file_is_an_input_error_as_in_process(tmp_path: Path) -> None:
    (tmp_path / "noise.onnx").write_bytes(b"not an ONNX file at all")
    with Worker("ort-cpu", SessionRequest(path=tmp_path / "noise.onnx"), time_limit_s=TIME_LIMIT_S) as worker:
        for _ in range(2):
            with pytest.raises(InputError, match=r"noise\.onnx"):
                worker.wait_opened()


def test_absent_device_is_unavailable_as_in_process(model: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this engine has CUDA")
    with (
        Worker("ort-cuda", SessionRequest(path=model), time_limit_s=TIME_LIMIT_S) as worker,
        pytest.raises(RuntimeUnavailableError, match="CUDAExecutionProvider"),
    ):
        worker.wait_opened()


def test_workers_start_side_by_side(model: Path) -> None:
    workers = [Worker("ort-cpu", SessionRequest(path=model), time_limit_s=TIME_LIMIT_S) for _ in range(2)]
    assert len({worker._process.pid for worker in workers} | {os.getpid()}) == 3
    for worker in workers:
        assert worker.run({"x": ONE})["y"].tolist() == [[2.0, 2.0]]
        worker.close()
        assert worker._process.returncode is not None


def test_closed_worker_says_so(double: Worker) -> None:
    double.wait_opened()
    double.close()
    double.close()
    with pytest.raises(CspDeployError, match="closed"):
        double.run({"x": ONE})


def test_forgotten_worker_leaves_no_process(model: Path) -> None:
    worker = Worker("ort-cpu", SessionRequest(path=model), time_limit_s=TIME_LIMIT_S)
    process = worker._process
    del worker
    assert process.wait(30) == -signal.SIGKILL


_ORPHAN = """
import os, sys
from pathlib import Path
from cspdeploy.check import worker as module
from cspdeploy.check.worker import Worker
from cspdeploy.runtimes import all_runtimes
from cspdeploy.runtimes.base import SessionRequest
module.CHILD = (sys.executable, "-P", sys.argv[1])
worker = Worker(sys.argv[2], SessionRequest(path=Path(sys.argv[3])), time_limit_s=float(sys.argv[4]))
worker.wait_opened()
if sys.argv[2] != "ort-cpu":
    worker._connection.send(("run", ({},)))
sys.stdout.write(f"{worker._process.pid}\\n")
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.parametrize(
    ("runtime", "limit"),
    [("ort-cpu", "60"), pytest.param("hold-run", "2", marks=pytest.mark.slow)],  # the latter waits for the kernel
)
def test_child_ends_when_the_parent_is_gone(model: Path, runtime: str, limit: str) -> None:
    """Also one that hangs in native code, where no thread of Python can see that the parent is gone."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_ORPHAN), str(Path(__file__).parent / "faulty_child.py"), runtime,
         str(model), limit],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert _pid_is_gone(int(done.stdout))


def test_folder_where_it_is_started_is_not_imported_from(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of models that holds a numpy.py must not run it."""
    (tmp_path / "numpy.py").write_text("raise SystemExit('imported from the working folder')")
    monkeypatch.chdir(tmp_path)
    with Worker("ort-cpu", SessionRequest(path=model), time_limit_s=TIME_LIMIT_S) as worker:
        assert worker.wait_opened().placement


IMAGE = np.arange(3 * 64 * 64, dtype=np.float32).reshape(1, 3, 64, 64)


@pytest.mark.usefixtures("faults")
def test_device_clock_is_kept_by_burst_beside_the_hosts(model: Path) -> None:
    with Worker("clocked", SessionRequest(path=model), time_limit_s=TIME_LIMIT_S) as worker:
        call = worker.bind({"x": IMAGE})
        host = [call.burst(min_runs=num, min_seconds=0.0, max_runs=num, lead_in_seconds=0.0) for num in (4, 2)]
        assert [len(found) for found in call.device_rounds_ms] == [4, 2]
        for ours, theirs in zip(host, call.device_rounds_ms, strict=True):
            assert all(0 < device < 0.6 * seen for seen, device in zip(ours, theirs, strict=True))
        call.forget_rounds()
        assert call.device_rounds_ms == []


def test_engine_without_a_device_clock_keeps_none(double: Worker) -> None:
    call = double.bind({"x": ONE}, rotate=True)
    call.burst(min_runs=3, min_seconds=0.0, max_runs=3, lead_in_seconds=0.0)
    assert (call.device_rounds_ms, call.inputs) == ([], "")  # nor is anything rotated on a CPU


@pytest.mark.usefixtures("faults")
def test_rotated_inputs_are_really_other_ones(model: Path) -> None:
    """Where no driver tells of a cache it is taken to be a large one; the engine counts what it has seen."""
    with Worker("clocked", SessionRequest(path=model), time_limit_s=TIME_LIMIT_S) as worker:
        still = worker.bind({"x": IMAGE}, name="still")
        still.burst(min_runs=70, min_seconds=0.0, max_runs=70, lead_in_seconds=0.0)
        assert worker.run({"x": IMAGE})["num_seen"].tolist() == [1]
        turning = worker.bind({"x": IMAGE}, name="turning", rotate=True)
        turning.burst(min_runs=260, min_seconds=0.0, max_runs=260, lead_in_seconds=0.0)
        assert worker.run({"x": IMAGE})["num_seen"].tolist() == [256]
    assert (still.inputs, turning.inputs) == ("", "rotated: 256 sets, 13 MB")


@pytest.mark.usefixtures("faults")
def test_inputs_of_a_captured_run_are_copied_in_and_that_is_said(model: Path) -> None:
    with Worker("clocked", SessionRequest(path=model, cuda_graph=True), time_limit_s=TIME_LIMIT_S) as worker:
        call = worker.bind({"x": IMAGE}, rotate=True)
    assert call.inputs == "rotated: 256 sets, 13 MB, copied in before each run"


def test_copies_are_not_rotated(double: Worker) -> None:
    with pytest.raises(ValueError, match="copies and rotate"):
        double.bind({"x": ONE}, copies=True, rotate=True)


@pytest.mark.skipif(all_runtimes()["torch-cuda"].missing() is None, reason="kernels can be recorded here")
def test_kernels_that_cannot_be_recorded_say_why(double: Worker) -> None:
    call = double.bind({"x": ONE})
    with pytest.raises(RuntimeUnavailableError, match="kernels are recorded by torch"):
        call.kernels(2)
