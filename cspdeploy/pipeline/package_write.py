"""A zip file that has the same bytes on every run: fixed date, order and permissions, and one way to pack each file."""

from __future__ import annotations

import hashlib
import os
import secrets
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cspdeploy.core.archive import Entry, bundle_prefix, read_entries, read_entry
from cspdeploy.core.archive_rules import MAX_RATIO
from cspdeploy.core.bundle import MANIFEST_FILE, FolderKind, disk_errors
from cspdeploy.core.errors import InputError, TamperedError
from cspdeploy.core.json_file import MAX_JSON_BYTES, parse_json

__all__ = ["PACKAGE", "PYZ_SAVING", "ZIP_SAVING", "Source", "require_replaceable", "write_package"]

Progress = Callable[[str, int, int], None]

PACKAGE = FolderKind(
    name="package", marker=MANIFEST_FILE, writer="package", elsewhere="give another file with -o"
)  # fmt: skip
# Why 5 %: deflate takes a sixth off the weights of CSPDarknet53 (FP32 18 %, FP16 16 %, INT8 14 %), and 4 % off images
# that are packed already, which are then better left alone.
ZIP_SAVING = 0.05
# Why a half: a zip application unpacks its model at every start; a sixth of its size is not worth that.
PYZ_SAVING = 0.5
SAMPLE_BYTES = 1 << 18
NUM_SAMPLES = 8
"""How much deflate saves is told from eight pieces of a quarter megabyte, spread over the file."""
MAX_PACKED_BYTES = int(((1 << 31) - 1) / 1.05)
"""Without ZIP64 zipfile writes files and offsets below 2 GiB, and keeps a twentieth for what packing may add."""
SAFE_RATIO = MAX_RATIO / 2
"""What deflates to less is stored, so that no reader takes it for a bomb, by a margin."""
MANIFEST_KEYS = frozenset({"schema_version", "spec", "artifacts", "files"})
"""That a manifest of any version has. Others call a file manifest.json, too."""
GOLDEN_SUFFIX = ".npz"
CHUNK_BYTES = 1 << 20
FIXED_DATE = (1980, 1, 1, 0, 0, 0)
"""The first that the format knows."""
FILE_MODE = 0o100644
UNIX = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A file to pack.

    Attributes:
        saving: the share of it that deflate must save to be used.
        sha256: that it must have, of the bytes that are packed; empty: it has none to be compared with.
    """

    path: Path
    saving: float
    sha256: str = ""


def require_replaceable(path: Path, *, overwrite: bool) -> None:
    """Refuse to write over what is not a package.

    Raises:
        InputError: a folder, or a file that is no package where `overwrite` was not asked for.
    """
    if path.is_dir():
        raise InputError(f"{path}: is a folder, expected a file", fix="name a file: -o model.zip or -o model.pyz")
    if overwrite or not (path.exists() or path.is_symlink()):
        return
    try:
        ours = _is_package(path)
    except InputError:
        ours = False
    if not ours:
        raise InputError(f"{path}: exists and is not a package", fix="give --overwrite, or another file with -o")


def _is_package(path: Path) -> bool:
    """Of any version of this. A zip file of somebody else may well hold a manifest.json: browser extensions do."""
    prefix = bundle_prefix(path)
    manifest = parse_json(read_entry(path, f"{prefix}{MANIFEST_FILE}", at_most=MAX_JSON_BYTES), name=str(path))
    names = {entry.name.removeprefix(prefix) for entry in read_entries(path)}
    return manifest.keys() >= MANIFEST_KEYS and any(
        name.startswith("golden") and name.endswith(GOLDEN_SUFFIX) for name in names
    )


def write_package(
    path: Path,
    files: Mapping[str, Source],
    *,
    prologue: bytes = b"",
    progress: Progress = lambda what, done, total: None,
) -> tuple[Entry, ...]:
    """Write beside, then rename; the reader of packages must take it before it gets its name.

    Args:
        files: by their names in the package.
        prologue: bytes before the zip file: the first line of a zip application, which then may be executed.

    Raises:
        InputError: the place cannot be written, or the files are more than a package holds.
        TamperedError: the bytes of a file are not those of its hash.
    """
    total = sum(source.path.stat().st_size for source in files.values())
    if total > MAX_PACKED_BYTES:
        raise InputError(f"{path}: {total} bytes to pack, expected at most {MAX_PACKED_BYTES}",
                         fix="--artifact onnx-int8: pack fewer artifacts")  # fmt: skip
    target = path.resolve()  # a link keeps pointing at the package
    with disk_errors(path, kind=PACKAGE), _beside(target) as beside:
        dense = _write(beside, files, prologue, stored=(), progress=progress)
        if dense:  # samples did not show it; to know, it had to be packed
            beside.unlink()
            _write(beside, files, prologue, stored=dense, progress=progress)
        if prologue:  # executable by whoever may read it
            mode = beside.stat().st_mode
            beside.chmod(mode | (mode & 0o444) >> 2)
        entries = read_entries(beside)
        beside.replace(target)
    return entries


def _write(
    path: Path, files: Mapping[str, Source], prologue: bytes, *, stored: Collection[str], progress: Progress
) -> set[str]:
    """Write it; names of what has become so small that a reader would take it for a bomb."""
    dense = set()
    with path.open("xb") as file:
        file.write(prologue)
        with zipfile.ZipFile(file, "w", allowZip64=False) as archive:
            for done, (name, source) in enumerate(sorted(files.items())):
                progress(f"packing, {source.path.name}", done, len(files))
                info = _add(archive, name, source, store=name in stored)
                if info.file_size > SAFE_RATIO * info.compress_size:
                    dense.add(name)
        file.flush()
        os.fsync(file.fileno())
    return dense


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A name for a file that is not there yet, in the folder of `target`; nothing is left there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.new-{secrets.token_hex(8)}")
    try:
        yield beside
    finally:
        beside.unlink(missing_ok=True)


def _add(archive: zipfile.ZipFile, name: str, source: Source, *, store: bool) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, date_time=FIXED_DATE)
    info.create_system, info.external_attr = UNIX, FILE_MODE << 16
    info.file_size = source.path.stat().st_size
    pays = not store and _pays(source.path, info.file_size, source.saving)
    info.compress_type = zipfile.ZIP_DEFLATED if pays else zipfile.ZIP_STORED
    digest = hashlib.sha256()
    with source.path.open("rb") as read, archive.open(info, "w") as written:
        while chunk := read.read(CHUNK_BYTES):
            digest.update(chunk)
            written.write(chunk)
    if source.sha256 and digest.hexdigest() != source.sha256:  # of what was packed, and not of what lay there before
        raise TamperedError(
            f"{source.path}: not the file of the manifest (SHA-256 differs)",
            fix="copy the bundle again, or export it again",
        )
    return info


def _pays(source: Path, num_bytes: int, saving: float) -> bool:
    """Whether deflate saves that share, by what it makes of samples; beyond `SAFE_RATIO` it is not used."""
    step = max(SAMPLE_BYTES, num_bytes // NUM_SAMPLES)
    taken = packed = 0
    with source.open("rb") as file:
        for start in range(0, num_bytes, step):
            file.seek(start)
            sample = file.read(SAMPLE_BYTES)
            taken, packed = taken + len(sample), packed + len(zlib.compress(sample))
    return taken / SAFE_RATIO < packed <= taken * (1 - saving)
