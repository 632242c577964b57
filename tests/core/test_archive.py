"""Packages that lie: each guard of the reader meets what it is there for, and nothing is left of what was refused."""

from __future__ import annotations

import io
import random
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cspdeploy.core import archive, archive_rules
from cspdeploy.core.archive import bundle_prefix, opened_bundle, packed_manifest, read_entries, read_entry, unpack
from cspdeploy.core.bundle import read_manifest
from cspdeploy.core.errors import InputError, TamperedError

GOOD = {"tiny/manifest.json": b"{}", "tiny/tiny.onnx": bytes(range(256)) * 40, "tiny/labels.txt": b"cat\ndog\n"}


def packed(files: dict[str, bytes], *, change: Callable[[zipfile.ZipInfo], None] | None = None) -> bytes:
    """A zip file; `change` may alter what its directory says of each entry."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as written:
        for name, data in files.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = 0o100644 << 16
            if change is not None:
                change(info)
            written.writestr(info, data)
    return buffer.getvalue()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    (tmp_path / "model.zip").write_bytes(packed(GOOD))
    return tmp_path / "model.zip"


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refused(path: Path, said: str) -> None:
    """Unpacking it ends in one error, which says that, and leaves nothing."""
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(InputError, match=said) as found:
        unpack(path, path.parent / "out")
    assert found.value.fix
    assert sorted(path.parent.rglob("*")) == before


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


# --- names ---


@pytest.mark.parametrize(
    "name",
    [
        "../evil", "tiny/../../evil", "/etc/evil", "C:/evil", "c:evil", "..\\evil", "tiny\\evil", "\\\\host\\share",
        "tiny//evil", "./evil", "tiny/.", "tiny/..", "..", "file.txt:stream",
    ],
)  # fmt: skip
def test_a_name_that_leaves_the_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.zip").write_bytes(packed({**GOOD, name: b"x"}))
    refused(tmp_path / "model.zip", "leaves the folder")


@pytest.mark.parametrize("name", ["con", "tiny/NUL.txt", "com1.onnx", "tiny./x", "x ", " x", "a/ /b"])
def test_a_name_that_is_another_on_another_system(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.zip").write_bytes(packed({name: b"x"}))
    refused(tmp_path / "model.zip", "other systems")


def test_a_name_with_a_nul_which_zipfile_would_cut_off(tmp_path: Path) -> None:
    data = packed({"tiny/evil.txtX.onnx": b"x"}).replace(b"evil.txtX", b"evil.txt\0")
    (tmp_path / "model.zip").write_bytes(data)
    refused(tmp_path / "model.zip", "do not print")


@pytest.mark.parametrize("evil", ["../../evil", "/evil", "tiny/other"])
def test_a_second_name_in_the_unicode_path_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evil: str) -> None:
    """Newer releases of Python take the name from there, after the first was kept; here older ones do, too."""
    plain = zipfile.ZipInfo._decodeExtra  # type: ignore[attr-defined]

    def newer(self: zipfile.ZipInfo, *words: object) -> None:
        plain(self, *words)
        kind, length = struct.unpack_from("<HH", self.extra)
        if kind == 0x7075:
            self.filename = self.extra[9 : 4 + length].decode()

    def add(info: zipfile.ZipInfo) -> None:
        body = struct.pack("<BL", 1, zlib.crc32(info.filename.encode())) + evil.encode()
        info.extra = struct.pack("<HH", 0x7075, len(body)) + body

    (tmp_path / "model.zip").write_bytes(packed({"tiny/good.txt": b"x"}, change=add))
    monkeypatch.setattr(zipfile.ZipInfo, "_decodeExtra", newer)
    refused(tmp_path / "model.zip", "has a second name")


def test_a_name_that_no_rule_has_caught_is_caught_by_the_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive_rules, "_wrong_name", lambda name: "")
    (tmp_path / "model.zip").write_bytes(packed({"../evil": b"x"}))
    refused(tmp_path / "model.zip", "leaves the folder")
    assert not (tmp_path / "evil").exists()


def test_a_name_that_writes_on_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "model.zip").write_bytes(packed({"\x1b[2Jevil": b"x"}))
    refused(tmp_path / "model.zip", "do not print")


@pytest.mark.parametrize("name", ["x" * 300, "/".join("abcdefghij"), "ü" * 200])
def test_a_name_too_long_or_too_deep(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.zip").write_bytes(packed({name: b"x"}))
    refused(tmp_path / "model.zip", "too long or too deep")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("tiny.onnx", "TINY.onnx"), "twice"),
        (("stra\u00dfe", "STRASSE"), "twice"),
        (("caf\u00e9", "cafe\u0301"), "twice"),
        (("tiny", "tiny/labels.txt"), "is a file and a folder"),
        (("Tiny/labels.txt", "tiny"), "is a file and a folder"),
        (("tiny/", "tiny"), "is a file and a folder"),
    ],
)
def test_two_names_for_one_file(tmp_path: Path, names: tuple[str, ...], said: str) -> None:
    files = dict.fromkeys(names, b"x")
    files |= {name: b"" for name in names if name.endswith("/")}
    (tmp_path / "model.zip").write_bytes(packed(files, change=_folder_kind))
    refused(tmp_path / "model.zip", said)


def _folder_kind(info: zipfile.ZipInfo) -> None:
    if info.is_dir():
        info.external_attr = 0o040755 << 16


def test_the_same_name_twice(tmp_path: Path) -> None:
    data = packed({"tiny/a": b"1", "tiny/b": b"2"}).replace(b"tiny/b", b"tiny/a")
    (tmp_path / "model.zip").write_bytes(data)
    refused(tmp_path / "model.zip", "twice")


NAMES = st.one_of(st.text(max_size=12), st.text(alphabet="aA./\\: \0", max_size=8))


@given(st.lists(NAMES, min_size=1, max_size=4, unique=True))
def test_whatever_the_names_nothing_is_written_outside(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as place:
        outer = Path(place) / "outer"
        outer.mkdir()
        try:
            (outer / "model.zip").write_bytes(packed({name: b"x" for name in names if name.rstrip("/")}))
        except (ValueError, UnicodeEncodeError):
            return
        try:
            unpack(outer / "model.zip", outer / "out")
        except InputError:
            assert names_in(outer) == ["model.zip"]
        assert names_in(Path(place)) == ["outer"]
        assert set(names_in(outer)) <= {"model.zip", "out"}


# --- kinds ---


@pytest.mark.parametrize("mode", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK, stat.S_IFDIR])
def test_a_link_or_a_special_file(tmp_path: Path, mode: int) -> None:
    def special(info: zipfile.ZipInfo) -> None:
        info.external_attr = (mode | 0o644) << 16

    (tmp_path / "model.zip").write_bytes(packed({"tiny/link": b"/etc/passwd"}, change=special))
    refused(tmp_path / "model.zip", "a link or a special file")


def test_encrypted(tmp_path: Path) -> None:
    data = bytearray(packed({"tiny/a": b"1"}))
    data[6] |= 1  # flags of the local header
    data[data.rindex(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "model.zip").write_bytes(data)
    refused(tmp_path / "model.zip", "encrypted")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_another_way_of_packing(tmp_path: Path, method: int) -> None:
    def repack(info: zipfile.ZipInfo) -> None:
        info.compress_type = method

    (tmp_path / "model.zip").write_bytes(packed(GOOD, change=repack))
    refused(tmp_path / "model.zip", "expected stored or deflate")


def test_a_folder_that_holds_bytes(tmp_path: Path) -> None:
    (tmp_path / "model.zip").write_bytes(packed({"tinyX": b"12345"}).replace(b"tinyX", b"tiny/"))
    refused(tmp_path / "model.zip", "special file|a folder with contents")


# --- bombs ---


def test_a_bomb_by_its_ratio(tmp_path: Path) -> None:
    (tmp_path / "model.zip").write_bytes(packed({"tiny/zeros": bytes(4 << 20)}))
    refused(tmp_path / "model.zip", "a bomb")


def test_a_bomb_of_many_small_entries(tmp_path: Path) -> None:
    """Each is below the size at which ratios count; together they were 2 GB of 2 MB."""
    zeros = bytes(1 << 20)
    (tmp_path / "model.zip").write_bytes(packed({f"tiny/{number}": zeros for number in range(64)}))
    assert len(read_entries(tmp_path / "model.zip")) == 64  # 64 MiB hurt nobody
    (tmp_path / "model.zip").write_bytes(packed({f"tiny/{number}": zeros for number in range(65)}))
    refused(tmp_path / "model.zip", "more than 100 times as many, a bomb")


def test_a_bomb_that_hides_its_size(tmp_path: Path) -> None:
    """The directory announces 1000 bytes, the stream holds 4 MB: no more than announced is ever taken."""
    data = bytearray(packed({"tiny/zeros": bytes(4 << 20)}))
    for header, field in ((data.index(b"PK\x03\x04"), 22), (data.rindex(b"PK\x01\x02"), 24)):
        data[header + field : header + field + 4] = struct.pack("<L", 1000)
    (tmp_path / "model.zip").write_bytes(data)
    refused(tmp_path / "model.zip", "broken|not the 1000 bytes")


def test_a_file_shorter_than_announced(tmp_path: Path) -> None:
    data = bytearray(packed({"tiny/short": b"abcdefgh" * 4}))
    for header, field in ((data.index(b"PK\x03\x04"), 22), (data.rindex(b"PK\x01\x02"), 24)):
        data[header + field : header + field + 4] = struct.pack("<L", 4000)
    (tmp_path / "model.zip").write_bytes(data)
    refused(tmp_path / "model.zip", "broken|not the 4000 bytes")


def test_entries_that_share_their_bytes(tmp_path: Path) -> None:
    """As in Fifield's bomb: one stream, many entries, each with a ratio of its own that looks fair."""
    data = bytes(range(256)) * 300
    deflated = zlib.compress(data, wbits=-15)
    local = struct.pack("<4s5H3L2H", b"PK\x03\x04", 20, 0, 8, 0, 0, zlib.crc32(data), len(deflated), len(data), 1, 0)
    first = local + b"a" + deflated
    directory = b""
    for name in (b"a", b"a", b"a"):
        directory += struct.pack(
            "<4s6H3L5H2L", b"PK\x01\x02", 20, 20, 0, 8, 0, 0, zlib.crc32(data), len(deflated), len(data), 1, 0, 0, 0, 0,
            0o100644 << 16, 0,
        ) + name  # fmt: skip
    names = iter((b"a", b"b", b"c"))
    parts = directory.split(b"PK\x01\x02")[1:]
    directory = b"".join(b"PK\x01\x02" + part[:-1] + next(names) for part in parts)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 3, 3, len(directory), len(first), 0)
    (tmp_path / "model.zip").write_bytes(first + directory + end)
    refused(tmp_path / "model.zip", "overlaps the next entry")


