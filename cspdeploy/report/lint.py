"""A file against targets, as tables. Knows a `LintReport` by its fields alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from cspdeploy.report.tables import compact_table

__all__ = ["render_lint"]

MAX_NODES = 3
"""Nodes that a line names; the rest is a count, and all are in the JSON."""
_STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red"}


def render_lint(report: Any) -> RenderableType:
    """One line a target, then what each does not take: equal findings together, with the nodes that have them."""
    table = compact_table(f"{report.file}  (opset {report.opset}, IR {report.ir_version})")
    table.add_column("target", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("violations", justify="right", no_wrap=True)
    table.add_column("warnings", justify="right", no_wrap=True)
    table.add_column("is")
    parts: list[RenderableType] = [table]
    for target in report.targets:
        violations, warnings = (
            sum(finding.severity == severity for finding in target.findings) for severity in ("violation", "warning")
        )
        table.add_row(
            target.target, Text(target.verdict, style=_STYLES[target.verdict]), str(violations or ""),
            str(warnings or ""), target.summary,
        )  # fmt: skip
        if target.findings:
            parts += [Text(""), Text(f"{target.target}: {target.verdict}", style=_STYLES[target.verdict])]
            parts += _lines(target)
    parts += [Text(""), _verdict(report)]
    return Group(*parts)


def _lines(target: Any) -> Iterable[Text]:
    groups: dict[tuple[str, ...], list[Any]] = {}
    for finding in target.findings:
        same = (finding.severity, finding.got, finding.takes, finding.fix)
        groups.setdefault(same, []).append(finding)
    for (severity, got, takes, fix), found in groups.items():
        style = "red" if severity == "violation" else "yellow"
        times = f" ({len(found)} nodes)" if len(found) > 1 else ""
        yield Text(f"  {severity}: {got}{times}; {target.target} takes {takes}", style=style)
        names = [_place(finding) for finding in found[:MAX_NODES] if finding.node]
        if names:
            more = f" and {len(found) - MAX_NODES} more" if len(found) > MAX_NODES else ""
            yield Text(f"    at: {', '.join(names)}{more}")
        yield Text(f"    fix: {fix}")
        yield Text(f"    source: {found[0].source}", style="dim")
    if target.num_elsewhere:
        here = target.num_nodes - target.num_elsewhere
        yield Text(
            f"  {here} of {target.num_nodes} nodes can run on the accelerator, in {target.num_pieces} pieces; "
            f"{target.num_elsewhere} stay on the CPU",
            style="yellow",
        )


def _place(finding: Any) -> str:
    return f"{finding.node} (module {finding.module})" if finding.module else str(finding.node)


def _verdict(report: Any) -> Text:
    refused = [target.target for target in report.targets if target.verdict == "fail"]
    if refused:
        they = "does" if len(refused) == 1 else "do"
        of_all = f"{len(refused)} of {len(report.targets)} target{'s' if len(report.targets) > 1 else ''}"
        return Text(f"FAIL: {of_all} {they} not take it: {', '.join(refused)}", style="bold red")
    warned = sum(target.verdict == "warn" for target in report.targets)
    loss = f", {warned} with warnings" if warned else ""
    num = len(report.targets)
    they = "target takes" if num == 1 else "targets take"
    return Text(f"PASS: {num} of {num} {they} it{loss}", style="bold green")
