"""JSON files, read with suspicion and written whole. Imports little: a device reads its manifest at every start."""

from __future__ import annotations

import json
import os
from pathlib import Path

from cspdeploy.core.codec import JsonObject
from cspdeploy.core.errors import InputError

__all__ = ["read_json", "write_text"]

MAX_JSON_BYTES = 64 << 20  # a manifest is a few kilobytes; this bounds what a hostile one can make us allocate


def read_json(path: Path) -> JsonObject:
    """Parse a JSON object.

    Raises:
        InputError: the file is missing, too large, not JSON or not an object.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise InputError(f"{path}: {path.stat().st_size} bytes, expected at most {MAX_JSON_BYTES}")
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}", fix="name a folder that holds it") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})", fix="restore the file, or make it again") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: got a {type(data).__name__}, expected an object", fix="restore the file")
    return data


def write_text(path: Path, text: str) -> None:
    """Write beside, then rename: a reader sees the old file or the whole new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
