"""`docker/edge-node`: the same answer out, in Node.js. What it shares with the page is in `test_shared_js.py`.

Tests that are not `slow` need Node.js and none of its packages.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
from PIL import Image

from cspdeploy.core.bundle import file_record, read_manifest, write_manifest
from cspdeploy.core.golden import read_golden, write_golden
from cspdeploy.core.metrics import softmax
from cspdeploy.core.preprocess import load_image, preprocess
from cspdeploy.edge.selftest_report import SELFTEST_SCHEMA_VERSION, CheckRow, LatencyRow, SelftestReport
from tests.docker.node import DOCKER, copy_sources, make_too_new, node, npm_install, run_module
from tests.pictures import pictures


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example without its packages."""
    return copy_sources(tmp_path_factory.mktemp("sources")) / "edge-node"


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy that may be broken."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "tiny"))


def _refused(sources: Path, *arguments: object) -> str:
    """The two lines of an error; there must be no more."""
    done = node(sources / "app.mjs", *arguments)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["error", "fix"], done.stderr
    return done.stderr


def test_a_half_copied_bundle_is_refused(sources: Path, bundle: Path) -> None:
    whole = (bundle / "tiny.onnx").read_bytes()
    (bundle / "tiny.onnx").write_bytes(whole[:-100])
    assert "the manifest says" in _refused(sources, bundle, "any.png")
    assert "the manifest says" in _failed(sources, bundle)
    (bundle / "tiny.onnx").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "tiny.onnx: SHA-256 differs" in _failed(sources, bundle)
    assert "tiny.onnx: SHA-256 differs" in _refused(sources, bundle, "any.png")
    (bundle / "tiny.onnx").unlink()
    assert "tiny.onnx: missing" in _refused(sources, bundle, "any.png")
    assert "tiny.onnx: missing" in _failed(sources, bundle)


def _failed(sources: Path, bundle: Path) -> str:
    """Why the files are not those of the manifest, in a report of one JSON document."""
    done = node(sources / "app.mjs", "selftest", bundle, "--json")
    assert (done.returncode, done.stderr) == (1, "")
    report = json.loads(done.stdout)
    assert report["verdict"] == "fail"
    rows = {row["artifact"] or row["check"]: row for row in report["checks"]}
    assert {rows[name]["verdict"] for name in ("onnx", "onnx-fp16")} == {"skip"}
    assert rows["files"]["verdict"] == "fail"
    return str(rows["files"]["reason"])


def test_an_error_is_json_where_json_was_asked_for(sources: Path, tmp_path: Path) -> None:
    for arguments in (("selftest", tmp_path), (tmp_path, "any.png")):
        done = node(sources / "app.mjs", *arguments, "--json")
        assert done.returncode == 2
        told = json.loads(done.stdout)
        assert (told["schema_version"], told["verdict"]) == (SELFTEST_SCHEMA_VERSION, "error")
        assert "manifest.json: no such file" in told["error"]["message"]


def test_what_is_no_bundle_is_refused(sources: Path, bundle: Path, tmp_path: Path) -> None:
    assert "no such file, expected a bundle" in _refused(sources, tmp_path / "nothing", "any.png")
    (bundle / "weights.bin").touch()
    assert "weights.bin: in the folder, but not in its manifest.json" in _refused(sources, bundle, "any.png")
    (bundle / "weights.bin").unlink()
    manifest = json.loads((bundle / "manifest.json").read_text())
    for change, expected in (
        ({"schema_version": 99}, "schema_version 99"),
        ({"artifacts": None}, "artifacts or files missing"),
        ({"files": [{"file": "../x", "sha256": "0" * 64, "num_bytes": 1}]}, "'../x' leaves the folder"),
        ({"spec": manifest["spec"] | {"preprocess": {}}}, "preprocess.height_px"),
        ({"spec": manifest["spec"] | {"provenance": None}}, "spec.provenance"),
        ({"labels": manifest["labels"][:-1]}, "9 labels, expected 10"),
        ({"labels": [1] * 10}, "labels broken"),
        ({"files": [None]}, "'undefined' leaves the folder"),
        ({"artifacts": [manifest["artifacts"][0] | {"inputs": None}]}, "inputs or steps broken"),
        ({"spec": manifest["spec"] | {"task": "features"}}, "not classes"),
    ):
        (bundle / "manifest.json").write_text(json.dumps(manifest | change))
        assert expected in _refused(sources, bundle, "any.png")
    (bundle / "manifest.json").write_text("{")
    assert "not JSON" in _refused(sources, bundle, "any.png")


