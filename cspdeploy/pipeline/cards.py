"""Every ONNX file of a bundle says of itself what it is, before its hash is taken."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from cspdeploy.core.bundle import file_record
from cspdeploy.core.card import card_of, stamp_card
from cspdeploy.core.env import package_version
from cspdeploy.core.types import Artifact, Manifest

__all__ = ["stamp_cards"]


def stamp_cards(folder: Path, manifest: Manifest) -> Manifest:
    """Write a card into each ONNX file in `folder`; gives the manifest with the hashes that the files have then."""
    tool = f"cspdeploy {package_version('cspdeploy') or 'from a source tree'}"

    def stamped(artifact: Artifact) -> Artifact:
        if artifact.format != "onnx":
            return artifact
        path = folder / artifact.file
        stamp_card(path, card_of(manifest, artifact, tool=tool))
        record = file_record(path)
        return dataclasses.replace(artifact, sha256=record.sha256, num_bytes=record.num_bytes)

    return dataclasses.replace(manifest, artifacts=tuple(stamped(artifact) for artifact in manifest.artifacts))
