"""The speed of two models beside each other: what is exported and timed, and who is called faster."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cspdeploy.check.latency import Measured, summarise
from cspdeploy.check.variants import variants_of
from cspdeploy.check.worker import EngineError, Worker
from cspdeploy.core.codec import from_json, to_json
from cspdeploy.core.errors import DeviceMemoryError, InputError, RuntimeUnavailableError
from cspdeploy.core.model_folder import read_spec, write_calibration, write_spec
from cspdeploy.core.spec import ModelSpec
from cspdeploy.export import simplify
from cspdeploy.pipeline import pair_latency, pair_sides, regimes
from cspdeploy.pipeline.compare import CompareReport
from cspdeploy.pipeline.pair_latency import LatencyRow, judge_on_device, judge_pair, told
from cspdeploy.pipeline.pair_sides import find_images
from cspdeploy.pipeline.regimes import PairRegime, check_device, common_regimes, default_batches
from cspdeploy.pipeline.sides import find_side
from cspdeploy.runtimes import all_runtimes
from tests.pipeline.conftest import quantities
from tests.pipeline.worker_here import WorkerHere

# --- latency ---


@pytest.fixture
def quick_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the unsimplified graph: onnxsim takes longer to import than all else together."""
    monkeypatch.setattr(simplify, "_CHILD", ["false"])


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[WorkerHere]]:
    """Engines in this process: a process for each takes seconds to start."""

    class Here(WorkerHere):
        pass

    Here.open_now, Here.most_open, Here.asked = [], 0, []
    monkeypatch.setattr(pair_latency, "Worker", Here)
    yield Here
    assert Here.open_now == []  # whatever happened: nothing of a row outlives it


@pytest.mark.usefixtures("quick_export", "here")
def test_models_are_exported_and_timed(compare: Callable[..., CompareReport], models: Path) -> None:
    (models / "plain" / "model.safetensors").unlink()
    (models / "tiny" / "calibration.npz").unlink()  # it takes the other side's
    report = compare("tiny", "plain", latency=True, batches=(1, 3, 1), runtimes=("torch-cpu", "ort-cpu"))
    found = {(row.runtime, row.artifact, row.batch): row for row in report.latency}
    # FP16 on this runtime is computed in float32: its time would say nothing.
    assert list(found) == [
        ("torch-cpu", "eager", 1), ("torch-cpu", "eager", 3), ("ort-cpu", "onnx", 1), ("ort-cpu", "onnx", 3),
    ]  # fmt: skip
    for row in report.latency:
        assert row.reason == ""
        assert row.a is not None
        assert row.b is not None
        assert len(row.a.samples_ms) >= 5
        assert row.ratio == 1 / row.b.ratio  # of times, where that of the timing is of speeds
        assert row.engine
    sizes = quantities(report)
    assert {"torchscript file", "onnx file", "onnx-fp16 file"} <= sizes.keys()
    assert sizes["onnx-fp16 file"][0] < sizes["onnx file"][0]
    assert (report.a.untrained, report.b.untrained, report.b.weights) == (False, True, "random, UNTRAINED")
    assert any("UNTRAINED" in note for note in report.notes)
    assert report.regime.environment["cpu"]
    data = json.loads(json.dumps(to_json(report)))
    assert from_json(CompareReport, data) == report


@pytest.mark.usefixtures("here")
def test_bundles_are_timed_as_they_are(compare: Callable[..., CompareReport], tiny_bundle: Path, bundle: Path) -> None:
    runtimes = ("ort-cpu", "torchscript-cpu")
    report = compare(str(tiny_bundle), str(bundle), latency=True, batches=(1, 2), runtimes=runtimes)
    assert report.regime.size_px == (32, 32)
    assert report.regime.batches == (1, 2)
    assert {row.tf32 for row in report.latency} == {None}
    found = {(row.artifact, row.batch): row for row in report.latency}
    assert found["onnx", 1].ratio is not None
    assert found["torchscript", 2].ratio is not None
    assert (found["onnx", 2].verdict, found["onnx", 2].ratio) == ("not-measured", None)
    assert found["onnx", 2].reason == "A is exported for a batch of 1"
    assert [report.a.untrained, report.b.untrained] == [False, False]


