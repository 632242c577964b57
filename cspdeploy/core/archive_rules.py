"""What a zip file may be before anything of it is unpacked: its directory and every entry, judged by what they say."""

from __future__ import annotations

import os
import stat
import struct
import unicodedata
import zipfile
from pathlib import Path
from typing import BinaryIO

from cspdeploy.core.errors import InputError

__all__ = ["MAX_RATIO", "MAX_TOTAL_BYTES", "REFUSE", "check_directory", "judged_files"]

REFUSE = "do not use this package; fetch it again from where it was made"
MAX_ENTRIES = 2000
"""A zip application of a bundle has about 140: the modules of the edge with their bytecode, ten files of the bundle."""
MAX_DIRECTORY_BYTES = 1 << 20
"""Of the table of contents, which zipfile reads whole: 2000 entries with names of 60 letters take 220 KB."""
MAX_TOTAL_BYTES = (1 << 32) - 1
"""Of a package that is read, unpacked and packed: what fits without the ZIP64 extension, which is refused. (`package`
writes 2 GB at most, because zipfile does.) All artifacts of CSPDarknet53 together take 0.3 GB."""
MAX_RATIO = 100
"""Of unpacked to packed bytes of an entry. Of CSPDarknet53 weights reach 1.2 and the manifest 6.5; deflate itself ends
at 1032, and bombs are built of that."""
RATIO_FREE_BYTES = 1 << 20
"""An entry up to here may have any ratio; all of them together may not."""
TOTAL_FREE_BYTES = 64 << 20
"""A package up to here may have any ratio as a whole: no device is hurt by 64 MiB. Above, `MAX_RATIO` holds for the
sum: without that, 2000 entries of a megabyte each would make 2 GB of 2 MB."""
MAX_NAME_BYTES = 255
MAX_DEPTH = 8

_END = b"PK\x05\x06"
_END_FORMAT = struct.Struct("<4s4H2LH")
_ZIP64_LOCATOR = b"PK\x06\x07"
_ZIP64_LOCATOR_BYTES = 20
_LOCAL_HEADER_BYTES = 30
_ENCRYPTED_FLAGS = 0x1 | 0x40 | 0x2000  # encrypted, strongly encrypted, directory encrypted
_WINDOWS_DEVICES = frozenset(
    {"con", "prn", "aux", "nul"} | {f"{port}{number}" for port in ("com", "lpt") for number in range(1, 10)}
)


def check_directory(file: BinaryIO, path: Path) -> None:
    """Bound the table of contents before zipfile reads it. Its end record must be the last thing in the file."""
    size = file.seek(0, os.SEEK_END)
    length = _END_FORMAT.size
    if size > MAX_TOTAL_BYTES:
        raise InputError(f"{path}: {size} bytes, expected at most {MAX_TOTAL_BYTES}", fix=REFUSE)
    file.seek(max(0, size - length - _ZIP64_LOCATOR_BYTES))
    tail = file.read()
    if len(tail) < length or not tail[-length:].startswith(_END):
        raise InputError(f"{path}: not a package: no zip directory at its end (cut short?)", fix=REFUSE)
    _, disk, start_disk, here, count, directory_bytes, _, comment = _END_FORMAT.unpack(tail[-length:])
    zip64 = tail[:-length].startswith(_ZIP64_LOCATOR)
    if zip64 or disk or start_disk or here != count or comment:
        raise InputError(f"{path}: a zip file of several parts, with a comment or ZIP64, expected a plain one",
                         fix=REFUSE)  # fmt: skip
    if count > MAX_ENTRIES or directory_bytes > MAX_DIRECTORY_BYTES:
        raise InputError(
            f"{path}: {count} entries in a directory of {directory_bytes} bytes, expected at most {MAX_ENTRIES} in "
            f"{MAX_DIRECTORY_BYTES}",
            fix=REFUSE,
        )


