"""A zip file that has the same bytes on every run: fixed date, order and permissions, and one way to pack each file."""

from __future__ import annotations

import os
import secrets
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from cspdeploy.core.archive import Entry, bundle_prefix, read_entries
from cspdeploy.core.archive_rules import MAX_RATIO, MAX_TOTAL_BYTES
from cspdeploy.core.bundle import FolderKind, disk_errors
from cspdeploy.core.errors import InputError

__all__ = ["PACKAGE", "PYZ_SAVING", "ZIP_SAVING", "require_replaceable", "write_package"]

Progress = Callable[[str, int, int], None]

PACKAGE = FolderKind(
    name="package", marker="manifest.json", writer="package", elsewhere="give another file with -o"
)  # fmt: skip
# Why 5 %: deflate takes a sixth off the weights of CSPDarknet53 (FP32 18 %, FP16 16 %, INT8 14 %), and 4 % off images
# that are packed already, which are then better left alone.
ZIP_SAVING = 0.05
# Why a half: a zip application unpacks its model at every start; a sixth of its size is not worth that.
PYZ_SAVING = 0.5
SAMPLE_BYTES = 1 << 18
NUM_SAMPLES = 8
"""How much deflate saves is told from eight pieces of a quarter megabyte, spread over the file."""
FIXED_DATE = (1980, 1, 1, 0, 0, 0)
"""The first that the format knows."""
FILE_MODE = 0o100644
UNIX = 3


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
        bundle_prefix(path)
    except InputError as error:
        raise InputError(
            f"{path}: exists and is not a package", fix="give --overwrite, or another file with -o"
        ) from error


def write_package(
    path: Path,
    files: Mapping[str, tuple[Path, float]],
    *,
    prologue: bytes = b"",
    progress: Progress = lambda what, done, total: None,
) -> tuple[Entry, ...]:
    """Write beside, then rename; the reader of packages must take it before it gets its name.

    Args:
        files: name in the package: the file, and the share of it that deflate must save to be used.
        prologue: bytes before the zip file: the first line of a zip application, which then may be executed.

    Raises:
        InputError: the place cannot be written, or the files are more than a package holds.
    """
    total = sum(source.stat().st_size for source, _ in files.values())
    if total > MAX_TOTAL_BYTES:
        raise InputError(f"{path}: {total} bytes to pack, expected at most {MAX_TOTAL_BYTES}",
                         fix="--artifact onnx-int8: pack fewer artifacts")  # fmt: skip
    target = path.resolve()  # a link keeps pointing at the package
    with disk_errors(path, kind=PACKAGE), _beside(target) as beside:
        with beside.open("xb") as file:
            file.write(prologue)
            with zipfile.ZipFile(file, "w", allowZip64=False) as archive:
                for done, (name, (source, saving)) in enumerate(sorted(files.items())):
                    progress(f"packing, {source.name}", done, len(files))
                    _add(archive, name, source, saving=saving)
            file.flush()
            os.fsync(file.fileno())
        if prologue:  # executable by whoever may read it
            mode = beside.stat().st_mode
            beside.chmod(mode | (mode & 0o444) >> 2)
        entries = read_entries(beside)
        beside.replace(target)
    return entries


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A name for a file that is not there yet, in the folder of `target`; nothing is left there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.new-{secrets.token_hex(8)}")
    try:
        yield beside
    finally:
        beside.unlink(missing_ok=True)


def _add(archive: zipfile.ZipFile, name: str, source: Path, *, saving: float) -> None:
    info = zipfile.ZipInfo(name, date_time=FIXED_DATE)
    info.create_system, info.external_attr = UNIX, FILE_MODE << 16
    info.file_size = source.stat().st_size
    info.compress_type = zipfile.ZIP_DEFLATED if _pays(source, info.file_size, saving) else zipfile.ZIP_STORED
    with source.open("rb") as read, archive.open(info, "w") as written:
        shutil.copyfileobj(read, written, 1 << 20)


def _pays(source: Path, num_bytes: int, saving: float) -> bool:
    """Whether deflate saves that share. Never beyond the ratio that a reader takes for a bomb, by a margin."""
    step = max(SAMPLE_BYTES, num_bytes // NUM_SAMPLES)
    taken = packed = 0
    with source.open("rb") as file:
        for start in range(0, num_bytes, step):
            file.seek(start)
            sample = file.read(SAMPLE_BYTES)
            taken, packed = taken + len(sample), packed + len(zlib.compress(sample))
    return taken / (MAX_RATIO / 2) < packed <= taken * (1 - saving)
