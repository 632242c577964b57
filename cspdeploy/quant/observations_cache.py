"""Observations kept between runs: what a graph gave on a set of images does not change, and takes minutes to see again.

A cache is never needed: whatever cannot be read is forgotten, whatever cannot be written is left out.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import __version__ as pillow_version

from cspdeploy.core.model_folder import UNREADABLE

__all__ = ["CACHE_VARIABLE", "ObservationsCache", "default_cache_folder", "observation_key"]

Arrays = Mapping[str, npt.NDArray[Any]]

CACHE_VARIABLE = "CSPDEPLOY_CACHE"
SCHEMA_VERSION = 1
MAX_CACHE_BYTES = 512 << 20
"""Observations of CSPDarknet53 are 46 MB unpacked and 4.5 MB here: a hundred."""
MAX_ENTRY_BYTES = 256 << 20
"""Unpacked, of one entry: bounds what a foreign file can make us allocate."""
STALE_SECONDS = 3600.0
"""A file that a writer has not finished in an hour belongs to a process that was killed."""

_KEY = re.compile(r"[0-9a-f]{64}")
_HEADER = "header"


def default_cache_folder() -> Path | None:
    """$CSPDEPLOY_CACHE, else `cspdeploy` below $XDG_CACHE_HOME or `~/.cache`; None for a user without a home."""
    if own := os.environ.get(CACHE_VARIABLE):
        return Path(own)
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if base.is_absolute():  # the XDG specification has relative ones ignored
        return base / "cspdeploy"
    try:
        return Path.home() / ".cache" / "cspdeploy"
    except RuntimeError:
        return None


def observation_key(graph: bytes, *, content_hash: str, observer: str) -> str:
    """The name of an observation: SHA-256 of all that it depends on.

    Args:
        graph: the ONNX file that was observed, with its weights.
        content_hash: of the images, `CalibrationSet.content_hash`.
        observer: name, version and settings of what observes.
    """
    # Another Pillow may decode and resize to other pixels.
    parts = {"graph": hashlib.sha256(graph).hexdigest(), "images": content_hash, "observer": observer,
             "pillow": pillow_version, "schema": SCHEMA_VERSION}  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class ObservationsCache:
    """Arrays by key, one file each. Several processes may share a folder.

    Args:
        folder: the cache's own, such as `default_cache_folder()`; None keeps and finds nothing.
        max_bytes: of all files together; those that were used the longest ago go first.
    """

    def __init__(self, folder: Path | None, *, max_bytes: int = MAX_CACHE_BYTES) -> None:
        self._folder = None if folder is None else folder / "observations"
        self._max_bytes = max_bytes

    def load(self, key: str) -> dict[str, npt.NDArray[Any]] | None:
        """What was stored under `key`; None where there is nothing, or nothing whole.

        Raises:
            ValueError: `key` is no key.
        """
        path = self._path(key)
        if path is None:
            return None
        try:
            arrays = _read(path, key)
        except UNREADABLE:
            return None
        with contextlib.suppress(OSError):  # a cache that may only be read
            os.utime(path)  # used now
        return arrays

    def store(self, key: str, arrays: Arrays) -> bool:
        """Keep `arrays` under `key`, then drop the oldest files beyond the bound; whether it was kept.

        Raises:
            ValueError: `key` is no key, or an array holds Python objects.
        """
        if any(array.dtype.hasobject for array in arrays.values()):
            raise ValueError("arrays: got Python objects, expected numbers")
        path = self._path(key)
        if path is None or sum(array.nbytes for array in arrays.values()) > MAX_ENTRY_BYTES:
            return False
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write(path, key, arrays)
            self._evict(path.parent)
        except OSError:  # a full disk, a folder that is not ours
            return False
        return path.is_file()

    def _path(self, key: str) -> Path | None:
        if not _KEY.fullmatch(key):
            raise ValueError(f"key: got {key!r}, expected 64 hexadecimal digits")
        return None if self._folder is None else self._folder / f"{key}.npz"

    def _evict(self, folder: Path) -> None:
        entries: list[tuple[float, int, Path]] = []
        for path in folder.iterdir():
            try:
                status = path.stat()
            except OSError:  # another process was faster
                continue
            if path.name.startswith(".") and path.suffix == ".tmp" and time.time() - status.st_mtime > STALE_SECONDS:
                path.unlink(missing_ok=True)
            elif path.suffix == ".npz" and _KEY.fullmatch(path.stem):  # others are not ours to delete
                entries.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self._max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size


def _read(path: Path, key: str) -> dict[str, npt.NDArray[Any]]:
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > 2 * MAX_ENTRY_BYTES:
            raise ValueError("too large")
    with np.load(path, allow_pickle=False) as stored:
        header = json.loads(stored[_HEADER].tobytes())
        if header["key"] != key or header["schema"] != SCHEMA_VERSION:
            raise ValueError("another file under this name")
        return {name: stored[f"a{i}"] for i, name in enumerate(header["names"])}


def _write(path: Path, key: str, arrays: Arrays) -> None:
    """Write beside, then rename: a reader sees no half-written file, and of two writers the later one stays."""
    # Names are data: those of tensors hold slashes, and one may be an argument of savez.
    header = json.dumps({"key": key, "schema": SCHEMA_VERSION, "names": list(arrays)}).encode()
    members = {f"a{i}": array for i, array in enumerate(arrays.values())}
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".tmp", delete=False) as file:
        beside = Path(file.name)
        try:
            # Counts are mostly zeros: the fastest level takes a third of the time of numpy's own.
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
                for name, array in {_HEADER: np.frombuffer(header, np.uint8), **members}.items():
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                        np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
            file.close()
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
