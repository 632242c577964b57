"""`python -m cspdeploy.edge`, called in this process: arguments in, exit code and streams out."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from PIL import Image

import cspdeploy
from cspdeploy.core.errors import InputError
from cspdeploy.core.integrity import file_sha256
from cspdeploy.core.signature import sign_folder
from cspdeploy.edge import Predictor, selftest
from cspdeploy.edge.__main__ import main
from cspdeploy.edge.console import fix_for_a_device
from cspdeploy.edge.selftest import SelftestRequest, run_selftest
from cspdeploy.pipeline.package import PackageRequest, package_bundle


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
    assert [row["check"] for row in report["checks"]] == ["files", "contract", "preprocess", "provider", "golden"]
    assert report["requested"] == {"artifacts": ["onnx"], "runtime": "", "threads": 1, "device": None}
    assert report["host"] == platform.node()
    assert datetime.fromisoformat(report["time_utc"]).utcoffset() == timedelta()
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
        (["predict", "BUNDLE", "PHOTO", "--key", "absent.pub"], 2, "absent.pub"),
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
    assert told["manifest_sha256"] == file_sha256(tiny_bundle / "manifest.json")


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


def test_half_copied_bundle_gives_one_report(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "tiny"))
    for name in ("tiny.fp16.onnx", "labels.txt"):
        (bundle / name).unlink()
    assert main(["selftest", str(bundle), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    rows = {(row["check"], row["artifact"]): row for row in report["checks"]}
    assert rows["files", ""]["verdict"] == "fail"
    assert "tiny.fp16.onnx, labels.txt: missing" in rows["files", ""]["reason"]
    assert rows["golden", "onnx"]["verdict"] == "skip"
    assert len(report["manifest_sha256"]) == 64


def test_engine_that_meets_a_full_disk_is_one_line(
    tiny_bundle: Path, photo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from cspdeploy.edge import predictor

    def broken(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "/here")

    monkeypatch.setattr(predictor, "open_artifact", broken)
    assert main(["predict", str(tiny_bundle), str(photo)]) == 2
    assert "error: /here: No space left on device" in capsys.readouterr().err


@pytest.mark.slow
def test_reader_that_leaves_early_is_no_error(tiny_bundle: Path, photo: Path) -> None:
    command = [sys.executable, "-m", "cspdeploy.edge", "predict", str(tiny_bundle), *[str(photo)] * 2000]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 0


def test_wrong_arguments_are_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", "--json", "--no-such-option", "x"]) == 2
    shown = capsys.readouterr()
    assert json.loads(shown.out)["error"]["exit_code"] == 2
    assert shown.err.startswith("error: ")


def test_labels_that_write_on_the_terminal_are_made_harmless(
    tiny_bundle: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "tiny"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["labels"] = [f"\x1b[2J{label}\n" for label in manifest["labels"]]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    assert main(["predict", str(bundle), str(photo)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\ufffd[2Jlabel" in shown
    assert len(shown.splitlines()) == 6


def test_a_package_is_told_of_by_its_name(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package_bundle(PackageRequest(bundle=tiny_bundle, output=tmp_path / "model.zip"))
    words = ["selftest", str(tmp_path / "model.zip"), "--no-latency"]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bundle"] == str(tmp_path / "model.zip")
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"tiny  {tmp_path / 'model.zip'}"


def test_advice_for_a_device_names_nothing_that_it_has_not() -> None:
    assert fix_for_a_device("pip install 'cspdeploy[cpu]'") == "pip install onnxruntime"
    assert fix_for_a_device("pip install 'cspdeploy[sign]'") == "pip install cryptography"
    assert "cspdeploy" not in fix_for_a_device("cspdeploy doctor")
    assert fix_for_a_device("cspdeploy inspect x").startswith("where the package was made: ")
    assert fix_for_a_device("--artifact onnx") == "--artifact onnx"


# --- signed ---


@pytest.fixture
def signed(tiny_bundle: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A bundle and the public key."""
    bundle, key = Path(shutil.copytree(tiny_bundle, tmp_path / "tiny")), Ed25519PrivateKey.generate()
    (tmp_path / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "key.pub").write_bytes(public)
    sign_folder(bundle, tmp_path / "key.pem")
    return bundle, tmp_path / "key.pub"


def test_a_signed_bundle_is_opened_with_its_key_and_no_other_is(
    signed: tuple[Path, Path], photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, key = signed
    words = ["predict", str(bundle), str(photo), "--key", str(key)]
    assert main(words) == 0
    with pytest.raises(InputError, match="expected a signed bundle"):
        Predictor.open(bundle / "tiny.onnx", key=key)
    path = bundle / "manifest.json"
    path.write_text(path.read_text().replace("label 3", "label 4"))
    capsys.readouterr()
    assert main(words) == 1
    shown = capsys.readouterr()
    assert (shown.out, "is not what was signed" in shown.err) == ("", True)
    assert main(words[:3]) == 0  # nobody asked


def test_each_row_says_what_is_its_own(signed: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """A changed file is no fault of the signature; a changed manifest is."""
    bundle, key = signed
    words = ["selftest", str(bundle), "--no-latency", "--json", "--key", str(key)]
    (bundle / "labels.txt").write_text("no\n" * 10)
    assert main(words) == 1
    rows = {row["check"]: row for row in json.loads(capsys.readouterr().out)["checks"]}
    assert (rows["signature"]["verdict"], rows["files"]["verdict"]) == ("pass", "fail")
    assert rows["signature"]["reason"].startswith(f"tiny, by {key} (")
    path = bundle / "manifest.json"
    path.write_text(path.read_text().replace("label 3", "label 4"))
    assert main(words) == 1
    rows = {row["check"]: row for row in json.loads(capsys.readouterr().out)["checks"]}
    assert rows["signature"]["verdict"] == "fail"


def test_a_manifest_that_is_swapped_after_it_was_read_changes_nothing(
    signed: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is checked, used and named is what was read once."""
    bundle, key = signed
    path = bundle / "manifest.json"
    good = path.read_bytes()
    real = selftest.read_json_bytes

    def swap(place: Path) -> bytes:
        data = real(place)
        path.write_bytes(good.replace(b'"name": "tiny"', b'"name": "evil"'))
        return data

    monkeypatch.setattr(selftest, "read_json_bytes", swap)
    report = run_selftest(bundle, SelftestRequest(key=key, latency=False))
    assert path.read_bytes() != good
    assert (report.verdict, report.model) == ("pass", "tiny")
    assert report.manifest_sha256 == hashlib.sha256(good).hexdigest()


def test_the_key_says_nothing_of_the_program_around_the_model(
    tiny_bundle: Path, tmp_path: Path, signed: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "model.pyz"
    package_bundle(PackageRequest(bundle=tiny_bundle, output=output, sign=tmp_path / "key.pem"))
    assert main(["selftest", str(output), "--no-latency", "--key", str(signed[1])]) == 0
    shown = capsys.readouterr().out
    assert "not the program in model.pyz" in shown
    assert "model.pyz.sig" in shown
