"""Where the error lies: over the decades of its size, and along the layers of the network."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cspdeploy.core.results import LayerCurve, LayerError, ParityRow
from cspdeploy.report.html.markup import Column, Markup, join, scientific, table, tag
from cspdeploy.report.html.rows import row_name
from cspdeploy.report.html.svg import Axis, Placer, artifact_class, figure, line, svg, text, tick_text

__all__ = ["curve_chart", "curve_tables", "histogram_chart"]

_LOWEST_DECADE = -9
"""`ParityRow.error_histogram` counts below 10^-9, then decade by decade, then above 1."""
_ROW_PX, _BAR_PX = 62, 34
_WORST_LAYERS = 8


def histogram_chart(rows: Sequence[ParityRow]) -> Markup:
    """A row of bars for each row that has a histogram; nothing if none has."""
    counted = [row for row in rows if sum(row.error_histogram)]
    if not counted:
        return Markup("")
    return figure(
        lambda width: _draw_histogram(width, counted),
        caption="Share of all output values by the size of their error, |error| / rms of the reference, a decade a "
        "bar. The triangle is the relative L2 of the row, the dashed line its limit.",
    )


def _draw_histogram(width: int, rows: Sequence[ParityRow]) -> Markup:
    num_bins = max(len(row.error_histogram) for row in rows)
    step = width / num_bins
    height = 10 + _ROW_PX * len(rows) + 40
    bottom = height - 40
    parts: list[Markup] = []
    for i in range(1, num_bins):
        decade = _LOWEST_DECADE + i - 1
        parts.append(line(i * step, 10, i * step, bottom, "grid"))
        if width > 500 or decade % 3 == 0:
            parts.append(_power(i * step, bottom + 17, decade))
    parts.append(text(width, bottom + 36, "|error| / rms(reference)", anchor="end", class_="unit"))
    for i, row in enumerate(rows):
        base = 10.0 + _ROW_PX * (i + 1) - 4
        parts.append(tag("g", *_bars(row, base, step), class_=artifact_class(row.artifact)))
    return svg(width, height, *parts, title="; ".join(map(_histogram_words, rows)), name="histogram")


def _bars(row: ParityRow, base: float, step: float) -> list[Markup]:
    total, highest = sum(row.error_histogram), max(row.error_histogram)
    parts = [line(0, base, step * len(row.error_histogram), base, "base")]
    for i, count in enumerate(row.error_histogram):
        if count:
            tall = max(_BAR_PX * count / highest, 1.0)
            words = tag("title", f"{row_name(row)}: {count} of {total} values")
            parts.append(tag("rect", words, x=i * step + 1, y=base - tall, width=step - 2, height=tall, class_="bar"))
    for value, class_ in ((row.rel_l2, "measured"), (row.limit, "limit")):
        if value is None or not math.isfinite(value) or value <= 0:
            continue
        x = min(max((math.log10(value) - _LOWEST_DECADE + 1) * step, 0), step * len(row.error_histogram))
        triangle = f"M{x:.1f} {base - 1:.1f}l-4.5 7h9z"
        parts.append(
            tag("path", d=triangle, class_="measured")
            if class_ == "measured"
            else line(x, base - _BAR_PX - 2, x, base + 4, "limit")
        )
    parts.append(text(2, base - _BAR_PX - 7, row_name(row), class_="strong"))
    return parts


def _power(x: float, y: float, exponent: int) -> Markup:
    if exponent == 0:
        return text(x, y, "1", anchor="middle", class_="tick")
    raised = tag("tspan", str(exponent).replace("-", "\N{MINUS SIGN}"), dy=-5, class_="raised")
    return tag("text", join("10", raised), x=x, y=y, text_anchor="middle", class_="tick")


def _histogram_words(row: ParityRow) -> str:
    most = max(range(len(row.error_histogram)), key=row.error_histogram.__getitem__)
    return f"{row_name(row)}: most errors are below 1e{_LOWEST_DECADE + most}"


# --- along the layers ---


def curve_chart(curves: Sequence[LayerCurve]) -> Markup:
    """Signal to noise along the graph, a line an artifact; nothing without layers."""
    drawn = [curve for curve in curves if _finite(curve)]
    if not drawn:
        return Markup("")
    against = ", ".join(dict.fromkeys(curve.against for curve in drawn))
    return figure(
        lambda width: _draw_curves(width, drawn),
        caption=f"Signal to noise of every layer's output against {against}, in graph order; higher is closer. "
        "A slow fall is rounding that adds up, a cliff is a layer that goes wrong. The dot is the lowest layer.",
    )


def _finite(curve: LayerCurve) -> list[tuple[float, LayerError]]:
    """Layers that differ at all, each with its share of the way through the graph."""
    last = max(len(curve.layers) - 1, 1)
    return [(i / last, layer) for i, layer in enumerate(curve.layers) if math.isfinite(layer.sqnr_db)]


def _draw_curves(width: int, curves: Sequence[LayerCurve]) -> Markup:
    height, left, right, top = 320, 38.0, width - 8.0, 26.0
    bottom = height - 42.0
    values = [layer.sqnr_db for curve in curves for _, layer in _finite(curve)]
    up = Axis.around([0.0, *values], px=(bottom, top), log=False)
    across = Axis(0.0, 100.0, left, right)
    parts = [text(0, 12, "signal to noise, dB", class_="unit")]
    for tick in up.ticks(6):
        parts += [
            line(left, up.at(tick), right, up.at(tick), "grid"),
            text(
                left - 8, up.at(tick) + 4, tick_text(tick).replace("-", "\N{MINUS SIGN}"), anchor="end", class_="tick"
            ),
        ]
    for share, anchor in ((0.0, "start"), (50.0, "middle"), (100.0, "end")):
        parts.append(text(across.at(share), bottom + 17, f"{share:g} %", anchor=anchor, class_="tick"))
    parts.append(text(right, bottom + 36, "way through the graph, from input to output", anchor="end", class_="unit"))
    placer = Placer(left_px=left, right_px=width, top_px=top - 8, bottom_px=bottom)
    for curve in curves:
        parts.append(_curve(curve, across, up, placer))
    said = "; ".join(f"{curve.artifact} on {curve.runtime}: {_lowest_words(curve)}" for curve in curves)
    return svg(width, height, *parts, title=f"Signal to noise by layer. Lowest: {said}", name="layers")


def _curve(curve: LayerCurve, across: Axis, up: Axis, placer: Placer) -> Markup:
    points = [(across.at(100 * share), up.at(layer.sqnr_db)) for share, layer in _finite(curve)]
    for x, y in points[:: max(1, len(points) // 60)]:
        placer.block(x, y, 2.0)
    low = max(points, key=lambda point: point[1])
    middle = points[len(points) // 2]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return tag(
        "g",
        tag("path", d=path, class_="curve"),
        tag("circle", tag("title", _lowest_words(curve)), cx=low[0], cy=low[1], r=4, class_="disc"),
        tag("g", placer.place(middle[0], middle[1], 4, f"{curve.artifact} on {curve.runtime}"), class_="label"),
        class_=artifact_class(curve.artifact),
    )  # fmt: skip


def _lowest_words(curve: LayerCurve) -> str:
    layer = min((layer for _, layer in _finite(curve)), key=lambda layer: layer.sqnr_db)
    return f"{layer.sqnr_db:.1f} dB at {layer.module or layer.node}"


def curve_tables(curves: Sequence[LayerCurve]) -> Markup:
    """The layers that lose most, for each curve, in a fold."""
    tables = []
    for curve in curves:
        worst = sorted((layer for _, layer in _finite(curve)), key=lambda layer: layer.sqnr_db)[:_WORST_LAYERS]
        if not worst:
            continue
        rows = [
            (layer.module or layer.node, layer.operator, scientific(layer.rel_l2), f"{layer.sqnr_db:.1f} dB")
            for layer in worst
        ]
        columns = [
            Column(name="layer"), Column(name="operator"), Column(name="relative L2", number=True),
            Column(name="signal to noise", number=True),
        ]  # fmt: skip
        tables.append(table(columns, rows, caption=f"{curve.artifact} on {curve.runtime}, against {curve.against}"))
    if not tables:
        return Markup("")
    return tag("details", tag("summary", "The layers that are furthest off"), *tables)
