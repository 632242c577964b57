"""Packages: a bundle in one zip file, or in a zip application. Read with suspicion, unpacked as a whole or not at all.

Python's zipfile believes what a file says of itself. Here nothing is opened before its directory has been judged, by
`cspdeploy.core.archive_rules`: names, kinds of entries, sizes, and where in the file they lie.
"""

from __future__ import annotations

import secrets
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cspdeploy.core.archive_rules import MAX_TOTAL_BYTES, REFUSE, check_directory, judged_files
from cspdeploy.core.bundle import SIGNATURE_FILE, TIMINGS_FILE
from cspdeploy.core.errors import CspDeployError, InputError
from cspdeploy.core.json_file import MAX_JSON_BYTES
from cspdeploy.core.manifest import MANIFEST_FILE, file_names, parse_manifest
from cspdeploy.core.types import Manifest

__all__ = ["Entry", "bundle_prefix", "opened_bundle", "packed_manifest", "read_entries", "read_entry", "unpack"]

CHUNK_BYTES = 1 << 20
# All that zipfile raises on a broken or hostile file.
_BROKEN = (
    zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError, OSError, zlib.error, struct.error,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A file in a package.

    Attributes:
        name: with "/" between folders.
        num_bytes: unpacked, as the directory says; the bytes that are read are counted against it.
        packed_bytes: as it lies in the package.
    """

    name: str
    num_bytes: int
    packed_bytes: int


def read_entries(path: Path) -> tuple[Entry, ...]:
    """What a package holds, in the order of its directory, after all that can be judged without unpacking was judged.

    Raises:
        InputError: not a zip file, cut short, or with an entry that is no plain file inside the folder: a name that
            leaves it (absolute, "..", drive, backslash, NUL), a link or device, two names that are one on a system that
            does not tell upper from lower case, an encrypted or overlapping entry, too many or too large ones.
    """
    with _opened(path) as archive:
        return tuple(
            Entry(name=info.filename, num_bytes=info.file_size, packed_bytes=info.compress_size)
            for info in judged_files(archive, path)
        )


def read_entry(path: Path, name: str, *, at_most: int = MAX_TOTAL_BYTES) -> bytes:
    """One file of a package, into memory.

    Args:
        at_most: bytes; a larger entry is refused before it is read.

    Raises:
        InputError: as `read_entries`; no such entry, or a larger one; its bytes are not those that the directory
            announces.
    """
    with _opened(path) as archive:
        info = next((one for one in judged_files(archive, path) if one.filename == name), None)
        if info is None:
            raise InputError(f"{path}: holds no {name}", fix=REFUSE)
        if info.file_size > at_most:
            raise InputError(f"{path}: {name}: {info.file_size} bytes, expected at most {at_most}", fix=REFUSE)
        return b"".join(_chunks(archive, info, path))


def bundle_prefix(path: Path) -> str:
    """Where in a package its bundle lies: "" or "NAME/".

    Raises:
        InputError: as `read_entries`; no bundle, or more than one.
    """
    names = [entry.name for entry in read_entries(path)]
    found = [name.removesuffix(MANIFEST_FILE) for name in names if name.rpartition("/")[2] == MANIFEST_FILE]
    if len(found) != 1 or found[0].count("/") > 1:
        what = "no bundle" if not found else f"{len(found)} bundles, expected one at its top"
        raise InputError(f"{path}: holds {what} ({MANIFEST_FILE})", fix="cspdeploy package BUNDLE -o model.zip")
    return found[0]


def packed_manifest(path: Path, prefix: str) -> Manifest:
    """The manifest of the bundle that lies at `prefix` in a package. Nothing is unpacked.

    Raises:
        InputError: as `read_entry`; not a manifest of this version.
    """
    data = read_entry(path, f"{prefix}{MANIFEST_FILE}", at_most=MAX_JSON_BYTES)
    return parse_manifest(data, name=f"{path}: {MANIFEST_FILE}")


def unpack(path: Path, folder: Path, *, prefix: str = "", only: Collection[str] | None = None) -> None:
    """Unpack a package into a folder that is not there yet, or is empty. It appears in one rename.

    Args:
        prefix: only what lies below it, without it: "NAME/".
        only: names below the prefix; the rest stays packed. None for all.

    Raises:
        InputError: as `read_entries`; the folder holds something or cannot be written, or the disk is too small.
            Nothing is left of a package that is refused.
    """
    with _opened(path) as archive:
        infos = [info for info in judged_files(archive, path) if info.filename.startswith(prefix)]
        if only is not None:
            infos = [info for info in infos if info.filename.removeprefix(prefix) in only]
        if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
            raise InputError(f"{folder}: exists, expected a folder to be made", fix="give another folder, or remove it")
        staging = folder.parent / f".{folder.name}.new-{secrets.token_hex(8)}"
        try:
            staging.mkdir()
        except OSError as error:
            raise _unwritable(folder, error) from error
        try:
            _require_space(staging, sum(info.file_size for info in infos), path)
            for info in infos:
                _extract(archive, info, staging, info.filename.removeprefix(prefix), path)
            staging.rename(folder)
        except OSError as error:
            raise _unwritable(folder, error) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def opened_bundle(path: Path) -> Iterator[Path]:
    """A bundle as a folder: that folder itself, or what a package holds, in a private folder that vanishes afterwards.

    Of a package its manifest is read first, and only what that names is unpacked, with the signature and the timings.
    Errors that the block raises name the package in place of the private folder.

    Raises:
        InputError: nothing is there, or a file that is neither a package nor an ONNX file nor a manifest; the package
            is refused; there is no place for temporary files.
    """
    if not path.exists():
        raise InputError(f"{path}: no such bundle or package", fix="name a bundle's folder, a .zip or a .pyz")
    if path.is_dir() or path.suffix.lower() == ".onnx" or path.name == MANIFEST_FILE:
        yield path
        return
    prefix = bundle_prefix(path)
    wanted = {MANIFEST_FILE, SIGNATURE_FILE, TIMINGS_FILE, *file_names(packed_manifest(path, prefix))}
    try:
        private = tempfile.TemporaryDirectory(prefix="cspdeploy-", ignore_cleanup_errors=True)
    except OSError as error:
        raise InputError(
            f"{path}: no folder for temporary files ({error.strerror or error})",
            fix="set TMPDIR to a folder that can be written, or unpack the package elsewhere",
        ) from error
    with private as place:
        folder = Path(place) / (prefix.rstrip("/") or path.stem)
        try:
            unpack(path, folder, prefix=prefix, only=wanted)
            yield folder
        except CspDeployError as error:
            error.message = error.message.replace(str(folder), str(path))
            raise


# --- reading and unpacking ---


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}", fix="name a package: model.zip or model.pyz") from error
    with file:
        check_directory(file, path)
        try:
            archive = zipfile.ZipFile(file)
        except _BROKEN as error:
            raise InputError(f"{path}: not a readable package ({error})", fix=REFUSE) from error
        with archive:
            yield archive


def _chunks(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> Iterator[bytes]:
    """The bytes of an entry: as many as announced, with the checksum of the directory, which zipfile compares."""
    left = info.file_size
    try:
        with archive.open(info) as source:
            while chunk := source.read(CHUNK_BYTES):
                left -= len(chunk)
                if left < 0:
                    break
                yield chunk
    except _BROKEN as error:
        raise InputError(f"{path}: {info.filename!r}: broken ({error})", fix=REFUSE) from error
    if left:
        raise InputError(f"{path}: {info.filename!r}: not the {info.file_size} bytes that are announced", fix=REFUSE)


def _extract(archive: zipfile.ZipFile, info: zipfile.ZipInfo, folder: Path, name: str, path: Path) -> None:
    target = folder / name
    # The names have been judged by their letters; this asks the file system, should that ever have missed one.
    if not target.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{path}: {name!r}: leaves the folder", fix=REFUSE)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as file:  # x: never through something that is there
        for chunk in _chunks(archive, info, path):
            file.write(chunk)


def _require_space(folder: Path, num_bytes: int, path: Path) -> None:
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise InputError(
            f"{path}: unpacks to {num_bytes} bytes, {free} are free in {folder.parent}",
            fix="free some space, or set TMPDIR to another disk",
        )


def _unwritable(folder: Path, error: OSError) -> InputError:
    return InputError(f"{folder}: cannot be written ({error.strerror or error})", fix="give another folder")
