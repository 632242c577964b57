from __future__ import annotations

import functools
import json
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from PIL import Image

from cspdeploy.check import doctor
from cspdeploy.core.spec import ModelSpec
from tests.edge.detectors import write_detector

Run = Callable[..., CompletedProcess[str]]
Refuse = Callable[..., str]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def _predict(run: Run, bundle: Path, *images: Path, options: tuple[object, ...] = ()) -> dict[str, Any]:
    done = run("predict", bundle, *images, "--json", *options)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# --- predict ---


def test_predict_as_a_table(run: Run, tiny_bundle: Path, photo: Path) -> None:
    done = run("predict", tiny_bundle, photo)
    assert done.returncode == 0
    assert all(word in done.stdout for word in ("photo.png", "label ", "%", "probability"))
    assert "UNTRAINED" not in done.stdout


def test_predict_as_json(run: Run, tiny_bundle: Path, photo: Path, tmp_path: Path) -> None:
    second = Path(shutil.copy(photo, tmp_path / "second.png"))
    found = _predict(run, tiny_bundle, photo, second, options=("--top", 4))
    assert found["untrained"] is False
    assert list(found["predictions"]) == [str(photo), str(second)]
    first = found["predictions"][str(photo)]
    assert found["predictions"][str(second)] == first
    assert [sorted(item) for item in first] == [["index", "label", "probability"]] * 4
    probabilities = [item["probability"] for item in first]
    assert probabilities == sorted(probabilities, reverse=True)
    assert 0 < sum(probabilities) <= 1
    assert all(item["label"] == f"label {item['index']}" for item in first)


@pytest.mark.parametrize(
    ("artifact", "runtime"),
    [("onnx-fp16", "ort-cpu"), ("onnx-fp16", "fp16-rounding"), ("torchscript", "torchscript-cpu")],
)
def test_other_artifacts_agree(run: Run, tiny_bundle: Path, photo: Path, artifact: str, runtime: str) -> None:
    expected = _predict(run, tiny_bundle, photo)["predictions"][str(photo)]
    found = _predict(run, tiny_bundle, photo, options=("--artifact", artifact, "--runtime", runtime))
    probabilities = {item["label"]: item["probability"] for item in found["predictions"][str(photo)]}
    for item in expected:
        assert probabilities.get(item["label"], item["probability"]) == pytest.approx(item["probability"], rel=1e-2)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "I;16", "CMYK"])
def test_images_of_every_mode(run: Run, tiny_bundle: Path, photo: Path, tmp_path: Path, mode: str) -> None:
    path = tmp_path / f"{mode.strip(';')}.tiff"
    with Image.open(photo) as image:
        (image.convert("I").convert("I;16") if mode == "I;16" else image.convert(mode)).save(path)
    assert _predict(run, tiny_bundle, path)["predictions"][str(path)]


def test_grey_is_replicated(run: Run, tiny_bundle: Path, photo: Path, tmp_path: Path) -> None:
    paths = [tmp_path / "grey.png", tmp_path / "rgb.png"]
    with Image.open(photo) as image:
        image.convert("L").save(paths[0])
        image.convert("L").convert("RGB").save(paths[1])
    grey, rgb = _predict(run, tiny_bundle, *paths)["predictions"].values()
    assert grey == rgb


def test_exif_rotation_is_applied(run: Run, tiny_bundle: Path, photo: Path, tmp_path: Path) -> None:
    """Orientation 6: the camera was held on its side, and the image is to be turned clockwise."""
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(photo) as image:
        image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
        image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "lying.png")
    upright, turned, lying = _predict(run, tiny_bundle, photo, tmp_path / "turned.png", tmp_path / "lying.png")[
        "predictions"
    ].values()
    assert turned == upright
    assert lying != upright


