"""compare as tables. They take what the stages return and know it by its fields alone."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from cspdeploy.report.tables import UNTRAINED, compact_table, format_bytes

__all__ = ["format_size", "render_comparison", "render_paper"]

_UNITS = {"MACs": ("GMAC", 1e9, ".3f"), "activations": ("million", 1e6, ".2f")}
_VERDICTS = {
    "holds": "bold green", "does not hold": "bold red", "undecided": "yellow", "not measurable here": "yellow",
}  # fmt: skip


def format_size(size_px: tuple[int, int]) -> str:
    """Height x width."""
    return "x".join(map(str, size_px))


# --- two networks ---


def render_comparison(report: Any) -> RenderableType:
    """A `CompareReport`: one row a quantity, then the training, remarks, and what the numbers hold for."""
    table = compact_table(f"A {report.a.given} against B {report.b.given} at {format_size(report.regime.size_px)} px")
    table.add_column("quantity", no_wrap=True)
    for name in ("A", "B", "B / A"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("B is")
    for quantity in report.quantities:
        table.add_row(*_quantity_cells(quantity))
    for row in report.latency:
        table.add_row(*_latency_cells(row))
        if row.device_ratio is not None:
            table.add_row(*_device_cells(row))
    for cells in _accuracy_rows(report.accuracy):
        table.add_row(*cells)
    parts: list[RenderableType] = [table]
    if report.training is not None:
        parts += _training(report.training)
    parts += [Text(f"accuracy: {line}", style="dim") for line in _accuracy_remarks(report.accuracy)]
    parts += [Text(f"note: {note}", style="dim") for note in report.notes]
    parts += [Text(line, style="dim") for line in _regime(report)]
    parts += [Text(f"warning: {warning}", style="yellow") for warning in report.warnings]
    for label, side in (("A", report.a), ("B", report.b)):
        if side.untrained:
            parts.append(Text(f"{label} {side.given} is {UNTRAINED}", style="bold yellow"))
    return Group(*parts)


def _quantity_cells(quantity: Any) -> list[str]:
    ratio = "" if quantity.ratio is None else f"{quantity.ratio:.3f}"
    if quantity.kind == "bytes":
        return [quantity.name, format_bytes(quantity.a), format_bytes(quantity.b), ratio, ""]
    unit, divisor, form = _UNITS.get(quantity.name, ("", 1, ",d"))
    name = f"{quantity.name}, {unit}" if unit else quantity.name
    values = (quantity.a, quantity.b) if divisor == 1 else (quantity.a / divisor, quantity.b / divisor)
    return [name, *(format(value, form) for value in values), ratio, ""]


def _latency_cells(row: Any) -> list[str | Text]:
    name = f"{row.regime}, batch {row.batch}"
    if row.ratio is None:
        return [name, "", "", "", Text(f"not measured: {row.reason}", style="yellow")]
    interval = f"{row.ratio:.3f} ({row.ratio_low:.3f} to {row.ratio_high:.3f})"
    style = {"faster": "green", "slower": "red"}.get(row.verdict, "")
    return [name, f"{row.a.p50_ms:.2f} ms", f"{row.b.p50_ms:.2f} ms", interval, Text(row.verdict, style=style)]


def _device_cells(row: Any) -> list[str | Text]:
    """The same between events on the device's stream, below it: without the host's wait for the end."""
    interval = f"{row.device_ratio:.3f} ({row.device_ratio_low:.3f} to {row.device_ratio_high:.3f})"
    return ["  between events", f"{row.a_device_ms:.2f} ms", f"{row.b_device_ms:.2f} ms", interval, ""]


def _accuracy_rows(pair: Any) -> list[list[str]]:
    if pair.a is None and pair.b is None:
        return []
    rows = []
    other = "not by the network alone" if pair.reason else ""  # beside the number, for the reason stands far below
    for name, shown in (("top1", "top-1"), ("top5", "top-5"), ("map50", "mAP@0.5"), ("map", "mAP@0.5:0.95")):
        values = [None if side is None or (got := getattr(side, name)) is None else 100 * got
                  for side in (pair.a, pair.b)]  # fmt: skip
        if values == [None, None]:
            continue
        cells = ["" if value is None else f"{value:.2f} %" for value in values]
        difference = "not comparable" if all(cells) else ""
        if pair.comparable:
            difference = f"{values[1] - values[0]:+.2f} points"  # type: ignore[operator]
        rows.append([shown, *cells, difference, other if pair.comparable else ""])
    return rows


def _accuracy_remarks(pair: Any) -> list[str]:
    lines = [
        f"{label}: {side.dataset}, {side.num_images or 'unknown number of'} images at {format_size(side.size_px)} px, "
        f"{side.source}"
        for label, side in (("A", pair.a), ("B", pair.b))
        if side is not None
    ]
    return [*lines, pair.reason] if pair.reason else lines


def _training(pair: Any) -> list[RenderableType]:
    table = compact_table("training")
    table.add_column("side", no_wrap=True)
    table.add_column("data set")
    for name in ("size", "images", "epochs", "hours", _curve_title(pair)):
        table.add_column(name, justify="right", no_wrap=True)
    for label, run in (("A", pair.a), ("B", pair.b)):
        curve = "   ".join(f"{point.train_loss:.3f}, {100 * _judged(point):.2f} %" for point in run.last_epochs)
        images = "" if run.num_images is None else f"{run.num_images:,}"
        table.add_row(
            label, run.dataset, format_size(run.size_px), images, str(run.epochs), f"{run.seconds / 3600:.1f}", curve
        )
    recipe = ", ".join(f"{key} {value}" for key, value in pair.a.recipe.items())
    if pair.equal_budget:
        verdict = Text(f"equal budget: {recipe}", style="dim")
    else:
        verdict = Text(f"not an equal budget: {'; '.join(pair.differences)}", style="bold yellow")
    return [table, verdict]


def _judged(point: Any) -> float:
    """What an epoch was judged by, in [0, 1]."""
    return float(point.test_top1 if point.test_map50 is None else point.test_map50)


def _curve_title(pair: Any) -> str:
    detects = [any(point.test_map50 is not None for point in run.last_epochs) for run in (pair.a, pair.b)]
    judged = "test mAP@0.5" if all(detects) else "top-1 or mAP@0.5" if any(detects) else "test top-1"
    return f"last epochs: loss, {judged}"


def _regime(report: Any) -> list[str]:
    regime = report.regime
    lines = [f"size: {format_size(regime.size_px)} px, {regime.size_from}"]
    if report.latency:
        lines.append(
            f"latency: inputs in {regime.layout}, medians of at least {regime.min_runs} runs and "
            f"{regime.min_seconds:g} s each, in turns; ratios with their 95 % interval"
        )
        lines += _engines(report.latency)
        lines += _variants(report.latency)
        lines.append(f"machine: {regime.environment.get('cpu', '')}, {regime.environment.get('system', '')}")
    return lines


def _engines(rows: Any) -> list[str]:
    """Each runtime with all of its precisions."""
    precisions: dict[str, dict[str, None]] = {}
    for row in rows:
        precisions.setdefault(f"{row.runtime}: {row.engine}", {})[row.precision] = None
    return [f"{engine}, {' and '.join(found)}" for engine, found in precisions.items()]


def _variants(rows: Any) -> list[str]:
    """What each variant changes, and how inputs were rotated."""
    notes = dict.fromkeys(f"{row.variant}: {row.note}" for row in rows if row.variant and row.note)
    return [*notes, *dict.fromkeys(f"inputs {row.inputs}" for row in rows if row.inputs)]


# --- the published claims ---


def render_paper(report: Any) -> RenderableType:
    """A `PaperReport`: a table for each pair of networks, remarks by number, and how many claims hold."""
    parts: list[RenderableType] = []
    remarks: dict[str, int] = {}
    for pair in dict.fromkeys(result.claim.pair for result in report.results):
        table = compact_table(pair)
        table.add_column("claim")
        table.add_column("by", no_wrap=True)
        for name in ("published", "measured"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("of", overflow="fold")
        table.add_column("verdict", no_wrap=True)
        for result in report.results:
            if result.claim.pair == pair:
                table.add_row(*_claim_cells(result, remarks))
        parts += [table, Text("")]
        parts += [part for result in report.results if result.claim.pair == pair for part in _regimes(result)]
    parts += [Text(f"[{number}] {remark}", style="dim") for remark, number in remarks.items()]
    parts += [Text(f"warning: {warning}", style="yellow") for warning in report.warnings]
    if report.latency:
        rows = [row for rows in report.latency.values() for row in rows]
        parts += [Text(line, style="dim") for line in (*_engines(rows), *_variants(rows))]
        parts.append(Text(f"machine: {report.environment.get('cpu', '')}", style="dim"))
    counts = {name: sum(result.verdict == name for result in report.results) for name in _VERDICTS}
    parts.append(Text(", ".join(f"{name}: {count}" for name, count in counts.items()), style="bold"))
    return Group(*parts)


def _claim_cells(result: Any, remarks: dict[str, int]) -> list[str | Text]:
    """The row; what is to be said of it goes to `remarks`, each remark once, with its number."""
    claim = result.claim
    numbers = [str(remarks.setdefault(said, len(remarks) + 1)) for said in (result.detail, claim.remark) if said]
    measured = "" if result.measured is None else _measured(claim, result.measured)
    of = f"{_measured_of(claim)}, {result.regime}" if result.regime else _measured_of(claim)
    verdict = Text(f"{result.verdict} [{', '.join(numbers)}]" if numbers else result.verdict)
    verdict.stylize(_VERDICTS[result.verdict], 0, len(result.verdict))
    return [claim.text, claim.source, _published(claim), measured, of, verdict]


def _regimes(result: Any) -> list[RenderableType]:
    """A table of the regimes that one claim on times was judged in; nothing where none was timed."""
    if not any(one.change is not None for one in result.regimes):
        return []
    claim = result.claim
    on_device = any(one.device_change is not None for one in result.regimes)
    table = compact_table(f"{claim.text}: {_measured_of(claim)} px, regime by regime")
    table.add_column("regime", overflow="fold")
    names = ["batch", f"{claim.baseline} ms", f"{claim.network} ms", "change (95 %)"]
    for name in [*names, *(["events, ms", "change"] if on_device else [])]:
        table.add_column(name, justify="right")
    table.add_column("verdict")
    for one in result.regimes:
        table.add_row(*_regime_cells(one, on_device=on_device))
    return [table, Text("")]


def _regime_cells(one: Any, *, on_device: bool) -> list[str | Text]:
    blank = ["", ""] if on_device else []
    if one.change is None:
        return [one.regime, str(one.batch), "", "", "", *blank, Text(f"not measured: {one.reason}", style="yellow")]
    device = blank
    if one.device_change is not None:
        device = [f"{one.a_device_ms:.3f}, {one.b_device_ms:.3f}", f"{one.device_change:+.1f} %"]
    verdict = Text(one.verdict, style=_VERDICTS[one.verdict])
    if not one.claimed:
        verdict.append(", not what was claimed", style="dim")
    return [
        one.regime, str(one.batch), f"{one.a_ms:.3f}", f"{one.b_ms:.3f}",
        f"{one.change:+.1f} % ({one.low:+.1f} to {one.high:+.1f})", *device, verdict,
    ]  # fmt: skip


def _published(claim: Any) -> str:
    if claim.subject == "time" and not claim.published:
        return "faster"
    if claim.subject == "top-1":
        return f"{claim.published:+.1f} points"
    if claim.is_change:
        return f"{claim.published:+g} %{'' if claim.bound == 'about' else ' or beyond'}"
    return f"{claim.published:.{_decimals(claim)}f}{_unit(claim)}"


def _measured(claim: Any, value: float) -> str:
    return f"{value:+.1f} %" if claim.is_change else f"{value:.{_decimals(claim) + 1}f}{_unit(claim)}"


def _decimals(claim: Any) -> int:
    """As many as the source prints."""
    return max(2, len(f"{claim.published:g}".partition(".")[2]))


def _unit(claim: Any) -> str:
    return " BFLOPs" if claim.subject == "BFLOPs" else " M"


def _measured_of(claim: Any) -> str:
    """Which networks, and at which size."""
    if not claim.network:
        return ""
    against = claim.baseline or ("" if claim.baseline_figure is None else f"{claim.baseline_figure:g} BFLOPs")
    return f"{claim.network}{f' / {against}' if against else ''} at {claim.size_px}"
