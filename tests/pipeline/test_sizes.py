"""A bundle of two input sizes, through everything that reads a bundle. Shapes: N images."""

from __future__ import annotations

import dataclasses
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image
from rich.console import Console

from cspdeploy.check import roofline
from cspdeploy.check.bench import BenchSettings, bench_subjects
from cspdeploy.check.blame import BlameRequest, blame
from cspdeploy.check.ladder import compare_with, require_comparable, verify_bundles
from cspdeploy.check.latency import LatencySettings
from cspdeploy.check.loose_file import file_subject
from cspdeploy.check.settings import VerifySettings
from cspdeploy.check.subject import bundle_subject, bundle_subjects
from cspdeploy.core.archive import unpack
from cspdeploy.core.bundle import file_record, read_manifest, write_manifest
from cspdeploy.core.card import read_card
from cspdeploy.core.errors import InputError
from cspdeploy.core.onnx_graph import read_onnx
from cspdeploy.core.preprocess import preprocess
from cspdeploy.core.sizes import contract_of, size_of
from cspdeploy.core.types import Frontend
from cspdeploy.edge import Predictor
from cspdeploy.edge.selftest import SelftestRequest, run_selftest
from cspdeploy.export import simplify
from cspdeploy.pipeline.int8_step import Int8Request
from cspdeploy.pipeline.package import PackageRequest, package_bundle
from cspdeploy.pipeline.publish import publish_report
from cspdeploy.pipeline.recipe import ExportRequest, export_bundle
from cspdeploy.pipeline.reproduce import reproduce_bundle
from cspdeploy.report.explain import render_explain
from cspdeploy.report.html.rows import rows_of_size
from tests.conftest import set_int8_speed

FURTHER = (48, 40)
SUFFIX = "@48x40"
QUICK = VerifySettings(latency=None, isolate=False, audit=False, runtimes=("ort-cpu", "torch-cpu"))


@pytest.fixture(autouse=True, scope="module")
def quick_exports() -> Iterator[None]:
    """Without the simplifier, which takes longer to start than all else together; INT8 is never refused for speed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simplify, "_CHILD", ["false"])
        set_int8_speed(patch, 1.5)
        yield


@pytest.fixture(scope="module")
def sizes(photo_models: Path, tmp_path_factory: pytest.TempPathFactory, quick_exports: None) -> Path:
    """32 px and 48x40 px, all in FP16 and INT8, with preprocessing in the graph, and in ONNX Runtime's format."""
    request = ExportRequest(
        model="tiny", models=photo_models, output=tmp_path_factory.mktemp("sizes"), further_sizes_px=(FURTHER,),
        fp16=True, int8=Int8Request(calibration="minmax"), frontend=Frontend(top_k=3), also=("ort",),
    )  # fmt: skip
    return Path(export_bundle(request).folder)


@pytest.fixture
def small(sizes: Path, tmp_path: Path) -> Path:
    """A copy that a test may change, of the FP32 files alone."""
    folder = Path(shutil.copytree(sizes, tmp_path / "exported" / "tiny"))
    manifest = read_manifest(folder)
    kept = tuple(made for made in manifest.artifacts if made.kind in ("onnx", f"onnx{SUFFIX}"))
    for made in manifest.artifacts:
        if made not in kept:
            (folder / made.file).unlink()
    (folder / "report.html").unlink(missing_ok=True)
    write_manifest(folder, dataclasses.replace(manifest, artifacts=kept))
    return folder


def _change(folder: Path, file: str, change: Callable[[onnx.ModelProto], None]) -> None:
    """Change an ONNX file, hash and all: as a wrong export would be, and not a damaged copy."""
    model = onnx.load(folder / file)
    change(model)
    (folder / file).write_bytes(model.SerializeToString())
    record, manifest = file_record(folder / file), read_manifest(folder)
    made = tuple(
        dataclasses.replace(one, sha256=record.sha256, num_bytes=record.num_bytes) if one.file == file else one
        for one in manifest.artifacts
    )
    write_manifest(folder, dataclasses.replace(manifest, artifacts=made))


def _shift_weight(model: onnx.ModelProto) -> None:
    node = [node for node in model.graph.node if node.op_type == "Conv"][1]
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == node.input[1])
    values = numpy_helper.to_array(tensor).copy()
    values[1, 1, 0, 0] += 0.2
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def _only(folder: Path, size_px: tuple[int, int] | None) -> None:
    """Take the artifacts of the other size out of the bundle."""
    manifest = read_manifest(folder)
    kept = tuple(made for made in manifest.artifacts if size_of(made.kind) == size_px)
    for made in manifest.artifacts:
        if made not in kept:
            (folder / made.file).unlink()
    write_manifest(folder, dataclasses.replace(manifest, artifacts=kept))


# --- export ---


