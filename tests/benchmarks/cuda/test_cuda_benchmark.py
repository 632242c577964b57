"""The CUDA benchmark without a GPU: its rules, its files, and all its stages on the CPU's runtimes, really measured."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
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
from cuda_budget import Budget, Pace  # noqa: E402
from cuda_figures import judge  # noqa: E402
from cuda_regimes import FP16_LIMIT, REGIMES, find_regimes  # noqa: E402
from cuda_result import (  # noqa: E402
    Comparison,
    Kind,
    Parity,
    Result,
    Row,
    merge_results,
    read_result,
    write_result,
)
from cuda_table import NO_CUDA, markdown  # noqa: E402
from cuda_tests import marked_files, read_junit, run_tests  # noqa: E402

from cspdeploy.core.errors import InputError, RuntimeUnavailableError  # noqa: E402
from cspdeploy.runtimes import all_runtimes  # noqa: E402
from cspdeploy.runtimes.base import SessionRequest  # noqa: E402

ROOT = HERE.parents[2]
_SPEC = importlib.util.spec_from_file_location("cuda_main", HERE / "__main__.py")
assert _SPEC is not None
assert _SPEC.loader is not None
MAIN = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(MAIN)
FACTS = {"gpu": "a GPU", "gpu_driver": "580.1", "torch": "2.13.0"}


def _result(kind: Kind = "cuda", **parts: object) -> Result:
    return dataclasses.replace(
        Result(kind=kind, commands=("python tests/benchmarks/cuda",), size_px=256, facts=FACTS),
        **parts,  # type: ignore[arg-type]
    )


def _row(network: str, regime: str, batch: int = 1, p50_ms: float | None = 1.0, reason: str = "") -> Row:
    return Row(
        network=network, regime=regime, batch=batch, runtime="ort-cuda", p50_ms=p50_ms, ci_low_ms=p50_ms,
        ci_high_ms=p50_ms, num_runs=80 if p50_ms else 0, reason=reason,
    )  # fmt: skip


def _ratio(subject: str, against: str, ratio: float, batch: int = 1) -> Comparison:
    return Comparison(subject=subject, against=against, batch=batch, ratio=ratio, low=0.98 * ratio, high=1.02 * ratio)


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


def test_what_there_is_no_time_for_is_said_and_kept(
    run: Callable[..., Done], two_bundles: list[str], tmp_path: Path
) -> None:
    done = run(*QUICK, "--only", two_bundles[0], "--batch", "1", "--budget", "0.01")
    assert done.returncode == 0, done.stderr
    found = read_result(tmp_path / "out" / "cuda.json")
    assert {row.reason for row in found.rows} == {"not measured: out of time"}
    assert {one.verdict for one in found.figures} == {"not measured"}
    assert "not done" in done.stdout


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
    assert any(one.figure.startswith("cspresnet50 instead of resnet50, eager-fp32, batch 2: 18 % off")
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


# --- time ---


class _Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_budget_counts_down_and_notes_what_became_of_each_stage() -> None:
    clock = _Clock()
    budget = Budget(60.0, clock=clock)
    with budget.stage("first"):
        clock.now += 20
    with budget.stage("second"):
        clock.now += 5
        raise InputError("no such thing", fix="make it")
    budget.skip("third")
    assert [(one.name, one.outcome, one.seconds, one.reason) for one in budget.stages] == [
        ("first", "done", 20.0, ""),
        ("second", "not done", 5.0, "no such thing (fix: make it)"),
        ("third", "not done", 0.0, "not measured: out of time"),
    ]
    assert budget.left == 35.0
    assert (budget.allows(35.0), budget.allows(35.1)) == (True, False)
    assert (budget.share(0.4), budget.share(0.4, most=10.0)) == (14.0, 10.0)
    clock.now += 100
    assert budget.left < 0
    assert not budget.allows(0.0)
    assert budget.share(0.5) == 0.0


def test_a_fault_of_the_benchmark_is_noted_and_not_swallowed() -> None:
    budget = Budget(60.0, clock=_Clock())
    with pytest.raises(ZeroDivisionError), budget.stage("broken"):
        raise ZeroDivisionError("division")
    assert budget.stages[0].reason == "ZeroDivisionError: division"


def test_the_dearest_group_seen_decides_whether_the_next_is_begun() -> None:
    pace = Pace(2.0)
    assert pace.need(10) == 20.0
    pace.note(5.0, 10)
    assert pace.need(10) == 5.0
    pace.note(40.0, 10)
    pace.note(5.0, 10)
    pace.note(1.0, 0)
    assert pace.need(10) == 40.0


# --- figures ---


def _speed(compiled: float, eager: float, large: float) -> Result:
    name = "cspdarknet53"
    return _result(
        rows=(_row(name, "ort-fp16-graph"),),
        comparisons=(
            _ratio(f"{name}/ort-fp16-graph", f"{name}/compile-fp16-nhwc", 2 * compiled),
            _ratio(f"{name}/ort-fp16-nhwc-graph", f"{name}/compile-fp16-nhwc", compiled),
            _ratio(f"{name}/ort-fp16-graph", f"{name}/eager-fp32", eager),
            _ratio(f"{name}/ort-fp16-graph", f"{name}/compile-fp16-nhwc", large, batch=32),
        ),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("compiled", "eager", "large", "verdicts"),
    [
        (0.99, 0.32, 1.08, ["holds"] * 3),
        (1.02, 1 / 3, 1 / 0.9, ["undecided"] * 3),  # within 2 % of each, which is what their intervals hold
        (1.05, 0.35, 1.15, ["does not hold"] * 3),
        (0.5, 0.1, 0.5, ["holds"] * 3),
    ],
)
def test_figures_of_speed(compiled: float, eager: float, large: float, verdicts: list[str]) -> None:
    figures = judge(_speed(compiled, eager, large))
    speed = [one for one in figures if one.figure.startswith("cspdarknet53: ort-cuda")]
    assert [one.verdict for one in speed] == verdicts
    assert "ort-fp16-nhwc-graph" in speed[0].detail  # the faster layout


def test_nothing_measured_is_no_pass_and_says_why() -> None:
    rows = (_row("cspdarknet53", "ort-fp16-graph", p50_ms=None, reason="no CUDA provider"),)
    for result in (_result(), _result(rows=rows)):
        figures = judge(result)
        assert {one.verdict for one in figures} == {"not measured"}
    first = next(one for one in judge(_result(rows=rows)) if one.figure.startswith("cspdarknet53: ort-cuda"))
    assert first.detail == "no CUDA provider"


@pytest.mark.parametrize(
    ("rel_l2", "bad_run", "verdict"), [(0.009, 0, "holds"), (0.011, 0, "does not hold"), (0.009, 2, "does not hold")]
)
def test_figure_of_fp16(rel_l2: float, bad_run: int, verdict: str) -> None:
    parity = Parity(network="resnet50", regime="ort-fp16", limit=FP16_LIMIT, rel_l2=rel_l2, first_bad_run=bad_run)
    result = _result(rows=(_row("resnet50", "ort-fp16"),), parity=(parity,))
    figure = next(one for one in judge(result) if one.figure.startswith("resnet50: FP16"))
    assert (figure.verdict, figure.speed) == (verdict, False)


@pytest.mark.parametrize(
    ("agreement", "images", "verdict"),
    [
        (0.995, "test images of Fashion-MNIST", "holds"),
        (0.9949, "test images of Fashion-MNIST", "does not hold"),
        (1.0, "calibration images", "not measured"),
    ],
)
def test_figure_of_agreement(agreement: float, images: str, verdict: str) -> None:
    rows = (Parity(network="x", regime="ort-fp16", num_images=512, images=images, top1_agreement=agreement),)
    figure = next(one for one in judge(_result(parity=rows)) if "top-1 agreement" in one.figure)
    assert figure.verdict == verdict


@pytest.mark.parametrize(("ratio", "verdict"), [(0.80, "holds"), (0.82, "undecided"), (0.84, "does not hold")])
def test_the_claim_of_18_percent_is_judged_regime_by_regime(ratio: float, verdict: str) -> None:
    rows = tuple(_row(name, "eager-fp32") for pair in ("resnet50", "darknet53") for name in (f"csp{pair}", pair))
    result = _result(rows=rows, comparisons=(
        _ratio("cspresnet50/eager-fp32", "resnet50/eager-fp32", ratio),
        _ratio("cspdarknet53/eager-fp32", "darknet53/eager-fp32", ratio),
    ))  # fmt: skip
    found = {one.figure: one for one in judge(result)}
    claim = found["cspresnet50 instead of resnet50, eager-fp32, batch 1: 18 % off the time"]
    assert (claim.verdict, claim.detail[:7]) == (verdict, f"{100 * (ratio - 1):+.1f} %")
    assert found["cspdarknet53 instead of darknet53, eager-fp32, batch 1"].verdict == "measured"
    assert found["cspresnet50 instead of resnet50, ort-fp16, batch 32: 18 % off the time"].verdict == "not measured"


# --- files ---


def test_a_result_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    result = _speed(1.0, 0.3, 1.0)
    result = dataclasses.replace(result, figures=judge(result))
    write_result(tmp_path / "new" / "cuda.json", result)
    assert read_result(tmp_path / "new" / "cuda.json") == result
    data = json.loads((tmp_path / "new" / "cuda.json").read_text())
    for change in ({"schema_version": 99}, {"speed": 1}):
        (tmp_path / "bad.json").write_text(json.dumps(data | change))
        with pytest.raises(InputError):
            read_result(tmp_path / "bad.json")


def test_results_of_two_calls_are_one() -> None:
    out = "not measured: out of time"
    first = _result(
        rows=(_row("a", "x"), _row("a", "x", 32, None, out), _row("b", "x")),
        comparisons=(_ratio("a/x", "a/y", 0.5), _ratio("b/x", "b/y", 0.5)),
    )  # fmt: skip
    second = _result(
        rows=(_row("a", "x", 32, 2.0), _row("b", "x", 1, 3.0), _row("b", "y", 1, 4.0), _row("a", "x", 1, None, out)),
        comparisons=(_ratio("b/x", "b/y", 0.75),),
    )  # fmt: skip
    found = merge_results(first, second)
    assert {(one.network, one.regime, one.batch): one.p50_ms for one in found.rows} == {
        ("a", "x", 1): 1.0, ("a", "x", 32): 2.0, ("b", "x", 1): 3.0, ("b", "y", 1): 4.0
    }  # fmt: skip
    assert {one.subject: one.ratio for one in found.comparisons} == {"a/x": 0.5, "b/x": 0.75}


@pytest.mark.parametrize("fact", ["gpu", "gpu_driver", "torch"])
def test_results_of_two_machines_are_never_one(fact: str) -> None:
    with pytest.raises(InputError, match=fact):
        merge_results(_result(), _result(facts=FACTS | {fact: "another"}))
    with pytest.raises(InputError, match="expected the same"):
        merge_results(_result(), _result("cpu"))


def test_a_page_holds_every_row_and_what_it_lacks() -> None:
    rows = (_row("cspdarknet53", "ort-fp16"), _row("cspdarknet53", "trt-fp16", 1, None, "no | TensorRT"))
    page = markdown(_result(rows=rows, remarks=("onnxsim is not installed",)))
    assert "| ONNX Runtime CUDA FP16 | 1.000 (1.000 to 1.000) |" in page
    assert "| ONNX Runtime TensorRT FP16 | not measured |" in page
    assert "no \\| TensorRT" in page
    assert "- onnxsim is not installed" in page
    assert NO_CUDA not in page


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


JUNIT = """<?xml version="1.0"?><testsuites><testsuite>
<testcase classname="tests.cuda.test_a" name="test_one"/>
<testcase classname="tests.cuda.test_a" name="test_two"><failure message="assert 1&#10; == 2">x</failure></testcase>
<testcase classname="tests.cuda.test_a" name="test_three"><error message="broken"/></testcase>
<testcase classname="tests.cuda.test_a" name="test_four"><skipped message="no"/></testcase>
</testsuite></testsuites>"""


def test_what_became_of_the_tests_is_read_from_pytest() -> None:
    assert [(one.name, one.outcome, one.detail) for one in read_junit(JUNIT)] == [
        ("test_a::test_one", "passed", ""),
        ("test_a::test_two", "failed", "assert 1 == 2"),
        ("test_a::test_three", "failed", "broken"),
        ("test_a::test_four", "skipped", "no"),
    ]


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
