"""How each limit of a verify report came about, and how each session was set, in words and numbers."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from cspdeploy.core.catalog import ACCURACY_BUDGET, INT8_AGREEMENT, TIE_FACTOR
from cspdeploy.core.results import Limit, ParityRow, VerifyReport
from cspdeploy.core.sizes import base_kind
from cspdeploy.report.sessions import session_lines

__all__ = ["render_explain"]


def render_explain(report: VerifyReport) -> RenderableType:
    """For each artifact and output: the limit, the model behind it with its numbers, and what each runtime measured.

    Then how each session was set, where its engine tells, and what the same input gave run after run.
    """
    parts: list[RenderableType] = []
    for bundle in dict.fromkeys(row.bundle for row in report.rows):
        rows = [row for row in report.rows if row.bundle == bundle and row.limits]
        if not rows:
            continue
        # Of each size of the bundle: its own, then those that are named after it.
        floors = {
            name.removeprefix(bundle): floor for name, floor in report.noise_floor.items()
            if base_kind(name) == bundle or name == bundle
        }  # fmt: skip
        listed = ", ".join(f"{floor:.2e} {size}".strip() for size, floor in floors.items())
        told = f" (noise floor {listed}: FP32 against FP64 of the original)" if listed else ""
        parts.append(Text(f"limits of {bundle}{told}", style="bold"))
        for artifact in dict.fromkeys(row.artifact for row in rows):
            parts += _artifact([row for row in rows if row.artifact == artifact])
    sessions = [(row, line) for row in report.rows for line in session_lines(row)]
    if sessions:
        parts.append(Text("sessions", style="bold"))
        parts += [Text(f"  {row.artifact} on {row.runtime}: {line}") for row, line in sessions]
    if any(row.top1_agreement is not None for row in report.rows):
        parts.append(Text(_decision_rule(report)))
    if any(row.top1 is not None for row in report.rows):
        budgets = ", ".join(f"{name} {100 * share:g} points" for name, share in ACCURACY_BUDGET.items())
        parts.append(Text(f"accuracy: top-1 may differ from the recorded one by: {budgets}"))
    return Group(*parts)


def _artifact(rows: list[ParityRow]) -> list[Text]:
    lines = []
    for limit in rows[0].limits:
        lines.append(Text(f"  {rows[0].artifact}, {limit.output}: {limit.rel_l2:.2e} = {limit.why}"))
        lines.append(Text(f"    {_terms(limit)}", style="dim"))
    measured = [
        f"{row.rel_l2:.2e} on {row.runtime} ({100 * row.rel_l2 / row.limit:.0f} % of the limit)"
        for row in rows
        if row.rel_l2 is not None and row.limit
    ]
    if measured:
        lines.append(Text(f"    measured: {'; '.join(measured)}"))
    return lines


def _terms(limit: Limit) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in limit.terms.items())


def _decision_rule(report: VerifyReport) -> str:
    rule = (
        f"decisions: another class may win only where the two best are closer than {TIE_FACTOR:g} times the typical "
        "error that the limit allows"
    )
    if any(limit.terms.get("num_quantised") for row in report.rows for limit in row.limits):
        rule += f"; of an INT8 artifact, on {100 * (1 - INT8_AGREEMENT):.0f} % of the images at most, or on one"
    return rule