def test_two_copies_of_one_network_cannot_be_told_apart(
    compare: Callable[..., CompareReport], tiny_bundle: Path, bundle: Path, here: type[WorkerHere]
) -> None:
    """On a clock that runs by a millisecond a call."""
    ticks = iter(range(10**9))
    here.clock = staticmethod(lambda: 1e-3 * next(ticks))
    report = compare(str(tiny_bundle), str(bundle), latency=True, batches=(1,))
    cpu = [row for row in report.latency if row.runtime.endswith("-cpu")]
    assert {row.artifact for row in cpu} == {"eager", "torchscript", "onnx"}
    assert {(row.verdict, round(row.ratio or 0, 9)) for row in cpu} == {("indistinguishable", 1.0)}
    assert all(row.ratio_low == pytest.approx(1) == row.ratio_high for row in cpu)


def test_bundle_decides_the_size(compare: Callable[..., CompareReport], bundle: Path, models: Path) -> None:
    spec = read_spec(models / "plain")
    write_spec(models / "plain", dataclasses.replace(spec, preprocess=spec.preprocess.with_size(64, 64)))
    assert compare(str(bundle), "plain").regime.size_px == (64, 64)  # counts can be had at any size
    for fields in ({"size_px": (64, 64)}, {"size_px": (32, 48)}):
        with pytest.raises(InputError, match="is exported for 32x32 px") as caught:
            compare(str(bundle), "plain", latency=True, **fields)
        assert "--no-latency" in caught.value.fix


def test_nothing_to_time(compare: Callable[..., CompareReport], bundle: Path) -> None:
    with pytest.raises(InputError, match="nothing to time"):
        compare(str(bundle), str(bundle), latency=True, runtimes=("fp16-rounding",))


# --- regimes ---


def test_each_regime_and_batch_is_a_row_set_alike_on_both_sides(
    compare: Callable[..., CompareReport], tiny_bundle: Path, bundle: Path, here: type[WorkerHere]
) -> None:
    report = compare(
        str(tiny_bundle), str(bundle), latency=True, batches=(1, 3), regimes=("plain", "channels-last"),
        runtimes=("torch-cpu", "ort-cpu"),
    )  # fmt: skip
    assert [(row.regime, row.batch) for row in report.latency] == [
        ("torch-cpu eager", 1), ("torch-cpu eager", 3), ("torch-cpu eager channels-last", 1),
        ("torch-cpu eager channels-last", 3), ("ort-cpu onnx", 1), ("ort-cpu onnx", 3),
    ]  # fmt: skip
    assert all(row.ratio for row in report.latency if row.runtime == "torch-cpu")
    assert {row.note for row in report.latency if row.variant} == {"computes in NHWC"}
    pairs = list(zip(here.asked[::2], here.asked[1::2], strict=True))
    for (_, a), (_, b) in pairs:
        assert dataclasses.replace(a, path=b.path, spec=b.spec) == b
    assert [a.cuda.channels_last for (_, a), _ in pairs] == [False, False, True, True, False]
    assert here.most_open == 2  # the two of one row


@pytest.mark.parametrize("refusal", [EngineError, RuntimeUnavailableError])
def test_all_stands_for_every_variant(
    compare: Callable[..., CompareReport], tiny_bundle: Path, bundle: Path, here: type[WorkerHere],
    monkeypatch: pytest.MonkeyPatch, refusal: type[Exception],
) -> None:  # fmt: skip
    """Without the minute that compiling takes: it is refused here, as where there is no compiler, which costs its row
    alone though the runtime was asked for by name."""
    opened = here.wait_opened

    def refuse(self: WorkerHere) -> Any:
        if self._request.cuda.compile:
            raise refusal("InvalidCxxCompiler: No working C++ compiler found in torch._inductor.config.cpp.cxx: g++")
        return opened(self)

    monkeypatch.setattr(here, "wait_opened", refuse)
    report = compare(
        str(tiny_bundle), str(bundle), latency=True, batches=(1,), regimes=("all",), runtimes=("torch-cpu",)
    )
    assert [row.variant for row in report.latency] == ["", "channels-last", "compile"]
    assert [row.verdict == "not-measured" for row in report.latency] == [False, False, True]
    assert report.latency[2].reason.startswith("torch.compile needs a C++ compiler")