def test_too_many_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_rules, "MAX_ENTRIES", 2)
    (tmp_path / "model.zip").write_bytes(packed(GOOD))
    refused(tmp_path / "model.zip", "3 entries")


def test_an_end_record_that_counts_fewer_entries_than_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive_rules, "MAX_ENTRIES", 2)
    data = bytearray(packed(GOOD))
    data[-14:-10] = struct.pack("<2H", 1, 1)
    (tmp_path / "model.zip").write_bytes(data)
    refused(tmp_path / "model.zip", "3 entries|not a readable package")


def test_a_directory_too_large_to_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_rules, "MAX_DIRECTORY_BYTES", 64)
    (tmp_path / "model.zip").write_bytes(packed(GOOD))
    refused(tmp_path / "model.zip", "directory of")


def test_more_than_a_package_holds(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_rules, "MAX_TOTAL_BYTES", 10_000)
    refused(package, "unpacks to")
    monkeypatch.setattr(archive_rules, "MAX_TOTAL_BYTES", 100)
    refused(package, "bytes, expected at most 100")


def test_a_disk_too_small(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive.shutil, "disk_usage", lambda place: _Usage)
    refused(package, "are free in")


class _Usage:
    free = 100


def test_a_disk_that_fills_up_while_unpacking(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(archive, "_extract", fail)
    refused(package, "No space left on device")


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
