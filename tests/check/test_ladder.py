"""`verify` on bundles with one fault each: the right row breaks, with the right verdict, and the others stand."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from PIL import Image

from cspdeploy.check.ladder import VerifySettings, verify_bundles
from cspdeploy.check.latency import LatencySettings
from cspdeploy.core.bundle import file_record
from cspdeploy.core.datasets import LabelledImages, open_dataset
from cspdeploy.core.errors import EXIT_CHECK_FAILED, InputError, RuntimeUnavailableError, TamperedError
from cspdeploy.core.golden import read_golden, write_golden
from cspdeploy.core.metrics import top_k
from cspdeploy.core.spec import ModelSpec
from cspdeploy.core.types import ParityRow, VerifyReport
from cspdeploy.edge import Predictor
from cspdeploy.export.reference import compute_reference
from cspdeploy.nets.registry import build

CUDA = "CUDAExecutionProvider"
SHORT = LatencySettings(min_runs=5, min_seconds=0.0, warmup_runs=1, warmup_seconds=0.0, lead_in_seconds=0.0, burst=1)
GARBAGE = b"this was never an ONNX file"


def _verify(folder: Path, *runtimes: str, **settings: Any) -> VerifyReport:
    return verify_bundles([folder], VerifySettings(runtimes=runtimes, **{"latency": None, **settings}))


def _row(report: VerifyReport, artifact: str, runtime: str) -> ParityRow:
    rows = [row for row in report.rows if (row.artifact, row.runtime) == (artifact, runtime)]
    assert len(rows) == 1
    return rows[0]


def _verdicts(report: VerifyReport) -> dict[tuple[str, str], str]:
    return {(row.artifact, row.runtime): row.verdict for row in report.rows}


def _edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def _rehash(folder: Path) -> None:
    """What somebody does who changes a file and its hash with it."""

    def change(data: dict[str, Any]) -> None:
        for entry in [*data["artifacts"], *data["files"]]:
            record = file_record(folder / entry["file"])
            entry.update(sha256=record.sha256, num_bytes=record.num_bytes)

    _edit(folder, change)


def _edit_golden(folder: Path, **changes: Any) -> None:
    """`fp64`, `fp32`: other logits; the rest by the golden file's own names."""
    for name in ("fp64", "fp32"):
        if name in changes:
            changes[f"outputs_{name}"] = {"logits": changes.pop(name)}
    golden = read_golden(folder / "golden.npz")
    write_golden(folder / "golden.npz", dataclasses.replace(golden, **changes))
    _rehash(folder)


def _hide(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """As if `packages` were not installed, for all who ask before they import."""
    find = importlib.util.find_spec

    def find_others(name: str, package: str | None = None) -> importlib.machinery.ModuleSpec | None:
        return None if name in packages else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_others)


# --- a good bundle ---


def test_good_bundle_passes_on_every_rung(tiny_bundle: Path) -> None:
    report = _verify(tiny_bundle)
    assert report.verdict == "pass"
    assert report.first_break == ""
    assert report.untrained == ()
    assert set(_verdicts(report).values()) == {"pass"}
    assert list(_verdicts(report))[:6] == [
        ("preprocess", "shared"), ("eager", "torch-cpu"), ("torchscript", "torchscript-cpu"), ("onnx", "ort-cpu"),
        ("onnx-fp16", "fp16-rounding"), ("onnx-fp16", "ort-cpu"),
    ]  # fmt: skip
    num_images = len(read_golden(tiny_bundle / "golden.npz").images)
    for row in report.rows[1:]:
        assert row.num_images == num_images
        assert row.rel_l2 is not None
        assert row.limit is not None
        assert row.rel_l2 <= row.limit
        assert row.rel_l2 < (1e-2 if row.artifact == "onnx-fp16" else 1e-5)
        assert row.top1_agreement is not None
        assert row.p50_ms is None
    floor = report.noise_floor[str(tiny_bundle)]
    assert 0 < floor < 1e-5
    assert "onnxruntime" in report.environment


def test_fp16_on_the_cpu_says_what_it_does_not_prove(tiny_bundle: Path) -> None:
    report = _verify(tiny_bundle, "ort-cpu", "fp16-rounding")
    assert "FP32" in _row(report, "onnx-fp16", "ort-cpu").note
    assert _row(report, "onnx", "ort-cpu").note == ""
    rounded, computed = (_row(report, "onnx-fp16", name).rel_l2 for name in ("fp16-rounding", "ort-cpu"))
    assert rounded is not None
    assert computed is not None
    assert rounded != computed  # results are rounded too, not the weights alone
    assert rounded > 100 * report.noise_floor[str(tiny_bundle)]