def test_session_that_was_not_set_so_is_not_timed_under_that_name(
    compare: Callable[..., CompareReport], tiny_bundle: Path, bundle: Path, here: type[WorkerHere],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    opened = here.wait_opened
    monkeypatch.setattr(here, "wait_opened", lambda self: dataclasses.replace(opened(self), settings={}))
    report = compare(
        str(tiny_bundle), str(bundle), latency=True, batches=(1,), regimes=("plain", "channels-last"),
        runtimes=("torch-cpu",),
    )  # fmt: skip
    plain, other = report.latency
    assert plain.ratio is not None
    assert (other.verdict, other.ratio) == ("not-measured", None)
    assert other.reason == (
        "A was not opened as this regime asks: memory_format channels_last, it has none"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("runtime", "kind", "variant", "settings", "unmet"),
    [
        ("torch-cuda", "eager", "", {"use_tf32_cudnn": "1"}, ""),
        ("torch-cuda", "eager", "", {"use_tf32_cudnn": "0"}, "use_tf32_cudnn 1, it has 0"),
        ("torch-cuda", "eager", "", {"use_tf32_cudnn": "1", "compile": "default"}, "compile unset, it has default"),
        ("torch-cuda", "eager", "fp16", {"dtype": "float16"}, ""),
        ("torch-cuda", "eager", "fp16", {}, "dtype float16, it has none"),
        ("ort-cuda", "onnx", "cuda-graph", {"use_tf32": "1", "enable_cuda_graph": "1"}, ""),
        ("ort-cuda", "onnx", "cuda-graph", {"enable_cuda_graph": "0"}, "enable_cuda_graph 1, it has 0"),
        ("ort-cuda", "onnx", "", {"use_tf32": "0", "enable_cuda_graph": "0"}, "use_tf32 1, it has 0"),
        ("ort-cpu", "onnx", "", {}, ""),
    ],
)  # fmt: skip
def test_what_a_session_says_is_held_against_the_regime(
    runtime: str, kind: str, variant: str, settings: dict[str, str], unmet: str
) -> None:
    (chosen,) = [one for one in variants_of(runtime) if one.name == variant]
    regime = PairRegime(runtime=all_runtimes()[runtime], kind=kind, artifact_precision="fp32", variant=chosen)
    assert regime.unmet(settings) == unmet
    assert regime.tf32 == (True if runtime.endswith("cuda") else None)
    assert regime.precision == ("fp16" if variant == "fp16" else "fp32")


def test_batches_and_variants_that_are_taken_where_none_are_named() -> None:
    """On a GPU all variants for the claims, plain ones else; and a batch at which it is not waiting for launches."""
    cpu, gpu = all_runtimes()["torch-cpu"], all_runtimes()["torch-cuda"]
    assert default_batches([cpu, gpu], None) == {"torch-cpu": (1, 8), "torch-cuda": (1, 32)}
    assert default_batches([cpu, gpu], (4, 1, 4)) == {"torch-cpu": (4, 1), "torch-cuda": (4, 1)}
    side: Any = None  # the eager network needs no artifact of it

    def names(**fields: Any) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for regime in common_regimes(side, side, [cpu, gpu], device=1, **fields):
            assert regime.device == 1
            found.setdefault(regime.runtime.name, []).append(regime.variant.name)
        return found

    every = {one.name: [variant.name for variant in variants_of(one.name)] for one in (cpu, gpu)}
    assert names(names=()) == {"torch-cpu": [""], "torch-cuda": [""]}
    assert names(names=(), all_on_gpu=True) == {"torch-cpu": [""], "torch-cuda": every["torch-cuda"]}
    assert names(names=("plain",), all_on_gpu=True) == {"torch-cpu": [""], "torch-cuda": [""]}
    assert names(names=("all",)) == every
    assert names(names=("fp16", "channels-last")) == {
        "torch-cpu": ["channels-last"], "torch-cuda": ["channels-last", "fp16"]
    }  # fmt: skip


def test_index_of_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regimes, "cuda_gpu", lambda index: object() if index < 2 else None)
    with pytest.raises(InputError, match="--device 5: there is no such GPU, CUDA shows 2 GPUs, 0 to 1") as caught:
        check_device(5, [all_runtimes()["ort-cuda"]])
    assert caught.value.fix == "--device 1"
    check_device(1, [all_runtimes()["ort-cuda"]])


@pytest.mark.parametrize(
    ("names", "said", "fix"),
    [
        (
            ("channel-last",),
            "--regimes channel-last: unknown, expected all or some of",
            "did you mean 'channels-last'?",
        ),
        (("plain", "0"), "--regimes 0: unknown", "--regimes all"),
        (("cuda-graph",), "--regimes cuda-graph: none of the runtimes that are timed has it (ort-cpu)", "--runtime"),
    ],
)
def test_regime_that_nothing_here_has(
    compare: Callable[..., CompareReport], here: type[WorkerHere], names: tuple[str, ...], said: str, fix: str
) -> None:
    with pytest.raises(InputError) as caught:
        compare("tiny", "plain", latency=True, regimes=names, runtimes=("ort-cpu",))
    assert said in caught.value.message
    assert fix in caught.value.fix
    assert here.asked == []


