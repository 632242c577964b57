"""The ladder as a matrix, artifact by runtime; why a rung broke; and how each limit came about."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cspdeploy.core.catalog import EAGER
from cspdeploy.core.results import ParityRow, Regression
from cspdeploy.core.sizes import base_kind
from cspdeploy.core.types import Manifest
from cspdeploy.report.html.latency import speed_words
from cspdeploy.report.html.markup import Column, Markup, bytes_text, join, ms_text, percent_text, scientific, table, tag
from cspdeploy.report.html.rows import PREPROCESS, VERDICT_WORDS, artifact_rows, mark, row_name, verdict_kind

__all__ = ["limit_table", "matrix", "reasons", "regression_table"]


def matrix(rows: Sequence[ParityRow], manifest: Manifest) -> Markup:
    """A row an artifact, a column a runtime; a cell holds verdict, error against its limit, and speed."""
    judged = artifact_rows(rows)
    # Of several rows the one that was opened, since it knows the size.
    artifacts = {row.artifact: max((other for other in judged if other.artifact == row.artifact), key=_num_bytes)
                 for row in judged}  # fmt: skip
    runtimes = list(dict.fromkeys(row.runtime for row in judged))
    cells = {(row.artifact, row.runtime): row for row in judged}
    body = []
    for artifact, row in artifacts.items():
        cells_of = [cells.get((artifact, runtime)) for runtime in runtimes]
        body.append([_artifact(row, manifest), *(_cell(found) if found else "" for found in cells_of)])
    columns = [Column(name="artifact"), *(Column(name=runtime) for runtime in runtimes)]
    caption = (
        "Every artifact on every runtime that reads it, in the order in which they were made. Error: relative L2 to "
        "the original in float64; the bar shows how much of its limit it uses up."
    )
    return tag("div", table(columns, body, caption=caption), class_="scroll matrix", tabindex="0")


def _num_bytes(row: ParityRow) -> int:
    return row.num_bytes


def _artifact(row: ParityRow, manifest: Manifest) -> Markup:
    if base_kind(row.artifact) == EAGER:
        return join(row.artifact, tag("small", "the original network"))
    made = next((artifact for artifact in manifest.artifacts if artifact.kind == row.artifact), None)
    words: list[str] = [made.precision] if made else []
    words += [bytes_text(row.num_bytes)] if row.num_bytes else []
    return join(row.artifact, tag("small", ", ".join(words)))


def _cell(row: ParityRow) -> Markup:
    kind = verdict_kind(row.verdict)
    parts = [mark(kind, VERDICT_WORDS[row.verdict])]
    if row.rel_l2 is not None:
        parts.append(tag("span", scientific(row.rel_l2), class_="error"))
    if row.rel_l2 is not None and row.limit:
        parts.append(_meter(row.rel_l2 / row.limit, kind))
    if row.top1_agreement is not None and row.top1_agreement < 1:
        parts.append(tag("small", f"same top-1 on {percent_text(row.top1_agreement)}"))
    if row.num_boxes and row.box_recall is not None and row.box_precision is not None:
        share = min(row.box_recall, row.box_precision)
        parts += [tag("small", f"same boxes {percent_text(share)}")] if share < 1 else []
    if row.map50 is not None:
        parts.append(tag("small", f"mAP50 {percent_text(row.map50)}, mAP {percent_text(row.map)}"))
    if row.top1 is not None:
        parts.append(tag("small", f"top-1 {percent_text(row.top1)}"))
    if row.timing is not None:
        speed = "" if row.timing.verdict == "reference" else f", {speed_words(row.timing)}"
        parts.append(tag("small", f"{ms_text(row.timing.p50_ms)}{speed}"))
    return join(*parts)


def _meter(share: float, kind: str) -> Markup:
    """How much of the limit is used up; more than all of it fills the bar."""
    width = f"width:{100 * min(share, 1.0) if math.isfinite(share) else 100:.1f}%"
    words = _share_words(share)
    bar = tag("span", tag("span", "", style=width), class_=f"meter {kind}", aria_hidden="true")
    return join(bar, tag("small", words))


def _share_words(share: float) -> str:
    if not math.isfinite(share):
        return "far beyond its limit"
    if share > 1:
        digits = max(0, 2 - int(math.log10(share)))  # three figures
        return f"{share:,.{digits}f}\N{MULTIPLICATION SIGN} its limit"
    return f"{100 * share:.0f} % of its limit" if share >= 0.01 else "under 1 % of its limit"  # noqa: PLR2004 - 1 %


def reasons(rows: Sequence[ParityRow]) -> Markup:
    """What failed and why, what could not be checked and why, and what to know of a runtime."""
    items = []
    for row in rows:
        kind = verdict_kind(row.verdict)
        if row.reason:
            sign = mark("fail" if kind == "fail" else "open", row_name(row))
            items.append(tag("li", sign, f" {VERDICT_WORDS[row.verdict]}: {row.reason}", class_=kind))
    items += [tag("li", f"{row_name(row)}: {row.note}", class_="remark") for row in rows if row.note]
    # One a size, and those of files that prepare their input themselves.
    shared = [row for row in rows if base_kind(row.artifact) == PREPROCESS and row.runtime == "shared"]
    if shared and all(row.verdict == "pass" for row in shared):
        distance = max(row.max_abs or 0.0 for row in shared)
        how = "to the bit" if not distance else f"within {distance:.1e}"
        items.append(tag("li", f"The stored images give the stored inputs here {how}: the preprocessing holds."))
    return tag("ul", *items, class_="reasons") if items else Markup("")


def limit_table(rows: Sequence[ParityRow]) -> Markup:
    """Each limit of each output with its reason; nothing without limits."""
    lines = []
    for row in artifact_rows(rows):
        for limit in row.limits:
            terms = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in limit.terms.items())
            given = tag("span", "given with --tolerance; ", class_="mark warn") if limit.overridden else Markup("")
            why = join(given, limit.why, tag("small", terms) if terms else Markup(""))
            lines.append((row_name(row), limit.output, scientific(limit.rel_l2), why))
    if not lines:
        return Markup("")
    columns = [
        Column(name="artifact on runtime"), Column(name="output"), Column(name="relative L2, at most", number=True),
        Column(name="how it came about", wide=True),
    ]  # fmt: skip
    return table(columns, lines, caption="The limit of every output, and how that number came about.")


_CHANGE_KINDS = {"same": "pass", "better": "pass", "worse": "fail", "gone": "fail", "new": "open"}


def regression_table(regressions: Sequence[Regression], against: str) -> Markup:
    """This bundle against an older one; nothing where there is none."""
    if not regressions:
        return Markup("")
    lines = []
    boxes = any(change.same_boxes is not None for change in regressions)
    for change in regressions:
        size = f"{bytes_text(change.old_bytes)} to {bytes_text(change.new_bytes)}" if change.old_bytes else ""
        ratio = f" {change.ratio:.2f}\N{MULTIPLICATION SIGN}" if change.ratio is not None else ""
        lines.append((
            f"{change.artifact} on {change.runtime}",
            join(mark(_CHANGE_KINDS[change.verdict], change.verdict), tag("small", change.reason)),
            scientific(change.rel_l2), percent_text(change.same_boxes if boxes else change.top1_agreement), size,
            f"{change.latency}{ratio}",
        ))  # fmt: skip
    columns = [
        Column(name="artifact on runtime"), Column(name="verdict"), Column(name="relative L2", number=True),
        Column(name=f"same {'boxes' if boxes else 'top-1'}", number=True), Column(name="size", number=True),
        Column(name="latency", number=True),
    ]  # fmt: skip
    return table(columns, lines, caption=f"Against {against}, on the inputs of this bundle.")
