"""The CUDA benchmark without a GPU: its rules, its files, and all its stages on the CPU's runtimes, really measured."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import cuda_device  # noqa: E402
from cuda_regimes import REGIMES, find_regimes  # noqa: E402
from cuda_result import read_result  # noqa: E402
from cuda_table import NO_CUDA, markdown  # noqa: E402
from cuda_tests import marked_files, run_tests  # noqa: E402

from cspdeploy.core.errors import InputError, RuntimeUnavailableError  # noqa: E402
from cspdeploy.runtimes import all_runtimes  # noqa: E402
from cspdeploy.runtimes.base import SessionRequest  # noqa: E402

ROOT = HERE.parents[2]
_SPEC = importlib.util.spec_from_file_location("cuda_main", HERE / "__main__.py")
assert _SPEC is not None
assert _SPEC.loader is not None
MAIN = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(MAIN)


# --- the run itself ---


@pytest.fixture
def two_bundles(tiny_bundle: Path, tmp_path: Path) -> list[str]:
    """The same network under two names: a network and its baseline that take the same time."""
    return [str(shutil.copytree(tiny_bundle, tmp_path / name)) for name in ("ours", "theirs")]


@dataclasses.dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """The command line, in this process: to import PyTorch takes a child seconds."""

    def run_here(*arguments: str) -> Done:
        code = MAIN.main(["--output", str(tmp_path / "out"), *arguments])
        return Done(code, *capfd.readouterr())

    return run_here


QUICK = ("--device-kind", "cpu", "--quick", "--regime", "ort-fp32", "--regime", "ort-fp16", "--part", "latency",
         "--part", "parity")  # fmt: skip


def test_all_stages_on_the_cpu(run: Callable[..., Done], two_bundles: list[str], tmp_path: Path) -> None:
    only = [word for bundle in two_bundles for word in ("--only", bundle)]
    done = run(*QUICK, *only, "--batch", "1", "--batch", "2")
    assert done.returncode == 0, done.stderr
    found = read_result(tmp_path / "out" / "cuda.json")
    measured = {(row.network, row.regime, row.copies) for row in found.rows if row.batch == 1 and not row.reason}
    assert measured == {
        (name, regime, copies) for name in ("ours", "theirs")
        for regime, copies in (("ort-fp32", False), ("ort-fp32", True), ("ort-fp16", False))
    }  # fmt: skip
    assert all(row.p50_ms and row.p50_ms > 0 and row.num_runs >= 6 for row in found.rows if not row.reason)
    assert all(set(row.placement) == {"CPUExecutionProvider"} for row in found.rows if not row.reason)
    fixed = {row.reason for row in found.rows if row.batch == 2}
    assert fixed == {"the file is exported for a batch of 1"}
    pair = next(one for one in found.comparisons if (one.subject, one.against) == ("ours/ort-fp32", "theirs/ort-fp32"))
    assert 0 < pair.low <= pair.ratio <= pair.high
    parity = {one.regime: one for one in found.parity if one.network == "ours"}
    fp32, fp16 = (parity[name].rel_l2 or 0.0 for name in ("ort-fp32", "ort-fp16"))
    assert 0 < fp32 < 1e-5
    assert fp32 < fp16 < 1e-2
    assert (parity["ort-fp32"].num_runs, parity["ort-fp32"].num_different) == (10, 0)
    verdicts = {one.figure: one.verdict for one in found.figures}
    assert verdicts["ours: FP32, TF32 off: rel_l2 under 1e-05 in every regime"] == "holds"
    assert verdicts["ours instead of theirs, ort-fp32, batch 1"] == "measured"
    page = (tmp_path / "out" / "cuda.md").read_text()
    assert NO_CUDA in page
    assert "### ours, batch 1" in page
    # Numbers first, which need no quiet; then the batches that figures are of; then the others.
    assert [one.name for one in found.stages] == [
        "exports", "parity", "ours and theirs, batch 1", "ours and theirs, batch 2"
    ]  # fmt: skip


def test_what_there_is_no_time_for_is_said_and_kept(
    run: Callable[..., Done], two_bundles: list[str], tmp_path: Path
) -> None:
    done = run(*QUICK, "--only", two_bundles[0], "--batch", "1", "--budget", "0.01")
    assert done.returncode == 0, done.stderr
    found = read_result(tmp_path / "out" / "cuda.json")
    assert {row.reason for row in found.rows} == {"not measured: out of time"}
    assert {one.verdict for one in found.figures} == {"not measured"}
    assert "not done" in done.stdout
    assert f"0 of {len(found.figures)} figures are measured" in done.stderr
    assert done.stderr.count("== not judged: ") == len(found.figures)
    page = (tmp_path / "out" / "cuda.md").read_text()
    assert f"{len(found.figures)} of {len(found.figures)} could not be judged" in page


def test_no_gpu_is_exit_3_in_one_line(tmp_path: Path) -> None:
    if cuda_device.gpu_problem() is None:
        pytest.fail("this test is of a machine without a GPU; deselect it where there is one")
    command = [sys.executable, str(HERE), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 3
    assert done.stderr.startswith("error: ")
    assert "; fix: " in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--part", "speed"), "--part speed: unknown"),
        (("--regime", "eager-fp8"), "--regime eager-fp8: unknown"),
        (("--batch", "0"), "expected numbers above 0"),
        (("--budget", "nan"), "expected numbers above 0"),
        (("--merge", "nothing.json"), "nothing.json"),
    ],
)
def test_wrong_use_is_exit_2(run: Callable[..., Done], arguments: tuple[str, ...], told: str) -> None:
    done = run("--device-kind", "cpu", *arguments)
    assert (done.returncode, told in done.stderr) == (2, True), done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)  # two exports and eight processes, on a machine with other work
def test_networks_of_the_registry_are_exported_and_timed(
    run: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of eight engines at once, each with a thread for every CPU
    done = run("--device-kind", "cpu", "--quick", "--size", "64", "--batch", "2", "--only", "cspresnet50",
                "--only", "resnet50", "--part", "latency", "--part", "parity")  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = read_result(tmp_path / "out" / "cuda.json")
    assert {row.network for row in found.rows} == {"cspresnet50", "resnet50"}
    assert {row.regime for row in found.rows} == {one.name for one in REGIMES["cpu"]}
    assert not [row.reason for row in found.rows if row.reason]
    assert any(one.figure.startswith("cspresnet50 instead of resnet50, eager-fp32, batch 2")
               and one.verdict != "not measured" for one in found.figures)  # fmt: skip


# --- whether there is a GPU ---


def _driver(init: int, count: int, code: int = 0) -> Callable[[str], object]:
    def get_count(place: object) -> int:
        place._obj.value = count  # type: ignore[attr-defined]  # what ctypes.byref points to
        return code

    return lambda name: SimpleNamespace(cuInit=lambda flags: init, cuDeviceGetCount=get_count)


def _no_library(name: str) -> object:
    raise OSError(name)


def test_why_no_gpu_can_be_used() -> None:
    def told(load: Callable[[str], object]) -> str:
        problem = cuda_device.gpu_problem(load)
        return problem[0] if problem is not None else ""

    assert told(_no_library) == "no NVIDIA driver: libcuda.so.1 is not found"
    assert told(_driver(100, 0)) == "no NVIDIA GPU is visible to this process (cuInit: CUDA error 100)"
    assert "different versions" in told(_driver(803, 0))
    assert "CUDA error 999" in told(_driver(999, 0))
    assert told(_driver(0, 0)) == "no NVIDIA GPU is visible to this process"
    assert told(_driver(0, 2)) == ""


# --- regimes ---


@pytest.mark.parametrize("kind", REGIMES)
def test_every_regime_is_one_that_a_runtime_has(kind: str) -> None:
    base = SessionRequest(path=Path("x"))
    for regime in REGIMES[kind]:
        if regime.runtime in all_runtimes() or not regime.optional:
            assert all_runtimes()[regime.runtime].device == kind
        request = regime.request(base)
        assert request.tf32 == regime.tf32
        assert request.cuda_graph == regime.name.endswith("graph")
        assert bool(request.cuda.compile) == regime.compiled
    with pytest.raises(InputError, match="no variant"):
        dataclasses.replace(REGIMES[kind][0], variant="fast").request(base)
    assert find_regimes(kind, ()) == REGIMES[kind]


# --- tests ---


def test_without_pytest_the_tests_are_not_run_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeUnavailableError, match=r"not run: pytest, hypothesis.* is missing"):
        run_tests(1.0)


def test_tests_of_the_marker_are_found() -> None:
    files = {path.relative_to(ROOT).as_posix() for path in marked_files()}
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests/cuda").glob("test_*.py")} <= files
    assert "tests/core/test_env.py" not in files


@pytest.mark.slow
def test_tests_of_the_marker_fail_where_there_is_no_gpu() -> None:
    """They do not skip: a run in which nothing ran must not look like one in which all was well."""
    if cuda_device.gpu_problem() is None:
        pytest.fail("this test is of a machine without a GPU; deselect it where there is one")
    found, problem = run_tests(300.0)
    assert problem == ""
    assert len(found) > 30
    assert {one.outcome for one in found if one.name.startswith("test_cuda_")} == {"failed"}


# --- what is said of it ---


def test_what_was_never_run_on_a_gpu_says_so() -> None:
    """Until a result is kept beside it, the page shows none, and README claims no figure of CUDA's."""
    page = (HERE / "README.md").read_text()
    kept = HERE / "cuda.json"
    if kept.is_file():
        assert "never run" not in page
        result = read_result(kept)
        assert result.kind == "cuda"
        assert markdown(result) in page
        return
    assert "never run on a GPU" in page
    assert "## Latency" not in page
    readme = (ROOT / "README.md").read_text()
    claims = [line for line in readme.splitlines() if "ort-cuda" in line and (" ms" in line or "x as fast" in line)]
    assert claims == []
