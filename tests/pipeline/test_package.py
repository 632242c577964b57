"""One file for a device: what is in it, that it is a bundle, that its bytes are the same again, that it runs alone."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

import cspdeploy
from cspdeploy.core.archive import opened_bundle, unpack
from cspdeploy.core.bundle import TIMINGS_FILE, check_hashes, read_manifest
from cspdeploy.core.errors import InputError, TamperedError
from cspdeploy.core.signature import verify_folder
from cspdeploy.edge import Predictor
from cspdeploy.pipeline import package_write
from cspdeploy.pipeline.package_write import Source
from tests.pipeline.conftest import Pack, names_in


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


# --- what is in it ---


def test_a_zip_holds_what_a_device_needs_and_is_a_bundle(pack: Pack, tiny_bundle: Path, tmp_path: Path) -> None:
    report = pack("model.zip")
    unpack(tmp_path / "model.zip", tmp_path / "out")
    folder = tmp_path / "out" / "tiny"
    assert names_in(tmp_path / "out") == ["tiny"]
    assert names_in(folder) == ["LICENCE.txt", "golden.npz", "labels.txt", "manifest.json", "tiny.onnx"]
    manifest = read_manifest(folder)
    check_hashes(folder, manifest)
    assert [artifact.kind for artifact in manifest.artifacts] == ["onnx"] == list(report.artifacts)
    assert [record.file for record in manifest.files] == ["golden.npz", "labels.txt", "LICENCE.txt"]
    assert manifest.spec == read_manifest(tiny_bundle).spec
    assert (report.kind, report.key, report.untrained) == ("zip", "", False)
    assert report.num_bytes == (tmp_path / "model.zip").stat().st_size


def test_its_answers_are_those_of_the_bundle(pack: Pack, tiny_bundle: Path, photo: Path, tmp_path: Path) -> None:
    pack("model.zip")
    with opened_bundle(tmp_path / "model.zip") as folder:
        found = Predictor.open(folder)(photo)
    assert list(found) == list(Predictor.open(tiny_bundle)(photo))


@pytest.mark.parametrize(
    ("asked", "kinds"),
    [
        (("onnx-fp16",), ["onnx-fp16"]),
        (("onnx-fp16", "onnx"), ["onnx", "onnx-fp16"]),
        (("all",), ["torchscript", "onnx", "onnx-fp16"]),
    ],
)
def test_the_artifacts_that_were_asked_for(pack: Pack, asked: tuple[str, ...], kinds: list[str]) -> None:
    assert list(pack("model.zip", artifacts=asked).artifacts) == kinds


@pytest.mark.slow
def test_int8_is_packed_by_default_where_there_is_one(pack: Pack, tiny_int8_bundle: Path) -> None:
    assert pack("model.zip", bundle=tiny_int8_bundle).artifacts == ("onnx", "onnx-int8")


def test_a_bundle_with_none_of_the_defaults(pack: Pack, tmp_path: Path) -> None:
    pack("fp16.zip", artifacts=("onnx-fp16",))
    unpack(tmp_path / "fp16.zip", tmp_path / "out")
    with pytest.raises(InputError, match="has neither of onnx, onnx-int8") as found:
        pack("model.zip", bundle=tmp_path / "out" / "tiny")
    assert found.value.fix == "--artifact onnx-fp16"


def test_timings_travel_and_the_report_does_not(pack: Pack, bundle: Path, tmp_path: Path) -> None:
    (bundle / "report.html").write_text("<html>")
    (bundle / TIMINGS_FILE).write_text("{}")
    names = {file.name for file in pack("model.zip", bundle=bundle).files}
    assert "tiny/timings.json" in names
    assert "tiny/report.html" not in names
    (bundle / TIMINGS_FILE).unlink()
    (bundle / TIMINGS_FILE).symlink_to("/etc/hostname")
    assert "tiny/timings.json" not in {file.name for file in pack("model.zip", bundle=bundle).files}


def test_packed_where_that_pays_and_stored_where_not(pack: Pack, tmp_path: Path) -> None:
    rows = {file.name: file for file in pack("model.zip").files}
    assert rows["tiny/manifest.json"].packed_bytes < rows["tiny/manifest.json"].num_bytes / 2
    golden = rows["tiny/golden.npz"]  # random images, which nothing makes smaller
    assert golden.packed_bytes == golden.num_bytes


def test_what_a_reader_would_take_for_a_bomb_is_stored(tmp_path: Path) -> None:
    (tmp_path / "zeros").write_bytes(bytes(3 << 20))
    sources = {"zeros": Source(path=tmp_path / "zeros", saving=0.05)}
    entries = package_write.write_package(tmp_path / "model.zip", sources)
    assert entries[0].packed_bytes == entries[0].num_bytes == 3 << 20


def test_what_looks_fair_in_samples_and_is_a_bomb_as_a_whole_is_stored(tmp_path: Path) -> None:
    """Random bytes where the samples are taken, zeros in between."""
    size, draw = 16 << 20, np.random.default_rng(0)
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(size)
        for start in range(0, size, size // 8):
            file.seek(start)
            file.write(draw.bytes(20_000))
    (tmp_path / "text").write_text("words " * 100)
    sources = {name: Source(path=tmp_path / name, saving=0.05) for name in ("sparse", "text")}
    entries = {entry.name: entry for entry in package_write.write_package(tmp_path / "model.zip", sources)}
    assert entries["sparse"].packed_bytes == size
    assert entries["text"].packed_bytes < entries["text"].num_bytes


# --- the same bytes again ---


@pytest.mark.parametrize("name", ["model.zip", "model.pyz"])
def test_the_same_bytes_on_every_run_whatever_umask_date_and_order(
    pack: Pack, tiny_bundle: Path, tmp_path: Path, keys: tuple[Path, Path], name: str
) -> None:
    with umask(0o077):
        pack(name, sign=keys[0], licence="Apache-2.0")
    first = (tmp_path / name).read_bytes()
    other = tmp_path / "copy"
    other.mkdir()
    for path in sorted(tiny_bundle.iterdir(), reverse=True):
        shutil.copyfile(path, other / path.name)
        os.utime(other / path.name, (1e9, 1e9))
        (other / path.name).chmod(0o640)
    with umask(0o002):
        report = pack(name, bundle=other, sign=keys[0], licence="Apache-2.0")
    assert (tmp_path / name).read_bytes() == first
    with zipfile.ZipFile(tmp_path / name) as archive:
        infos = archive.infolist()
    assert [info.filename for info in infos] == sorted(file.name for file in report.files)
    assert {info.date_time for info in infos} == {(1980, 1, 1, 0, 0, 0)}
    assert {info.external_attr >> 16 for info in infos} == {0o100644}
    mode = stat.S_IMODE((tmp_path / name).stat().st_mode)
    assert mode == (0o600 if name == "model.zip" else 0o700) or mode in (0o664, 0o775)


@pytest.mark.slow
def test_the_same_bytes_from_another_process(tiny_bundle: Path, tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from cspdeploy.pipeline.package import PackageRequest, package_bundle
package_bundle(PackageRequest(bundle=Path(sys.argv[1]), output=Path(sys.argv[2])))
"""
    for seed in ("1", "2"):
        words = [sys.executable, "-c", code, str(tiny_bundle), str(tmp_path / f"{seed}.pyz")]
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(cspdeploy.__file__).parents[1])}
        subprocess.run(words, env=environment, check=True)
    assert (tmp_path / "1.pyz").read_bytes() == (tmp_path / "2.pyz").read_bytes()


