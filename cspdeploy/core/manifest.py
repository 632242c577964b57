"""The manifest of a bundle, as a text of unknown origin: from its bytes to its fields, without a look at any file."""

from __future__ import annotations

from pathlib import Path

from cspdeploy.core.codec import JsonObject, from_json
from cspdeploy.core.errors import InputError
from cspdeploy.core.json_file import parse_json
from cspdeploy.core.types import MANIFEST_SCHEMA_VERSION, Manifest

__all__ = ["MANIFEST_FILE", "file_names", "parse_manifest"]

MANIFEST_FILE = "manifest.json"


def parse_manifest(data: bytes, *, name: str) -> Manifest:
    """A manifest from its bytes; no file is looked at.

    Args:
        name: what errors call it.

    Raises:
        InputError: not JSON, of another schema version, an unknown or wrong field, a name that is there twice or leaves
            the folder.
    """
    found: JsonObject = parse_json(data, name=name)
    version = found.get("schema_version")
    if version != MANIFEST_SCHEMA_VERSION:
        newer = isinstance(version, int) and version > MANIFEST_SCHEMA_VERSION
        raise InputError(
            f"{name}: schema_version {version!r}, expected {MANIFEST_SCHEMA_VERSION}",
            fix="update cspdeploy" if newer else "export the bundle again",
        )
    try:
        manifest = from_json(Manifest, found)
    except InputError as error:
        raise InputError(f"{name}: {error.message}", fix="export the bundle again") from error
    names = file_names(manifest)
    for what, given in (("artifacts", [one.kind for one in manifest.artifacts]), ("file names", names)):
        twice = sorted(one for one in set(given) if given.count(one) > 1)
        if twice:
            raise InputError(f"{name}: {what}: '{twice[0]}' is there twice", fix="export the bundle again")
    for file in names:
        if file in ("", ".", "..") or Path(file).name != file or "\\" in file:
            raise InputError(f"{name}: file name '{file}' leaves the bundle's folder", fix="do not use this bundle")
    return manifest


def file_names(manifest: Manifest) -> list[str]:
    """All files that a manifest names: artifacts, and what lies beside them."""
    return [artifact.file for artifact in manifest.artifacts] + [record.file for record in manifest.files]
