"""How the sessions were set that were judged and timed, by the engines' own word; and what a device gave twice."""

from __future__ import annotations

from collections.abc import Sequence

from cspdeploy.core.results import ParityRow
from cspdeploy.report.html.markup import Column, Markup, join, ms_text, scientific, table, tag
from cspdeploy.report.html.rows import artifact_rows, row_name
from cspdeploy.report.sessions import session_lines

__all__ = ["session_table"]


def session_table(rows: Sequence[ParityRow]) -> Markup:
    """A row for each session of which something is known; columns that nothing fills are left out."""
    told = [row for row in artifact_rows(rows) if session_lines(row)]
    if not told:
        return Markup("")
    cells: dict[Column, list[str]] = {
        Column(name="artifact on runtime"): [row_name(row) for row in told],
        Column(name="relative L2 with TF32", number=True): [scientific(row.tf32_rel_l2) for row in told],
        Column(name="relative L2 to FP16 rounding", number=True): [scientific(row.rounding_rel_l2) for row in told],
        Column(name="runs of one input"): [_repeats(row) for row in told],
        Column(name="median between events", number=True): [ms_text(row.events_p50_ms) for row in told],
        Column(name="set to", wide=True): [_settings(row) for row in told],
    }
    kept = {column: values for column, values in cells.items() if any(values)}
    drift = any(row.tf32_rel_l2 is not None for row in told)
    tf32 = " Verdicts are with TF32 off; what was set otherwise for the timing is marked." if drift else ""
    return table(
        list(kept), zip(*kept.values(), strict=True),
        caption=f"How sessions were set, by the engine's own word, and what one input gave again and again.{tf32}",
    )  # fmt: skip


def _repeats(row: ParityRow) -> str:
    found = row.repeats
    if found is None:
        return ""
    if not found.num_different:
        return f"{found.num_runs}, all the same to the bit"
    what = (
        f"run {found.first_bad_run} is not finite" if found.first_bad_run
        else join("relative L2 ", scientific(found.max_rel_l2), " at most")
    )  # fmt: skip
    return join(f"{found.num_runs}, {found.num_different} differ", tag("small", what))


def _settings(row: ParityRow) -> str:
    return join(*(tag("span", f"{name}: {value}", class_="tensor") for name, value in row.settings.items()))