def test_wrong_use_is_refused(sources: Path, bundle: Path) -> None:
    assert "--artifact onnx" in _refused(sources, bundle, "any.png", "--artifact", "onnx-int7")
    assert "Unknown option '--tpo'" in _refused(sources, bundle, "any.png", "--tpo", "3")
    assert "--top 0" in _refused(sources, bundle, "any.png", "--top", "0")
    assert "at least one image" in _refused(sources, bundle)
    assert "expected one bundle" in _refused(sources, "selftest")


def test_a_file_of_a_further_size_is_refused(sources: Path, bundle: Path) -> None:
    """Its preprocessing is another one than that of the bundle's own size, which is what the application knows."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    for artifact in manifest["artifacts"]:
        if artifact["kind"] == "onnx-fp16":
            artifact["kind"] = "onnx@48x40"
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    refused = _refused(sources, bundle, "any.png", "--artifact", "onnx@48x40")
    assert "no artifact 'onnx@48x40' for ONNX Runtime, it has onnx" in refused
    assert "onnx@48x40, " not in refused


def test_missing_packages_are_named(sources: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    Image.fromarray(pictures(1)[0]).save(tmp_path / "a.png")
    done = node(sources / "app.mjs", tiny_bundle, tmp_path / "a.png")
    assert done.returncode == 3
    assert "sharp" in done.stderr
    assert "fix: npm ci --ignore-scripts" in done.stderr


@pytest.mark.parametrize("name", ["edge-node", "edge-web"])
def test_packages_are_pinned_and_no_registry_is_named(name: str) -> None:
    package = json.loads((DOCKER / name / "package.json").read_text())
    lock = json.loads((DOCKER / name / "package-lock.json").read_text())
    pins = package["dependencies"]
    assert pins == {key: lock["packages"][f"node_modules/{key}"]["version"] for key in pins}
    for path, entry in lock["packages"].items():
        assert "resolved" not in entry, path
        assert not path or entry["integrity"].startswith("sha512-"), path


# ------------------------------------------------------------------------------------------------ with its packages


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy_sources(tmp_path_factory.mktemp("installed")) / "edge-node"
    npm_install(folder)
    return folder


def _selftest(installed: Path, bundle: Path) -> tuple[int, Any]:
    done = node(installed / "app.mjs", "selftest", bundle, "--json")
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)


@pytest.mark.slow
def test_selftest_passes_in_every_precision(installed: Path, tiny_int8_bundle: Path) -> None:
    status, report = _selftest(installed, tiny_int8_bundle)
    assert status == 0, report
    assert report["verdict"] == "pass"
    checks = {row["artifact"] or row["check"]: row for row in report["checks"]}
    assert list(checks)[:2] == ["files", "preprocess"]
    assert {row["artifact"] for row in report["latency"]} == set(checks) - {"files", "preprocess"}
    # A fleet reads one form, whichever language proved the bundle.
    for name, kind in (("checks", CheckRow), ("latency", LatencyRow)):
        known = {field.name for field in dataclasses.fields(kind)}
        assert all(set(row) <= known for row in report[name])
    assert set(report) <= {field.name for field in dataclasses.fields(SelftestReport)}
    assert report["schema_version"] == SELFTEST_SCHEMA_VERSION
    assert {"onnx", "onnx-fp16", "onnx-int8"} <= set(checks)
    assert checks["onnx"]["top1_agreement"] == 1.0
    assert 0 < checks["onnx-int8"]["rel_l2"] <= checks["onnx-int8"]["limit"]


@pytest.mark.slow
def test_selftest_passes_with_preprocessing_and_top_k_in_the_graph(installed: Path, tiny_u8_bundle: Path) -> None:
    status, report = _selftest(installed, tiny_u8_bundle)
    assert status == 0, report
    rows = {row["artifact"]: row for row in report["checks"] if row["check"] == "golden"}
    assert {"onnx-u8", "onnx-fp16-u8", "onnx-int8-u8"} <= set(rows)
    assert rows["onnx-u8"]["reason"].endswith(", top-k")
    assert report["requested"]["artifacts"] == []


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["scaled", "inputs"])
def test_selftest_fails_where_the_outputs_are_others(installed: Path, bundle: Path, fault: str) -> None:
    manifest, golden = read_manifest(bundle), read_golden(bundle / "golden.npz")
    if fault == "scaled":
        other = dataclasses.replace(
            golden, outputs_fp64={name: array * 1.01 for name, array in golden.outputs_fp64.items()},
            outputs_fp32={name: array * np.float32(1.01) for name, array in golden.outputs_fp32.items()},
        )  # fmt: skip
    else:
        other = dataclasses.replace(golden, x_NCHW=np.ascontiguousarray(golden.x_NCHW[:, :, ::-1]))
    write_golden(bundle / "golden.npz", other)
    files = tuple(file_record(bundle / record.file) for record in manifest.files)
    write_manifest(bundle, dataclasses.replace(manifest, files=files))
    status, report = _selftest(installed, bundle)
    assert status == 1
    assert report["verdict"] == "fail"
    failed = {row["artifact"] or row["check"] for row in report["checks"] if row["verdict"] == "fail"}
    assert "onnx" in failed
    assert ("preprocess" in failed) == (fault == "inputs")


def _python(bundle: Path, artifact: str, images: list[Path]) -> npt.NDArray[np.float64]:
    """Probabilities `[N, C]` of the same file by ONNX Runtime in Python."""
    manifest = read_manifest(bundle)
    found = next(item for item in manifest.artifacts if item.kind == artifact)
    session = onnxruntime.InferenceSession(bundle / found.file, providers=["CPUExecutionProvider"])
    x_NCHW = preprocess(images, manifest.spec.preprocess)
    return softmax(np.concatenate([session.run(None, {found.inputs[0].name: x[None]})[0] for x in x_NCHW]))


def _photographs(folder: Path) -> list[Path]:
    photo = Image.fromarray(pictures(1, height=203, width=301)[0])
    turned = Image.Exif()
    turned[0x0112] = 6
    options: dict[str, dict[str, Any]] = {
        "plain.png": {}, "sharp.jpg": {"quality": 92, "subsampling": 0}, "usual.jpg": {"quality": 75, "subsampling": 2},
        "progressive.jpg": {"quality": 85, "progressive": True}, "turned.jpg": {"exif": turned, "quality": 90},
        "lossy.webp": {"quality": 80}, "lossless.webp": {"lossless": True}, "plain.tif": {}, "palette.gif": {},
    }  # fmt: skip
    for name, arguments in options.items():
        photo.save(folder / name, **arguments)
    photo.convert("L").save(folder / "grey.jpg")
    photo.convert("LA").save(folder / "grey-alpha.png")
    glass = photo.convert("RGBA")
    glass.putalpha(photo.convert("L"))
    glass.save(folder / "glass.png")
    deep = np.asarray(photo.convert("L")).astype(np.uint16) * 257
    Image.fromarray(deep).save(folder / "deep.png")
    return sorted(folder.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("artifact", ["onnx", "onnx-fp16", "onnx-int8"])
def test_predictions_are_pythons(installed: Path, tiny_int8_bundle: Path, tmp_path: Path, artifact: str) -> None:
    images = _photographs(tmp_path)
    done = node(installed / "app.mjs", tiny_int8_bundle, *images, "--artifact", artifact, "--json", "--top", 3)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    labels = read_manifest(tiny_int8_bundle).labels
    expected = _python(tiny_int8_bundle, artifact, images)
    assert [entry["image"] for entry in found] == [str(path) for path in images]
    for entry, row in zip(found, expected, strict=True):
        assert set(entry) == {"image", "untrained", "predictions"}
        assert len(entry["predictions"]) == 3
        assert entry["predictions"][0]["index"] == int(row.argmax())
        for one in entry["predictions"]:
            assert one["label"] == labels[one["index"]]
            # Two builds of one engine: 1e-5 is float32; an 8-bit step of INT8 moves a probability by more.
            assert one["probability"] == pytest.approx(row[one["index"]], abs=1e-2 if artifact == "onnx-int8" else 1e-5)


@pytest.mark.slow
def test_decoded_pixels_are_pillows_within_one_step(installed: Path, tmp_path: Path) -> None:
    images = _photographs(tmp_path)
    code = f"""
