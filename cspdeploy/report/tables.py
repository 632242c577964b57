"""Reports as tables for a terminal."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cspdeploy.core.types import ParityRow, VerifyReport

__all__ = ["compact_table", "format_bytes", "render_bench", "render_verify"]

_STYLES = {"pass": "green", "not-checkable": "yellow"}
UNTRAINED = "UNTRAINED: random weights; no prediction of it means anything"


def format_bytes(num_bytes: int) -> str:
    """Megabytes of 10^6 bytes, one decimal; empty for nothing."""
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes else ""


def compact_table(title: str) -> Table:
    """A table without vertical rules, so that eleven columns fit into a terminal."""
    return Table(
        title=title or None, title_justify="left", title_style="bold", header_style="bold", box=box.SIMPLE_HEAD,
        pad_edge=False, collapse_padding=True, show_edge=False,
    )  # fmt: skip


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.4g} %"


def _latency_cells(row: ParityRow) -> list[str]:
    if row.timing is None:
        return ["", "", ""]
    word = {"reference": "", "indistinguishable": "unclear"}.get(row.timing.verdict, row.timing.verdict)
    ratio = f"{row.timing.ratio:.2f}x {word}".strip()
    return [f"{row.timing.p50_ms:.2f}", f"{row.timing.p95_ms:.2f}", ratio]


def render_verify(report: VerifyReport) -> RenderableType:
    """One table a bundle, reasons of what failed, notes, and the verdict in the last line."""
    with_accuracy = any(row.top1 is not None for row in report.rows)
    parts: list[RenderableType] = []
    for bundle in dict.fromkeys(row.bundle for row in report.rows):
        table = compact_table(bundle)
        for name in ("artifact", "runtime"):
            table.add_column(name, no_wrap=True)
        table.add_column("size", justify="right", no_wrap=True)
        table.add_column("parity", no_wrap=True)
        for name in ("rel. L2", "limit", "same top-1"):
            table.add_column(name, justify="right", no_wrap=True)
        if with_accuracy:
            table.add_column("accuracy", justify="right", no_wrap=True)
        for name in ("p50 ms", "p95 ms"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("speed", no_wrap=True)
        rows = [row for row in report.rows if row.bundle == bundle]
        for row in rows:
            table.add_row(*_verify_cells(row, with_accuracy))
        parts += [table, *_remarks(rows)]
        if bundle in report.untrained:
            parts.append(Text(f"{bundle} is {UNTRAINED}", style="bold yellow"))
    parts += [Text(f"warning: {warning}", style="yellow") for warning in report.warnings]
    parts.append(_verdict(report))
    return Group(*parts)


def _verify_cells(row: ParityRow, with_accuracy: bool) -> list[str | Text]:
    cells: list[str | Text] = [
        row.artifact, row.runtime, format_bytes(row.num_bytes),
        Text(row.verdict, style=_STYLES.get(row.verdict, "bold red")),
        _number(row.rel_l2 if row.artifact != "preprocess" else row.max_abs, ".1e"), _number(row.limit, ".1e"),
        _percent(row.top1_agreement),
    ]  # fmt: skip
    if with_accuracy:
        cells.append(_percent(row.top1))
    return [*cells, *_latency_cells(row)]


def _remarks(rows: list[ParityRow]) -> list[Text]:
    remarks = [
        Text(f"{row.artifact} on {row.runtime}: {row.verdict}: {row.reason}", style="red" if row.failed else "yellow")
        for row in rows
        if row.reason
    ]
    notes = [Text(f"{row.artifact} on {row.runtime}: {row.note}", style="dim") for row in rows if row.note]
    return remarks + notes


def _verdict(report: VerifyReport) -> Text:
    checked = sum(row.verdict != "not-checkable" for row in report.rows)
    skipped = len(report.rows) - checked
    left = f", {skipped} not checkable here" if skipped else ""
    if report.verdict == "pass":
        return Text(f"PASS: {checked} of {checked} rows hold{left}", style="bold green")
    return Text(f"FAIL: first broken rung: {report.first_break}{left}", style="bold red")


def render_bench(report: VerifyReport) -> RenderableType:
    """Latencies alone, each against the first row of its bundle."""
    parts: list[RenderableType] = []
    for bundle in dict.fromkeys(row.bundle for row in report.rows):
        rows = [row for row in report.rows if row.bundle == bundle and (row.timing or row.failed)]
        first = next((f"{row.artifact} on {row.runtime}" for row in rows if row.timing), "nothing")
        table = compact_table(f"{bundle} (speed against {first})")
        for name in ("artifact", "runtime"):
            table.add_column(name, no_wrap=True)
        for name in ("p50 ms", "95 % interval", "p95 ms", "runs"):
            table.add_column(name, justify="right")
        table.add_column("speed")
        for row in rows:
            p50, p95, speed = _latency_cells(row)
            interval = f"{row.timing.ci_low_ms:.2f} to {row.timing.ci_high_ms:.2f}" if row.timing else row.reason
            runs = str(row.timing.num_runs) if row.timing else ""
            table.add_row(row.artifact, row.runtime, p50, interval, p95, runs, speed)
        parts.append(table)
        if bundle in report.untrained:
            parts.append(Text(f"{bundle} is {UNTRAINED}", style="bold yellow"))
    parts += [Text(f"warning: {warning}", style="yellow") for warning in report.warnings]
    return Group(*parts)
