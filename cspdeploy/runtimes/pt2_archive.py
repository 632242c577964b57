"""A .pt2 file as plain data: what `torch.export.load` would run on the way is taken out or refused.

PyTorch's reader trusts its file. It unpickles sample inputs and weights that say so, hands symbolic expressions to
sympy, which evaluates them as Python, executes guards, and calls whatever a node names below `torch`. A bundle comes
from elsewhere, and its hashes come with it. So PyTorch is never given the file itself, but one that is written anew
from what a network needs: weights as raw bytes, a graph of ATen operators, sizes that are sizes.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cspdeploy.core.errors import InputError

__all__ = ["plain_program"]

MAX_BYTES = 1 << 32
"""Of all that is unpacked: four times the largest network that ONNX could hold in one file."""
MAX_JSON_BYTES = 1 << 28

_ROOT = "model"
_GRAPH, _SAMPLE = "models/model.json", "data/sample_inputs/model.pt"
_TABLES = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_PLAIN = re.compile(r"\.data/version|archive_format|archive_version|byteorder|data/weights/weight_\d+|"
                    r"data/constants/tensor_\d+")  # fmt: skip
_SIZE = re.compile(r"(?:Symbol\('s\d+', (?:positive=True, )?integer=True\)|s\d+|\d+|[*+/() -])+")
_CALLED = re.compile(r"torch\.ops\.aten\.\w+(?:\.\w+)?|_operator\.(?:add|floordiv|getitem|mul|sub|truediv)")
"""All that the networks of the registry are made of, and arithmetic of sizes."""


def plain_program(path: Path) -> io.BytesIO:
    """The file anew, with nothing in it that runs.

    Raises:
        InputError: not such an archive, too large, or with anything that a network does not need; says what.
    """
    made = io.BytesIO()
    try:
        with zipfile.ZipFile(path) as source, zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as target:
            entries = source.infolist()
            if sum(entry.file_size for entry in entries) > MAX_BYTES:
                raise InputError(f"{path}: unpacks to more than {MAX_BYTES} bytes", fix="do not use this file")
            seen: set[str] = set()
            for entry in entries:
                inner = entry.filename.partition("/")[2]
                if inner in seen:
                    raise _refused(path, f"'{inner}' twice")
                seen.add(inner)
                data = _plain(path, inner, source, entry)
                if data is not None:
                    target.writestr(zipfile.ZipInfo(f"{_ROOT}/{inner}"), data)
            if _GRAPH not in seen:
                raise InputError(f"{path}: not a .pt2 file (no {_GRAPH})", fix="export it again")
            target.writestr(zipfile.ZipInfo(f"{_ROOT}/{_SAMPLE}"), b"")  # which PyTorch asks for
    except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, OSError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"{path}: not a .pt2 file ({reason})", fix="export it again") from error
    made.seek(0)
    return made


def _plain(path: Path, inner: str, source: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes | None:
    """The entry's bytes; None for what is left out."""
    if inner in (_SAMPLE, ".data/serialization_id"):
        return None
    if inner == _GRAPH or inner in _TABLES:
        if entry.file_size > MAX_JSON_BYTES:
            raise _refused(path, f"{inner} of {entry.file_size} bytes")
        data = json.loads(source.read(entry))
        return json.dumps(_graph(path, data) if inner == _GRAPH else _table(path, data)).encode()
    if not _PLAIN.fullmatch(inner):
        raise _refused(path, f"'{inner[:80]}'")
    return source.read(entry)


def _table(path: Path, data: Any) -> Any:
    """Of weights by name: raw bytes all of them."""
    rows = data.get("config") if isinstance(data, dict) else None
    for row in rows.values() if isinstance(rows, dict) else ():
        if not isinstance(row, dict) or row.get("use_pickle") is not False:
            raise _refused(path, "a pickle")
        if not re.fullmatch(r"(?:weight|tensor)_\d+", str(row.get("path_name"))):
            raise _refused(path, f"weights in '{str(row.get('path_name'))[:80]}'")
    return data


def _graph(path: Path, data: Any) -> Any:
    """Without guards, which are Python, and without the notes of whoever exported; with known operators alone."""
    if not isinstance(data, dict):
        raise _refused(path, "no graph")
    data = {**data, "guards_code": []}
    for found in _walk(data):
        expression = found.get("expr_str")
        if expression is not None and not (isinstance(expression, str) and _is_size(expression)):
            raise _refused(path, f"a size that is none: {str(expression)[:60]!r}")
        if "target" in found and "inputs" in found:  # a node
            if not _CALLED.fullmatch(str(found["target"])):
                raise _refused(path, f"a call of '{str(found['target'])[:80]}'")
            found["metadata"] = {}
    return data


def _is_size(expression: str) -> bool:
    """No powers: 9**9**9 would be computed."""
    return _SIZE.fullmatch(expression) is not None and "**" not in expression


def _walk(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for item in list(value.values()):
            yield from _walk(item)
    elif isinstance(value, list):
        for item in value:
            yield from _walk(item)


def _refused(path: Path, what: str) -> InputError:
    return InputError(f"{path}: not a .pt2 file of a plain network: it holds {what}", fix="do not use this file")
