"""Predictions as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from rich.console import Group, RenderableType
from rich.text import Text

from cspdeploy.report.tables import UNTRAINED, compact_table

__all__ = ["render_predictions"]


class _Prediction(Protocol):
    @property
    def label(self) -> str: ...
    @property
    def probability(self) -> float: ...


def render_predictions(found: Mapping[str, Sequence[_Prediction]], *, untrained: bool) -> RenderableType:
    """A row an image: its likeliest classes with their probabilities, likeliest first."""
    table = compact_table("")
    table.add_column("image")
    table.add_column("class")
    table.add_column("probability", justify="right")
    table.add_column("then")
    for image, predictions in found.items():
        first, *others = predictions
        rest = ", ".join(f"{other.label} {100 * other.probability:.1f} %" for other in others)
        table.add_row(image, first.label, f"{100 * first.probability:.1f} %", rest)
    return Group(table, Text(UNTRAINED, style="bold yellow")) if untrained else table
