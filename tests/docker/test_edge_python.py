"""docker/edge-python/app.py as a program, without its image."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cspdeploy.core.golden import read_golden
from cspdeploy.edge import Predictor
from tests.edge.detectors import write_detector

ROOT = Path(__file__).parents[2]
APP = ROOT / "docker/edge-python/app.py"


@pytest.fixture
def images(tmp_path: Path, tiny_bundle: Path) -> Path:
    """Two golden images, a broken one, and what is none of its business."""
    folder = tmp_path / "images"
    folder.mkdir()
    for index, image in enumerate(read_golden(tiny_bundle / "golden.npz").images[:2]):
        Image.fromarray(image).save(folder / f"{index}.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff no")
    (folder / ".hidden.png").write_bytes(b"half of a fi")
    (folder / "notes.txt").write_text("no image")
    (folder / "below.png").mkdir()
    return folder


def command(bundle: Path, images: Path, *options: str) -> list[str]:
    return [sys.executable, str(APP), "--bundle", str(bundle), str(images), "--threads", "1", *options]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def run_once(bundle: Path, images: Path, *options: str) -> subprocess.CompletedProcess[str]:
    given = command(bundle, images, "--once", *options)
    return subprocess.run(given, capture_output=True, text=True, check=False, env=environment())


@contextmanager
def watching(bundle: Path, images: Path) -> Iterator[subprocess.Popen[str]]:
    given = command(bundle, images, "--interval", "0.02", "--top", "1")
    with subprocess.Popen(given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()) as app:
        try:
            yield app
        finally:
            app.kill()


def next_line(app: subprocess.Popen[str]) -> dict[str, Any]:
    assert app.stdout is not None
    return dict(json.loads(app.stdout.readline()))


def test_once_through_a_folder_gives_the_predictors_answers_and_survives_a_broken_image(
    tiny_bundle: Path, images: Path
) -> None:
    done = run_once(tiny_bundle, images, "--top", "3")
    assert done.returncode == 0, done.stderr
    lines = {line["image"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert list(lines) == ["0.png", "1.png", "broken.jpg"]
    assert "error" in lines["broken.jpg"]
    predictor = Predictor.open(tiny_bundle)
    for name in ("0.png", "1.png"):
        expected = list(predictor(images / name, top=3))
        assert [one["index"] for one in lines[name]["predictions"]] == [one.index for one in expected]
        assert [one["label"] for one in lines[name]["predictions"]] == [one.label for one in expected]
        found = [one["probability"] for one in lines[name]["predictions"]]
        np.testing.assert_allclose(found, [one.probability for one in expected], rtol=1e-6)
        assert lines[name]["untrained"] is False


def test_a_detector_gives_boxes(images: Path, tmp_path: Path) -> None:
    bundle = write_detector(tmp_path / "spots")
    done = run_once(bundle, images)
    assert done.returncode == 0, done.stderr
    first, _, broken = map(json.loads, done.stdout.splitlines())
    assert first["boxes"] == [dataclasses.asdict(box) for box in Predictor.open(bundle)(images / "0.png")]
    assert len(first["boxes"]) > 5
    assert set(broken) == {"image", "error"}


def test_images_are_taken_when_they_come_and_again_when_they_change_and_sigterm_ends_it(
    tiny_bundle: Path, images: Path
) -> None:
    with watching(tiny_bundle, images) as app:
        assert [next_line(app)["image"] for _ in range(3)] == ["0.png", "1.png", "broken.jpg"]
        shutil.copy(images / "0.png", images / "2.png")
        assert next_line(app)["image"] == "2.png"
        shutil.copy(images / "1.png", images / ".new")
        (images / ".new").rename(images / "broken.jpg")
        mended = next_line(app)
        assert mended["image"] == "broken.jpg"
        assert mended["predictions"]
        (images / "2.png").unlink()
        app.send_signal(signal.SIGTERM)
        assert app.stdout is not None
        assert app.stderr is not None
        assert app.stdout.read() == ""  # nothing twice
        assert app.stderr.read() == ""
        assert app.wait() == 0


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--artifact", "onnx-int4"], 2, "no artifact 'onnx-int4'"),
        (["--runtime", "ort-cuda"], 3, "ort-cuda"),
    ],
)
def test_what_cannot_be_opened_is_one_line_and_an_exit_code(
    tiny_bundle: Path, images: Path, options: list[str], code: int, said: str
) -> None:
    done = run_once(tiny_bundle, images, *options)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr.splitlines()[0]
    assert "Traceback" not in done.stderr


def test_a_changed_bundle_and_a_missing_folder_are_refused(tiny_bundle: Path, images: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(tiny_bundle, tmp_path / "changed"))
    with (changed / "tiny.onnx").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    done = run_once(changed, images)
    assert (done.returncode, done.stdout) == (1, "")
    assert "SHA-256 differs" in done.stderr
    gone = run_once(tiny_bundle, tmp_path / "gone")
    assert (gone.returncode, gone.stdout) == (2, "")
    assert "gone" in gone.stderr
