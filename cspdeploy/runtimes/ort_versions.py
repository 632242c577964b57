"""Which ONNX files a version of ONNX Runtime reads: told before it opens one, and taken from its own words after."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from cspdeploy.core.errors import EXIT_NO_ENGINE, InputError
from cspdeploy.core.onnx_wire import Message, read_message
from cspdeploy.runtimes.base import SessionRequest

__all__ = ["EngineTooOldError", "FileVersions", "read_model", "read_versions", "require_readable", "told_too_old"]

T = TypeVar("T")

_AGAIN = "copy it again, or export it again"
_IR_VERSION, _OPSET_IMPORT = 1, 8  # ModelProto
_DOMAIN, _VERSION = 1, 2  # OperatorSetIdProto

# (opset, IR version) at most, by release. From the version matrix of onnxruntime.ai/docs/reference/compatibility and
# the VERSION_TABLE of onnx.helper. A release that is not here is asked itself: what it cannot read, it says.
_READS: dict[tuple[int, int], tuple[int, int]] = {
    (1, 10): (15, 8), (1, 11): (16, 8), (1, 12): (17, 8), (1, 13): (17, 8), (1, 14): (18, 8), (1, 15): (19, 9),
    (1, 16): (19, 9), (1, 17): (20, 9), (1, 18): (21, 10), (1, 19): (21, 10), (1, 20): (21, 10), (1, 21): (22, 10),
    (1, 22): (23, 11), (1, 23): (23, 11),
}  # fmt: skip

_TOLD_IR = r"Unsupported model IR version: (\d+), max supported IR version: (\d+)"
_TOLD_OPSET = r"Opset (\d+) is under development .*?domain ai\.onnx is till opset (\d+)"


class EngineTooOldError(InputError):
    """The file is of a newer ONNX than the engine reads: a failed check, and for a device an engine that is missing."""

    exit_code = EXIT_NO_ENGINE


class FileVersions(NamedTuple):
    """Of an ONNX file: its IR version, and the version of ONNX's own operators."""

    ir_version: int
    opset: int


def read_versions(request: SessionRequest) -> FileVersions:
    """The versions of a file. Nothing of the graph is read.

    Raises:
        InputError: not an ONNX file.
    """
    return read_model(request, _versions)


def read_model(request: SessionRequest, reader: Callable[[Message], T]) -> T:
    """What `reader` makes of a model, in a file or in memory.

    Raises:
        InputError: not an ONNX file.
    """
    if request.data is None:
        return read_message(request.path, reader)
    try:
        return reader(Message(request.data, (0, len(request.data))))
    except (ValueError, IndexError, RecursionError, struct.error) as error:
        raise InputError(f"{request.path}: not an ONNX file, or a truncated one ({error})", fix=_AGAIN) from error


def _versions(model: Message) -> FileVersions:
    opsets = [one.integer(_VERSION) for one in model.messages(_OPSET_IMPORT) if one.text(_DOMAIN) in ("", "ai.onnx")]
    return FileVersions(ir_version=model.integer(_IR_VERSION), opset=max(opsets, default=0))


def require_readable(request: SessionRequest, *, engine: str) -> None:
    """Refuse a file that this release is known not to read.

    Args:
        engine: version of ONNX Runtime: "1.17.3".

    Raises:
        EngineTooOldError: names both versions, and the release that reads the file.
        InputError: not an ONNX file.
    """
    reads = _READS.get(_release(engine))
    if reads is None:
        return
    found = read_versions(request)
    if found.opset > reads[0] or found.ir_version > reads[1]:
        raise _too_old(request.path, engine, found, reads)


def told_too_old(error: Exception, request: SessionRequest, *, engine: str) -> EngineTooOldError | None:
    """The engine's own refusal for a version, as one of ours; None where it refuses for something else."""
    told_ir, told_opset = re.search(_TOLD_IR, str(error)), re.search(_TOLD_OPSET, str(error), re.DOTALL)
    if told_ir is None and told_opset is None:
        return None
    found = read_versions(request)
    # What the engine did not name is taken as read.
    opset = int(told_opset[2]) if told_opset else found.opset
    return _too_old(request.path, engine, found, (opset, int(told_ir[2]) if told_ir else found.ir_version))


def _too_old(path: Path, engine: str, found: FileVersions, reads: tuple[int, int]) -> EngineTooOldError:
    pairs = (("opset", found.opset, reads[0]), ("IR version", found.ir_version, reads[1]))
    has = " and ".join(f"{what} {own}" for what, own, most in pairs if own > most)
    takes = " and ".join(f"{what} {most}" for what, own, most in pairs if own > most)
    needed = [release for release, (opset, ir) in _READS.items() if opset >= found.opset and ir >= found.ir_version]
    wanted = f"'onnxruntime>={needed[0][0]}.{needed[0][1]}'" if needed else "--upgrade onnxruntime"
    return EngineTooOldError(
        f"{path}: {has or 'newer than the engine'}, onnxruntime {engine} reads {takes or 'less'} at most",
        fix=f"pip install {wanted}, or export it again with a lower --opset",
    )


def _release(engine: str) -> tuple[int, int]:
    numbers = re.match(r"(\d+)\.(\d+)", engine)
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
