"""HTML that cannot be injected into: every tag is made by `tag`, which escapes all that is not markup already."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Column", "Markup", "bytes_text", "join", "ms_text", "percent_text", "scientific", "table", "tag"]

_VOID = frozenset({"br", "img", "meta"})


class Markup(str):
    """Text that is HTML already. Made by `tag` and `join`, and from constants of this package alone."""

    __slots__ = ()


def tag(name: str, /, *children: str, **attributes: str | float | None) -> Markup:
    """One element.

    Args:
        name: of the element.
        children: escaped, unless they are `Markup`.
        attributes: escaped. `class_` is class, `data_label` is data-label; None leaves one out, "" is one without
            a value.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(_attribute(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    start = f"<{name}{written}>"
    return Markup(start if name in _VOID else f"{start}{join(*children)}</{name}>")


def join(*parts: str) -> Markup:
    """Parts one after another; those that are not `Markup` are escaped."""
    return Markup("".join(part if isinstance(part, Markup) else html.escape(part) for part in parts))


def _attribute(value: str | float) -> str:
    """Coordinates to a hundredth of a pixel: finer ones only make the file larger."""
    return value if isinstance(value, str) else f"{round(value, 2):g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """Of a table. `number`: set flush right, its figures of one width."""

    name: str
    number: bool = False
    wide: bool = False
    """Takes a line of its own where the table is folded for a phone."""


def table(
    columns: Sequence[Column],
    rows: Iterable[Sequence[str]],
    *,
    caption: str,
    hidden_caption: bool = False,
    row_classes: Sequence[str] = (),
) -> Markup:
    """A table whose first column names the row. On a phone each row becomes a block of its own.

    Roles are written out, since the `display: block` of a folded table would take them away.
    """
    cells = [list(row) for row in rows]
    classes = list(row_classes) or [""] * len(cells)
    head = [
        tag("th", column.name, scope="col", role="columnheader", class_="n" if column.number else None)
        for column in columns
    ]
    body = [
        tag("tr", *map(_cell, range(len(columns)), columns, row), role="row", class_=class_ or None)
        for row, class_ in zip(cells, classes, strict=True)
    ]
    return tag(
        "table",
        tag("caption", caption, class_="hidden" if hidden_caption else None),
        tag("thead", tag("tr", *head, role="row"), role="rowgroup"),
        tag("tbody", *body, role="rowgroup"),
        role="table", class_="fold",
    )  # fmt: skip


def _cell(index: int, column: Column, content: str) -> Markup:
    if index == 0:
        return tag("th", content, scope="row", role="rowheader")
    names = " ".join(name for name, here in (("n", column.number), ("w", column.wide), ("empty", not content)) if here)
    return tag("td", tag("div", content), role="cell", class_=names or None, data_label=column.name)


# --- numbers ---

_BILLION, _MILLION, _THOUSAND = 1e9, 1e6, 1e3
_TENTH_MS, _ONE_MS, _HUNDRED_MS = 0.1, 1.0, 100.0
_FINEST_DIGITS = 6
"""Nanoseconds, as clocks give them."""
_GAP = "\N{NO-BREAK SPACE}"
"""Between a number and its unit."""


def scientific(value: float | None) -> Markup:
    """Two digits and a power of ten; nothing for None."""
    if value is None:
        return Markup("")
    if value != value or value in (float("inf"), float("-inf")):  # noqa: PLR0124 - NaN alone differs from itself
        return Markup("not finite")
    if value == 0:
        return Markup("0")
    digits, _, exponent = f"{value:.1e}".partition("e")
    power = str(int(exponent)).replace("-", "\N{MINUS SIGN}")
    return join(f"{digits}\N{THIN SPACE}\N{MULTIPLICATION SIGN}\N{THIN SPACE}10", tag("sup", power))


def bytes_text(num_bytes: int | None) -> str:
    """Units of a thousand, three figures; nothing for None or 0."""
    if not num_bytes:
        return ""
    for divisor, unit in ((_BILLION, "GB"), (_MILLION, "MB"), (_THOUSAND, "kB")):
        if abs(num_bytes) >= divisor:
            value = num_bytes / divisor
            return f"{value:.1f}{_GAP}{unit}"
    return f"{num_bytes}{_GAP}B"


def ms_text(value: float | None, *, unit: bool = True) -> str:
    """Milliseconds to about three figures; nothing for None."""
    if value is None:
        return ""
    digits = 0 if value >= _THOUSAND else 1 if value >= _HUNDRED_MS else 2 if value >= _ONE_MS else 3
    if 0 < value < _TENTH_MS:  # a network of microseconds
        digits = min(2 - math.floor(math.log10(value)), _FINEST_DIGITS)
    return f"{value:,.{digits}f}" + (f"{_GAP}ms" if unit else "")


def percent_text(share: float | None, *, digits: int = 2) -> str:
    """A share in [0, 1] as percent; 100 % is said only of all of it."""
    if share is None:
        return ""
    if share >= 1:
        return f"100{_GAP}%"
    shown = f"{100 * share:.{digits}f}"
    return f"{'99.' + '9' * digits if float(shown) >= 100 else shown}{_GAP}%"
