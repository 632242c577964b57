from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

Run = Callable[..., CompletedProcess[str]]
Refuse = Callable[..., str]


def test_a_table_of_sizes_and_what_comes_next(run: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    done = run("package", tiny_bundle, "-o", tmp_path / "model.zip", "--artifact", "onnx-fp16", "--licence", "MIT")
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if len(line.split()) == 3}
    size = (tiny_bundle / "tiny.fp16.onnx").stat().st_size
    assert rows["tiny/tiny.fp16.onnx"][0] == f"{size:,}"
    assert set(rows) == {"file", "all", *(f"tiny/{name}" for name in (
        "LICENCE.txt", "golden.npz", "labels.txt", "manifest.json", "tiny.fp16.onnx"))}  # fmt: skip
    shown = " ".join(done.stdout.split())
    assert "model.zip: tiny, " in shown
    assert "not signed" in shown
    assert "note:" not in shown
    assert "next: python -m cspdeploy.edge selftest" in shown


def test_json(run: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    done = run("package", tiny_bundle, "-o", tmp_path / "model.zip", "--json")
    report = json.loads(done.stdout)
    assert (report["schema_version"], report["kind"], report["artifacts"]) == (1, "zip", ["onnx"])
    assert report["num_bytes"] == (tmp_path / "model.zip").stat().st_size
    assert sum(file["packed_bytes"] for file in report["files"]) < report["num_bytes"]
    assert "not stated" in report["notes"][0]


def test_a_program_folds_its_modules_into_one_row(run: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    done = run("package", tiny_bundle, "-o", tmp_path / "model.pyz")
    assert done.returncode == 0, done.stderr
    assert "the program, " in done.stdout
    assert "cspdeploy/" not in done.stdout
    assert (tmp_path / "model.pyz").stat().st_mode & 0o100


def test_wrong_use(refuse: Refuse, tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.zip"
    assert "--output" in refuse("package", tiny_bundle)
    assert ".zip or .pyz" in refuse("package", tiny_bundle, "-o", tmp_path / "model.rar")
    assert "absent" in refuse("package", tmp_path / "absent", "-o", out)
    assert "did you mean 'onnx-fp16'?" in refuse("package", tiny_bundle, "-o", out, "--artifact", "onnx-fp61")
    assert "lies in the bundle" in refuse("package", tiny_bundle, "-o", tiny_bundle / "model.zip")
    assert "absent.pem" in refuse("package", tiny_bundle, "-o", out, "--sign", tmp_path / "absent.pem")
    out.write_text("precious")
    assert "--overwrite" in refuse("package", tiny_bundle, "-o", out)
    assert out.read_text() == "precious"


def test_a_changed_bundle_fails_its_check(refuse: Refuse, bundle: Path, tmp_path: Path) -> None:
    (bundle / "labels.txt").write_text("no\n" * 10)
    assert "labels.txt" in refuse("package", bundle, "-o", tmp_path / "model.zip", code=1)


def test_signing_without_its_library(
    refuse: Refuse, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    said = refuse("package", tiny_bundle, "-o", tmp_path / "model.zip", "--sign", tmp_path / "key.pem", code=3)
    assert "pip install 'cspdeploy[sign]'" in said


def test_what_comes_after_a_signed_package_asks_for_the_key(run: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    (tmp_path / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    done = run("package", tiny_bundle, "-o", tmp_path / "model.zip", "--sign", tmp_path / "key.pem")
    assert done.returncode == 0, done.stderr
    assert "model.zip --key key.pub" in " ".join(done.stdout.split())