def test_a_package_packed_again_is_the_same_package(pack: Pack, tmp_path: Path) -> None:
    pack("model.zip", licence="MIT")
    unpack(tmp_path / "model.zip", tmp_path / "out")
    pack("again.zip", bundle=tmp_path / "out" / "tiny")
    assert (tmp_path / "again.zip").read_bytes() == (tmp_path / "model.zip").read_bytes()


# --- licence and origin ---


def test_the_page_on_the_weights(pack: Pack, tmp_path: Path) -> None:
    report = pack("model.zip")
    assert any("licence of the weights is not stated" in note for note in report.notes)
    with opened_bundle(tmp_path / "model.zip") as folder:
        page = (folder / "LICENCE.txt").read_text(encoding="utf-8")
    assert "model:     tiny\nlicence:   not stated\nweights:   user\norigin:    test\n" in page


def test_a_licence_by_its_name_and_as_a_text(pack: Pack, tmp_path: Path) -> None:
    assert pack("model.zip", licence="CC-BY-4.0").notes == ()
    with opened_bundle(tmp_path / "model.zip") as folder:
        assert "licence:   CC-BY-4.0\n" in (folder / "LICENCE.txt").read_text()
    (tmp_path / "MIT").write_text("MIT License\r\n\r\nPermission is hereby granted\r\n")
    pack("model.zip", licence=str(tmp_path / "MIT"))
    with opened_bundle(tmp_path / "model.zip") as folder:
        page = (folder / "LICENCE.txt").read_text()
    assert "licence:   see below" in page
    assert page.endswith("\nMIT License\n\nPermission is hereby granted\n")