def test_gpu_where_none_is_used(compare: Callable[..., CompareReport]) -> None:
    with pytest.raises(RuntimeUnavailableError, match=r"--device 0: no CUDA runtime is timed here \(timed: ort-cpu\)"):
        compare("tiny", "plain", latency=True, device=0, runtimes=("ort-cpu",))
    with pytest.raises(InputError, match="--device -1: expected the index of a GPU"):
        compare("tiny", "plain", latency=True, device=-1)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            DeviceMemoryError("out of GPU memory at a batch of 32", fix="--batch 16"),
            "out of GPU memory at a batch of 32 (fix: --batch 16)",
        ),
        (EngineError("CUDA error: an illegal\n memory access"), "CUDA error: an illegal memory access"),
        (InputError("reads no FP16", fix="export it again"), "reads no FP16"),
    ],
)
def test_error_costs_its_row_alone_and_is_one_line(
    compare: Callable[..., CompareReport], tiny_bundle: Path, bundle: Path, here: type[WorkerHere],
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str,
) -> None:  # fmt: skip
    opened = here.wait_opened

    def refuse(self: WorkerHere) -> Any:
        if self._request.cuda.channels_last and len(self.open_now) == 2:  # when the first already holds memory
            raise error
        return opened(self)

    monkeypatch.setattr(here, "wait_opened", refuse)
    report = compare(
        str(tiny_bundle), str(bundle), latency=True, batches=(1,), regimes=("channels-last", "plain"),
        runtimes=("torch-cpu",),
    )  # fmt: skip
    assert [(row.variant, bool(row.ratio), row.reason) for row in report.latency] == [
        ("", True, ""), ("channels-last", False, reason),
    ]  # fmt: skip
    assert told(EngineError("x" * 999)) == "x" * 300


