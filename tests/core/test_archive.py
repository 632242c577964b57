"""Packages: what is sound is unpacked as it was packed, what is broken is refused, and bundles are opened in them."""

from __future__ import annotations

import io
import random
import stat
import struct
import zipfile
from pathlib import Path

import pytest

from cspdeploy.core import archive
from cspdeploy.core.archive import bundle_prefix, opened_bundle, packed_manifest, read_entries, read_entry, unpack
from cspdeploy.core.bundle import read_manifest
from cspdeploy.core.errors import InputError, TamperedError
from tests.core.archives import GOOD, names_in, packed, refused

# --- what is sound ---


def test_unpacks_to_what_was_packed(package: Path, tmp_path: Path) -> None:
    unpack(package, tmp_path / "out")
    found = {
        path.relative_to(tmp_path / "out").as_posix(): path.read_bytes()
        for path in (tmp_path / "out").rglob("*") if path.is_file()
    }  # fmt: skip
    assert found == GOOD
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_part_of_it_without_its_prefix(package: Path, tmp_path: Path) -> None:
    assert bundle_prefix(package) == "tiny/"
    unpack(package, tmp_path / "out", prefix="tiny/")
    assert names_in(tmp_path / "out") == ["labels.txt", "manifest.json", "tiny.onnx"]


def test_an_empty_folder_is_taken_and_a_full_one_is_not(package: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    unpack(package, tmp_path / "empty")
    assert (tmp_path / "empty" / "tiny" / "tiny.onnx").is_file()
    with pytest.raises(InputError, match="exists"):
        unpack(package, tmp_path / "empty")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="exists"):
        unpack(package, tmp_path / "link")
    with pytest.raises(InputError, match="cannot be written"):
        unpack(package, tmp_path / "absent" / "out")


def test_permissions_of_the_package_are_not_taken_over(tmp_path: Path) -> None:
    def set_uid(info: zipfile.ZipInfo) -> None:
        info.external_attr = 0o104777 << 16

    (tmp_path / "model.zip").write_bytes(packed(GOOD, change=set_uid))
    unpack(tmp_path / "model.zip", tmp_path / "out")
    assert stat.S_IMODE((tmp_path / "out" / "tiny" / "tiny.onnx").stat().st_mode) & 0o7111 == 0


def test_one_entry_into_memory(package: Path) -> None:
    assert read_entry(package, "tiny/labels.txt") == b"cat\ndog\n"
    with pytest.raises(InputError, match="holds no tiny/absent"):
        read_entry(package, "tiny/absent")
    assert read_entry(package, "tiny/labels.txt", at_most=8) == b"cat\ndog\n"
    with pytest.raises(InputError, match="8 bytes, expected at most 7"):
        read_entry(package, "tiny/labels.txt", at_most=7)


def test_a_program_before_the_zip_file_is_no_harm(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    buffer.write(b"#!/usr/bin/env python3\n")
    with zipfile.ZipFile(buffer, "w") as written:
        for name, data in GOOD.items():
            written.writestr(name, data)
    (tmp_path / "model.pyz").write_bytes(buffer.getvalue())
    assert [entry.name for entry in read_entries(tmp_path / "model.pyz")] == list(GOOD)
    (tmp_path / "moved.pyz").write_bytes(b"#! another\n" + packed(GOOD))  # offsets are then counted from the zip file
    assert read_entry(tmp_path / "moved.pyz", "tiny/labels.txt") == b"cat\ndog\n"


# --- broken files ---


@pytest.mark.parametrize("kept", [0, 10, 22, 100, -1, -30])
def test_cut_short(package: Path, kept: int) -> None:
    package.write_bytes(package.read_bytes()[:kept])
    refused(package, "not a package|not a readable package")


def test_zip64_several_parts_and_comments(package: Path) -> None:
    data = package.read_bytes()
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, 0, 1)
    package.write_bytes(data[:-22] + locator + data[-22:])
    refused(package, "ZIP64")
    package.write_bytes(data[:-2] + struct.pack("<H", 4) + b"note")
    refused(package, "not a package")
    package.write_bytes(data[:-18] + struct.pack("<H", 3) + data[-16:])
    refused(package, "several parts")


