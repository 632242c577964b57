"""How fast: every timed call as a mark on one axis, and the table of what they amount to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cspdeploy.core.results import ParityRow, Timing
from cspdeploy.report.html.markup import Column, Markup, bytes_text, join, ms_text, table, tag
from cspdeploy.report.html.rows import row_name
from cspdeploy.report.html.svg import Axis, artifact_class, figure, line, svg, text, text_width_px, tick_text

__all__ = ["latency_chart", "latency_table", "speed_words"]

# More marks than this are no more than a grey bar, and each costs ten bytes.
_MAX_MARKS = 240
# Calls above this quantile are an interrupt or two; they are put at the edge, so that they do not squeeze the others.
_EDGE_QUANTILE = 0.99
_ROW_PX, _CLOUD_PX, _RUG_PX = 74, 26, 9
_TOP_PX, _AXIS_PX = 8, 40
_BOLD = 1.15
"""How much wider bold text is."""


def speed_words(timing: Timing) -> str:
    """Against the first row that was timed."""
    if timing.verdict == "reference":
        return "the reference"
    if timing.verdict == "indistinguishable":
        return "no difference"
    return f"{timing.ratio:.2f}\N{MULTIPLICATION SIGN} {timing.verdict if timing.verdict == 'faster' else 'the speed'}"


def latency_chart(rows: Sequence[ParityRow]) -> Markup:
    """A strip for each row: density above, each call below, median with its interval. Nothing if nothing was timed."""
    timed = [(row, row.timing) for row in rows if row.timing and row.timing.samples_ms]
    if not timed:
        return Markup("")
    return figure(
        lambda width: _draw(width, timed),
        caption="Each tick below a line is one call, batch 1, host wall clock with the device finished; the shape "
        "above it is their density. The bar is the median with its bootstrap 95 % interval. Calls beyond the 99th "
        "percentile stand at the right edge.",
    )


def _draw(width: int, timed: Sequence[tuple[ParityRow, Timing]]) -> Markup:
    height = _TOP_PX + _ROW_PX * len(timed) + _AXIS_PX
    tops = [float(np.quantile(timing.samples_ms, _EDGE_QUANTILE)) for _, timing in timed]
    lows = [min(timing.samples_ms) for _, timing in timed]
    axis = Axis.around([*lows, *tops], px=(4.0, width - 12.0), margin=0.04)
    bottom = height - _AXIS_PX
    parts: list[Markup] = []
    for tick in axis.ticks(8 if width > 500 else 4):
        parts += [
            line(axis.at(tick), _TOP_PX, axis.at(tick), bottom, "grid"),
            text(axis.at(tick), bottom + 16, tick_text(tick), anchor="middle", class_="tick"),
        ]
    scale = ", logarithmic" if axis.log else ""
    parts.append(text(width - 12, bottom + 34, f"latency of one call, ms{scale}", anchor="end", class_="unit"))
    for i, (row, timing) in enumerate(timed):
        parts.append(_strip(row, timing, axis, base=_TOP_PX + _ROW_PX * (i + 1) - 14))
    said = "; ".join(f"{row_name(row)} {ms_text(timing.p50_ms)}" for row, timing in timed)
    return svg(width, height, *parts, title=f"Latency distributions. Medians: {said}", name="latency")


def _strip(row: ParityRow, timing: Timing, axis: Axis, *, base: float) -> Markup:
    samples = np.sort(np.asarray(timing.samples_ms, np.float64))
    shown = samples[np.unique(np.linspace(0, len(samples) - 1, _MAX_MARKS).astype(np.int64))]
    rug = "".join(f"M{axis.at(float(value)):.1f} {base + 2}v{_RUG_PX}" for value in shown)
    low, middle, high = (axis.at(value) for value in (timing.ci_low_ms, timing.p50_ms, timing.ci_high_ms))
    interval = tag("rect", x=low, y=base - 3.5, width=max(high - low, 1.5), height=5, class_="interval")
    figures = f"{ms_text(timing.p50_ms)}, {timing.num_runs} calls"
    if text_width_px(row_name(row) + figures) * _BOLD > axis.end_px - axis.start_px:
        figures = ms_text(timing.p50_ms)
    above = base - _CLOUD_PX - 12
    return tag(
        "g",
        tag("path", d=_cloud(samples, axis, base), class_="cloud"),
        line(axis.start_px, base, axis.end_px, base, "base"),
        tag("path", d=rug, class_="rug"),
        interval, line(middle, base - 8, middle, base + 5, "median"),
        text(axis.start_px, above, row_name(row), class_="strong"),
        text(axis.end_px, above, figures, anchor="end", class_="num"),
        class_=artifact_class(row.artifact),
    )  # fmt: skip


def _cloud(samples: npt.NDArray[np.float64], axis: Axis, base: float) -> str:
    """Outline of a Gaussian kernel density along the axis, in pixels, as high as the row allows."""
    at = np.array([axis.at(float(value)) for value in samples])
    quartiles = np.quantile(at, [0.25, 0.75])
    spread = min(float(at.std()), float(quartiles[1] - quartiles[0]) / 1.34) or float(at.std())
    bandwidth = max(0.9 * spread * len(at) ** -0.2, 1.2)  # Silverman's rule; never finer than a pixel can show
    grid = np.linspace(max(at[0] - 3 * bandwidth, axis.start_px), min(at[-1] + 3 * bandwidth, axis.end_px), 72)
    density = np.exp(-0.5 * ((grid[:, None] - at[None, :]) / bandwidth) ** 2).sum(axis=1)
    heights = density / density.max() * _CLOUD_PX
    outline = "L".join(f"{x:.1f} {base - y:.1f}" for x, y in zip(grid, heights, strict=True))
    return f"M{grid[0]:.1f} {base:.1f}L{outline}L{grid[-1]:.1f} {base:.1f}Z"


def latency_table(rows: Sequence[ParityRow]) -> Markup:
    """Steady state and cold start of what was timed; columns that nothing fills are left out."""
    timed = [row for row in rows if row.timing or row.cold]
    if not timed:
        return Markup("")
    columns: dict[str, list[str]] = {
        "artifact": [join(row.artifact, tag("small", row.runtime)) for row in timed],
        "median": [_median(row.timing) for row in timed],
        **{
            name: [ms_text(getattr(row.timing, f"{name}_ms")) if row.timing else "" for row in timed]
            for name in ("p90", "p95", "p99")
        },
        "calls": [f"{row.timing.num_runs:,}" if row.timing else "" for row in timed],
        "speed": [_speed(row.timing) for row in timed],
        "cold start": [_cold(row) for row in timed],
        "peak memory": [bytes_text(row.memory.peak_bytes) if row.memory else "" for row in timed],
    }
    kept = {name: cells for name, cells in columns.items() if any(cells)}
    return tag("div", table(
        [Column(name=name, number=i > 0) for i, name in enumerate(kept)],
        zip(*kept.values(), strict=True),
        caption="Latency of one call at batch 1, the median with its 95 % interval; a percentile only where there are "
        "calls enough to know it. Speed is against the first row, with its 95 % interval. Cold start is a fresh "
        "process from nothing to the first result; memory is what the session added to it.",
    ), class_="scroll", tabindex="0")  # fmt: skip


def _median(timing: Timing | None) -> str:
    if timing is None:
        return ""
    interval = f"{ms_text(timing.ci_low_ms, unit=False)}\N{EN DASH}{ms_text(timing.ci_high_ms, unit=False)}"
    return join(ms_text(timing.p50_ms), tag("small", interval))


def _speed(timing: Timing | None) -> str:
    if timing is None:
        return ""
    interval = f"{timing.ratio_low:.2f}\N{EN DASH}{timing.ratio_high:.2f}"
    return join(speed_words(timing), tag("small", "" if timing.verdict == "reference" else interval))


def _cold(row: ParityRow) -> str:
    cold = row.cold
    if cold is None:
        return ""
    parts = [f"import {cold.import_ms:,.0f}", f"open {cold.open_ms:,.0f}", f"first run {cold.first_run_ms:,.0f}"]
    return join(f"{cold.total_ms:,.0f}\N{NO-BREAK SPACE}ms", *(tag("small", part) for part in parts))