def test_onnx_files_come_in_every_size_and_programs_of_torch_once(sizes: Path) -> None:
    kinds = [artifact.kind for artifact in read_manifest(sizes).artifacts]
    per_size = ["onnx", "onnx-fp16", "onnx-int8", "onnx-u8", "onnx-fp16-u8", "onnx-int8-u8", "ort", "ort-int8"]
    assert sorted(kinds) == sorted(["torchscript", *per_size, *(f"{kind}{SUFFIX}" for kind in per_size)])
    assert {path.name for path in sizes.glob("*48x40*")} >= {
        "tiny.48x40.onnx", "tiny.48x40.int8.onnx", "tiny.48x40.u8.onnx", "tiny.48x40.ort", "golden.48x40.npz",
    }  # fmt: skip
    assert not list(sizes.glob("*48x40*.pt*"))


def test_each_file_takes_its_own_size(sizes: Path) -> None:
    manifest = read_manifest(sizes)
    for artifact in manifest.artifacts:
        height_px, width_px = size_of(artifact.kind) or (32, 32)
        contract = contract_of(manifest, artifact)
        assert (contract.height_px, contract.width_px) == (height_px, width_px)
        shape = (height_px, width_px, 3) if artifact.frontend else (3, height_px, width_px)
        assert artifact.inputs[0].shape[1:] == shape
        if artifact.format == "onnx":
            model = read_onnx(sizes / artifact.file)
            assert model.graph.inputs[0].shape == (1, *shape)
            card = read_card(model.metadata, name=artifact.file)
            assert card is not None
            assert (card.artifact, card.preprocess) == (artifact.kind, contract)


def test_the_manifest_says_what_was_asked_for(sizes: Path) -> None:
    options = json.loads((sizes / "manifest.json").read_text())["options"]
    assert (options["size_px"], options["further_sizes_px"]) == ([32, 32], [[48, 40]])


def test_int8_ranges_are_those_of_the_size(sizes: Path) -> None:
    """The same weights on other pictures: other activations, and so other scales."""

    def activation_scales(file: str) -> list[float]:
        model = onnx.load(sizes / file)
        values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        nodes = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
        return [float(values[node.input[1]].max()) for node in nodes]

    own, further = activation_scales("tiny.int8.onnx"), activation_scales("tiny.48x40.int8.onnx")
    assert len(own) == len(further) > 0
    assert own != further


@pytest.mark.parametrize("twice", [(32, 32), FURTHER])
def test_a_size_twice_is_refused(photo_models: Path, tmp_path: Path, twice: tuple[int, int]) -> None:
    request = ExportRequest(model="tiny", models=photo_models, output=tmp_path, further_sizes_px=(FURTHER, twice))
    with pytest.raises(InputError, match=f"--size: {twice[0]}x{twice[1]} is there twice"):
        export_bundle(request)


def test_a_size_that_cannot_be_is_refused_before_anything_is_written(sizes: Path, tmp_path: Path) -> None:
    request = ExportRequest(model=str(sizes / "tiny.onnx"), output=tmp_path / "out", further_sizes_px=(FURTHER,),
                            calibration=tmp_path)  # fmt: skip
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "image.png")
    with pytest.raises(InputError, match=r"--size 48x40: .* has its size built in"):
        export_bundle(request)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_refused_int8_file_says_of_which_size(photo_models: Path, tmp_path: Path) -> None:
    request = ExportRequest(
        model="tiny", models=photo_models, output=tmp_path, further_sizes_px=(FURTHER,), also=("pt2",),
        int8=Int8Request(calibration="minmax", max_drop="90dB", time_limit_s=0.1),
    )  # fmt: skip
    report = export_bundle(request)
    assert [made.kind for made in report.manifest.artifacts] == ["torchscript", "onnx", "pt2", f"onnx{SUFFIX}"]
    assert report.refused_int8.count("no INT8 file") == 2
    assert f"; {SUFFIX} no INT8 file" in report.refused_int8


# --- verify, bench, blame ---


def test_every_size_is_judged_by_its_own_reference(sizes: Path) -> None:
    report = verify_bundles([sizes], QUICK)
    assert {row.verdict for row in report.rows} == {"pass"}
    names = [(row.artifact, row.runtime) for row in report.rows]
    assert len(set(names)) == len(names)
    for name in ("preprocess", "eager", "onnx", "onnx-fp16", "onnx-int8", "onnx-u8", "ort"):
        assert [row.artifact for row in report.rows if row.artifact.split("@")[0] == name and row.runtime in (
            "shared", "ort-cpu", "torch-cpu")] == [name, f"{name}{SUFFIX}"]  # fmt: skip
    floors = report.noise_floor
    assert list(floors) == [str(sizes), f"{sizes}{SUFFIX}"]
    assert floors[str(sizes)] != floors[f"{sizes}{SUFFIX}"]
    console = Console(width=200)
    with console.capture() as captured:
        console.print(render_explain(report))
    assert f"{floors[f'{sizes}{SUFFIX}']:.2e} {SUFFIX}" in captured.get().replace("\n", "")


