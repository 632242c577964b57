"""Signatures of bundles: what holds, and each thing that must not."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from cspdeploy.core import signature
from cspdeploy.core.bundle import check_hashes, read_manifest
from cspdeploy.core.errors import InputError, MissingExtraError, TamperedError
from cspdeploy.core.signature import check_private_key, sign_file, sign_folder, verify_folder, verify_manifest

OPENSSL = shutil.which("openssl") or ""
PEM = serialization.Encoding.PEM
PRIVATE = serialization.PrivateFormat.PKCS8
PUBLIC = serialization.PublicFormat.SubjectPublicKeyInfo
Private = ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey


def write_keys(folder: Path, key: Private, *, password: bytes | None = None) -> tuple[Path, Path]:
    """Private and public file."""
    folder.mkdir(exist_ok=True)
    lock = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    (folder / "key.pem").write_bytes(key.private_bytes(PEM, PRIVATE, lock))
    (folder / "key.pub").write_bytes(key.public_key().public_bytes(PEM, PUBLIC))
    return folder / "key.pem", folder / "key.pub"


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return write_keys(tmp_path / "keys", ed25519.Ed25519PrivateKey.from_private_bytes(bytes(range(32))))


@pytest.fixture
def signed(tiny_bundle: Path, tmp_path: Path, keys: tuple[Path, Path]) -> Path:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "tiny"))
    sign_folder(bundle, keys[0])
    return bundle


def test_what_was_signed_holds_and_names_the_key(signed: Path, keys: tuple[Path, Path]) -> None:
    assert len((signed / "manifest.sig").read_bytes()) == 64
    assert verify_folder(signed, keys[1]) == sign_folder(signed, keys[0])


def test_the_same_key_and_manifest_give_the_same_signature(signed: Path, keys: tuple[Path, Path]) -> None:
    first = (signed / "manifest.sig").read_bytes()
    sign_folder(signed, keys[0])
    assert (signed / "manifest.sig").read_bytes() == first


def test_no_signature(signed: Path, keys: tuple[Path, Path]) -> None:
    (signed / "manifest.sig").unlink()
    with pytest.raises(TamperedError, match="is not signed"):
        verify_folder(signed, keys[1])


def test_another_key(signed: Path, tmp_path: Path) -> None:
    _, other = write_keys(tmp_path / "other", ed25519.Ed25519PrivateKey.generate())
    with pytest.raises(TamperedError, match="not what was signed"):
        verify_folder(signed, other)


def test_a_manifest_that_was_changed_by_one_letter(signed: Path, keys: tuple[Path, Path]) -> None:
    path = signed / "manifest.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("label 3", "label 4"), encoding="utf-8")
    with pytest.raises(TamperedError, match="not what was signed"):
        verify_folder(signed, keys[1])


def test_a_file_that_was_changed_under_a_manifest_that_was_not(signed: Path, keys: tuple[Path, Path]) -> None:
    (signed / "labels.txt").write_text("no\n" * 10)
    with pytest.raises(TamperedError, match=r"labels\.txt"):
        verify_folder(signed, keys[1])


def test_the_manifest_that_is_given_is_the_one_that_was_signed(
    signed: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever swaps manifest.json after it was read gains nothing: it is read once."""
    good, path = (signed / "manifest.json").read_bytes(), signed / "manifest.json"
    expected = read_manifest(signed)
    reads: list[int] = []
    real = signature.read_json_bytes

    def swapped_afterwards(place: Path) -> bytes:
        data = real(place)
        reads.append(len(data))
        path.write_bytes(data.replace(b"label 3", b"label 4"))
        return data

    monkeypatch.setattr(signature, "read_json_bytes", swapped_afterwards)
    manifest, fingerprint = verify_manifest(signed, keys[1])
    assert manifest == expected
    assert read_manifest(signed) != expected  # what lies there now
    assert (reads, fingerprint) == ([len(good)], sign_folder(signed, keys[0]))
    assert verify_manifest(signed, keys[1], data=path.read_bytes())[0] != expected  # signed anew, as it is now


def test_files_are_not_hashed_with_the_manifest(signed: Path, keys: tuple[Path, Path]) -> None:
    (signed / "labels.txt").write_text("no\n" * 10)
    manifest, _ = verify_manifest(signed, keys[1])
    with pytest.raises(TamperedError, match=r"labels\.txt"):
        check_hashes(signed, manifest)


@pytest.mark.parametrize("name", ["timings.json", "report.html", ".hidden"])
def test_what_is_not_signed(signed: Path, keys: tuple[Path, Path], name: str) -> None:
    """As the module says."""
    (signed / name).write_text("anything")
    assert verify_folder(signed, keys[1])