def test_placement_is_in_the_row(tiny_bundle: Path) -> None:
    row = _row(_verify(tiny_bundle, "ort-cpu"), "onnx", "ort-cpu")
    assert list(row.placement) == ["CPUExecutionProvider"]
    assert row.placement["CPUExecutionProvider"] > 5


def test_runtimes_that_were_asked_for_and_no_others(tiny_bundle: Path) -> None:
    assert list(_verdicts(_verify(tiny_bundle, "torchscript-cpu"))) == [
        ("preprocess", "shared"), ("torchscript", "torchscript-cpu"),
    ]  # fmt: skip


def test_two_bundles_in_one_report(tiny_bundle: Path, bundle: Path) -> None:
    (bundle / "tiny.onnx").write_bytes(GARBAGE)
    _rehash(bundle)
    report = verify_bundles([tiny_bundle, bundle], VerifySettings(runtimes=("ort-cpu",), latency=None))
    failed = [row for row in report.rows if row.failed]
    assert [(row.bundle, row.artifact) for row in failed] == [(str(bundle), "onnx")]
    assert report.verdict == "fail"
    assert report.first_break.startswith(f"{bundle}: onnx on ort-cpu: ")
    assert set(report.noise_floor) == {str(tiny_bundle), str(bundle)}


def test_progress_names_what_is_done(tiny_bundle: Path) -> None:
    seen: list[str] = []
    settings = VerifySettings(runtimes=("ort-cpu",), latency=None)
    verify_bundles([tiny_bundle], settings, progress=lambda what, done, total: seen.append(what))
    assert seen == ["tiny: onnx on ort-cpu", "tiny: onnx-fp16 on ort-cpu"]


@pytest.mark.parametrize("batch", [1, 3, 10, 16])
def test_fixed_batch_is_filled_up(make_mean_bundle: Callable[[int], Path], batch: int) -> None:
    row = _row(_verify(make_mean_bundle(batch), "ort-cpu"), "onnx", "ort-cpu")
    assert row.verdict == "pass"
    assert row.num_images == 10


def test_untrained_is_told(bundle: Path) -> None:
    _edit(bundle, lambda data: data["spec"]["provenance"].update(source="random"))
    assert _verify(bundle, "ort-cpu").untrained == (str(bundle),)


# --- the reference was changed ---


@pytest.mark.parametrize("factor", [0.5, 100.0, 1.05, -1.0])
def test_scaled_reference_breaks_every_row(bundle: Path, factor: float) -> None:
    golden = read_golden(bundle / "golden.npz")
    _edit_golden(
        bundle, fp64=golden.outputs_fp64["logits"] * factor, fp32=golden.outputs_fp32["logits"] * np.float32(factor)
    )
    report = _verify(bundle)
    assert report.verdict == "fail"
    assert f"{bundle}: eager on torch-cpu" in report.first_break
    assert {row.verdict for row in report.rows if row.artifact != "preprocess"} == {"numeric"}


def test_reference_of_other_weights_breaks_every_row(bundle: Path, tiny_spec: ModelSpec) -> None:
    """A golden file that stayed behind when the model was trained again."""
    torch.manual_seed(1)
    x_NCHW = read_golden(bundle / "golden.npz").x_NCHW
    outputs_fp64, outputs_fp32 = compute_reference(build(tiny_spec), x_NCHW, names=("logits",))
    _edit_golden(bundle, fp64=outputs_fp64["logits"], fp32=outputs_fp32["logits"])
    report = _verify(bundle)
    assert {row.verdict for row in report.rows if row.artifact != "preprocess"} == {"numeric"}


def test_reference_in_another_order_is_told_as_such(bundle: Path) -> None:
    golden = read_golden(bundle / "golden.npz")
    _edit_golden(bundle, fp64=golden.outputs_fp64["logits"][::-1], fp32=golden.outputs_fp32["logits"][::-1])
    assert _row(_verify(bundle, "ort-cpu"), "onnx", "ort-cpu").verdict == "order"


