"""The device option, and runs that are repeated: what can be seen of them without a GPU."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from cspdeploy.core.bundle import read_manifest
from cspdeploy.core.errors import DeviceMemoryError, InputError, RuntimeUnavailableError
from cspdeploy.core.golden import read_golden
from cspdeploy.edge import Predictor
from cspdeploy.edge.__main__ import main
from cspdeploy.edge.calls import Calls
from cspdeploy.edge.engine_options import require_device, session_request
from cspdeploy.edge.opening import OpenedArtifact, find_artifact, open_listed
from cspdeploy.edge.selftest import SelftestRequest, run_selftest
from cspdeploy.edge.selftest_repeats import NUM_RUNS, check_repeats
from cspdeploy.edge.selftest_report import CheckRow
from cspdeploy.runtimes import all_runtimes, require_runtime
from cspdeploy.runtimes.base import Feeds, Outputs

ROW = CheckRow(check="golden", artifact="onnx", runtime="ort-cpu", verdict="pass", finding="pass")
OUT_OF_MEMORY = (
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running Conv node. "
    "bfc_arena.cc:359 void* onnxruntime::BFCArena::AllocateRawInternal: "
    "Failed to allocate memory for requested buffer of size 1073741824"
)
without_cuda = pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this onnxruntime has CUDA"
)


class _Changed:
    """The real session, whose answers are changed from one run on."""

    def __init__(self, opened: OpenedArtifact, *, from_run: int, value: float | None = None) -> None:
        self.placement: dict[str, int] = {}
        self.nodes = ()
        self.num_runs = 0
        self._inner, self._from_run, self._value = opened.session, from_run, value

    def run(self, feeds: Feeds) -> Outputs:
        self.num_runs += 1
        found = self._inner.run(feeds)
        if self.num_runs < self._from_run:
            return found
        if self._value is None:
            return {name: array[..., :-1] for name, array in found.items()}
        return {name: np.full_like(array, self._value) for name, array in found.items()}

    def bind(self, feeds: Feeds) -> Callable[[], None]:
        return self._inner.bind(feeds)


def _opened(bundle: Path, **session: Any) -> OpenedArtifact:
    manifest = read_manifest(bundle)
    found = find_artifact(bundle, manifest, "onnx")
    opened = open_listed(bundle, manifest, found, runtime=require_runtime("ort-cpu"))
    return dataclasses.replace(opened, session=_Changed(opened, **session)) if session else opened


@pytest.mark.parametrize("device", [0, 1])
def test_a_device_needs_a_runtime_on_gpus(tiny_bundle: Path, device: int) -> None:
    with pytest.raises(InputError, match=f"--device {device}: ort-cpu does not run on a GPU") as found:
        Predictor.open(tiny_bundle, device=device)
    assert "--runtime ort-cuda" in found.value.fix
    with pytest.raises(InputError, match="does not run on a GPU"):
        run_selftest(tiny_bundle, SelftestRequest(device=device))


@pytest.mark.parametrize("device", [-1, True, 1.0, "0"])
def test_a_device_is_an_index(device: object) -> None:
    with pytest.raises(InputError, match="index of a GPU"):
        require_device(device, all_runtimes()["ort-cuda"])


def test_a_device_reaches_the_engine(tmp_path: Path) -> None:
    require_device(3, all_runtimes()["ort-cuda"])
    assert session_request(tmp_path, ("y",), num_threads=0, device=3).cuda.device == 3
    assert session_request(tmp_path, ("y",), num_threads=0, device=None).cuda.device == 0


@without_cuda
def test_without_cuda_a_device_is_no_reason_to_run_on_the_cpu(tiny_bundle: Path) -> None:
    with pytest.raises(RuntimeUnavailableError):
        Predictor.open(tiny_bundle, runtime="ort-cuda", device=0)
    assert main(["selftest", str(tiny_bundle), "--runtime", "ort-cuda", "--device", "0"]) == 3


def test_commands_take_a_device(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["selftest", str(tiny_bundle)], ["predict", str(tiny_bundle), "a.png"]):
        assert main([*command, "--device", "0"]) == 2
        assert "--runtime ort-cuda" in capsys.readouterr().err


def test_a_gpu_without_room_is_one_line_with_half_the_images(tiny_bundle: Path) -> None:
    """The message is the engine's own; that a device without room is met needs one."""

    def full(feeds: Feeds) -> Outputs:
        raise RuntimeError(OUT_OF_MEMORY)

    opened = _opened(tiny_bundle, from_run=99)
    opened.session.run = full  # type: ignore[method-assign]
    x = np.zeros((8, 3, 32, 32), np.float32)
    with pytest.raises(InputError, match="ort-cpu cannot compute it"):
        Calls(opened).once(x)
    with pytest.raises(DeviceMemoryError) as found:
        Calls(dataclasses.replace(opened, runtime=all_runtimes()["ort-cuda"])).once(x)
    assert "\n" not in found.value.message
    assert "4" in found.value.fix


