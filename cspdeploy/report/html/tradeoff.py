"""Size, latency and accuracy of every artifact in one picture, with those that no other one beats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cspdeploy.core.results import ParityRow
from cspdeploy.report.html.markup import Markup, bytes_text, join, ms_text, percent_text, tag
from cspdeploy.report.html.rows import row_name
from cspdeploy.report.html.svg import Axis, Placer, artifact_class, figure, line, svg, text, tick_text

__all__ = ["Choice", "frontier", "list_choices", "tradeoff_chart"]

# Nobody picks one file over another for a hundredth of its size or time, or for 5 images of 10,000.
_SAME_SHARE, _SAME_TOP1 = 0.01, 0.0005
# An axis of accuracy shows a point at least: blown up further, it would show single images.
_LEAST_POINTS = 1.0
_LEFT_PX, _BOTTOM_PX, _TOP_PX = 50.0, 44.0, 26.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """An artifact on a runtime as somebody who picks one sees it. `top1` None: not measured."""

    name: str
    artifact: str
    p50_ms: float
    num_bytes: int
    top1: float | None
    interval_ms: tuple[float, float]


def list_choices(rows: Sequence[ParityRow]) -> list[Choice]:
    """The rows that were timed and did not fail: a broken artifact is no choice."""
    return [
        Choice(
            name=row_name(row), artifact=row.artifact, p50_ms=row.timing.p50_ms, num_bytes=row.num_bytes, top1=row.top1,
            interval_ms=(row.timing.ci_low_ms, row.timing.ci_high_ms),
        )
        for row in rows
        if row.timing and not row.failed and row.num_bytes
    ]  # fmt: skip


def frontier(choices: Sequence[Choice]) -> list[Choice]:
    """Those that no other choice beats: none is at least as good in everything and better in something.

    Accuracy counts where every choice has one. Differences too small to choose by count as none.
    """
    judged = all(choice.top1 is not None for choice in choices)

    def gains(a: Choice, b: Choice) -> list[float]:
        """By how many times the smallest difference that counts `a` is better than `b`, in each respect."""
        found = [math.log(b.p50_ms / a.p50_ms) / _SAME_SHARE, math.log(b.num_bytes / a.num_bytes) / _SAME_SHARE]
        return [*found, ((a.top1 or 0.0) - (b.top1 or 0.0)) / _SAME_TOP1] if judged else found

    def beats(a: Choice, b: Choice) -> bool:
        return min(gains(a, b)) >= -1 and max(gains(a, b)) > 1

    return [choice for choice in choices if not any(beats(other, choice) for other in choices)]


def tradeoff_chart(rows: Sequence[ParityRow]) -> Markup:
    """Latency across; accuracy upwards where it is known of all, else size. Nothing for fewer than two choices."""
    choices = list_choices(rows)
    if len(choices) < 2:
        return Markup("")
    judged = all(choice.top1 is not None for choice in choices)
    left_out = [row_name(row) for row in rows if row.timing and row.failed]
    caption = (
        f"Left is faster, {'up is more accurate, a larger disc is a larger file' if judged else 'down is smaller'}. "
        "Filled: the Pareto frontier, which no other one here beats in everything at once."
        + (f" Left out, since broken: {', '.join(left_out)}." if left_out else "")
    )
    return figure(lambda width: _draw(width, choices, judged=judged), caption=caption)


def _draw(width: int, choices: list[Choice], *, judged: bool) -> Markup:
    height = 320 if width > 500 else 340
    right, bottom = width - 14.0, height - _BOTTOM_PX
    largest = max(choice.num_bytes for choice in choices)
    across = Axis.around([choice.p50_ms for choice in choices], px=(_LEFT_PX + 14, right - 14), margin=0.16)
    up = _upwards(choices, judged=judged, px=(bottom - 18, _TOP_PX + 14))
    placer = Placer(left_px=_LEFT_PX, right_px=width, top_px=_TOP_PX - 6, bottom_px=bottom - 2)
    spots = []
    for choice in choices:
        y = up.at(100 * choice.top1 if judged and choice.top1 is not None else choice.num_bytes / 1e6)
        radius = max(4.0, 15 * math.sqrt(choice.num_bytes / largest)) if judged else 6.0
        placer.block(across.at(choice.p50_ms), y, radius)
        low, high = choice.interval_ms
        placer.block_line(across.at(low), across.at(high), y)
        spots.append((choice, across.at(choice.p50_ms), y, radius))
    best = frontier(choices)
    parts = [*_frame(across, up, width=width, bottom=bottom, judged=judged)]
    # Large discs first, so that none hides a smaller one.
    for choice, x, y, radius in sorted(spots, key=lambda spot: -spot[3]):
        low, high = (across.at(value) for value in choice.interval_ms)
        disc = tag(
            "circle", tag("title", _said(choice)), cx=x, cy=y, r=radius, class_="disc" if choice in best else "ring"
        )
        parts.append(tag("g", line(low, y, high, y, "whisker"), disc, class_=artifact_class(choice.artifact)))
    for choice, x, y, radius in spots:
        label = placer.place(x, y, radius, choice.name)
        parts.append(tag("g", label, class_=f"{artifact_class(choice.artifact)} label"))
    said = "; ".join(map(_said, choices))
    names = ", ".join(choice.name for choice in best)
    return svg(width, height, *parts, title=f"{said}. On the frontier: {names}", name="tradeoff")


def _upwards(choices: list[Choice], *, judged: bool, px: tuple[float, float]) -> Axis:
    if judged:
        points = [100 * (choice.top1 or 0.0) for choice in choices]
        middle, half = (min(points) + max(points)) / 2, max(_LEAST_POINTS, 1.4 * (max(points) - min(points))) / 2
        top = min(middle + half, 100.0)
        return Axis(max(min(middle - half, top - 2 * half), 0.0), top, *px)
    # Bytes are compared by their length from nothing.
    return Axis(0.0, 1.12 * max(choice.num_bytes for choice in choices) / 1e6, px[0] + 18, px[1])


def _frame(across: Axis, up: Axis, *, width: int, bottom: float, judged: bool) -> list[Markup]:
    right = width - 14.0
    parts = [text(0, 12, "top-1 accuracy, %" if judged else "file size, MB", class_="unit")]
    for tick in up.ticks(5):
        parts += [
            line(_LEFT_PX, up.at(tick), right, up.at(tick), "grid"),
            text(_LEFT_PX - 8, up.at(tick) + 4, tick_text(tick), anchor="end", class_="tick"),
        ]
    for tick in across.ticks(8 if width > 500 else 4):
        parts.append(text(across.at(tick), bottom + 18, tick_text(tick), anchor="middle", class_="tick"))
        parts.append(line(across.at(tick), bottom, across.at(tick), bottom + 5, "base"))
    scale = ", logarithmic" if across.log else ""
    unit = text(right, bottom + 38, f"median latency, ms{scale}", anchor="end", class_="unit")
    return [*parts, line(_LEFT_PX, bottom, right, bottom, "base"), unit]


def _said(choice: Choice) -> str:
    accuracy = "" if choice.top1 is None else f", top-1 {percent_text(choice.top1)}"
    return join(f"{choice.name}: {ms_text(choice.p50_ms)}, {bytes_text(choice.num_bytes)}{accuracy}")
