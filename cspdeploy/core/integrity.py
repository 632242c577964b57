"""Whether a file is the one that a manifest describes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cspdeploy.core.errors import InputError, TamperedError

__all__ = ["Expected", "file_sha256", "held_unchanged", "require_unchanged"]

Expected = tuple[str, str, int]
"""File name, SHA-256 in hexadecimal, size in bytes."""

_COPY_AGAIN = "copy the bundle again, or export it again"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_unchanged(folder: Path, files: Sequence[Expected]) -> None:
    """Compare files with what is expected of them.

    Raises:
        InputError: a file cannot be read.
        TamperedError: files differ; all are named, and of which only a part is there.
    """
    changed = [file for file in files if not _is_unchanged(folder / file[0], file)]
    if changed:
        raise _tampered(folder, changed)


@contextmanager
def held_unchanged(folder: Path, expected: Expected) -> Iterator[None]:
    """Check a file's hash, and at the end of the block that it is still that file: an engine opens it in between.

    An engine that is given bytes takes twice the memory and longer (measured with ONNX Runtime 1.31 on 27 and 106 MB:
    35 and 180 ms of CPU more), so it is given the path. Whatever writes to the file or puts another in its place
    changes one of the numbers that are compared.

    Raises:
        InputError: it cannot be read.
        TamperedError: it differs, or has changed meanwhile.
    """
    path = folder / expected[0]
    before = _identity(path)
    require_unchanged(folder, [expected])
    yield
    if _identity(path) != before:
        raise TamperedError(f"{path}: has changed while it was opened", fix="wait until the bundle is whole, try again")


def _identity(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _is_unchanged(path: Path, expected: Expected) -> bool:
    try:
        return path.stat().st_size == expected[2] and file_sha256(path) == expected[1]
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: {error.strerror or error}", fix="make it readable for this user, or copy it again")


def _tampered(folder: Path, changed: Sequence[Expected]) -> TamperedError:
    names = ", ".join(name for name, _, _ in changed)
    sizes = [
        f"{name} has {size} of {num_bytes} bytes: copied in part?"
        for name, _, num_bytes in changed
        if (size := _size(folder / name)) < num_bytes
    ]
    told = f"; {sizes[0]}" if len(changed) == 1 and sizes else f"; {len(sizes)} copied in part?" if sizes else ""
    return TamperedError(f"{folder}: {names}: not the file of the manifest (SHA-256 differs{told})", fix=_COPY_AGAIN)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
