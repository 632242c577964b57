from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from cspdeploy.check.ladder import verify_bundles
from cspdeploy.check.settings import VerifySettings
from cspdeploy.core.bundle import file_record, read_manifest, write_manifest
from cspdeploy.core.card import stamp_card
from cspdeploy.core.errors import InputError, RuntimeUnavailableError, TamperedError
from cspdeploy.core.types import Frontend, PlacedNode
from cspdeploy.edge import selftest_checks
from cspdeploy.edge.opening import find_card
from cspdeploy.edge.selftest import SelftestRequest, run_selftest
from cspdeploy.edge.selftest_checks import measure_median
from cspdeploy.edge.selftest_report import CheckRow, SelftestReport, render_selftest
from cspdeploy.runtimes import ort_placement

MakeBundle = Callable[..., Path]
QUICK = SelftestRequest(latency=False)


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "tiny"))


def _row(report: SelftestReport, check: str, artifact: str = "") -> CheckRow:
    return next(row for row in report.checks if (row.check, row.artifact) == (check, artifact))


def _edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def _record(folder: Path, *rows: dict[str, Any]) -> None:
    """As `cspdeploy verify` leaves it."""
    data = {"schema_version": 1, "machine": "An Abacus", "rows": rows}
    (folder / "timings.json").write_text(json.dumps(data))


def _rewrite(folder: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    """Change the one artifact, hash and all: as a wrong export would be, and not a damaged copy."""
    path = next(folder.glob("*.onnx"))
    model = onnx.load(path)
    change(model)
    path.write_bytes(model.SerializeToString())
    record = file_record(path)
    _edit(folder, lambda data: data["artifacts"][0].update(sha256=record.sha256, num_bytes=record.num_bytes))


def test_whole_bundle_passes(tiny_int8_bundle: Path) -> None:
    report = run_selftest(tiny_int8_bundle, QUICK)
    assert report.verdict == "pass"
    assert {row.artifact for row in report.checks if row.check == "golden"} == {
        "torchscript", "onnx", "onnx-fp16", "onnx-int8",
    }  # fmt: skip
    for row in report.checks:
        # TorchScript tells nothing of its nodes.
        untold = (row.check, row.artifact) == ("provider", "torchscript")
        assert row.verdict == ("skip" if untold else "pass"), row
        if row.check == "golden":
            assert row.rel_l2 is not None
            assert row.limit is not None
            assert 0 < row.rel_l2 <= row.limit
    assert _row(report, "provider", "onnx").provider == "CPUExecutionProvider"
    assert sum(_row(report, "provider", "onnx").placement.values()) > 0
    assert _row(report, "preprocess").max_abs == 0
    assert report.environment["onnxruntime"] == onnxruntime.__version__
    assert (report.latency, report.untrained, len(report.manifest_sha256)) == ((), False, 64)


@pytest.mark.parametrize(("fixture", "num_rows"), [("tiny_int8_bundle", 4), ("tiny_u8_bundle", 7)])
def test_limits_are_those_of_verify(request: pytest.FixtureRequest, fixture: str, num_rows: int) -> None:
    bundle = request.getfixturevalue(fixture)
    settings = VerifySettings(latency=None, isolate=False, audit=False, runtimes=("ort-cpu", "torchscript-cpu"))
    verified = {row.artifact: row for row in verify_bundles([bundle], settings).rows}
    rows = [row for row in run_selftest(bundle, QUICK).checks if row.check == "golden"]
    assert len(rows) == num_rows
    for row in rows:
        other = verified[row.artifact]
        assert (row.finding, row.limit) == (other.verdict, other.limit)
        assert row.rel_l2 == pytest.approx(other.rel_l2, rel=1e-3)


# --- every guard, and what it catches ---


def _scale(model: onnx.ModelProto) -> None:
    """The last node's output, by a tenth more."""
    node = model.graph.node[-1]
    node.output[0] = "before"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(1.1, np.float32), "tenth"))
    model.graph.node.append(onnx.helper.make_node("Mul", ["before", "tenth"], ["logits"]))


def _nan(model: onnx.ModelProto) -> None:
    node = model.graph.node[-1]
    node.output[0] = "before"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(np.nan, np.float32), "nothing"))
    model.graph.node.append(onnx.helper.make_node("Mul", ["before", "nothing"], ["logits"]))


