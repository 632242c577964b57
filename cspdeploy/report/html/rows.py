"""Rows of a report as words: what a verdict means, which rows are of which bundle. Shapes: N images."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cspdeploy.core.results import ParityRow, VerifyReport
from cspdeploy.core.sizes import Size, base_kind, size_of
from cspdeploy.report.html.markup import Markup, join, tag

__all__ = [
    "PREPROCESS", "VERDICT_WORDS", "artifact_rows", "bundle_rows", "mark", "row_name", "rows_of_size", "verdict_kind",
]  # fmt: skip

PREPROCESS = "preprocess"
"""The row of the shared preprocessing, which is no artifact."""

VERDICT_WORDS: dict[str, str] = {
    "pass": "holds",
    "numeric": "too far off",
    "decision": "decides otherwise",
    "nan": "NaN or infinite",
    "shape": "wrong shape",
    "dtype": "wrong dtype",
    "order": "wrong order",
    "inputs": "wrong inputs",
    "accuracy": "accuracy out of budget",
    "precision": "not of its precision",
    "placement": "on another provider",
    "crash": "engine crashed",
    "hang": "engine hung",
    "error": "does not run",
    "not-checkable": "not checkable here",
    "not-checked": "not checked",
}
_MARKS = {
    "pass": "\N{CHECK MARK}", "fail": "\N{MULTIPLICATION X}", "open": "\N{WHITE CIRCLE}", "warn": "!",
}  # fmt: skip


def verdict_kind(verdict: str) -> str:
    """The class and the mark of a verdict: "pass", "fail", or "open" where nothing was judged."""
    return verdict if verdict == "pass" else "open" if verdict in ("not-checkable", "not-checked") else "fail"


def mark(kind: str, words: str) -> Markup:
    """A sign and words, so that nobody has to tell colours apart."""
    sign = tag("span", _MARKS[kind], class_="sign", aria_hidden="true")
    return tag("span", sign, join(words), class_=f"mark {kind}")


def row_name(row: ParityRow) -> str:
    """Artifact and runtime."""
    return f"{row.artifact} on {row.runtime}"


def bundle_rows(report: VerifyReport, folder: Path) -> list[ParityRow]:
    """The rows of one bundle, where a report may be of several."""
    bundles = {row.bundle for row in report.rows}
    if len(bundles) <= 1:
        return list(report.rows)
    own = {bundle for bundle in bundles if Path(bundle).resolve() == folder.resolve()}
    return [row for row in report.rows if row.bundle in own]


def artifact_rows(rows: Iterable[ParityRow]) -> list[ParityRow]:
    """Without the rows of the preprocessing."""
    return [row for row in rows if base_kind(row.artifact) != PREPROCESS]


def rows_of_size(rows: Iterable[ParityRow], size_px: Size | None) -> list[ParityRow]:
    """Those of one size of the bundle; None is its own."""
    return [row for row in rows if size_of(row.artifact) == size_px]