def test_a_fault_in_one_size_breaks_its_rows_alone(small: Path) -> None:
    _change(small, "tiny.48x40.onnx", _shift_weight)
    report = verify_bundles([small], QUICK)
    assert {row.artifact for row in report.rows if row.failed} == {f"onnx{SUFFIX}"}
    assert str(report.settings["next_step"]).startswith(f"cspdeploy blame {small / 'tiny.48x40.onnx'}")


def test_a_tolerance_may_name_a_size(small: Path) -> None:
    report = verify_bundles([small], dataclasses.replace(QUICK, tolerances={f"onnx{SUFFIX}": 1e-12}))
    assert {row.artifact for row in report.rows if row.failed} == {f"onnx{SUFFIX}"}
    with pytest.raises(InputError, match="--tolerance onnx@64x64: no such artifact"):
        verify_bundles([small], dataclasses.replace(QUICK, tolerances={"onnx@64x64": 1.0}))


def test_a_file_of_a_size_by_itself_is_judged_by_its_golden_outputs(sizes: Path) -> None:
    subject = file_subject(sizes / "tiny.48x40.onnx")
    assert next(iter(subject.feeds.values())).shape[2:] == FURTHER
    assert [made.artifact for made in subject.candidates] == [f"onnx{SUFFIX}"]


def test_blame_finds_the_node_at_the_size_of_the_file(small: Path) -> None:
    _change(small, "tiny.48x40.onnx", _shift_weight)
    found = blame(BlameRequest(artifact=small / "tiny.48x40.onnx"))
    assert found.blamed is not None
    assert (found.verdict, found.artifact) == ("introduced", f"onnx{SUFFIX}")


def test_blame_names_the_file_of_the_same_size_without_preprocessing(sizes: Path) -> None:
    with pytest.raises(InputError, match=r"has preprocessing in its graph.*tiny\.48x40\.onnx"):
        blame(BlameRequest(artifact=sizes / "tiny.48x40.u8.onnx"))


@pytest.mark.slow
def test_bench_times_every_size(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "PRODUCT_SIDE", {"cpu": 64})
    monkeypatch.setattr(roofline, "STREAM_VALUES", 1 << 20)
    latency = LatencySettings(min_runs=5, min_seconds=0.0, warmup_runs=1, warmup_seconds=0.0, max_warmup_seconds=0.0,
                              lead_in_seconds=0.0, burst=1)  # fmt: skip
    settings = BenchSettings(runtimes=("ort-cpu",), latency=latency)
    report = bench_subjects([("tiny", list(bundle_subjects(small)))], settings)
    assert [(row.artifact, row.verdict) for row in report.rows] == [("onnx", "timed"), (f"onnx{SUFFIX}", "timed")]
    gflop = {line.artifact: line.gflop for line in report.rooflines}
    assert gflop[f"onnx{SUFFIX}"] > 1.5 * gflop["onnx"]  # 1,920 pixels against 1,024


def test_against_compares_each_size_with_itself(small: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(small, tmp_path / "old"))
    _change(small, "tiny.48x40.onnx", _shift_weight)
    settings = dataclasses.replace(QUICK, runtimes=("ort-cpu",))
    report = compare_with(verify_bundles([small], settings), old, small, settings)
    assert {found.artifact: found.verdict for found in report.regressions} == {"onnx": "same", f"onnx{SUFFIX}": "worse"}


def test_against_a_bundle_of_fewer_sizes(small: Path, tmp_path: Path) -> None:
    fewer, other = (Path(shutil.copytree(small, tmp_path / name)) for name in ("fewer", "other"))
    _only(fewer, None)
    _only(other, FURTHER)
    settings = dataclasses.replace(QUICK, runtimes=("ort-cpu",))
    more = compare_with(verify_bundles([small], settings), fewer, small, settings)
    assert {found.artifact: found.verdict for found in more.regressions} == {"onnx": "same", f"onnx{SUFFIX}": "new"}
    less = compare_with(verify_bundles([fewer], settings), small, fewer, settings)
    assert {found.artifact: found.verdict for found in less.regressions} == {"onnx": "same", f"onnx{SUFFIX}": "gone"}
    assert less.verdict == "fail"
    with pytest.raises(InputError, match="has no input size of"):
        require_comparable(fewer, other)