def test_reference_of_other_classes(bundle: Path) -> None:
    golden = read_golden(bundle / "golden.npz")
    _edit_golden(bundle, fp64=golden.outputs_fp64["logits"][:, :7], fp32=golden.outputs_fp32["logits"][:, :7])
    assert _row(_verify(bundle, "ort-cpu"), "onnx", "ort-cpu").verdict == "shape"


def test_reference_that_claims_to_be_noise_excuses_nothing(bundle: Path) -> None:
    """The limit is a multiple of the distance between the two eager outputs; that distance is in the same file."""
    golden = read_golden(bundle / "golden.npz")
    _edit_golden(bundle, fp64=golden.outputs_fp64["logits"] * 0.5)
    assert _row(_verify(bundle, "ort-cpu"), "onnx", "ort-cpu").verdict == "numeric"


# --- the contract was changed ---


@pytest.mark.parametrize(
    "change", [{"mean": [0.5, 0.4, 0.5]}, {"std": [0.25, 0.25, 0.26]}, {"interpolation": "nearest"}, {"crop_pct": 0.9}]
)
def test_wrong_preprocessing_breaks_its_own_row(bundle: Path, change: dict[str, Any]) -> None:
    _edit(bundle, lambda data: data["spec"]["preprocess"].update(change))
    report = _verify(bundle, "ort-cpu")
    row = _row(report, "preprocess", "shared")
    assert row.verdict == "numeric"
    assert row.max_abs is not None
    assert row.max_abs > 1e-3
    assert "preprocess on shared" in report.first_break
    assert _row(report, "onnx", "ort-cpu").verdict == "pass"


def test_wrong_size_breaks_the_preprocess_row(bundle: Path) -> None:
    _edit(bundle, lambda data: data["spec"]["preprocess"].update(height_px=48))
    row = _row(_verify(bundle, "ort-cpu"), "preprocess", "shared")
    assert row.verdict == "shape"
    assert "48" in row.reason


# --- an artifact was changed ---


def _edit_convolution(path: Path, change: Callable[[np.ndarray[Any, Any]], None]) -> None:
    model = onnx.load(path)
    names = [node.input[1] for node in model.graph.node if node.op_type == "Conv"]
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == names[len(names) // 2])
    weights = numpy_helper.to_array(tensor).copy()
    change(weights)
    tensor.CopyFrom(numpy_helper.from_array(weights, tensor.name))
    onnx.save(model, path)


def _negate_largest(weights: np.ndarray[Any, Any]) -> None:
    weights.flat[np.abs(weights).argmax()] *= -1


def _scale_by_a_thousandth(weights: np.ndarray[Any, Any]) -> None:
    weights *= np.float32(1.001)


@pytest.mark.parametrize("change", [_negate_largest, _scale_by_a_thousandth])
def test_changed_convolution_breaks_its_rung_alone(
    bundle: Path, change: Callable[[np.ndarray[Any, Any]], None]
) -> None:
    _edit_convolution(bundle / "tiny.onnx", change)
    _rehash(bundle)
    report = _verify(bundle, "torch-cpu", "torchscript-cpu", "ort-cpu")
    assert _verdicts(report) == {
        ("preprocess", "shared"): "pass", ("eager", "torch-cpu"): "pass", ("torchscript", "torchscript-cpu"): "pass",
        ("onnx", "ort-cpu"): "numeric", ("onnx-fp16", "ort-cpu"): "pass",
    }  # fmt: skip
    assert report.verdict == "fail"
    assert report.first_break.startswith(f"{bundle}: onnx on ort-cpu: relative L2")


def test_fp16_file_that_overflows_breaks_on_the_rounding_runtime(bundle: Path) -> None:
    """What the CPU's float32 arithmetic hides: features times 60000, twice, and divided again."""
    model = onnx.load(bundle / "tiny.fp16.onnx")
    gemm = next(node for node in model.graph.node if node.op_type in ("Gemm", "MatMul"))
    weight = next(tensor for tensor in model.graph.initializer if tensor.name in gemm.input)
    source = gemm.input[0]
    up = numpy_helper.from_array(np.array(60000.0, np.float16), "up")
    nodes = [
        onnx.helper.make_node("Mul", [source, "up"], ["large"]),
        onnx.helper.make_node("Mul", ["large", "up"], ["larger"]),
        onnx.helper.make_node("Div", ["larger", "up"], ["smaller"]),
        onnx.helper.make_node("Div", ["smaller", "up"], ["back"]),
    ]
    assert weight.data_type == onnx.TensorProto.FLOAT16
    index = list(model.graph.node).index(gemm)
    gemm.input[0] = "back"
    for offset, node in enumerate(nodes):
        model.graph.node.insert(index + offset, node)
    model.graph.initializer.append(up)
    onnx.save(model, bundle / "tiny.fp16.onnx")
    _rehash(bundle)
    report = _verify(bundle, "ort-cpu", "fp16-rounding")
    assert _row(report, "onnx-fp16", "fp16-rounding").verdict == "nan"
    assert _row(report, "onnx-fp16", "ort-cpu").verdict == "pass"
    assert report.verdict == "fail"


def test_garbage_with_the_right_hash_is_an_error_row_and_the_others_go_on(bundle: Path) -> None:
    (bundle / "tiny.fp16.onnx").write_bytes(GARBAGE)
    _rehash(bundle)
    report = _verify(bundle)
    verdicts = {key: verdict for key, verdict in _verdicts(report).items() if key[1] in (
        "torch-cpu", "torchscript-cpu", "ort-cpu", "fp16-rounding")}  # fmt: skip
    assert verdicts == {
        ("eager", "torch-cpu"): "pass", ("torchscript", "torchscript-cpu"): "pass", ("onnx", "ort-cpu"): "pass",
        ("onnx-fp16", "fp16-rounding"): "error", ("onnx-fp16", "ort-cpu"): "error",
    }  # fmt: skip
    for runtime in ("fp16-rounding", "ort-cpu"):
        reason = _row(report, "onnx-fp16", runtime).reason
        assert "tiny.fp16.onnx" in reason
        assert "\n" not in reason
    assert "onnx-fp16 on fp16-rounding" in report.first_break


_OTHER_INPUT = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[1,3,32,32] image) => (float[1,3] logits) { logits = ReduceMean<axes = [2, 3], keepdims = 0>(image) }
"""
_FAILS_WHEN_RUN = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[1,3,32,32] input) => (float[1,3] logits) {
    index = Constant<value = int64[1] {9}>()
    picked = Gather<axis = 1>(input, index)
    logits = ReduceMean<axes = [2, 3], keepdims = 0>(picked)
}
"""