import {{ writeFileSync }} from "node:fs";
import {{ decodeImage }} from "{(installed / "decode.mjs").as_uri()}";
const sizes = [];
for (const path of process.argv.slice(1)) {{
  const image = await decodeImage(path);
  writeFileSync(path + ".rgb", image.data);
  sizes.push([image.height, image.width, 3]);
}}
console.log(JSON.stringify(sizes));
"""
    for path, shape in zip(images, run_module(code, *images), strict=True):
        expected = np.asarray(load_image(path)).astype(int)
        assert tuple(shape) == expected.shape, path.name
        found = np.frombuffer(Path(f"{path}.rgb").read_bytes(), np.uint8).reshape(expected.shape)
        # Measured: 0 in all. Two builds of libjpeg may round the colour conversion to either side.
        assert np.abs(found - expected).max() <= 1, path.name


@pytest.mark.slow
def test_bad_images_are_one_line(installed: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    photo = Image.fromarray(pictures(1, height=203, width=301)[0])
    photo.save(tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:3000])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "page.png").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>')
    photo.convert("CMYK").save(tmp_path / "print.jpg")
    expected = {
        "none.png": "no such file", "empty.png": "0 bytes", "text.png": "not an image", "half.jpg": "broken image",
        "page.png": "a file of format svg", "print.jpg": "CMYK", "whole.jpg": "",
    }  # fmt: skip
    paths = [tmp_path / name for name in expected]
    done = node(installed / "app.mjs", tiny_bundle, *paths, "--json")
    assert done.returncode == 2
    entries = json.loads(done.stdout)
    assert [entry["image"] for entry in entries] == [str(path) for path in paths]
    for entry, told in zip(entries, expected.values(), strict=True):
        assert told in entry.get("error", "")
        assert len(entry["predictions"]) == (0 if told else 5)  # the others go on
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["error", "fix"] * 6
    done = node(installed / "app.mjs", tiny_bundle, *paths)
    assert done.stdout.startswith(f"{paths[-1]}\n")


@pytest.mark.slow
def test_an_artifact_that_the_engine_cannot_open_names_both_versions(installed: Path, bundle: Path) -> None:
    make_too_new(bundle)
    version = json.loads((DOCKER / "edge-node/package.json").read_text())["dependencies"]["onnxruntime-node"]
    status, report = _selftest(installed, bundle)
    rows = {row["artifact"]: row for row in report["checks"]}
    assert (status, rows["onnx"]["verdict"], rows["onnx-fp16"]["verdict"]) == (1, "fail", "pass")
    assert f"tiny.onnx (opset 18): onnxruntime-node {version} does not open it" in rows["onnx"]["reason"]


@pytest.mark.slow
def test_untrained_weights_are_told(installed: Path, bundle: Path, tmp_path: Path) -> None:
    manifest = read_manifest(bundle)
    spec = dataclasses.replace(
        manifest.spec, provenance=dataclasses.replace(manifest.spec.provenance, source="random", weights_sha256="")
    )
    write_manifest(bundle, dataclasses.replace(manifest, spec=spec))
    Image.fromarray(pictures(1)[0]).save(tmp_path / "a.png")
    for arguments in ((bundle, tmp_path / "a.png"), ("selftest", bundle)):
        done: subprocess.CompletedProcess[str] = node(installed / "app.mjs", *arguments)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("UNTRAINED")
