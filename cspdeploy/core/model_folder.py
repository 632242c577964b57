"""`models/<name>/`: spec.json, model.safetensors, labels.txt, calibration.npz, train.json. All but the weights here."""

from __future__ import annotations

import json
import zipfile
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cspdeploy.core.codec import from_json, to_json
from cspdeploy.core.errors import InputError
from cspdeploy.core.json_file import read_json, write_text
from cspdeploy.core.spec import SPEC_SCHEMA_VERSION, ModelSpec

__all__ = ["read_calibration", "read_json", "read_labels", "read_spec", "write_calibration", "write_spec", "write_text"]

SPEC_FILE = "spec.json"
WEIGHTS_FILE = "model.safetensors"
LABELS_FILE = "labels.txt"
CALIBRATION_FILE = "calibration.npz"
CURVE_FILE = "train.json"

# All that numpy and zipfile raise on a broken or hostile .npz.
UNREADABLE = (
    OSError, KeyError, ValueError, TypeError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
MAX_CALIBRATION_BYTES = 1 << 30


def read_spec(folder: Path) -> ModelSpec:
    """The model description in `folder`.

    Raises:
        InputError: missing, of another schema version, or with an unknown or wrong field (named by its path).
    """
    path = folder / SPEC_FILE
    data = read_json(path)
    if data.get("schema_version") != SPEC_SCHEMA_VERSION:
        raise InputError(
            f"{path}: schema_version {data.get('schema_version')!r}, expected {SPEC_SCHEMA_VERSION}",
            fix="make the folder with this version of cspdeploy",
        )
    try:
        return from_json(ModelSpec, data)
    except InputError as error:
        raise InputError(f"{path}: {error.message}", fix=error.fix) from error


def write_spec(folder: Path, spec: ModelSpec) -> None:
    """Write spec.json."""
    write_text(folder / SPEC_FILE, json.dumps(to_json(spec), indent=2) + "\n")


def read_labels(path: Path, *, num_classes: int) -> tuple[str, ...]:
    """Class names, one a line, in the order of the network's outputs.

    Raises:
        InputError: missing, or another number of lines than `num_classes`.
    """
    try:
        labels = tuple(path.read_text(encoding="utf-8").splitlines())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}", fix="give one class name a line") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: {error}", fix="give one class name a line") from error
    if len(labels) != num_classes:
        raise InputError(f"{path}: got {len(labels)} labels, expected {num_classes}", fix="one class name a line")
    return labels


def write_calibration(path: Path, images: npt.NDArray[np.uint8]) -> None:
    """Real training images as stored, `[N, H, W]` or `[N, H, W, 3]` uint8, before any preprocessing."""
    np.savez_compressed(path, images=images)


def read_calibration(path: Path) -> npt.NDArray[np.uint8]:
    """The images of `write_calibration`.

    Raises:
        InputError: missing, not such a file, or empty.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            total = sum(entry.file_size for entry in archive.infolist())
        if total > MAX_CALIBRATION_BYTES:
            raise InputError(f"{path}: unpacks to {total} bytes, expected at most {MAX_CALIBRATION_BYTES}")
        with np.load(path, allow_pickle=False) as archive:
            images: npt.NDArray[np.uint8] = archive["images"]
    except UNREADABLE as error:
        raise InputError(f"{path}: not calibration images ({error})", fix="give --calib DIR instead") from error
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in ((), (3,)) or len(images) == 0:
        raise InputError(f"{path}: got {images.dtype} {list(images.shape)}, expected uint8 [N, H, W] or [N, H, W, 3]")
    return images
