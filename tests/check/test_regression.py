from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from cspdeploy.check.ladder import compare_with, verify_bundles
from cspdeploy.check.latency import LatencySettings
from cspdeploy.check.regression import compare_bundles
from cspdeploy.check.regression_rows import SIZE_BUDGET
from cspdeploy.check.settings import VerifySettings
from cspdeploy.check.subject import ONNX_FAMILY, ORIGINAL
from cspdeploy.core.bundle import file_record, read_manifest, write_manifest
from cspdeploy.core.datasets import LabelledImages
from cspdeploy.core.errors import InputError, TamperedError
from cspdeploy.core.results import ParityRow, Regression
from cspdeploy.core.types import Manifest

HERE = VerifySettings(runtimes=("ort-cpu",), latency=None, isolate=False)
QUICK = LatencySettings(min_runs=20, min_seconds=0.0, warmup_runs=1, warmup_seconds=0.0)
ONNX, FP16 = ("onnx", "ort-cpu"), ("onnx-fp16", "ort-cpu")


@pytest.fixture
def old(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "old"))


@pytest.fixture
def new(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "new"))


def _rows(folder: Path, **more: Any) -> list[ParityRow]:
    """What verify says of a bundle of which all holds."""
    kept = ParityRow(bundle=str(folder), artifact="", runtime="ort-cpu", verdict="pass", limit=1e-5, **more)
    return [
        dataclasses.replace(kept, artifact=artifact.kind, num_bytes=artifact.num_bytes)
        for artifact in read_manifest(folder).artifacts
        if artifact.format == "onnx"
    ]


def _compare(
    old: Path, new: Path, settings: VerifySettings = HERE, **rows: list[ParityRow]
) -> dict[tuple[str, str], Regression]:
    found = compare_bundles(
        old,
        new,
        old_rows=rows.get("old_rows", _rows(old)),
        new_rows=rows.get("new_rows", _rows(new)),
        settings=settings,
    )
    return {(one.artifact, one.runtime): one for one in found}


def _edit(folder: Path, change: Callable[[Manifest], Manifest]) -> None:
    write_manifest(folder, change(read_manifest(folder)))


def _rewrite(folder: Path, kind: str, change: Callable[[onnx.ModelProto], None]) -> None:
    """Change an ONNX file of a bundle, and its hash and size in the manifest."""
    manifest = read_manifest(folder)
    made = {artifact.kind: artifact for artifact in manifest.artifacts}
    path = folder / made[kind].file
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)
    record = file_record(path)
    made[kind] = dataclasses.replace(made[kind], sha256=record.sha256, num_bytes=record.num_bytes)
    write_manifest(folder, dataclasses.replace(manifest, artifacts=tuple(made.values())))


def _remove(folder: Path, kind: str) -> None:
    manifest = read_manifest(folder)
    for artifact in manifest.artifacts:
        if artifact.kind == kind:
            (folder / artifact.file).unlink()
    kept = tuple(artifact for artifact in manifest.artifacts if artifact.kind != kind)
    write_manifest(folder, dataclasses.replace(manifest, artifacts=kept))


def _scale_weights(factor: float) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        weights = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
        values = numpy_helper.to_array(weights) * np.float32(factor)
        weights.CopyFrom(numpy_helper.from_array(values.astype(np.float32), weights.name))

    return change


def _pad(num_bytes: int) -> Callable[[onnx.ModelProto], None]:
    return lambda model: onnx.helper.set_model_props(model, {"note": "x" * num_bytes})


def test_a_bundle_against_itself_is_the_same(old: Path, new: Path) -> None:
    found = _compare(old, new)
    assert list(found) == [ONNX, FP16]
    for one in found.values():
        assert (one.verdict, one.reason) == ("same", "")
        assert (one.old_verdict, one.new_verdict, one.latency, one.ratio) == ("pass", "pass", "", None)
        assert (one.rel_l2, one.top1_agreement) == (0.0, 1.0)
        assert one.old_bytes == one.new_bytes


def test_in_processes_of_their_own_and_with_latency(old: Path, new: Path) -> None:
    settings = dataclasses.replace(HERE, isolate=True, latency=QUICK)
    one = _compare(old, new, settings, old_rows=_rows(old)[:1], new_rows=_rows(new)[:1])[ONNX]
    assert one.rel_l2 == 0.0
    assert one.latency in ("faster", "slower", "indistinguishable")
    assert one.ratio is not None


def test_a_check_that_held_and_fails_is_worse(old: Path, new: Path) -> None:
    rows = [dataclasses.replace(row, verdict="numeric", reason="far off") for row in _rows(new)]
    one = _compare(old, new, new_rows=rows)[ONNX]
    assert (one.verdict, one.old_verdict, one.new_verdict) == ("worse", "pass", "numeric")
    assert "numeric, was pass: far off" in one.reason


