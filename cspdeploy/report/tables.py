"""Reports as tables for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from cspdeploy.core.results import ParityRow, Regression, VerifyReport
from cspdeploy.report.sessions import half_words, tf32_words

__all__ = ["UNTRAINED", "compact_table", "format_bytes", "number", "percent", "render_verify", "speed_word"]

_STYLES = {"pass": "green", "not-checkable": "yellow"}
UNTRAINED = "UNTRAINED: random weights; no prediction of it means anything"
MAX_NODES_LISTED = 12
"""Nodes on another provider that are named; the rest are counted, and all are in the JSON."""


def format_bytes(num_bytes: int) -> str:
    """Megabytes of 10^6 bytes, one decimal; empty for nothing."""
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes else ""


def compact_table(title: str) -> Table:
    """A table without vertical rules, so that eleven columns fit into a terminal."""
    return Table(
        title=title or None, title_justify="left", title_style="bold", header_style="bold", box=box.SIMPLE_HEAD,
        pad_edge=False, collapse_padding=True, show_edge=False,
    )  # fmt: skip


def number(value: float | None, form: str) -> str:
    """Formatted; empty for None."""
    return "" if value is None else format(value, form)


def percent(value: float | None) -> str:
    """A share of 1, in percent, four digits; empty for None."""
    return "" if value is None else f"{100 * value:.4g} %"


def speed_word(row: ParityRow) -> str:
    """The median of the first row over that of this one, and whether that is a difference."""
    if row.timing is None:
        return ""
    word = {"reference": "", "indistinguishable": "unclear"}.get(row.timing.verdict, row.timing.verdict)
    return f"{row.timing.ratio:.2f}x {word}".strip()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Column:
    """`priority` 0 is always shown; the highest goes first where the terminal is too narrow for all."""

    name: str
    cell: Callable[[ParityRow], str | Text]
    priority: int = 0
    right: bool = True


def _distance(row: ParityRow) -> str:
    return number(row.rel_l2 if row.limits or row.rel_l2 is not None else row.max_abs, ".1e")


def _limit(row: ParityRow) -> str:
    return number(row.limit, ".1e") + ("*" if any(limit.overridden for limit in row.limits) else "")


def _same_boxes(row: ParityRow) -> str:
    """Of the two shares the smaller one: lost boxes and invented ones are both wrong."""
    if row.box_recall is None or row.box_precision is None:
        return ""
    return percent(min(row.box_recall, row.box_precision)) if row.num_boxes else "no box"


_COLUMNS = (
    _Column(name="artifact", cell=lambda row: row.artifact, right=False),
    _Column(name="runtime", cell=lambda row: row.runtime, right=False),
    _Column(name="size", cell=lambda row: format_bytes(row.num_bytes), priority=3),
    _Column(name="parity", cell=lambda row: Text(row.verdict, style=_STYLES.get(row.verdict, "bold red")), right=False),
    _Column(name="rel. L2", cell=_distance),
    _Column(name="limit", cell=_limit),
    _Column(name="with TF32", cell=lambda row: number(row.tf32_rel_l2, ".1e"), priority=3),
    _Column(name="FP16 drift", cell=lambda row: number(row.rounding_rel_l2, ".1e"), priority=3),
    _Column(name="same top-1", cell=lambda row: percent(row.top1_agreement), priority=2),
    _Column(name="same boxes", cell=_same_boxes, priority=2),
    _Column(name="accuracy", cell=lambda row: percent(row.top1)),
    _Column(name="mAP50", cell=lambda row: percent(row.map50)),
    _Column(name="mAP", cell=lambda row: percent(row.map), priority=1),
    _Column(name="p50 ms", cell=lambda row: number(row.timing.p50_ms if row.timing else None, ".2f")),
    _Column(name="p95 ms", cell=lambda row: number(row.timing.p95_ms if row.timing else None, ".2f"), priority=4),
    _Column(name="events ms", cell=lambda row: number(row.events_p50_ms, ".2f"), priority=2),
    _Column(name="speed", cell=speed_word, right=False),
    _Column(name="cold ms", cell=lambda row: number(row.cold.total_ms if row.cold else None, ".0f"), priority=5),
    _Column(name="memory", cell=lambda row: format_bytes(row.memory.peak_bytes) if row.memory else "", priority=6),
)
_ALWAYS = {"artifact", "runtime", "parity", "rel. L2", "limit", "same top-1", "p50 ms", "p95 ms", "speed", "size"}
"""Columns that are there even if empty; the others where some row fills them."""


@dataclass(frozen=True, slots=True)
class _Ladder:
    """The rows of a bundle, in as many columns as the terminal is wide."""

    title: str
    rows: list[ParityRow]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        columns = [
            column
            for column in _COLUMNS
            if column.name in self._always() or any(str(column.cell(row)) for row in self.rows)
        ]
        while True:
            table = self._table(columns)
            least = max((column.priority for column in columns), default=0)
            # The title wraps, the cells do not.
            width = Measurement.get(console, options.update(max_width=10_000), self._table(columns, "")).maximum
            if width <= options.max_width or least == 0:
                yield table
                return
            columns = [column for column in columns if column.priority != least]

    def _always(self) -> set[str]:
        """Of a detector nothing is first: its boxes take the place of the first class."""
        return _ALWAYS - {"same top-1"} if any(row.box_recall is not None for row in self.rows) else _ALWAYS

    def _table(self, columns: list[_Column], title: str | None = None) -> Table:
        table = compact_table(self.title if title is None else title)
        for column in columns:
            table.add_column(column.name, justify="right" if column.right else "left", no_wrap=True)
        for row in self.rows:
            table.add_row(*(column.cell(row) for column in columns))
        return table


def render_verify(report: VerifyReport) -> RenderableType:
    """One table a bundle, reasons of what failed, notes, and the verdict in the last lines."""
    parts: list[RenderableType] = []
    for bundle in dict.fromkeys(row.bundle for row in report.rows):
        rows = [row for row in report.rows if row.bundle == bundle]
        parts += [_Ladder(bundle, rows), *_remarks(rows)]
        if bundle in report.untrained:
            parts.append(Text(f"{bundle} is {UNTRAINED}", style="bold yellow"))
    if report.regressions:
        parts += [Text(), _regressions(report)]
    parts += [Text(note, style="dim") for note in report.notes]
    parts += [Text(f"warning: {warning}", style="yellow") for warning in report.warnings]
    parts.append(_verdict(report))
    if report.verdict == "fail" and report.settings.get("next_step"):
        parts.append(Text(f"next: {report.settings['next_step']}", style="bold"))
    return Group(*parts)


def _remarks(rows: list[ParityRow]) -> list[Text]:
    found: list[Text] = []
    for row in rows:
        where = f"{row.artifact} on {row.runtime}"
        if row.reason:
            style = "red" if row.failed else "yellow"
            found.append(Text(f"{where}: {row.verdict}: {row.reason}", style=style))
        found += [Text(line, style="yellow") for line in _placement_lines(where, row)]
        drifts = filter(None, (tf32_words(row), half_words(row)))
        found += [Text(f"{where}: {drift}", style="dim") for drift in drifts]
    given = sorted({row.artifact for row in rows if any(limit.overridden for limit in row.limits)})
    if given:
        line = f"* limit given with --tolerance for {', '.join(given)}; --explain tells what the model says"
        found.append(Text(line, style="bold yellow"))
    notes = [Text(f"{row.artifact} on {row.runtime}: {row.note}", style="dim") for row in rows if row.note]
    return found + notes


def _placement_lines(where: str, row: ParityRow) -> list[str]:
    lines = []
    if row.nodes_elsewhere:
        named = [f"{node.node} ({node.operator}) on {node.provider}" for node in row.nodes_elsewhere]
        left = len(named) - MAX_NODES_LISTED
        more = [f"and {left} more"] if left > 0 else []
        listed = "; ".join(named[:MAX_NODES_LISTED] + more)
        lines.append(f"{where}: {len(named)} nodes run elsewhere: {listed}")
    if row.num_copies:
        lines.append(f"{where}: {row.num_copies} copies between devices")
    return lines


def _regressions(report: VerifyReport) -> Table:
    table = compact_table(f"against {report.against}")
    for name in ("artifact", "runtime", "now"):
        table.add_column(name, no_wrap=True)
    boxes = any(found.same_boxes is not None for found in report.regressions)
    for name in ("rel. L2", "same boxes" if boxes else "same top-1", "size"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("speed", no_wrap=True)
    table.add_column("why")
    styles = {"worse": "bold red", "gone": "bold red", "better": "green"}
    for found in report.regressions:
        table.add_row(
            found.artifact, found.runtime, Text(found.verdict, style=styles.get(found.verdict, "")),
            number(found.rel_l2, ".1e"), percent(found.same_boxes if boxes else found.top1_agreement), _growth(found),
            _old_speed(found), found.reason,
        )  # fmt: skip
    return table


def _growth(found: Regression) -> str:
    if not found.old_bytes or not found.new_bytes:
        return ""
    return f"{100 * (found.new_bytes / found.old_bytes - 1):+.1f} %"


def _old_speed(found: Regression) -> str:
    if found.ratio is None:
        return ""
    word = "unclear" if found.latency == "indistinguishable" else found.latency
    return f"{found.ratio:.2f}x {word}".strip()


def _verdict(report: VerifyReport) -> Text:
    checked = sum(row.verdict != "not-checkable" for row in report.rows)
    skipped = len(report.rows) - checked
    left = f", {skipped} not checkable here" if skipped else ""
    given = sum(any(limit.overridden for limit in row.limits) for row in report.rows)
    by_hand = f"; {given} judged by limits given with --tolerance" if given else ""
    if report.verdict == "pass":
        return Text(f"PASS: {checked} of {checked} rows hold{left}{by_hand}", style="bold green")
    return Text(f"FAIL: first broken rung: {report.first_break}{left}{by_hand}", style="bold red")