def test_the_same_image_is_computed_three_times(tiny_bundle: Path) -> None:
    opened = _opened(tiny_bundle, from_run=99)
    row = check_repeats(ROW, opened, read_golden(tiny_bundle / "golden.npz"))
    assert (row.verdict, row.num_runs, row.run_difference) == ("pass", NUM_RUNS, 0.0)
    assert opened.session.num_runs == NUM_RUNS  # type: ignore[attr-defined]


@pytest.mark.parametrize(("value", "finding"), [(np.nan, "nan"), (-np.inf, "nan"), (None, "shape")])
@pytest.mark.parametrize("from_run", [2, 3])
def test_a_later_run_that_goes_wrong_is_refused(
    tiny_bundle: Path, from_run: int, value: float | None, finding: str
) -> None:
    opened = _opened(tiny_bundle, from_run=from_run, value=value)
    row = check_repeats(ROW, opened, read_golden(tiny_bundle / "golden.npz"))
    assert (row.verdict, row.finding, row.num_runs) == ("fail", finding, from_run)
    assert f"run {from_run} of {NUM_RUNS}" in row.reason


def test_how_far_a_later_run_lies_from_the_first_is_told(tiny_bundle: Path) -> None:
    opened = _opened(tiny_bundle, from_run=2, value=0.0)
    row = check_repeats(ROW, opened, read_golden(tiny_bundle / "golden.npz"))
    assert row.run_difference
    assert row.run_difference > 0


def test_a_row_that_failed_is_not_computed_again(tiny_bundle: Path) -> None:
    opened = _opened(tiny_bundle, from_run=99)
    failed = dataclasses.replace(ROW, verdict="fail", finding="numeric")
    assert check_repeats(failed, opened, read_golden(tiny_bundle / "golden.npz")) is failed
    assert opened.session.num_runs == 0  # type: ignore[attr-defined]


def test_on_a_gpu_all_images_are_computed_again(tiny_bundle: Path) -> None:
    golden = read_golden(tiny_bundle / "golden.npz")
    opened = _opened(tiny_bundle, from_run=99)
    on_gpu = dataclasses.replace(opened, runtime=all_runtimes()["ort-cuda"])
    check_repeats(ROW, on_gpu, golden)
    calls = -(-len(golden.images) // (opened.batch or 8))
    assert opened.session.num_runs == NUM_RUNS * calls  # type: ignore[attr-defined]


def test_runs_are_in_the_report(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", str(tiny_bundle), "--artifact", "onnx", "--no-latency", "--json"]) == 0
    rows = {row["check"]: row for row in json.loads(capsys.readouterr().out)["checks"]}
    assert (rows["golden"]["num_runs"], rows["golden"]["run_difference"]) == (NUM_RUNS, 0.0)
    assert rows["provider"]["num_runs"] is None


@pytest.mark.cuda
def test_a_gpu_answers_as_the_golden_file_says(tiny_bundle: Path) -> None:
    ask = functools.partial(SelftestRequest, runtime="ort-cuda", artifacts=("onnx", "onnx-fp16"), latency=False)
    report = run_selftest(tiny_bundle, ask(device=0))
    assert report.verdict == "pass", report.checks
    assert {row.num_runs for row in report.checks if row.check == "golden"} == {NUM_RUNS}
    with pytest.raises(InputError):
        run_selftest(tiny_bundle, ask(device=99))