def test_the_report_shows_both_and_compares_pictures_of_one(sizes: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sizes, tmp_path / "tiny"))
    report = verify_bundles([folder], dataclasses.replace(QUICK, runtimes=("ort-cpu",)))
    page = publish_report(folder, report, layers=False).read_text(encoding="utf-8")
    assert f"onnx{SUFFIX}" in page
    assert "32 \N{MULTIPLICATION SIGN} 32, 48 \N{MULTIPLICATION SIGN} 40 px" in page
    first = rows_of_size(report.rows, None)
    assert {row.artifact for row in first} < {row.artifact for row in report.rows}
    assert not any(SUFFIX in row.artifact for row in first)


# --- on the device ---


def test_prediction_prepares_images_for_the_size(sizes: Path) -> None:
    image = np.random.default_rng(5).integers(0, 256, (60, 70, 3), np.uint8)
    subject = bundle_subject(sizes, size_px=FURTHER)
    assert subject.manifest is not None
    x_NCHW = preprocess([image], subject.manifest.spec.preprocess)
    with Predictor.open(sizes, artifact=f"onnx{SUFFIX}") as predictor:
        assert (predictor.preprocess.height_px, predictor.preprocess.width_px) == FURTHER
        np.testing.assert_array_equal(predictor.logits(image), predictor.raw(x_NCHW)["logits"])
        expected = predictor.logits(image)
    with Predictor.open(sizes) as predictor:
        assert not np.array_equal(predictor.logits(image), expected)
    with Predictor.open(sizes, artifact=f"onnx-u8{SUFFIX}") as predictor:
        np.testing.assert_allclose(predictor.logits(image), expected, rtol=1e-4, atol=1e-5)
    with Predictor.open(sizes / "tiny.48x40.onnx") as predictor:
        assert predictor.artifact == f"onnx{SUFFIX}"
        np.testing.assert_array_equal(predictor.logits(image), expected)


def test_a_size_that_is_not_there_is_refused_with_those_that_are(sizes: Path) -> None:
    with pytest.raises(InputError, match=rf"no artifact 'onnx@64x64', it has .*onnx{SUFFIX}"):
        Predictor.open(sizes, artifact="onnx@64x64")


def test_selftest_proves_each_size_on_its_own_images(small: Path) -> None:
    report = run_selftest(small, SelftestRequest(latency=False))
    assert report.verdict == "pass"
    rows = [(row.check, row.artifact) for row in report.checks]
    assert rows.index(("preprocess", SUFFIX)) > rows.index(("golden", "onnx"))
    assert ("golden", f"onnx{SUFFIX}") in rows
    _change(small, "tiny.48x40.onnx", _shift_weight)
    report = run_selftest(small, SelftestRequest(latency=False))
    assert {row.artifact for row in report.checks if row.verdict == "fail"} == {f"onnx{SUFFIX}"}


# --- hand-over ---


@pytest.mark.parametrize(
    ("asked", "kinds", "golden"),
    [
        ((), ["onnx", "onnx-int8", f"onnx{SUFFIX}", f"onnx-int8{SUFFIX}"], {"golden.npz", "golden.48x40.npz"}),
        (("onnx-u8",), ["onnx-u8", f"onnx-u8{SUFFIX}"], {"golden.npz", "golden.48x40.npz"}),
        (("onnx@32x32",), ["onnx"], {"golden.npz"}),
        ((f"onnx{SUFFIX}",), [f"onnx{SUFFIX}"], {"golden.48x40.npz"}),
    ],
)
def test_a_package_takes_the_sizes_along(
    sizes: Path, tmp_path: Path, asked: tuple[str, ...], kinds: list[str], golden: set[str]
) -> None:
    output = tmp_path / "model.zip"
    report = package_bundle(PackageRequest(bundle=sizes, output=output, artifacts=asked))
    assert list(report.artifacts) == kinds
    with zipfile.ZipFile(output) as archive:
        assert {Path(name).name for name in archive.namelist() if name.endswith(".npz")} == golden
    unpack(output, tmp_path / "device")
    assert run_selftest(tmp_path / "device" / "tiny", SelftestRequest(latency=False)).verdict == "pass"


def test_a_bundle_of_a_further_size_alone_is_whole(small: Path) -> None:
    _only(small, FURTHER)
    assert verify_bundles([small], QUICK).verdict == "pass"
    assert publish_report(small, layers=False).is_file()
    with pytest.raises(InputError, match="no artifact 'onnx'") as caught:
        Predictor.open(small)
    assert f"--artifact onnx{SUFFIX}" in (caught.value.fix or "")


def test_it_is_built_again_to_the_byte(photo_models: Path, tmp_path: Path) -> None:
    request = ExportRequest(model="tiny", models=photo_models, output=tmp_path, further_sizes_px=(FURTHER,))
    report = reproduce_bundle(Path(export_bundle(request).folder), models=photo_models)
    assert report.verdict == "equal"
    assert {"tiny.48x40.onnx", "golden.48x40.npz"} <= {file.file for file in report.files}
