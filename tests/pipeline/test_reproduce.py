from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from cspdeploy.core.bundle import file_sha256, read_manifest, write_manifest
from cspdeploy.core.errors import InputError, TamperedError
from cspdeploy.core.types import Manifest
from cspdeploy.export import simplify
from cspdeploy.pipeline import graph_steps
from cspdeploy.pipeline.recipe import ExportRequest, export_bundle
from cspdeploy.pipeline.reproduce import ReproduceReport, reproduce_bundle

SIMPLIFIER = simplify._CHILD


@pytest.fixture(autouse=True)
def without_simplifier(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports keep the unsimplified graph, in no time: onnxsim takes longer to import than all else together."""
    monkeypatch.setattr(simplify, "_CHILD", ["false"])


@pytest.fixture
def models(tiny_models: Path, tmp_path: Path) -> Path:
    """A models folder that a test may change."""
    return Path(shutil.copytree(tiny_models, tmp_path / "models"))


@pytest.fixture
def make(models: Path, tmp_path: Path) -> Callable[..., Path]:
    """`make(fp16=True)`: a bundle of "tiny"."""

    def call(**options: object) -> Path:
        request = ExportRequest(**{"model": "tiny", "models": models, "output": tmp_path / "exported", **options})  # type: ignore[arg-type]
        return Path(export_bundle(request).folder)

    return call


@pytest.fixture
def bundle(tiny_bundle: Path, tiny_models: Path, models: Path, tmp_path: Path) -> Path:
    """A copy of the shared bundle, as if it had been made from `models`."""
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "exported" / "tiny"))
    moved = {
        name: value.replace(str(tiny_models), str(models)) if isinstance(value, str) else value
        for name, value in read_manifest(folder).options.items()
    }
    _edit(folder, lambda made: dataclasses.replace(made, options=moved))
    return folder


def _snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    return {path.name: (path.stat().st_mtime_ns, file_sha256(path)) for path in folder.iterdir()}


def _edit(folder: Path, change: Callable[[Manifest], Manifest]) -> None:
    write_manifest(folder, change(read_manifest(folder)))


def _verdicts(report: ReproduceReport) -> dict[str, str]:
    return {file.file: file.verdict for file in report.files}


@pytest.mark.slow
def test_the_same_inputs_give_the_same_bytes_and_the_bundle_is_not_touched(
    make: Callable[..., Path], models: Path
) -> None:
    folder = make(fp16=True)
    before = _snapshot(folder)
    report = reproduce_bundle(folder, models=models)
    assert report.verdict == "equal"
    assert _verdicts(report) == dict.fromkeys(
        ["tiny.torchscript.pt", "tiny.onnx", "tiny.fp16.onnx", "golden.npz", "labels.txt"], "equal"
    )
    assert (report.tools, report.remarks) == ((), ())
    assert all(file.recorded_sha256 == file.rebuilt_sha256 for file in report.files)
    assert _snapshot(folder) == before


@pytest.mark.parametrize("slower", [(None,), ()])
def test_what_a_clock_decided_then_is_not_decided_by_a_clock_again(
    make: Callable[..., Path], models: Path, monkeypatch: pytest.MonkeyPatch, slower: tuple[None, ...]
) -> None:
    monkeypatch.setattr(simplify, "_CHILD", SIMPLIFIER)  # without it there is no graph that could be split
    folder = make(slower_split=slower)
    steps = {step.name: step for step in read_manifest(folder).artifacts[-1].steps}
    assert steps["split-expansion"].outcome == ("kept" if slower else "done")
    monkeypatch.setattr(graph_steps, "measure_latency", None)  # would be called where a clock is asked
    report = reproduce_bundle(folder, models=models)
    assert (report.verdict, report.remarks) == ("equal", ())


@pytest.mark.slow
def test_options_are_those_of_then(make: Callable[..., Path], models: Path) -> None:
    folder = make(opset=15, dynamic_batch=True, size_px=(48, 40), features=True, strides=(2, 4))
    report = reproduce_bundle(folder, models=models)
    assert report.verdict == "equal", report


@pytest.mark.slow
def test_a_target_is_an_option(make: Callable[..., Path], models: Path) -> None:
    assert reproduce_bundle(make(target="tensorrt-8.6"), models=models).verdict == "equal"


@pytest.mark.slow
def test_random_weights_come_back(make: Callable[..., Path], models: Path) -> None:
    assert reproduce_bundle(make(weights="random"), models=models).verdict == "equal"


@pytest.mark.slow
def test_a_users_own_images_and_names(make: Callable[..., Path], models: Path, tmp_path: Path) -> None:
    images = tmp_path / "photos"
    images.mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(images / f"{i}.png")
    names = tmp_path / "names.txt"
    names.write_text("".join(f"thing {i}\n" for i in range(10)))
    folder = make(calibration=images, names=names)
    assert reproduce_bundle(folder, models=models).verdict == "equal"
    (images / "0.png").unlink()
    names.unlink()
    with pytest.raises(InputError) as caught:
        reproduce_bundle(folder, models=models)
    assert f"the images {images} (6 images): 5 are there" in caught.value.message
    assert f"the class names {names} (10 of them)" in caught.value.message


@pytest.mark.slow
def test_another_image_gives_another_golden_file(make: Callable[..., Path], models: Path, tmp_path: Path) -> None:
    images = tmp_path / "photos"
    images.mkdir()
    for i in range(4):
        Image.fromarray(np.full((40, 50, 3), 40 * i + np.arange(50)[None, :, None], np.uint8)).save(images / f"{i}.png")
    folder = make(calibration=images)
    Image.fromarray(np.arange(40 * 50 * 3, dtype=np.uint8).reshape(40, 50, 3)).save(images / "0.png")
    report = reproduce_bundle(folder, models=models)
    assert (report.verdict, _verdicts(report)["golden.npz"]) == ("differs", "differs")


def test_a_difference_is_named_with_what_may_explain_it(bundle: Path, models: Path) -> None:
    """The bundle was made with the simplifier, which is broken now; at another opset; and onnx was another one."""
    _edit(bundle, lambda made: dataclasses.replace(
        made, options={**made.options, "fp16": False, "opset": 17},
        tools={**made.tools, "onnx": "1.22.0", "gone": "1.0"},
    ))  # fmt: skip
    before = _snapshot(bundle)
    report = reproduce_bundle(bundle, models=models)
    found = {file.file: file for file in report.files}
    assert report.verdict == "differs"
    assert _verdicts(report) == {
        "tiny.torchscript.pt": "equal", "tiny.onnx": "differs", "tiny.fp16.onnx": "not-made", "golden.npz": "equal",
        "labels.txt": "equal",
    }  # fmt: skip
    assert found["tiny.onnx"].rebuilt_sha256 != found["tiny.onnx"].recorded_sha256
    assert {(tool.name, tool.recorded, tool.here) for tool in report.tools} == {
        ("onnx", "1.22.0", onnx.__version__), ("gone", "1.0", ""),
    }  # fmt: skip
    assert any(remark.startswith("step simplify: ") for remark in report.remarks), report.remarks
    assert _snapshot(bundle) == before


def test_missing_weights_are_named_with_their_hash(bundle: Path, models: Path) -> None:
    folder = bundle
    sha256 = file_sha256(models / "tiny" / "model.safetensors")
    (models / "tiny" / "model.safetensors").unlink()
    (models / "tiny" / "calibration.npz").unlink()
    with pytest.raises(InputError) as caught:
        reproduce_bundle(folder, models=models)
    assert f"model.safetensors (SHA-256 {sha256})" in caught.value.message
    assert "calibration.npz (SHA-256 " in caught.value.message


def test_other_weights_under_the_same_name_are_missing_weights(bundle: Path, models: Path) -> None:
    folder = bundle
    path = models / "tiny" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"the weights .* \(SHA-256 "):
        reproduce_bundle(folder, models=models)


def test_an_option_of_another_version_is_not_left_out(bundle: Path, models: Path) -> None:
    folder = bundle
    _edit(folder, lambda made: dataclasses.replace(made, options={**made.options, "sparsity": 0.5}))
    with pytest.raises(InputError, match="'sparsity', which export does not know"):
        reproduce_bundle(folder, models=models)


@pytest.mark.parametrize("option", ["model", "images"])
def test_a_manifest_that_does_not_say_what_it_was_made_from(bundle: Path, models: Path, option: str) -> None:
    folder = bundle
    _edit(folder, lambda made: dataclasses.replace(
        made, options={name: value for name, value in made.options.items() if name != option}))  # fmt: skip
    with pytest.raises(InputError, match="manifest does not say"):
        reproduce_bundle(folder, models=models)


def test_a_tampered_bundle_is_not_reproduced(bundle: Path, models: Path) -> None:
    folder = bundle
    (folder / "tiny.onnx").write_bytes(b"other")
    with pytest.raises(TamperedError):
        reproduce_bundle(folder, models=models)


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """An ONNX file that cspdeploy did not make, exported with images of its own."""
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    mean (float[1,3,32,32] picture) => (float[1,3] means) {
        means = ReduceMean<axes = [2, 3], keepdims = 0>(picture)
    }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "foreign.onnx")
    images = tmp_path / "pictures"
    images.mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(images / f"{i}.png")
    request = ExportRequest(
        model=str(tmp_path / "foreign.onnx"), output=tmp_path / "exported", calibration=images, preprocess="unit"
    )
    return Path(export_bundle(request).folder)


@pytest.mark.slow
def test_a_bundle_of_an_onnx_file_from_elsewhere(foreign: Path, tmp_path: Path) -> None:
    assert reproduce_bundle(foreign).verdict == "equal"
    data = (tmp_path / "foreign.onnx").read_bytes()
    (tmp_path / "foreign.onnx").write_bytes(data + data[-1:])
    with pytest.raises(InputError, match=r"foreign\.onnx \(SHA-256 "):
        reproduce_bundle(foreign)