def test_a_check_that_failed_and_holds_is_better(old: Path, new: Path) -> None:
    rows = [dataclasses.replace(row, verdict="numeric", reason="far off") for row in _rows(old)]
    assert _compare(old, new, old_rows=rows)[ONNX].verdict == "better"


def test_a_check_that_still_fails_is_the_same_and_says_so(old: Path, new: Path) -> None:
    rows = {name: [dataclasses.replace(row, verdict="nan", reason="3 NaN") for row in _rows(folder)]
            for name, folder in (("old_rows", old), ("new_rows", new))}  # fmt: skip
    one = _compare(old, new, **rows)[ONNX]
    assert (one.verdict, one.reason) == ("same", "fails as the old one does: 3 NaN")


def test_other_outputs_from_the_same_weights_are_worse(old: Path, new: Path) -> None:
    _rewrite(new, "onnx", _scale_weights(1.01))
    found = _compare(old, new)
    assert found[ONNX].verdict == "worse"
    assert "outputs of the same weights differ by" in found[ONNX].reason
    assert found[ONNX].rel_l2 is not None
    assert found[ONNX].rel_l2 > 2e-5
    assert found[FP16].verdict == "same"


def test_other_outputs_within_both_limits_are_the_same(old: Path, new: Path) -> None:
    _rewrite(new, "onnx", _scale_weights(1.01))
    rows = {name: [dataclasses.replace(row, limit=1.0) for row in _rows(folder)]
            for name, folder in (("old_rows", old), ("new_rows", new))}  # fmt: skip
    assert _compare(old, new, **rows)[ONNX].verdict == "same"


def test_other_weights_are_shown_and_not_judged(old: Path, new: Path) -> None:
    _rewrite(new, "onnx", _scale_weights(1.5))
    _edit(new, lambda made: dataclasses.replace(made, spec=dataclasses.replace(
        made.spec, provenance=dataclasses.replace(made.spec.provenance, weights_sha256="ab" * 32))))  # fmt: skip
    one = _compare(old, new)[ONNX]
    assert (one.verdict, one.reason) == ("same", "other weights: outputs are shown, not judged")
    assert one.rel_l2 is not None
    assert one.rel_l2 > 1e-3


def test_each_bundle_prepares_the_images_by_its_own_contract(old: Path, new: Path) -> None:
    """The same network behind another mean: an application that follows the contract gets other outputs."""
    _edit(old, lambda made: dataclasses.replace(made, spec=dataclasses.replace(
        made.spec, preprocess=dataclasses.replace(made.spec.preprocess, mean=(0.1, 0.1, 0.1)))))  # fmt: skip
    one = _compare(old, new)[ONNX]
    assert one.rel_l2 is not None
    assert one.rel_l2 > 1e-3
    assert (one.verdict, one.reason.startswith("other preprocessing")) == ("same", True)


@pytest.mark.parametrize(("which", "verdict"), [("new", "worse"), ("old", "better")])
def test_size(old: Path, new: Path, which: str, verdict: str) -> None:
    folder = {"old": old, "new": new}[which]
    size = (folder / "tiny.onnx").stat().st_size
    _rewrite(folder, "onnx", _pad(int(2 * SIZE_BUDGET * size)))
    one = _compare(old, new)[ONNX]
    assert one.verdict == verdict
    assert "bytes, was" in one.reason
    assert (one.old_bytes, one.new_bytes) == tuple((place / "tiny.onnx").stat().st_size for place in (old, new))


def test_a_size_within_the_budget_is_the_same(old: Path, new: Path) -> None:
    _rewrite(new, "onnx", _pad(int(SIZE_BUDGET * (new / "tiny.onnx").stat().st_size / 4)))
    one = _compare(old, new)[ONNX]
    assert one.verdict == "same"
    assert one.new_bytes != one.old_bytes


@pytest.mark.parametrize(("top1", "verdict"), [(0.90, "same"), (0.8990, "worse"), (0.9010, "better")])
def test_labelled_accuracy(old: Path, new: Path, top1: float, verdict: str) -> None:
    found = _compare(old, new, old_rows=_rows(old, top1=0.90), new_rows=_rows(new, top1=top1))
    assert found[ONNX].verdict == verdict


def test_artifacts_of_one_bundle_alone(old: Path, new: Path) -> None:
    _remove(old, "onnx-fp16")
    _remove(new, "onnx")
    found = _compare(old, new)
    assert (found[ONNX].verdict, found[ONNX].old_verdict, found[ONNX].new_verdict) == ("gone", "pass", "")
    assert (found[FP16].verdict, found[FP16].old_bytes, found[FP16].new_verdict) == ("new", None, "pass")
    assert found[FP16].new_bytes