def _rename(model: onnx.ModelProto) -> None:
    model.graph.node[-1].output[0] = model.graph.output[0].name = "scores"


@pytest.mark.parametrize(("change", "finding"), [(_scale, "numeric"), (_nan, "nan"), (_rename, "order")])
def test_artifact_that_gives_something_else(
    make_bundle: MakeBundle, change: Callable[[onnx.ModelProto], None], finding: str
) -> None:
    bundle = make_bundle()
    assert run_selftest(bundle, QUICK).verdict == "pass"
    _rewrite(bundle, change)
    report = run_selftest(bundle, QUICK)
    row = _row(report, "golden", "onnx")
    assert (report.verdict, row.verdict, row.finding) == ("fail", "fail", finding)
    assert row.reason
    assert "fail" in render_selftest(report)


def test_one_broken_artifact_leaves_the_others_checked(bundle: Path) -> None:
    (bundle / "tiny.fp16.onnx").write_bytes(b"garbage")
    record = file_record(bundle / "tiny.fp16.onnx")

    def change(data: dict[str, Any]) -> None:
        entry = next(one for one in data["artifacts"] if one["kind"] == "onnx-fp16")
        entry.update(sha256=record.sha256, num_bytes=record.num_bytes)

    _edit(bundle, change)
    report = run_selftest(bundle, QUICK)
    assert report.verdict == "fail"
    assert _row(report, "golden", "onnx-fp16").finding == "error"
    assert "not an ONNX file" in _row(report, "golden", "onnx-fp16").reason
    assert _row(report, "golden", "onnx").verdict == "pass"


@pytest.mark.parametrize("file", ["tiny.fp16.onnx", "golden.npz"])
def test_changed_file_is_not_opened(bundle: Path, file: str) -> None:
    content = bytearray((bundle / file).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / file).write_bytes(content)
    report = run_selftest(bundle, QUICK)
    assert report.verdict == "fail"
    assert file in _row(report, "files").reason
    assert {row.verdict for row in report.checks if row.check == "golden"} == {"skip"}


