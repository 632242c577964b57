"""`python -m cspdeploy.edge`, called in this process: arguments in, exit code and streams out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cspdeploy
from cspdeploy.edge.__main__ import main


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(2).integers(0, 256, (40, 50, 3), np.uint8)).save(path)
    return path


def test_selftest_as_a_table(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", str(tiny_bundle), "--no-latency"]) == 0
    shown = capsys.readouterr().out
    assert "golden" in shown
    assert shown.splitlines()[-1].startswith("pass: ")


def test_selftest_as_json(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", str(tiny_bundle), "--json", "--artifact", "onnx", "--threads", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["schema_version"], report["verdict"], report["model"]) == (1, "pass", "tiny")
    assert [row["check"] for row in report["checks"]] == ["files", "preprocess", "provider", "golden"]
    assert report["latency"][0]["threads"] == 1
    assert report["environment"]["cspdeploy"] == cspdeploy.__version__


def test_failed_selftest(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "tiny"))
    (bundle / "tiny.onnx").write_bytes(b"changed")
    assert main(["selftest", str(bundle)]) == 1
    assert "copied in part" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["selftest", "nowhere"], 2, "error: nowhere"),
        (["selftest", "BUNDLE", "--artifact", "onnx-int8"], 2, "no artifact 'onnx-int8'"),
        (["selftest", "BUNDLE", "--runtime", "ort-tpu"], 2, "--runtime ort-tpu: unknown"),
        (["selftest", "BUNDLE", "--threads", "-1"], 2, "num_threads: got -1"),
        (["predict", "BUNDLE", "nowhere.png"], 2, "error: nowhere.png"),
        (["predict", "BUNDLE", "PHOTO", "--top", "0"], 2, "top: got 0"),
        (["predict", "BUNDLE"], 2, "IMAGE"),
        (["predict", "BUNDLE", "PHOTO", "--art", "onnx"], 2, "unrecognized"),
        ([], 2, "COMMAND"),
        (["--version"], 0, ""),
        (["selftest", "--help"], 0, ""),
    ],
)
def test_exit_codes(
    tiny_bundle: Path, photo: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, told: str
) -> None:
    real = {"BUNDLE": str(tiny_bundle), "PHOTO": str(photo)}
    assert main([real.get(word, word) for word in arguments]) == code
    shown = capsys.readouterr()
    assert told in shown.err
    assert "Traceback" not in shown.err


def test_error_is_json_where_json_was_asked_for(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", str(tiny_bundle), "--artifact", "onnx-int8", "--json"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert (told["verdict"], told["error"]["exit_code"]) == ("error", 2)
    assert told["error"]["fix"].startswith("--artifact ")


def test_predict_as_json(tiny_bundle: Path, photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(tiny_bundle), str(photo), str(photo), "--json", "--top", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["image"] for entry in found] == [str(photo)] * 2
    assert set(found[0]) == {"image", "untrained", "predictions"}
    assert [set(one) for one in found[0]["predictions"]] == [{"label", "index", "probability"}] * 2
    assert found[0]["predictions"] == found[1]["predictions"]


def test_predict_goes_on_after_a_broken_image(
    tiny_bundle: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.png").write_text("words")
    assert main(["predict", str(tiny_bundle), str(tmp_path / "broken.png"), str(photo)]) == 2
    shown = capsys.readouterr()
    assert "broken.png: not an image" in shown.err
    assert shown.out.startswith(f"{photo}\n")