def test_a_slower_artifact_is_worse(make_mean_bundle: Callable[[int], Path], tmp_path: Path) -> None:
    """The same outputs after 100 multiplications by the identity: many times as slow, on a machine however busy."""
    old = make_mean_bundle(1)
    new = Path(shutil.copytree(old, tmp_path / "slow"))

    def slow_down(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(numpy_helper.from_array(np.eye(32, dtype=np.float32), "identity"))
        names = ["input", *(f"step{i}" for i in range(100))]
        steps = [onnx.helper.make_node("MatMul", [a, "identity"], [b]) for a, b in itertools.pairwise(names)]
        mean = model.graph.node.pop()
        mean.input[0] = names[-1]
        model.graph.node.extend([*steps, mean])

    _rewrite(new, "onnx", slow_down)
    rows = [dataclasses.replace(row, num_bytes=0) for row in _rows(old)]
    one = _compare(old, new, dataclasses.replace(HERE, latency=QUICK), old_rows=rows)[ONNX]
    assert (one.verdict, one.latency, one.rel_l2) == ("worse", "slower", 0.0)
    assert one.ratio is not None
    assert one.ratio < 0.5
    assert one.reason.startswith("slower: median ")


def test_what_cannot_be_run_here_is_not_compared(old: Path, new: Path) -> None:
    rows = [dataclasses.replace(row, verdict="not-checkable", reason="no engine") for row in _rows(old)]
    one = _compare(old, new, old_rows=rows)[ONNX]
    assert (one.verdict, one.rel_l2, one.reason) == ("same", None, "pass, was not-checkable: no engine")


def test_an_artifact_that_no_longer_opens_is_worse_and_the_others_go_on(old: Path, new: Path) -> None:
    _rewrite(new, "onnx", lambda model: model.graph.node[0].attribute.clear())
    found = _compare(old, new)
    assert found[ONNX].verdict == "worse"
    assert found[ONNX].reason.startswith(("could not be compared: ", "outputs of the same weights"))
    assert found[FP16].verdict == "same"


def test_rows_of_the_network_and_of_other_bundles_are_passed_over(old: Path, new: Path) -> None:
    more = [
        ParityRow(bundle=str(new), artifact="eager", runtime="torch-cpu", verdict="pass"),
        ParityRow(bundle=str(new), artifact="preprocess", runtime="shared", verdict="pass"),
        ParityRow(bundle="elsewhere", artifact="onnx", runtime="torch-cpu", verdict="pass"),
    ]
    assert list(_compare(old, new, new_rows=[*more, *_rows(new)])) == [ONNX, FP16]


def test_bundles_of_other_classes_or_outputs_are_refused(
    old: Path, new: Path, make_mean_bundle: Callable[[int], Path]
) -> None:
    _edit(old, lambda made: dataclasses.replace(made, labels=("cat", *made.labels[1:])))
    with pytest.raises(InputError, match="'cat' there, 'label 0' here"):
        _compare(old, new)
    with pytest.raises(InputError, match=r"its outputs are logits \[3\], those of .* logits \[10\]"):
        _compare(make_mean_bundle(1), new)


def test_a_tampered_old_bundle_is_refused(old: Path, new: Path) -> None:
    (old / "tiny.onnx").write_bytes(b"other")
    with pytest.raises(TamperedError):
        _compare(old, new)


def test_the_file_that_a_bundle_was_made_from_is_passed_over(old: Path, new: Path) -> None:
    def foreign(made: Manifest) -> Manifest:
        network = dataclasses.replace(made.spec.network, family=ONNX_FAMILY)
        return dataclasses.replace(made, spec=dataclasses.replace(made.spec, network=network))

    for folder in (old, new):
        _edit(folder, foreign)
    more = [
        [ParityRow(bundle=str(folder), artifact=ORIGINAL, runtime="ort-cpu", verdict="pass"), *_rows(folder)]
        for folder in (old, new)
    ]
    assert list(_compare(old, new, old_rows=more[0], new_rows=more[1])) == [ONNX, FP16]


def test_labelled_accuracy_of_the_old_bundle_is_measured_too(old: Path, new: Path) -> None:
    """And a tolerance for an artifact that the old one lacks is no mistake."""
    _edit(old, lambda made: dataclasses.replace(made, artifacts=made.artifacts[:2]))
    (old / "tiny.fp16.onnx").unlink()
    pixels_NHW = np.random.default_rng(0).integers(0, 256, (30, 8, 8), np.uint8)
    labels = read_manifest(new).labels
    data = LabelledImages(name="noise", stored=pixels_NHW, classes=np.arange(30) % len(labels), labels=labels)
    settings = dataclasses.replace(HERE, audit=False, accuracy=data, tolerances={"onnx-fp16": 0.1})
    report = verify_bundles([new], settings)
    wrong = [dataclasses.replace(row, top1=row.top1 - 0.5) if row.top1 is not None else row for row in report.rows]
    found = compare_with(dataclasses.replace(report, rows=tuple(wrong)), old, new, settings)
    assert found.verdict == "fail"
    verdicts = {one.artifact: (one.verdict, one.reason) for one in found.regressions}
    assert verdicts["onnx"][0] == "worse"
    assert "top-1" in verdicts["onnx"][1]
    assert verdicts["onnx-fp16"][0] == "new"