def _huge_png() -> bytes:
    """A header that promises 400 megapixels, and no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"this is no image", "not an image"),
        (b"", "empty file (0 bytes)"),
        (_huge_png(), "400000000 pixels"),
        (b"\x89PNG\r\n\x1a\n", "not an image"),
        (b"\xff\xd8\xff\xe0" + bytes(100), "not an image"),
        (None, "No such file"),
        ("folder", "Is a directory"),
    ],
    ids=["text", "empty", "huge", "cut png", "cut jpeg", "missing", "folder"],
)
def test_image_that_is_none(
    refuse: Refuse, tiny_bundle: Path, photo: Path, tmp_path: Path, content: bytes | str | None, why: str
) -> None:
    path = tmp_path / "bad.png"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        path.mkdir()
    lines = refuse("predict", tiny_bundle, photo, path)  # beside a good one, and nothing is printed of that
    assert str(path) in lines
    assert why in lines


@pytest.mark.parametrize(
    ("options", "subject"),
    [
        (("--artifact", "onnx-int8"), "no artifact 'onnx-int8', it has torchscript, onnx, onnx-fp16"),
        (("--runtime", "ort-cpv"), "--runtime ort-cpv: unknown"),
        (("--runtime", "torchscript-cpu"), "does not read 'onnx'"),
    ],
)
def test_wrong_artifact_or_runtime(
    refuse: Refuse, tiny_bundle: Path, photo: Path, options: tuple[str, ...], subject: str
) -> None:
    assert subject in refuse("predict", tiny_bundle, photo, *options)


def test_near_runtime_is_suggested(refuse: Refuse, tiny_bundle: Path, photo: Path) -> None:
    assert "fix: --runtime ort-cpu" in refuse("predict", tiny_bundle, photo, "--runtime", "ort-cpv")


def test_number_of_classes_is_not_asked_of_a_detector(run: Run, refuse: Refuse, tmp_path: Path, photo: Path) -> None:
    bundle = write_detector(tmp_path / "spots")
    lines = refuse("predict", bundle, photo, "--top", 3)
    assert "--top: " in lines
    assert "fix: --max-detections 3" in lines
    assert run("predict", bundle, photo).returncode == 0


def test_predict_from_a_folder_that_is_no_bundle(refuse: Refuse, tmp_path: Path, photo: Path) -> None:
    assert str(tmp_path / "none") in refuse("predict", tmp_path / "none", photo)
    assert str(tmp_path) in refuse("predict", tmp_path, photo)


def test_predict_from_a_changed_bundle(refuse: Refuse, bundle: Path, photo: Path) -> None:
    (bundle / "labels.txt").write_text("other\n" * 10)
    assert "labels.txt: not the file of the manifest" in refuse("predict", bundle, photo, code=1)


# --- inspect ---


def test_inspect_as_a_table_and_as_json(run: Run, tiny_bundle: Path, tiny_spec: ModelSpec) -> None:
    path = tiny_bundle / "tiny.fp16.onnx"
    text = run("inspect", path)
    assert text.returncode == 0
    words = ("input", "logits", "ai.onnx 18", "Conv", "float16", "external data", "M for one image: FP16 100 %")
    assert all(word in text.stdout for word in words)
    assert text.stdout.rstrip().endswith("FP16, as it is named")
    found = json.loads(run("inspect", path, "--json").stdout)
    assert found["opsets"] == {"ai.onnx": 18}
    assert found["inputs"] == [{"name": "input", "dtype": "float32", "shape": [1, 3, 32, 32]}]
    assert found["num_bytes"] == path.stat().st_size
    assert found["external_data"] == []
    assert found["weights"][0]["dtype"] == "float16"


def test_inspect_a_file_that_is_not_what_it_is_named(run: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(tiny_bundle / "tiny.onnx", tmp_path / "tiny.int8.onnx"))
    done = run("inspect", path)
    assert done.returncode == 1
    problem = "named INT8, but 0 % of its MACs are in INT8 (100 % FP32)"
    assert done.stdout.rstrip().endswith(problem)
    found = json.loads(run("inspect", path, "--json").stdout)
    assert found["audit"]["problem"] == problem
    assert found["audit"]["macs"] == {"fp32": 1.0}
    assert run("inspect", path, "--precision", "fp32").returncode == 0
    assert run("inspect", tiny_bundle / "tiny.onnx").returncode == 0
    assert run("inspect", tiny_bundle / "tiny.onnx", "--precision", "fp16").returncode == 1


def test_inspect_refuses_an_unknown_precision(run: Run, tiny_bundle: Path) -> None:
    done = run("inspect", tiny_bundle / "tiny.onnx", "--precision", "int9")
    assert done.returncode == 2
    assert "int9" in done.stderr


def test_inspect_a_file_of_strange_make(run: Run, tmp_path: Path) -> None:
    """Custom operators, a function of its own, a free size, no weights, and no way to run it."""
    path = tmp_path / "strange.onnx"
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 18, "com.example": 2, "own": 1]>
        strange (float[N, 3, H, W] x) => (float[N, K] y) {
            a = com.example.Magic(x)  b = own.twice(a)  y = MatMul(b, b)
        }
        <domain: "own", opset_import: ["" : 18]> twice (p) => (q) { q = Add(p, p) }""")
    onnx.save(model, path)
    done = run("inspect", path)
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    words = (
        "x: float32 [N, 3, H, W]",
        "com.example.Magic",
        "own.twice",
        "does not run it",
        "an unnamed producer",
    )
    assert all(word in text for word in words)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x3a\x02\xff\xff", None, "folder", "cut"])
