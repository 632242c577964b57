"""What came of building a bundle again. Knows a `ReproduceReport` by its fields alone."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from cspdeploy.report.tables import compact_table

__all__ = ["render_reproduction"]


def render_reproduction(report: Any) -> RenderableType:
    """One line a file, then what may explain a difference, versions first, and the verdict."""
    table = compact_table(report.bundle)
    table.add_column("file", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("SHA-256 recorded", no_wrap=True)
    table.add_column("rebuilt", no_wrap=True)
    for file in report.files:
        same = file.verdict == "equal"
        table.add_row(
            file.file, Text(file.verdict, style="green" if same else "bold red"), file.recorded_sha256[:16],
            "" if same else file.rebuilt_sha256[:16],
        )  # fmt: skip
    parts: list[RenderableType] = [table]
    for tool in report.tools:
        parts.append(
            Text(f"{tool.name} {tool.here or 'not'} here, {tool.recorded or 'not there'} then", style="yellow")
        )
    parts += [Text(remark, style="yellow") for remark in report.remarks]
    return Group(*parts, _verdict(report))


def _verdict(report: Any) -> Text:
    num = sum(file.verdict == "equal" for file in report.files)
    if report.verdict == "equal":
        return Text(f"EQUAL: all {num} files have the same bytes", style="bold green")
    why = "" if report.tools else "; the tools are of the same versions"
    return Text(f"DIFFERS: {num} of {len(report.files)} files have the same bytes{why}", style="bold red")