def test_a_file_beside_that_nobody_signed(signed: Path, keys: tuple[Path, Path]) -> None:
    (signed / "extra.onnx").write_bytes(b"")
    with pytest.raises(InputError, match=r"extra\.onnx"):
        verify_folder(signed, keys[1])


@pytest.mark.parametrize("data", [b"", bytes(63), bytes(65)])
def test_a_signature_of_another_length(signed: Path, keys: tuple[Path, Path], data: bytes) -> None:
    (signed / "manifest.sig").write_bytes(data)
    with pytest.raises(TamperedError, match="expected an Ed25519 signature of 64"):
        verify_folder(signed, keys[1])


def test_a_signature_of_another_manifest(signed: Path, keys: tuple[Path, Path]) -> None:
    (signed / "manifest.sig").write_bytes(bytes(64))
    with pytest.raises(TamperedError, match="not what was signed"):
        verify_folder(signed, keys[1])


# --- keys ---


def test_the_private_key_where_the_public_one_belongs_and_the_other_way(signed: Path, keys: tuple[Path, Path]) -> None:
    with pytest.raises(InputError, match="is a private key, expected the public one") as found:
        verify_folder(signed, keys[0])
    assert "-pubout" in found.value.fix
    with pytest.raises(InputError, match="is a public key, expected the private one"):
        check_private_key(keys[1])


def test_both_halves_in_one_file_and_no_file(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "both.pem").write_bytes(keys[0].read_bytes() + keys[1].read_bytes())
    for check in (check_private_key, lambda key: verify_folder(signed, key)):
        with pytest.raises(InputError, match="holds a private key and a public one"):
            check(tmp_path / "both.pem")
    with pytest.raises(InputError, match="No such file") as found:
        verify_folder(signed, tmp_path / "absent.pub")
    assert found.value.fix == "copy the public key (key.pub) of whoever made it"  # and no new one


def test_a_key_of_another_sort(signed: Path, tmp_path: Path) -> None:
    private, public = write_keys(tmp_path / "other", ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(InputError, match="another sort, expected Ed25519"):
        check_private_key(private)
    with pytest.raises(InputError, match="another sort, expected Ed25519"):
        verify_folder(signed, public)


def test_a_key_with_a_password(tmp_path: Path) -> None:
    private, _ = write_keys(tmp_path / "locked", ed25519.Ed25519PrivateKey.generate(), password=b"secret")
    with pytest.raises(InputError, match="locked with a password"):
        check_private_key(private)


@pytest.mark.parametrize("data", [b"", b"hello", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"])
def test_a_file_that_is_no_public_key(signed: Path, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "key.pub").write_bytes(data)
    with pytest.raises(InputError, match="not a public key in PEM"):
        verify_folder(signed, tmp_path / "key.pub")


def test_a_file_that_is_no_private_key_none_at_all_and_too_large_a_one(tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_bytes(b"hello")
    with pytest.raises(InputError, match="not a private key in PEM"):
        check_private_key(tmp_path / "key.pem")
    with pytest.raises(InputError, match="No such file"):
        check_private_key(tmp_path / "absent.pem")
    (tmp_path / "key.pem").write_bytes(bytes(1 << 17))
    with pytest.raises(InputError, match="more than 65536 bytes"):
        check_private_key(tmp_path / "key.pem")


def test_without_the_library_the_error_names_the_extra(
    signed: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(MissingExtraError, match="'cryptography'") as found:
        verify_folder(signed, keys[1])
    assert (found.value.exit_code, found.value.fix) == (3, "pip install cryptography")


@pytest.mark.skipif(not OPENSSL, reason="no openssl here")
def test_openssl_makes_the_keys_and_checks_the_signature(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "tiny"))
    for words in (
        ["genpkey", "-algorithm", "ed25519", "-out", "key.pem"],
        ["pkey", "-in", "key.pem", "-pubout", "-out", "key.pub"],
    ):
        subprocess.run([OPENSSL, *words], cwd=tmp_path, check=True)
    sign_folder(bundle, tmp_path / "key.pem")
    assert verify_folder(bundle, tmp_path / "key.pub")
    words = ["-verify", "-pubin", "-inkey", "../key.pub", "-rawin", "-in", "manifest.json", "-sigfile", "manifest.sig"]
    done = subprocess.run([OPENSSL, "pkeyutl", *words], cwd=bundle, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (bundle / "manifest.json").write_bytes(b"{}")
    done = subprocess.run([OPENSSL, "pkeyutl", *words], cwd=bundle, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    sign_file(bundle / "tiny.onnx", tmp_path / "key.pem")
    words = ["-verify", "-pubin", "-inkey", "../key.pub", "-rawin", "-in", "tiny.onnx", "-sigfile", "tiny.onnx.sig"]
    for code in (0, 1):
        done = subprocess.run([OPENSSL, "pkeyutl", *words], cwd=bundle, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        (bundle / "tiny.onnx").write_bytes(b"changed")
