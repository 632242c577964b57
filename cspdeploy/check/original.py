"""Where the very file lies that a bundle was made from: weights, or an ONNX file."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cspdeploy.core.bundle import file_sha256
from cspdeploy.core.errors import InputError
from cspdeploy.core.model_folder import WEIGHTS_FILE
from cspdeploy.core.onnx_file import check_external_data, external_data_files
from cspdeploy.core.types import Manifest

__all__ = ["ONNX_FAMILY", "find_weights", "onnx_sha256", "why_absent"]

ONNX_FAMILY = "onnx"
"""`NetworkSpec.family` of a bundle that was made from an ONNX file: there is no network to build."""


def why_absent(manifest: Manifest) -> str:
    """What to say where `find_weights` finds none."""
    if manifest.spec.provenance.untrained:
        return "random weights are not kept: the original's outputs are in golden.npz"
    return "the weights that the bundle was made from are not here"


def find_weights(folder: Path, manifest: Manifest) -> Path | None:
    """The file with the very bytes that the bundle was made from, where it lay at export or in models/.

    Of a bundle that was made from an ONNX file it is that file, where it lay at export or beside the bundle.
    """
    sha256 = manifest.spec.provenance.weights_sha256
    given = Path(str(manifest.options.get("model", "")))
    if manifest.spec.network.family == ONNX_FAMILY:
        files = (given, folder.parent / given.name, folder.parent.parent / given.name, Path(given.name))
        return next((path for path in files if sha256 and _is_original(path, sha256)), None)
    names = dict.fromkeys((manifest.spec.name, given.name))
    places = [
        Path(str(manifest.options.get("weights", ""))),
        *(
            models / name / WEIGHTS_FILE
            for name in names
            for models in (Path("models"), folder.parent.parent / "models")
        ),
    ]
    return next((path for path in places if sha256 and _may_be_weights(path) and file_sha256(path) == sha256), None)


def _may_be_weights(path: Path) -> bool:
    """The path may come from a manifest of unknown origin: nothing but a weights file is read."""
    return path.suffix in (".safetensors", ".pth", ".pt", ".bin", ".weights", ".backup") and path.is_file()


def _is_original(path: Path, sha256: str) -> bool:
    """Whether it is that ONNX file. Likewise of unknown origin: a file that cannot be read is not the one."""
    try:
        return path.suffix.lower() == ".onnx" and path.is_file() and onnx_sha256(path) == sha256
    except (InputError, OSError):
        return False


def onnx_sha256(path: Path) -> str:
    """SHA-256 of an ONNX file; where it keeps weights in other files, of all of them together, by name.

    Raises:
        InputError: not an ONNX file, or its weights lie outside its folder.
    """
    check_external_data(path)
    others = external_data_files(path)
    if not others:
        return file_sha256(path)
    digest = hashlib.sha256(file_sha256(path).encode())
    for name in others:
        digest.update(f"{name}\0{file_sha256(path.parent / name)}".encode())
    return digest.hexdigest()
