"""A detector's snippets, run as an application would: the boxes that `cspdeploy.edge` gives of the same picture."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cspdeploy.core.bundle import read_manifest
from cspdeploy.edge import Predictor
from cspdeploy.edge.predictor import DetectedBox
from cspdeploy.report.html.usage import cpp_snippet, node_snippet, python_snippet, snippets_for
from tests.check import detectors

PICTURE = (48, 96)


def _bundle(tmp_path: Path, decode: str, resize: str) -> Path:
    folder = detectors.make_bundle(tmp_path / "tiny", decode, resize=resize)  # type: ignore[arg-type]
    picture = np.random.default_rng(5).integers(0, 256, (*PICTURE, 3), np.uint8)
    for place in (folder, tmp_path):
        Image.fromarray(picture).save(place / "photo.jpg", "PNG")  # lossless under that name
    return folder


def _expected(folder: Path) -> list[DetectedBox]:
    (folder / "photo.jpg").unlink(missing_ok=True)
    with Predictor.open(folder) as predictor:
        return list(predictor(folder.parent / "photo.jpg"))


def _run(source: str, folder: Path, *, blocked: bool) -> list[list[str]]:
    start = "import sys; sys.modules['cspdeploy'] = None\n" if blocked else f"import sys; sys.path[:0] = {sys.path!r}\n"
    done = subprocess.run(
        [sys.executable, "-I", "-c", start + source], cwd=folder, capture_output=True, text=True, check=False,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("decode", "resize"),
    [("nms", "letterbox"), ("decoded", "stretch"), pytest.param("ultralytics", "crop", marks=pytest.mark.slow),
     pytest.param("decoded", "letterbox", marks=pytest.mark.slow)],
)  # fmt: skip
def test_python_prints_the_boxes_in_the_picture(decode: str, resize: str, tmp_path: Path) -> None:
    folder = _bundle(tmp_path, decode, resize)
    manifest = read_manifest(folder)
    lines = _run(python_snippet(manifest, manifest.artifacts[0]), folder, blocked=True)
    expected = _expected(folder)
    assert len(expected) > 3
    assert [(line[0], float(line[1])) for line in lines] == [
        (box.label, pytest.approx(box.score, abs=0.006)) for box in expected
    ]
    corners = np.array([[float(side) for side in line[2:]] for line in lines])
    limits = [PICTURE[1], PICTURE[0]] * 2  # edge cuts boxes at the edges of the picture
    wanted = [[box.left, box.top, box.right, box.bottom] for box in expected]
    np.testing.assert_allclose(np.clip(corners, 0, limits), wanted, atol=0.51)


def test_the_one_with_edge_prints_them_too(tmp_path: Path) -> None:
    folder = _bundle(tmp_path, "nms", "letterbox")
    manifest = read_manifest(folder)
    artifact = manifest.artifacts[0]
    edge = next(snippet for snippet in snippets_for(manifest, artifact) if snippet.name == "edge")
    expected = _expected(folder)
    lines = _run(edge.write(manifest, artifact), folder, blocked=False)
    assert [(line[0], float(line[2])) for line in lines] == [(box.label, box.left) for box in expected]


@pytest.mark.parametrize("decode", ["nms", "decoded", "ultralytics", "raw"])
def test_no_class_is_made_of_boxes(decode: str, tmp_path: Path) -> None:
    manifest = read_manifest(detectors.make_bundle(tmp_path / "tiny", decode))  # type: ignore[arg-type]
    for write in (node_snippet, cpp_snippet):
        source = write(manifest, manifest.artifacts[0])
        assert "labels.txt" not in source
        assert "max_element" not in source
    compile(python_snippet(manifest, manifest.artifacts[0]), "snippet", "exec")


def test_what_only_tensorrt_opens_has_no_other_snippet(tmp_path: Path) -> None:
    manifest = read_manifest(detectors.make_bundle(tmp_path / "tiny", "trt"))
    (only,) = snippets_for(manifest, manifest.artifacts[0])
    assert only.write(manifest, manifest.artifacts[0]) == (
        "trtexec --onnx=tiny.onnx --saveEngine=tiny.plan --shapes=input:1x3x64x64"
    )
