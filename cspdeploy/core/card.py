"""What an ONNX file says of itself, in its `metadata_props`: one dropped file explains what goes in and what comes out.

The card is the part of the manifest that an application needs, as JSON under one key, beside a sentence for whoever
opens the file in a viewer. Written and read without the onnx package.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cspdeploy.core.codec import from_json, to_json
from cspdeploy.core.detection.spec import Decode, Detection
from cspdeploy.core.errors import InputError
from cspdeploy.core.onnx_edit import with_metadata
from cspdeploy.core.sizes import size_of, spec_at
from cspdeploy.core.spec import Preprocess, Provenance, Task
from cspdeploy.core.types import Artifact, Frontend, Manifest

__all__ = ["CARD_KEY", "CARD_SCHEMA_VERSION", "SUMMARY_KEY", "ModelCard", "card_of", "read_card", "stamp_card"]

CARD_KEY, SUMMARY_KEY = "cspdeploy.card", "cspdeploy.summary"
CARD_SCHEMA_VERSION = 1
MAX_CARD_BYTES = 1 << 24
"""A thousand labels take 20 KB; a card of megabytes is not one of ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """Of one ONNX file.

    Attributes:
        artifact: kind, of `cspdeploy.core.catalog.ARTIFACT_KINDS`; with a size where its bundle has several.
        labels: in the order of the class scores; placeholders for what is no classifier.
        preprocess: from an image to the network's input; where there is a `frontend`, what the graph does of it itself.
        outputs: names, in the order of the file.
        tool: "cspdeploy 1.2.3", which wrote it.
        detection: of a detector, how its outputs become boxes; `decode` is the contract of this file.
    """

    schema_version: int = CARD_SCHEMA_VERSION
    model: str
    artifact: str
    task: Task
    labels: tuple[str, ...]
    preprocess: Preprocess
    outputs: tuple[str, ...]
    provenance: Provenance
    tool: str
    frontend: Frontend | None = None
    detection: Detection | None = None
    decode: Decode | None = None

    @property
    def summary(self) -> str:
        """One sentence, which says UNTRAINED where it is so."""
        contract = self.preprocess
        what = "classes" if self.task == "classify" else self.task
        trained = "UNTRAINED: random weights, no answer means anything. " if self.provenance.untrained else ""
        return (
            f"{trained}{self.model}, {self.artifact}: {contract.height_px}x{contract.width_px} px, {len(self.labels)} "
            f"{what}, by {self.tool}; see {CARD_KEY}"
        )


def card_of(manifest: Manifest, artifact: Artifact, *, tool: str) -> ModelCard:
    """That of an artifact of a bundle."""
    spec = spec_at(manifest.spec, size_of(artifact.kind))
    return ModelCard(
        model=spec.name, artifact=artifact.kind, task=spec.task, labels=manifest.labels,
        preprocess=spec.preprocess, outputs=tuple(value.name for value in artifact.outputs),
        provenance=spec.provenance, tool=tool, frontend=artifact.frontend,
        detection=spec.detection, decode=artifact.decode,
    )  # fmt: skip


def stamp_card(path: Path, card: ModelCard) -> None:
    """Write the card into an ONNX file, in place of the one that it has. The file is whole at any moment."""
    text = json.dumps(to_json(card), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    data = with_metadata(path.read_bytes(), {CARD_KEY: text, SUMMARY_KEY: card.summary})
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".onnx", delete=False) as file:
        beside = Path(file.name)
        try:
            file.write(data)
            file.close()
            beside.chmod(path.stat().st_mode)
            os.replace(beside, path)  # noqa: PTH105 (Path.replace says the same)
        finally:
            beside.unlink(missing_ok=True)


def read_card(metadata: Mapping[str, str], *, name: str) -> ModelCard | None:
    """The card among the `metadata_props` of a file; None where it has none.

    Args:
        name: of the file, for errors.

    Raises:
        InputError: of a newer version, broken, or too large.
    """
    text = metadata.get(CARD_KEY)
    if text is None:
        return None
    again = "export it again"
    if len(text) > MAX_CARD_BYTES:
        raise InputError(f"{name}: {CARD_KEY} has {len(text)} characters, expected at most {MAX_CARD_BYTES}", fix=again)
    try:
        data = json.loads(text)
        version = data.get("schema_version") if isinstance(data, dict) else None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: {CARD_KEY} is not JSON ({error})", fix=again) from error
    if version != CARD_SCHEMA_VERSION:
        newer = isinstance(version, int) and version > CARD_SCHEMA_VERSION
        raise InputError(
            f"{name}: {CARD_KEY} has schema_version {version!r}, expected {CARD_SCHEMA_VERSION}",
            fix="update cspdeploy" if newer else again,
        )
    try:
        return from_json(ModelCard, data)
    except InputError as error:
        raise InputError(f"{name}: {CARD_KEY}: {error.message}", fix=again) from error