def test_inspect_what_is_no_onnx_file(
    refuse: Refuse, tiny_bundle: Path, tmp_path: Path, content: bytes | str | None
) -> None:
    path = tmp_path / "bad.onnx"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "folder":
        path.mkdir()
    elif content == "cut":
        path.write_bytes((tiny_bundle / "tiny.onnx").read_bytes()[:5000])
    assert str(path) in refuse("inspect", path)


def test_inspect_external_data_outside_the_folder(refuse: Refuse, tiny_bundle: Path, tmp_path: Path) -> None:
    model = onnx.load(tiny_bundle / "tiny.onnx")
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")
    path = tmp_path / "outside.onnx"
    path.write_bytes(model.SerializeToString())
    assert "external data '../../etc/passwd' leaves the folder" in refuse("inspect", path)


# --- list, doctor ---


def test_list_as_a_table_and_as_json(run: Run, tiny_models: Path) -> None:
    text = run("list", "--models", tiny_models)
    assert text.returncode == 0
    assert all(word in text.stdout for word in ("cspdarknet53", "27,642,184", "6.534", "tiny", "models here"))
    found = json.loads(run("list", "--models", tiny_models, "--json").stdout)
    assert [model["name"] for model in found["models"]] == ["tiny"]
    assert "cspdarknet53" in [network["name"] for network in found["networks"]]


def test_list_without_models(run: Run, tmp_path: Path) -> None:
    done = run("list", "--models", tmp_path / "none")
    assert done.returncode == 0
    assert "cspdarknet53" in done.stdout
    assert "models here" not in done.stdout


def test_list_with_a_broken_model(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "spec.json").write_text("{")
    assert "spec.json: not JSON" in refuse("list", "--models", tmp_path)


def test_doctor_as_a_table_and_as_json(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "diagnose", functools.cache(doctor.diagnose))  # one takes seconds
    found = run("doctor", "--json")
    report = json.loads(found.stdout)
    assert found.returncode == (0 if report["healthy"] else 1)
    works = {state["name"]: state["works"] for state in report["runtimes"]}
    assert works.keys() >= {"ort-cpu", "torch-cpu", "torchscript-cpu", "ort-cuda", "torch-cuda", "torchscript-cuda"}
    assert works["ort-cpu"]
    assert works["torchscript-cpu"]
    for state in report["runtimes"]:
        assert state["works"] or (state["reason"] and state["fix"])
    assert report["environment"]["cpu"]
    assert "CPUExecutionProvider" in [state["name"] for state in report["providers"] if state["works"]]
    text = run("doctor")
    assert "ort-cpu" in text.stdout
    assert report["advice"] in " ".join(text.stdout.split())