def test_one_byte_of_contents_changed(tmp_path: Path) -> None:
    def store(info: zipfile.ZipInfo) -> None:
        info.compress_type = zipfile.ZIP_STORED

    data = packed({"tiny/a": b"hello world"}, change=store).replace(b"hello", b"jello")
    (tmp_path / "model.zip").write_bytes(data)
    refused(tmp_path / "model.zip", "broken")


@pytest.mark.parametrize("seed", range(60))
def test_damage_anywhere_ends_in_an_error_or_in_the_right_bytes(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    data = bytearray(packed(GOOD))
    for _ in range(draw.choice((1, 2, 8))):
        data[draw.randrange(len(data))] = draw.randrange(256)
    (tmp_path / "model.zip").write_bytes(data)
    try:
        unpack(tmp_path / "model.zip", tmp_path / "out")
    except InputError:
        assert names_in(tmp_path) == ["model.zip"]
        return
    found = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert sorted(found) == sorted(GOOD.values())


def test_what_is_no_file_at_all(tmp_path: Path) -> None:
    refused(tmp_path / "absent.zip", "No such file")
    (tmp_path / "folder.zip").mkdir()
    refused(tmp_path / "folder.zip", "Is a directory")
    (tmp_path / "text.zip").write_text("hello")
    refused(tmp_path / "text.zip", "not a package")


# --- bundles in packages ---


def test_where_the_bundle_lies(tmp_path: Path) -> None:
    path = tmp_path / "model.zip"
    for names, said in (
        (("labels.txt",), "holds no bundle"),
        (("a/manifest.json", "b/manifest.json"), "holds 2 bundles"),
        (("a/b/manifest.json",), "bundles, expected one at its top"),
    ):
        path.write_bytes(packed(dict.fromkeys(names, b"{}")))
        with pytest.raises(InputError, match=said):
            bundle_prefix(path)
    path.write_bytes(packed({"manifest.json": b"{}"}))
    assert bundle_prefix(path) == ""


@pytest.fixture
def bundle_package(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A real bundle, with files beside it that its manifest does not name."""
    files = {f"tiny/{path.name}": path.read_bytes() for path in tiny_bundle.iterdir()}
    files |= {"tiny/stranger.onnx": b"weights", "tiny/timings.json": b"{}", "elsewhere.txt": b"x"}
    (tmp_path / "model.zip").write_bytes(packed(files))
    return tmp_path / "model.zip"


def test_a_package_is_opened_in_a_private_folder_that_vanishes(bundle_package: Path, tiny_bundle: Path) -> None:
    with opened_bundle(bundle_package) as folder:
        assert folder.name == "tiny"
        assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
        assert read_manifest(folder) == read_manifest(tiny_bundle) == packed_manifest(bundle_package, "tiny/")
        assert names_in(folder) == sorted([*names_in(tiny_bundle), "timings.json"])  # and no stranger
        place = folder.parent
    assert not place.exists()


def test_a_manifest_is_read_before_anything_is_unpacked(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "unpacked")

    monkeypatch.setattr(archive, "unpack", refuse)
    with pytest.raises(InputError, match=r"model\.zip: manifest\.json: schema_version None"), opened_bundle(package):
        pass
    monkeypatch.setattr(archive, "MAX_JSON_BYTES", 1)
    with pytest.raises(InputError, match=r"manifest\.json: 2 bytes, expected at most 1"), opened_bundle(package):
        pass


def test_errors_name_the_package_and_not_the_private_folder(bundle_package: Path) -> None:
    with pytest.raises(TamperedError) as found, opened_bundle(bundle_package) as folder:
        raise TamperedError(f"{folder}: labels.txt: changed", fix="copy it again")
    assert found.value.message == f"{bundle_package}: labels.txt: changed"


def test_what_needs_no_unpacking_is_given_back_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"")
    (tmp_path / "manifest.json").write_bytes(b"")
    for place in (tmp_path, tmp_path / "x.onnx", tmp_path / "manifest.json"):
        with opened_bundle(place) as given:
            assert given == place


def test_nothing_there_and_no_place_to_unpack(bundle_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no such bundle or package"), opened_bundle(bundle_package.parent / "absent"):
        pass

    def fail(*_: object, **__: object) -> None:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(archive.tempfile, "TemporaryDirectory", fail)
    with pytest.raises(InputError, match="No usable temporary directory") as found, opened_bundle(bundle_package):
        pass
    assert "TMPDIR" in found.value.fix