@pytest.mark.parametrize(
    "given",
    ["absent.txt", "some/where", "LICENSE.md", "LICENSE", "licence", "COPYING.lesser", "NOTICE", "LICENSE-MIT"],
)
def test_a_licence_that_is_meant_to_be_a_file(
    pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        pack("model.zip", licence=given)


@pytest.mark.parametrize("data", [b"", b"\xff\xfe", b"text\0", b"x" * ((1 << 20) + 1)])
def test_a_licence_that_is_no_text(pack: Pack, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "licence").write_bytes(data)
    with pytest.raises(InputError, match="--licence"):
        pack("model.zip", licence=str(tmp_path / "licence"))
    assert not (tmp_path / "model.zip").exists()


# --- signed ---


def test_a_signed_package(pack: Pack, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    report = pack("model.zip", sign=keys[0])
    with opened_bundle(tmp_path / "model.zip") as folder:
        assert verify_folder(folder, keys[1]) == report.key
        (folder / "labels.txt").write_text("no\n" * 10)
        with pytest.raises(TamperedError):
            verify_folder(folder, keys[1])


def test_an_older_signature_does_not_travel_with_a_new_manifest(
    pack: Pack, bundle: Path, tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    (bundle / "manifest.sig").write_bytes(bytes(64))
    pack("model.zip", bundle=bundle)
    with opened_bundle(tmp_path / "model.zip") as folder:
        assert not (folder / "manifest.sig").exists()


def test_a_signed_program_has_a_signature_of_the_whole_file(
    pack: Pack, tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    report = pack("model.pyz", sign=keys[0])
    place = tmp_path / "model.pyz.sig"
    assert report.signature_file == str(place)
    assert any("-rawin -in model.pyz -sigfile model.pyz.sig" in note for note in report.notes)
    public = serialization.load_pem_public_key(keys[1].read_bytes())
    assert isinstance(public, Ed25519PublicKey)
    public.verify(place.read_bytes(), (tmp_path / "model.pyz").read_bytes())
    assert pack("model.pyz", sign=keys[0]).key == report.key  # over its own older one
    assert pack("model.zip", sign=keys[0]).signature_file == ""
    assert not (tmp_path / "model.zip.sig").exists()
    before = (tmp_path / "model.pyz").read_bytes()
    place.write_text("precious")
    with pytest.raises(InputError, match="exists and is not a signature"):
        pack("model.pyz", sign=keys[0], licence="MIT")
    assert (tmp_path / "model.pyz").read_bytes() == before