def test_device_that_did_not_take_the_work_ends_all_only_if_asked_for(
    compare: Callable[..., CompareReport], tiny_bundle: Path, bundle: Path, here: type[WorkerHere],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def refuse(self: WorkerHere) -> Any:
        raise RuntimeUnavailableError("asked for CUDAExecutionProvider, the session runs on CPUExecutionProvider")

    monkeypatch.setattr(here, "wait_opened", refuse)
    report = compare(str(tiny_bundle), str(bundle), latency=True, batches=(1,))
    assert report.latency
    assert {row.verdict for row in report.latency} == {"not-measured"}
    assert all(row.reason.startswith("asked for CUDA") for row in report.latency)
    with pytest.raises(RuntimeUnavailableError, match="asked for CUDA"):
        compare(str(tiny_bundle), str(bundle), latency=True, batches=(1,), runtimes=("ort-cpu",))


def test_each_side_has_a_process_that_ends_with_its_row(
    compare: Callable[..., CompareReport], tiny_bundle: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real thing: what a network holds on its device goes with its process, before the next row begins."""
    started: list[Worker] = []
    left: list[int] = []

    class Watched(Worker):
        def __init__(self, *args: Any, **options: Any) -> None:
            left.append(sum(worker._process.poll() is None for worker in started))
            super().__init__(*args, **options)
            started.append(self)

    monkeypatch.setattr(pair_latency, "Worker", Watched)
    options: dict[str, Any] = {"latency": True, "runtimes": ("ort-cpu",)}
    rows = compare(str(tiny_bundle), str(bundle), batches=(1,), **options).latency
    rows += compare(str(tiny_bundle), str(bundle), batches=(1,), **options).latency
    for row in rows:
        assert row.ratio is not None
        assert row.a is not None
        assert row.a.num_runs >= 5
    assert left == [0, 1, 0, 1]
    assert [worker._process.poll() is None for worker in started] == [False] * 4


@pytest.mark.slow
@pytest.mark.timeout(900)  # inductor compiles each of four networks with a C++ compiler
def test_compiled_network_is_timed(
    compare: Callable[..., CompareReport], tiny_bundle: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    """The compiler that inductor calls is really called, and where there is none the row says so."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    options: dict[str, Any] = {
        "latency": True, "batches": (1,), "regimes": ("plain", "compile"), "runtimes": ("torch-cpu",)
    }  # fmt: skip
    plain, compiled = compare(str(tiny_bundle), str(bundle), **options).latency
    assert (plain.variant, compiled.variant) == ("", "compile")
    assert compiled.ratio is not None, compiled.reason
    assert any((tmp_path / "cache").rglob("*.so"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "other"))
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    plain, compiled = compare(str(tiny_bundle), str(bundle), **options).latency
    assert plain.ratio is not None
    assert compiled.verdict == "not-measured"
    assert compiled.reason.startswith("torch.compile needs a C++ compiler")


ROW = LatencyRow(
    runtime="ort-cpu", artifact="onnx", precision="fp32", batch=1, engine="", verdict="not-measured"
)  # fmt: skip


def _judge(a: list[float], b: list[float]) -> LatencyRow:
    """As `measure_latency` would have timed them."""
    rounds = {name: tuple((value,) for value in samples) for name, samples in (("A", a), ("B", b))}
    found = summarise(
        {name: Measured(rounds_ms=samples, num_warmups=0, stable=True) for name, samples in rounds.items()}
    )
    return judge_pair(ROW, found["A"], found["B"])


@settings(max_examples=15)
@given(samples=st.lists(st.tuples(st.floats(1.0, 10.0), st.floats(1.0, 10.0)), min_size=5, max_size=30))
def test_swapped_sides_give_the_opposite_verdict_or_none(samples: list[tuple[float, float]]) -> None:
    a, b = ([pair[i] for pair in samples] for i in (0, 1))
    forward, backward = _judge(a, b), _judge(b, a)
    assert {forward.verdict, backward.verdict} != {"faster"}
    assert {forward.verdict, backward.verdict} != {"slower"}
    assert forward.ratio == pytest.approx(1 / (backward.ratio or 0))
    assert (forward.verdict == "faster") <= ((forward.ratio_high or 0) < 1)
    assert (forward.verdict == "slower") <= ((forward.ratio_low or 0) > 1)
    same = _judge(a, a)
    assert same.verdict == "indistinguishable"
    assert (same.ratio_low or 0) <= 1 <= (same.ratio_high or 0)


def test_verdict_is_of_b_and_the_ratio_of_times() -> None:
    row = _judge([10.0] * 9, [5.0] * 9)
    assert (row.verdict, row.ratio, row.ratio_low, row.ratio_high) == ("faster", *[pytest.approx(0.5)] * 3)
    row = _judge([5.0] * 9, [10.0] * 9)
    assert (row.verdict, row.ratio) == ("slower", pytest.approx(2.0))


def test_device_clock_has_its_own_ratio() -> None:
    """At batch 1 the host's launches are what a caller waits for, and not what the device computes."""
    row = _judge([10.0] * 9, [9.9] * 9)
    found = judge_on_device(row, [(4.0, 4.0)] * 9, [(2.0, 2.0)] * 9)
    assert (found.ratio, found.verdict) == (pytest.approx(0.99), "indistinguishable")
    assert (found.a_device_ms, found.b_device_ms, found.device_ratio) == (4.0, 2.0, pytest.approx(0.5))
    assert (found.device_ratio_low or 0) <= 0.5 + 1e-9
    assert (found.device_ratio_high or 0) >= 0.5 - 1e-9
    assert judge_on_device(row, [], []) == row
    assert judge_on_device(row, [(4.0,)] * 9, []) == row


# --- images to export with ---


def test_images_come_from_the_other_side(models: Path) -> None:
    network, tiny = (find_side(name, models=models) for name in ("darknet17", "tiny"))
    images = np.full((3, 8, 8), 7, np.uint8)
    write_calibration(models / "tiny" / "calibration.npz", images)
    found = find_images((network, tiny), None)
    assert found is not None
    np.testing.assert_array_equal(found, images)
    assert find_images((tiny, tiny), None) is None  # each brings its own
    (models / "tiny" / "model.safetensors").unlink()
    assert find_images((tiny, tiny), None) is not None  # a folder of its own is made for random weights


def test_no_images_anywhere(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_sides, "FASHION_MNIST_FOLDER", tmp_path / "none")
    network = find_side("darknet17", models=models)
    with pytest.raises(InputError, match="no real images") as caught:
        find_images((network, network), None)
    assert "--calib" in caught.value.fix
    assert "--no-latency" in caught.value.fix


@pytest.mark.slow
def test_networks_are_exported_with_random_weights(
    compare: Callable[..., CompareReport], models: Path, tiny_spec: ModelSpec
) -> None:
    report = compare("cs3darknet_focus_s", "tiny", latency=True, size_px=(64, 64), batches=(1,))
    assert report.a.untrained
    assert {row.artifact for row in report.latency if row.ratio} >= {"eager", "torchscript", "onnx"}
