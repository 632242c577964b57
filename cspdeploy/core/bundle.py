"""A bundle: a flat folder of artifacts with manifest.json, golden.npz and labels.txt.

Written in a hidden sibling and moved into place in one rename, under a lock, so that at any moment there is the old
bundle or the new one. Read with suspicion: names cannot leave the folder, and hashes are checked before use.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import json
import os
import shutil
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cspdeploy.core.codec import to_json
from cspdeploy.core.errors import InputError
from cspdeploy.core.integrity import file_sha256, require_unchanged
from cspdeploy.core.json_file import read_json_bytes, write_text
from cspdeploy.core.manifest import MANIFEST_FILE, file_names, parse_manifest
from cspdeploy.core.types import FileRecord, Manifest

__all__ = [
    "BUNDLE",
    "MANIFEST_FILE",
    "MODEL_FOLDER",
    "REPORT_FILE",
    "SIGNATURE_FILE",
    "TIMINGS_FILE",
    "FolderKind",
    "check_hashes",
    "disk_errors",
    "file_record",
    "file_sha256",
    "find_bundles",
    "read_manifest",
    "staged_folder",
    "write_manifest",
]

REPORT_FILE = "report.html"
"""Without a hash: it holds timings, which no second run repeats. Nothing here ever reads it."""
TIMINGS_FILE = "timings.json"
"""Without a hash, for the same reason; read with suspicion by `cspdeploy.core.timings`."""
SIGNATURE_FILE = "manifest.sig"
"""Of manifest.json, and so of the hashes in it. Made of the manifest, so that it can have no hash there."""
_UNHASHED = frozenset({MANIFEST_FILE, REPORT_FILE, TIMINGS_FILE, SIGNATURE_FILE})


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderKind:
    """A sort of folder that is written whole.

    Attributes:
        name: as errors call it.
        marker: the file by which one is known; a folder without it is somebody else's and is left alone.
        writer: what else may be writing one.
        elsewhere: what a user does to have it written elsewhere.
    """

    name: str
    marker: str
    writer: str
    elsewhere: str


BUNDLE = FolderKind(name="bundle", marker=MANIFEST_FILE, writer="export", elsewhere="give another folder with -o")
MODEL_FOLDER = FolderKind(
    name="model folder", marker="spec.json", writer="command", elsewhere="give another folder with --models"
)

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def file_record(path: Path) -> FileRecord:
    """Name, hash and size of a file."""
    return FileRecord(file=path.name, sha256=file_sha256(path), num_bytes=path.stat().st_size)


def find_bundles(places: list[Path], *, default: Path) -> list[Path]:
    """Bundle folders: `places` as they are, or all below `default` where none is named. A folder of bundles counts too.

    Raises:
        InputError: a place is missing, or holds no bundle.
    """
    found: list[Path] = []
    for given in places or [default]:
        place = given.parent if given.is_file() and given.name == MANIFEST_FILE else given
        if (place / MANIFEST_FILE).is_file():
            found.append(place)
            continue
        if not place.is_dir():
            raise InputError(f"{place}: no such folder", fix="cspdeploy export cspdarknet53 --fp16")
        below = sorted(path.parent for path in place.glob(f"*/{MANIFEST_FILE}") if not path.parent.name.startswith("."))
        if not below:
            raise InputError(
                f"{place}: holds no bundle (no {MANIFEST_FILE})", fix="cspdeploy export cspdarknet53 --fp16"
            )
        found += below
    return found


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json."""
    write_text(folder / MANIFEST_FILE, json.dumps(to_json(manifest), indent=2) + "\n")


def read_manifest(folder: Path, *, data: bytes | None = None) -> Manifest:
    """Read manifest.json and check that it describes this folder: names, and that every file is there.

    Args:
        data: the bytes of manifest.json, where they have been read already.

    Raises:
        InputError: missing, of another schema version, an unknown or wrong field, a name that leaves the folder, a
            file that is not there.
    """
    path = folder / MANIFEST_FILE
    manifest = parse_manifest(read_json_bytes(path) if data is None else data, name=str(path))
    for name in file_names(manifest):
        if (folder / name).is_symlink():
            raise InputError(f"{folder / name}: is a link, expected a file", fix="do not use this bundle")
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: missing, named in the manifest", fix="copy the whole bundle again")
    return manifest


