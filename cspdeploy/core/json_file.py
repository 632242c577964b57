"""JSON files, read with suspicion and written whole. Imports little: a device reads its manifest at every start."""

from __future__ import annotations

import json
import os
from pathlib import Path

from cspdeploy.core.codec import JsonObject
from cspdeploy.core.errors import InputError

__all__ = ["MAX_JSON_BYTES", "parse_json", "read_json", "read_json_bytes", "write_text"]

MAX_JSON_BYTES = 64 << 20  # a manifest is a few kilobytes; this bounds what a hostile one can make us allocate


def read_json(path: Path) -> JsonObject:
    """Parse a JSON object.

    Raises:
        InputError: the file is missing, too large, not JSON or not an object.
    """
    return parse_json(read_json_bytes(path), name=str(path))


def read_json_bytes(path: Path) -> bytes:
    """The bytes of a JSON file, of which no more is read than one can have.

    Raises:
        InputError: the file is missing or too large.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}", fix="name a folder that holds it") from error
    if len(data) > MAX_JSON_BYTES:
        raise InputError(f"{path}: {path.stat().st_size} bytes, expected at most {MAX_JSON_BYTES}")
    return data


def parse_json(data: bytes, *, name: str) -> JsonObject:
    """Parse a JSON object.

    Args:
        name: what errors call it.

    Raises:
        InputError: not JSON in UTF-8, or not an object.
    """
    try:
        found = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: not JSON ({error})", fix="restore the file, or make it again") from error
    if not isinstance(found, dict):
        raise InputError(f"{name}: got a {type(found).__name__}, expected an object", fix="restore the file")
    return found


def write_text(path: Path, text: str) -> None:
    """Write beside, then rename: a reader sees the old file or the whole new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