@pytest.mark.parametrize("parity", [True, False])
@pytest.mark.parametrize("text", [_OTHER_INPUT, _FAILS_WHEN_RUN])
def test_file_that_opens_but_does_not_run_is_an_error_row(bundle: Path, text: str, parity: bool) -> None:
    """`bench`, which checks no parity, meets it first when it binds or times."""
    model = onnx.parser.parse_model(text)
    (bundle / "tiny.onnx").write_bytes(model.SerializeToString())
    _rehash(bundle)
    report = _verify(bundle, "ort-cpu", parity=parity, latency=SHORT)
    assert _row(report, "onnx", "ort-cpu").verdict == "error"
    other = _row(report, "onnx-fp16", "ort-cpu")
    assert other.verdict == ("pass" if parity else "not-checked")
    assert other.p50_ms is not None
    assert report.verdict == "fail"


@pytest.mark.parametrize("file", ["tiny.torchscript.pt", "tiny.onnx", "tiny.fp16.onnx", "golden.npz", "labels.txt"])
def test_one_changed_byte_stops_before_anything_is_opened(bundle: Path, file: str) -> None:
    content = bytearray((bundle / file).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / file).write_bytes(content)
    with pytest.raises(TamperedError, match=file.replace(".", r"\.")) as caught:
        _verify(bundle)
    assert caught.value.exit_code == EXIT_CHECK_FAILED == 1


# --- what is not here ---