def test_device_that_makes_other_pixels(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of 255 in one pixel, as another Pillow may give."""
    from cspdeploy.edge import images

    resize = images.resize_pixels

    def other(*arguments: Any) -> np.ndarray:
        pixels = np.array(resize(*arguments))
        pixels[0, 0, 0] ^= 1
        return pixels

    monkeypatch.setattr(images, "resize_pixels", other)
    row = _row(run_selftest(bundle, QUICK), "preprocess")
    assert row.verdict == "fail"
    assert "another Pillow" in row.reason


@pytest.mark.parametrize("resize", [False, True])
@pytest.mark.parametrize("top_k", [0, 2])
def test_preprocessing_in_the_graph(make_bundle: MakeBundle, resize: bool, top_k: int) -> None:
    bundle = make_bundle(frontend=Frontend(resize=resize, top_k=top_k), batch=4)
    report = run_selftest(bundle, QUICK)
    assert report.verdict == "pass", report.checks
    assert _row(report, "golden", "onnx-u8").num_images == 6


def test_wrong_channel_order_declared(make_bundle: MakeBundle) -> None:
    """The file takes RGB, and the manifest says BGR."""
    bundle = make_bundle(frontend=Frontend(channel_order="rgb"))
    _edit(bundle, lambda data: data["artifacts"][0]["frontend"].update(channel_order="bgr"))
    row = _row(run_selftest(bundle, QUICK), "golden", "onnx-u8")
    assert row.verdict == "fail"
    assert "passes with red and blue swapped: wrong channel order" in row.reason


@pytest.mark.parametrize("change", ["classes", "probabilities", "twice"])
def test_top_k_that_is_not_that_of_the_scores(make_bundle: MakeBundle, change: str) -> None:
    bundle = make_bundle(frontend=Frontend(top_k=2))

    def swap(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.op_type == "TopK")
        if change == "classes":
            node.attribute.append(onnx.helper.make_attribute("largest", 0))
        elif change == "probabilities":
            node.input[0] = "logits"
        else:
            node.output[1] = "ranked"
            zero = onnx.numpy_helper.from_array(np.zeros(2, np.int64), "zero")
            model.graph.initializer.append(zero)
            model.graph.node.append(onnx.helper.make_node("Gather", ["ranked", "zero"], ["classes"], axis=1))

    _rewrite(bundle, swap)
    row = _row(run_selftest(bundle, QUICK), "golden", "onnx-u8")
    assert (row.verdict, row.finding) == ("fail", "numeric" if change == "probabilities" else "decision")
    assert row.reason.startswith("top-k: ")


def _reverse_labels(bundle: Path) -> None:
    _edit(bundle, lambda data: data.update(labels=data["labels"][::-1]))


def _reverse_labels_file(bundle: Path) -> None:
    path = bundle / "labels.txt"
    path.write_text("\n".join(reversed(path.read_text().splitlines())) + "\n")
    record = file_record(path)
    _edit(bundle, lambda data: [one.update(sha256=record.sha256, num_bytes=record.num_bytes)
                                for one in data["files"] if one["file"] == "labels.txt"])  # fmt: skip


def _change_mean(bundle: Path) -> None:
    """Of a card: the golden images do not see it, and an application with this file alone would."""
    path = bundle / "tiny.fp16.onnx"
    card = find_card(path)
    assert card is not None
    stamp_card(path, dataclasses.replace(card, preprocess=dataclasses.replace(card.preprocess, mean=(0.0, 0.0, 0.0))))
    record = file_record(path)
    _edit(bundle, lambda data: [one.update(sha256=record.sha256, num_bytes=record.num_bytes)
                                for one in data["artifacts"] if one["file"] == path.name])  # fmt: skip


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_reverse_labels, "labels.txt: other labels than the manifest, or in another order"),
        (_reverse_labels_file, "labels.txt: other labels"),
        (_change_mean, "tiny.fp16.onnx: its card has another preprocess than the manifest"),
    ],
)
def test_bundle_that_says_two_things(bundle: Path, change: Callable[[Path], None], told: str) -> None:
    assert _row(run_selftest(bundle, QUICK), "contract").reason == "10 labels, 2 cards"
    change(bundle)
    report = run_selftest(bundle, QUICK)
    assert (report.verdict, _row(report, "contract").verdict) == ("fail", "fail")
    assert told in _row(report, "contract").reason
    assert _row(report, "golden", "onnx").verdict == "pass"  # which is why it is asked


@pytest.mark.parametrize("num_elsewhere", [4, 5, 9])
def test_provider_that_did_not_take_most_of_the_work(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, num_elsewhere: int
) -> None:
    def assigned(_: object) -> tuple[PlacedNode, ...]:
        here = ["CUDAExecutionProvider"] * num_elsewhere + ["CPUExecutionProvider"] * (9 - num_elsewhere)
        return tuple(PlacedNode(provider=name, node=str(i), operator="Conv") for i, name in enumerate(here))

    monkeypatch.setattr(ort_placement, "read_assignment", assigned)
    row = _row(run_selftest(tiny_bundle, SelftestRequest(artifacts=("onnx",), latency=False)), "provider", "onnx")
    assert row.verdict == ("pass" if num_elsewhere == 4 else "fail")
    assert row.reason.startswith(f"{num_elsewhere} of 9 nodes elsewhere")


def test_engine_that_does_not_tell_where_its_nodes_are(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(ort_placement, "read_assignment", lambda _: ())
    row = _row(run_selftest(tiny_bundle, SelftestRequest(artifacts=("onnx",), latency=False)), "provider", "onnx")
    assert (row.verdict, row.reason) == ("skip", "the engine does not tell where its nodes are")


def test_nodes_elsewhere_are_told_in_part(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = tuple(PlacedNode(provider="CUDAExecutionProvider", node=str(i), operator="Conv") for i in range(500))
    monkeypatch.setattr(ort_placement, "read_assignment", lambda _: nodes)
    row = _row(run_selftest(tiny_bundle, SelftestRequest(artifacts=("onnx",), latency=False)), "provider", "onnx")
    assert len(row.nodes_elsewhere) == 20
    assert "500 of 500" in row.reason


def test_error_that_has_grown_since_the_bundle_was_verified(tiny_int8_bundle: Path, tmp_path: Path) -> None:
    """The last layer's scale by a twentieth: within what INT8 may do to any network, and not to this one."""
    bundle = Path(shutil.copytree(tiny_int8_bundle, tmp_path / "tiny"))
    int8 = SelftestRequest(artifacts=("onnx-int8",), latency=False)
    before = _row(run_selftest(bundle, int8), "golden", "onnx-int8")
    path = bundle / "tiny.int8.onnx"
    model = onnx.load(path)
    stored = {one.name: one for one in model.graph.initializer}
    scale = next(
        stored[node.input[1]] for node in reversed(model.graph.node)
        if node.op_type == "DequantizeLinear" and node.input[0] in stored and len(stored[node.input[0]].dims) > 1
    )  # fmt: skip
    values = onnx.numpy_helper.to_array(scale) * np.float32(1.05)
    scale.CopyFrom(onnx.numpy_helper.from_array(values, scale.name))
    path.write_bytes(model.SerializeToString())
    record = file_record(path)
    _edit(bundle, lambda data: [one.update(sha256=record.sha256, num_bytes=record.num_bytes)
                                for one in data["artifacts"] if one["file"] == path.name])  # fmt: skip
    unrecorded = _row(run_selftest(bundle, int8), "golden", "onnx-int8")
    assert (unrecorded.verdict, unrecorded.recorded_rel_l2) == ("pass", None)
    recorded = {"artifact": "onnx-int8", "runtime": "ort-cpu", "threads": 1, "rel_l2": before.rel_l2}
    _record(bundle, {**recorded, "runtime": "openvino"})
    assert _row(run_selftest(bundle, int8), "golden", "onnx-int8").verdict == "pass"  # another engine's
    _record(bundle, recorded)
    report = run_selftest(bundle, int8)
    row = _row(report, "golden", "onnx-int8")
    assert (report.verdict, row.verdict, row.finding) == ("fail", "fail", "numeric")
    assert "where it was verified: expected at most" in row.reason
    assert f"recorded {before.rel_l2:.1e}" in render_selftest(report)


def test_recorded_error_excuses_nothing(make_bundle: MakeBundle) -> None:
    bundle = make_bundle()
    _rewrite(bundle, _scale)
    _record(bundle, {"artifact": "onnx", "runtime": "ort-cpu", "threads": 1, "rel_l2": 99.0})
    assert _row(run_selftest(bundle, QUICK), "golden", "onnx").verdict == "fail"


def test_artifact_of_another_machine_is_checked_where_it_is_asked_for(bundle: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        next(one for one in data["artifacts"] if one["kind"] == "onnx-fp16").update(machine="An Abacus")

    _edit(bundle, change)
    report = run_selftest(bundle, QUICK)
    row = _row(report, "golden", "onnx-fp16")
    assert (report.verdict, row.verdict) == ("pass", "skip")
    assert row.reason.startswith("optimised for another machine (An Abacus; ")
    row = _row(run_selftest(bundle, SelftestRequest(artifacts=("onnx-fp16",), latency=False)), "golden", "onnx-fp16")
    assert row.verdict == "pass"
    assert "optimised for another machine" in row.reason
    verified = verify_bundles(
        [bundle], VerifySettings(latency=None, isolate=False, audit=False, runtimes=("ort-cpu",))
    ).rows
    assert [row.artifact for row in verified if "optimised for another machine" in row.note] == ["onnx-fp16"]


# --- what was asked for ---


def test_chosen_artifacts(tiny_bundle: Path) -> None:
    report = run_selftest(tiny_bundle, SelftestRequest(artifacts=("onnx-fp16",), latency=False))
    assert {row.artifact for row in report.checks} == {"", "onnx-fp16"}
    with pytest.raises(InputError, match="no artifact 'onnx-int8'"):
        run_selftest(tiny_bundle, SelftestRequest(artifacts=("onnx-int8",)))


def test_chosen_runtime(tiny_bundle: Path) -> None:
    report = run_selftest(tiny_bundle, SelftestRequest(runtime="ort-cpu", latency=False))
    assert _row(report, "golden", "torchscript").verdict == "skip"
    assert "ort-cpu does not read it" in _row(report, "golden", "torchscript").reason
    assert report.verdict == "pass"
    with pytest.raises(InputError, match="--runtime ort-cpu: 'torchscript'"):
        run_selftest(tiny_bundle, SelftestRequest(runtime="ort-cpu", artifacts=("torchscript",)))
    with pytest.raises(InputError, match="unknown"):
        run_selftest(tiny_bundle, SelftestRequest(runtime="ort-tpu"))


def test_runtime_that_is_not_here(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(RuntimeUnavailableError, match="ort-cuda") as caught:
        run_selftest(tiny_bundle, SelftestRequest(runtime="ort-cuda"))
    assert caught.value.exit_code == 3


def test_signature_is_asked_of_who_checks_signatures(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cspdeploy.core import signature

    def refuse(folder: Path, key: Path, *, data: bytes) -> str:
        raise TamperedError(f"{folder}: signed with another key than {key.name}")

    monkeypatch.setattr(signature, "verify_manifest", refuse)
    report = run_selftest(tiny_bundle, SelftestRequest(key=tmp_path / "key.pub", latency=False))
    assert (report.verdict, _row(report, "signature").verdict) == ("fail", "fail")
    assert "another key than key.pub" in _row(report, "signature").reason
    assert {row.verdict for row in report.checks if row.check == "golden"} == {"skip"}


def test_what_is_no_bundle(make_bundle: MakeBundle, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"manifest\.json"):
        run_selftest(tmp_path)
    with pytest.raises(InputError, match=r"one file, expected a bundle.*golden\.npz"):
        run_selftest(make_bundle(card=True) / "mean.onnx")
    _edit(tmp_path / "mean", lambda data: data.update(files=[]))
    with pytest.raises(InputError, match=r"names no golden\.npz"):
        run_selftest(tmp_path / "mean")


# --- latency ---


def test_latency_against_the_recorded_one(bundle: Path) -> None:
    _record(bundle, {"artifact": "onnx", "runtime": "ort-cpu", "p50_ms": 1e-6, "batch": 1, "threads": 1})
    report = run_selftest(bundle, SelftestRequest(artifacts=("onnx", "onnx-fp16"), num_threads=1))
    first, second = report.latency
    assert first.recorded_ms == 1e-6
    assert first.ratio is not None
    assert first.ratio > 1
    assert second.ratio is None
    assert report.verdict == "pass"  # a figure, and no verdict
    assert report.recorded_machine == "An Abacus"
    assert "An Abacus" in render_selftest(report)


def test_no_ratio_of_other_numbers_of_threads(bundle: Path) -> None:
    _record(bundle, {"artifact": "onnx", "runtime": "ort-cpu", "p50_ms": 5.0, "batch": 1, "threads": 64})
    row = run_selftest(bundle, SelftestRequest(artifacts=("onnx",), num_threads=1)).latency[0]
    assert (row.recorded_ms, row.recorded_threads, row.threads, row.ratio) == (5.0, 64, 1, None)


def test_broken_timings_are_a_remark(bundle: Path) -> None:
    (bundle / "timings.json").write_text("{")
    report = run_selftest(bundle, SelftestRequest(artifacts=("onnx",)))
    assert report.verdict == "pass"
    assert "timings.json" in report.remarks[0]
    assert report.latency[0].recorded_ms is None


def test_median_is_taken_until_it_is_known_or_takes_too_long() -> None:
    now = [0.0]

    def clock() -> float:
        return now[0]

    def call(seconds: float) -> Callable[[], None]:
        return lambda: now.__setitem__(0, now[0] + seconds)

    assert measure_median(call(0.01), clock=clock) == (pytest.approx(10.0), 50)
    assert measure_median(call(1e-6), clock=clock)[1] == selftest_checks.MAX_RUNS
    assert measure_median(call(60.0), clock=clock)[1] == 1


def test_untrained_is_told(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    _edit(bundle, lambda data: data["spec"]["provenance"].update(source="random"))
    report = run_selftest(bundle, QUICK)
    assert report.untrained
    assert "UNTRAINED" in render_selftest(report)
    write_manifest(bundle, manifest)
    assert "UNTRAINED" not in render_selftest(run_selftest(bundle, QUICK))
