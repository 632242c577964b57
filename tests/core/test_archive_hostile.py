"""Packages that lie: each guard of the reader meets what it is there for, and nothing is left of what was refused."""

from __future__ import annotations

import stat
import struct
import tempfile
import zipfile
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cspdeploy.core import archive, archive_rules
from cspdeploy.core.archive import read_entries, unpack
from cspdeploy.core.errors import InputError
from tests.core.archives import GOOD, names_in, packed, refused

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