def test_without_torch_its_rows_are_not_checkable_rather_than_passed(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _hide(monkeypatch, "torch")
    report = _verify(tiny_bundle, latency=SHORT)
    verdicts = _verdicts(report)
    assert verdicts["eager", "torch-cpu"] == verdicts["torchscript", "torchscript-cpu"] == "not-checkable"
    assert verdicts["onnx", "ort-cpu"] == verdicts["onnx-fp16", "ort-cpu"] == "pass"
    assert report.verdict == "pass"
    row = _row(report, "torchscript", "torchscript-cpu")
    assert "torch is not installed" in row.reason
    assert (row.rel_l2, row.top1_agreement, row.p50_ms) == (None, None, None)


def test_without_any_runtime_nothing_is_proven(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _hide(monkeypatch, "torch", "onnxruntime", "onnx")
    with pytest.raises(InputError, match="nothing could be checked"):
        _verify(tiny_bundle)


def test_runtime_that_reads_no_artifact_of_the_bundle(bundle: Path) -> None:
    _edit(bundle, lambda data: data.update(artifacts=data["artifacts"][:2]))
    with pytest.raises(InputError, match="nothing could be checked"):
        _verify(bundle, "fp16-rounding")


def test_no_bundle_is_not_a_pass() -> None:
    with pytest.raises(InputError, match="nothing could be checked"):
        verify_bundles([], VerifySettings())


def test_device_that_was_asked_for_and_is_not_here(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(RuntimeUnavailableError) as caught:
        _verify(tiny_bundle, "ort-cuda")
    assert caught.value.exit_code == 3


def _pretend_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime-gpu on a machine without a GPU: the provider is listed as available and takes no session."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, "CPUExecutionProvider"])
    get_providers = onnxruntime.InferenceSession.get_providers

    def without_cuda(session: onnxruntime.InferenceSession) -> list[str]:
        return [name for name in get_providers(session) if name != CUDA]

    monkeypatch.setattr(onnxruntime.InferenceSession, "get_providers", without_cuda)


@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
def test_silent_fallback_of_a_runtime_that_was_asked_for(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend_cuda(monkeypatch)
    with pytest.raises(RuntimeUnavailableError, match=f"asked for {CUDA}, the session runs on CPU"):
        _verify(tiny_bundle, "ort-cpu", "ort-cuda")


@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
def test_device_that_nobody_asked_for_does_not_stop_the_others(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pretend_cuda(monkeypatch)
    report = _verify(tiny_bundle)
    verdicts = _verdicts(report)
    assert verdicts["onnx", "ort-cpu"] == "pass"
    assert {verdict for (_, runtime), verdict in verdicts.items() if runtime == "ort-cuda"} <= {"not-checkable"}
    assert report.verdict == "pass"


# --- labelled accuracy ---


def _photos(folder: Path, predictor: Predictor) -> Path:
    """A folder of 20 random images under the class that the model itself gives; every fourth under another one."""
    images = np.random.default_rng(5).integers(0, 256, (20, 32, 32, 3), np.uint8)
    answers = top_k(predictor.logits(*images), 1)[:, 0]
    for index in range(10):
        (folder / "test" / f"label {index}").mkdir(parents=True)
    for i, answer in enumerate(answers):
        index = (answer + 1) % 10 if i % 4 == 0 else answer
        Image.fromarray(images[i]).save(folder / "test" / f"label {index}" / f"{i}.png")
    for index in range(10):  # no class folder may be empty: a picture of each class that is told apart by nothing
        Image.new("RGB", (32, 32)).save(folder / "test" / f"label {index}" / "black.png")
    return folder


def _record_accuracy(folder: Path, **accuracy: Any) -> None:
    _edit(folder, lambda data: data["spec"]["provenance"].update(accuracy=accuracy))


def test_accuracy_on_a_labelled_folder(bundle: Path, tmp_path: Path) -> None:
    data = open_dataset(str(_photos(tmp_path / "photos", Predictor.open(bundle))), split="test")
    report = _verify(bundle, "ort-cpu", "torchscript-cpu", accuracy=data)
    assert report.verdict == "pass"
    for row in report.rows[1:]:
        assert row.accuracy_images == 30
        assert row.top5 is not None
    for artifact, runtime in (("torchscript", "torchscript-cpu"), ("onnx", "ort-cpu")):
        row = _row(report, artifact, runtime)
        assert row.top1 == pytest.approx(16 / 30)  # 15 of the 20, and one of the black ones

    _record_accuracy(bundle, dataset="photos/test", num_images=30, top1=16 / 30, top5=1.0)
    assert _verify(bundle, "torchscript-cpu", accuracy=data).verdict == "pass"


@pytest.mark.parametrize("recorded", [0.9, 0.7])
def test_accuracy_out_of_budget_either_way(bundle: Path, recorded: float) -> None:
    data = _own_answers(bundle, num_right=16)
    _record_accuracy(bundle, dataset="own/test", num_images=20, top1=recorded, top5=1.0)
    report = _verify(bundle, "torchscript-cpu", accuracy=data)
    row = _row(report, "torchscript", "torchscript-cpu")
    assert row.verdict == "accuracy"
    assert row.top1 == 0.8
    assert "80.00 %" in row.reason
    assert "0.05 points" in row.reason
    assert report.verdict == "fail"
    assert "torchscript on torchscript-cpu" in report.first_break


@pytest.mark.parametrize("recorded", [0.1005, 0.0995])
def test_accuracy_at_the_edge_of_the_budget_passes(bundle: Path, recorded: float) -> None:
    """0.0005 is 5 of 10,000 images; whether 0.1005 - 0.1 is more than that must not hang on the last bit."""
    data = _own_answers(bundle, num_right=2)
    _record_accuracy(bundle, dataset="own/test", num_images=20, top1=recorded, top5=1.0)
    assert _row(_verify(bundle, "torchscript-cpu", accuracy=data), "torchscript", "torchscript-cpu").verdict == "pass"


@pytest.mark.parametrize(
    "recorded", [{"dataset": "other/test", "num_images": 20}, {"dataset": "own/test", "num_images": 9}]
)
def test_accuracy_on_other_images_is_told_but_not_judged(bundle: Path, recorded: dict[str, Any]) -> None:
    data = _own_answers(bundle, num_right=16)
    _record_accuracy(bundle, **recorded, top1=0.1, top5=0.1)
    row = _row(_verify(bundle, "torchscript-cpu", accuracy=data), "torchscript", "torchscript-cpu")
    assert row.verdict == "pass"
    assert row.top1 == 0.8


def _own_answers(folder: Path, *, num_right: int) -> LabelledImages:
    """The golden images, `num_right` of them under the class that the original gives."""
    golden = read_golden(folder / "golden.npz")
    classes = top_k(golden.outputs_fp64["logits"], 1)[:, 0]
    classes[num_right:] = (classes[num_right:] + 1) % 10
    assert len(classes) == 20
    return LabelledImages(
        name="own/test", labels=tuple(f"label {i}" for i in range(10)), classes=classes, stored=golden.images
    )


def test_accuracy_of_a_broken_artifact_is_not_measured(bundle: Path) -> None:
    _edit_convolution(bundle / "tiny.onnx", _negate_largest)
    _rehash(bundle)
    row = _row(_verify(bundle, "ort-cpu", accuracy=_own_answers(bundle, num_right=20)), "onnx", "ort-cpu")
    assert row.verdict == "numeric"
    assert row.top1 is None


# --- latency ---


def test_latency_fills_the_rows_that_are_timed(tiny_bundle: Path) -> None:
    report = _verify(tiny_bundle, "torchscript-cpu", "ort-cpu", "fp16-rounding", latency=SHORT)
    for row in report.rows:
        if row.runtime in ("shared", "fp16-rounding"):
            assert (row.p50_ms, row.p95_ms, row.timing) == (None, None, None)
            continue
        assert row.timing is not None
        assert row.timing.num_runs >= SHORT.min_runs
        assert row.p50_ms == round(row.timing.p50_ms, 4)
        assert row.p95_ms == round(row.timing.p95_ms, 4)
        assert 0 < row.p50_ms <= row.p95_ms
    timed = [row for row in report.rows if row.timing]
    verdicts = [row.timing.verdict for row in timed if row.timing]
    assert [row.artifact for row in timed] == ["torchscript", "onnx", "onnx-fp16"]
    assert verdicts[0] == "reference"
    assert "reference" not in verdicts[1:]


def test_latency_alone(tiny_bundle: Path) -> None:
    report = _verify(tiny_bundle, "ort-cpu", parity=False, latency=SHORT)
    assert [row.artifact for row in report.rows] == ["onnx", "onnx-fp16"]
    for row in report.rows:
        assert row.rel_l2 is None
        assert row.p50_ms is not None


def test_broken_artifact_does_not_stop_the_timing_of_others(bundle: Path) -> None:
    (bundle / "tiny.onnx").write_bytes(GARBAGE)
    _rehash(bundle)
    report = _verify(bundle, "ort-cpu", latency=SHORT)
    assert _row(report, "onnx", "ort-cpu").p50_ms is None
    assert _row(report, "onnx-fp16", "ort-cpu").p50_ms is not None