def check_hashes(folder: Path, manifest: Manifest, *, only: Collection[str] | None = None) -> None:
    """Compare files with their hashes, before anything opens them.

    Args:
        only: names of files; None for every file of the bundle. What the manifest does not name is refused either way.

    Raises:
        InputError: the folder holds what the manifest does not name.
        TamperedError: files differ; all are named.
    """
    _refuse_unlisted(folder, manifest)
    records = [(one.file, one.sha256, one.num_bytes) for one in manifest.artifacts]
    records += [(one.file, one.sha256, one.num_bytes) for one in manifest.files]
    require_unchanged(folder, [record for record in records if only is None or record[0] in only])


def _refuse_unlisted(folder: Path, manifest: Manifest) -> None:
    """A file without a hash beside an ONNX file may be weights that it reads, or an artifact that was never checked.

    Hidden files may lie there: desktops and network file systems leave them behind (.DS_Store, .nfs0001), and no
    program takes one for an artifact. So may the report, whatever it is: nothing here opens it.
    """
    known = {*_UNHASHED, *file_names(manifest)}
    strange = sorted(path.name for path in folder.iterdir() if path.name not in known and path.name[0] != ".")
    if strange:
        more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
        raise InputError(
            f"{folder}: {', '.join(strange[:3])}{more}: in the folder, but not in its {MANIFEST_FILE}",
            fix="move it out of the bundle's folder, or export the bundle again",
        )


@contextmanager
def staged_folder(place: Path, *, kind: FolderKind = BUNDLE) -> Iterator[Path]:
    """A fresh folder that takes the place of `place` when the block ends well, and vanishes when it does not.

    The block has the place to itself: a second writer is refused. What a killed writer left is cleared away first.

    Raises:
        InputError: another process is writing there, `place` is not a folder, or it cannot be written.
    """
    place = place.resolve()  # a link keeps pointing at the folder
    with _locked(place, kind):
        _restore(place)
        for stale in place.parent.glob(f".{glob.escape(place.name)}.new-*"):
            shutil.rmtree(stale, ignore_errors=True)
        if place.exists() and not (place / kind.marker).is_file() and any(place.iterdir()):
            raise InputError(f"{place}: exists and is not a {kind.name}", fix=kind.elsewhere)
        staging = place.parent / f".{place.name}.new-{os.getpid()}"
        staging.mkdir()
        try:
            yield staging
            _flush(staging)
            _move_into_place(staging, place)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def disk_errors(folder: Path, *, kind: FolderKind) -> Iterator[None]:
    """A full disk, or a folder without permission, as one line.

    Raises:
        InputError: in place of any OSError.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        fix = f"free some space, or {kind.elsewhere}" if full else kind.elsewhere
        raise InputError(f"{folder}: cannot be written: {error.strerror or error}", fix=fix) from error


def _restore(place: Path) -> None:
    """Put back an old bundle that a writer without atomic exchange had moved aside when it was killed."""
    for aside in sorted(place.parent.glob(f".{glob.escape(place.name)}.old-*")):
        if place.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(place)


@contextmanager
def _locked(place: Path, kind: FolderKind) -> Iterator[None]:
    try:
        import fcntl  # here: a device reads bundles on any system, and writes none
    except ImportError as error:
        raise InputError(
            f"{place}: a {kind.name} is written under a lock that this system has not", fix="write it on Linux or macOS"
        ) from error
    lock = place.parent / f".{place.name}.lock"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists() and not place.is_dir():
            raise InputError(f"{place}: is a file, expected a folder", fix=kind.elsewhere)
        file = lock.open("a")
    except OSError as error:
        raise InputError(f"{place.parent}: cannot be written ({error.strerror})", fix=kind.elsewhere) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"{place}: another {kind.writer} is writing it", fix=f"wait for it, or {kind.elsewhere}"
            ) from error
        yield  # the lock file stays: to unlink it would let a third writer lock another one of the same name


def _flush(folder: Path) -> None:
    """To the disk before the rename, so that a power cut cannot leave a whole name with half a file behind it."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _move_into_place(staging: Path, place: Path) -> None:
    if not place.exists():
        staging.rename(place)
    elif not _exchange(staging, place):
        # No atomic exchange on this system: between the two renames the old bundle lies beside its place.
        aside = place.parent / f".{place.name}.old-{os.getpid()}"
        place.rename(aside)
        staging.rename(place)
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one system call (Linux's renameat2); False where the system has no such call."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(b))
