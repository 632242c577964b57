"""Whether a bundle says one thing: its labels file, and the cards of its ONNX files, against its manifest.

An application may read any of the three, and with other labels or another mean all outputs are right and all answers
wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cspdeploy.core.card import card_of
from cspdeploy.core.errors import InputError
from cspdeploy.core.model_folder import LABELS_FILE
from cspdeploy.core.types import Artifact, Manifest
from cspdeploy.edge.opening import find_card
from cspdeploy.edge.selftest_report import CheckRow

__all__ = ["check_contract"]

FIELDS = ("model", "artifact", "task", "labels", "preprocess", "outputs", "frontend", "detection", "decode")
"""Of a card, all that an application acts on. The provenance and who wrote it may be told otherwise."""


def check_contract(folder: Path, manifest: Manifest, artifacts: Sequence[Artifact]) -> CheckRow:
    """Compare labels and cards with the manifest. The files have been found to be those of the manifest.

    Args:
        artifacts: those whose cards are looked at. A file that is no ONNX file is the golden check's.
    """
    problems = [*_wrong_labels(folder, manifest)]
    num_cards = 0
    for artifact in (one for one in artifacts if one.format == "onnx"):
        try:
            card = find_card(folder / artifact.file)
        except InputError as error:
            if "card" in error.message:
                problems.append(error.message)
            continue
        if card is None:
            continue
        num_cards += 1
        expected = card_of(manifest, artifact, tool=card.tool)
        wrong = [name for name in FIELDS if getattr(card, name) != getattr(expected, name)]
        if wrong:
            problems.append(f"{artifact.file}: its card has another {', '.join(wrong)} than the manifest")
    if problems:
        return CheckRow(check="contract", verdict="fail", reason="; ".join(problems))
    cards = f"{num_cards} card{'s' if num_cards != 1 else ''}"
    return CheckRow(check="contract", verdict="pass", reason=f"{len(manifest.labels)} labels, {cards}")


def _wrong_labels(folder: Path, manifest: Manifest) -> list[str]:
    spec = manifest.spec
    found = []
    if spec.task in ("classify", "detect") and len(manifest.labels) != spec.num_classes:
        found.append(f"{len(manifest.labels)} labels, expected {spec.num_classes}")
    if any(record.file == LABELS_FILE for record in manifest.files):
        try:
            listed = (folder / LABELS_FILE).read_text(encoding="utf-8").splitlines()
        except ValueError as error:
            return [*found, f"{LABELS_FILE}: not UTF-8 ({error})"]
        if tuple(listed) != manifest.labels:
            found.append(f"{LABELS_FILE}: other labels than the manifest, or in another order")
    return found