def judged_files(archive: zipfile.ZipFile, path: Path) -> list[zipfile.ZipInfo]:
    """The files of an archive; the names of its folders are judged and dropped."""
    infos = archive.infolist()
    if not 1 <= len(infos) <= MAX_ENTRIES:
        raise InputError(f"{path}: {len(infos)} entries, expected 1 to {MAX_ENTRIES}", fix=REFUSE)
    for info in infos:
        wrong = _wrong_name(info.orig_filename) or _wrong_names(info) or _wrong_kind(info) or _wrong_size(info)
        if wrong:
            raise InputError(f"{path}: {info.orig_filename[:MAX_NAME_BYTES]!r}: {wrong}", fix=REFUSE)
    total = sum(info.file_size for info in infos)
    if total > MAX_TOTAL_BYTES:
        raise InputError(f"{path}: unpacks to {total} bytes, expected at most {MAX_TOTAL_BYTES}", fix=REFUSE)
    packed = sum(info.compress_size for info in infos)
    if total > max(TOTAL_FREE_BYTES, MAX_RATIO * packed):
        raise InputError(
            f"{path}: unpacks {packed} bytes to {total}: more than {MAX_RATIO} times as many, a bomb", fix=REFUSE
        )
    _refuse_collisions(infos, path)
    _refuse_overlaps(archive, infos, path)
    return [info for info in infos if not info.is_dir()]


def _wrong_name(name: str) -> str:
    if any(not letter.isprintable() for letter in name):
        return "a name with characters that do not print"
    if "\\" in name or ":" in name or name.startswith("/"):
        return "a name that leaves the folder (absolute, a drive, or a backslash)"
    parts = name.removesuffix("/").split("/")
    if any(part in ("", ".", "..") for part in parts):
        return "a name that leaves the folder"
    if len(parts) > MAX_DEPTH or any(len(part.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES for part in parts):
        return "a name too long or too deep"
    if any(part != part.strip() or part.endswith(".") or _is_device(part) for part in parts):
        return "a name that means something else on other systems"
    return ""


def _wrong_names(info: zipfile.ZipInfo) -> str:
    """Newer releases of Python take a name from the Unicode Path field (0x7075) in place of the one judged here."""
    return "" if info.filename == info.orig_filename else "has a second name"


def _is_device(part: str) -> bool:
    return part.partition(".")[0].casefold() in _WINDOWS_DEVICES


def _wrong_kind(info: zipfile.ZipInfo) -> str:
    kind = stat.S_IFMT(info.external_attr >> 16)
    expected = stat.S_IFDIR if info.is_dir() else stat.S_IFREG
    if kind not in (0, expected):
        return "a link or a special file, expected a plain one"
    if info.flag_bits & _ENCRYPTED_FLAGS:
        return "encrypted"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"packed by method {info.compress_type}, expected stored or deflate"
    return ""


def _wrong_size(info: zipfile.ZipInfo) -> str:
    if info.is_dir() and info.file_size:
        return "a folder with contents of its own"
    if info.compress_type == zipfile.ZIP_STORED and info.file_size != info.compress_size:
        return f"stored in {info.compress_size} bytes, expected {info.file_size}"
    if info.file_size > max(RATIO_FREE_BYTES, MAX_RATIO * info.compress_size):
        return f"unpacks {info.compress_size} bytes to {info.file_size}: more than {MAX_RATIO} times as many, a bomb"
    return ""


def _refuse_collisions(infos: list[zipfile.ZipInfo], path: Path) -> None:
    """Two names for one file, on a file system that keeps neither case nor the form of accents; a file as a folder."""
    files: set[str] = set()
    folders: set[str] = set()
    for info in infos:
        name = unicodedata.normalize("NFC", unicodedata.normalize("NFC", info.filename).casefold()).rstrip("/")
        if info.is_dir():
            folders.add(name)
        elif name in files:
            raise InputError(f"{path}: {info.filename!r} is there twice (or differs in case only)", fix=REFUSE)
        else:
            files.add(name)
        folders |= {name[:at] for at, letter in enumerate(name) if letter == "/"}
    both = sorted(files & folders)
    if both:
        raise InputError(f"{path}: {both[0]!r} is a file and a folder", fix=REFUSE)


def _refuse_overlaps(archive: zipfile.ZipFile, infos: list[zipfile.ZipInfo], path: Path) -> None:
    """Entries that share their packed bytes make a small file a large bomb, each with a modest ratio of its own."""
    ordered = sorted(infos, key=lambda info: info.header_offset)
    ends = [info.header_offset for info in ordered[1:]] + [archive.start_dir]
    for info, end in zip(ordered, ends, strict=True):
        if info.header_offset + _LOCAL_HEADER_BYTES + len(info.filename) + info.compress_size > end:
            raise InputError(f"{path}: {info.filename!r} overlaps the next entry: a bomb", fix=REFUSE)
