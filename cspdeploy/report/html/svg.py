"""Axes and marks of the charts, as SVG. A chart is drawn for two widths, of which the style sheet shows one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from cspdeploy.core.sizes import base_kind
from cspdeploy.report.html.markup import Markup, join, tag

__all__ = [
    "NARROW_PX", "WIDE_PX", "Axis", "Placer", "artifact_class", "figure", "line", "svg", "text", "text_width_px",
    "tick_text",
]  # fmt: skip

WIDE_PX, NARROW_PX = 880, 328
"""The column of a desktop page, and a phone of 360 px less its margins. Text keeps its size in both."""

# Of the sans-serif faces that systems come with, at the 12 px of the charts' text, digits and lower case mixed.
_CHARACTER_PX = 6.3
# Below this ratio of the ends a logarithmic axis would have one round number on it, or none.
_LOG_FROM = 5.0


@dataclass(frozen=True, slots=True)
class Axis:
    """Values to pixels, linear or logarithmic."""

    low: float
    high: float
    start_px: float
    end_px: float
    log: bool = False

    @classmethod
    def around(cls, values: list[float], *, px: tuple[float, float], margin: float = 0.06, log: bool = True) -> Axis:
        """An axis that holds all values with a margin; logarithmic where they span enough of it and `log` allows it."""
        low, high = min(values), max(values)
        if log and low > 0 and high / low >= _LOG_FROM:
            room = (high / low) ** margin
            return cls(low / room, high * room, *px, log=True)
        room = (high - low) * margin or abs(high) * margin or 1.0
        bottom = low - room
        return cls(max(bottom, 0.0) if low >= 0 else bottom, high + room, *px)

    def at(self, value: float) -> float:
        """Pixel of a value; values beyond the ends are put onto them."""
        value = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start_px + share * (self.end_px - self.start_px)

    def ticks(self, count: int) -> list[float]:
        """About `count` round numbers on the axis."""
        return self._log_ticks(count) if self.log else self._linear_ticks(count)

    def _linear_ticks(self, count: int) -> list[float]:
        raw = (self.high - self.low) / max(count, 1)
        power = 10.0 ** math.floor(math.log10(raw))
        step = next((factor * power for factor in (1, 2, 5) if factor * power >= raw), 10 * power)
        first = math.ceil(self.low / step)
        return [round(i * step, 12) for i in range(first, math.floor(self.high / step) + 1)]

    def _log_ticks(self, count: int) -> list[float]:
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        found: list[float] = []
        for factors in ((1, 2, 5), (1, 3), (1,)):
            found = [
                value for decade in decades for factor in factors
                if self.low <= (value := factor * 10.0**decade) <= self.high
            ]  # fmt: skip
            if len(found) <= count:
                return found
        return found[:: math.ceil(len(found) / count)]


def figure(draw: Callable[[int], Markup], *, caption: str) -> Markup:
    """A chart drawn for a wide and a narrow page, with a caption that says how to read it."""
    return tag(
        "figure",
        tag("div", draw(WIDE_PX), class_="wide"),
        tag("div", draw(NARROW_PX), class_="narrow"),
        tag("figcaption", caption),
    )  # fmt: skip


def svg(width: int, height: float, *children: str, title: str, name: str) -> Markup:
    """A drawing that a screen reader reads out as its title.

    Args:
        title: what there is to see, with its numbers.
        name: of the chart, for the id of its title.
    """
    label = f"{name}-{width}"
    return tag(
        "svg", tag("title", title, id=label), *children,
        viewBox=f"0 0 {width} {height:g}", width=width, height=height, role="img", aria_labelledby=label,
    )  # fmt: skip


def text(x: float, y: float, content: str, *, anchor: str | None = None, class_: str | None = None) -> Markup:
    """Text from `x` on; `anchor` "middle" or "end" for around it or up to it."""
    return tag("text", content, x=x, y=y, text_anchor=anchor, class_=class_)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """A straight line."""
    return tag("path", d=f"M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}", class_=class_)


def text_width_px(content: str) -> float:
    """About how wide chart text is: no fonts can be asked here."""
    return _CHARACTER_PX * len(content)


def tick_text(value: float) -> str:
    """A round number without needless digits."""
    return f"{value:,.10g}"


def artifact_class(artifact: str) -> str:
    """The colour of an artifact, the same in every chart and at every size."""
    known = ("eager", "torchscript", "onnx", "onnx-fp16", "onnx-int8")
    kind = base_kind(artifact)
    return f"a-{kind}" if kind in known else "a-other"


class Placer:
    """Finds room for labels: next to their points, and not on one another."""

    def __init__(self, *, left_px: float, right_px: float, top_px: float, bottom_px: float) -> None:
        self._frame = (left_px, top_px, right_px, bottom_px)
        self._taken: list[tuple[float, float, float, float]] = []

    def block(self, x: float, y: float, radius: float) -> None:
        """Keep labels off a point."""
        self._taken.append((x - radius, y - radius, x + radius, y + radius))

    def block_line(self, left_px: float, right_px: float, y: float) -> None:
        """Keep labels off a level line, which would strike them through."""
        self._taken.append((left_px, y - 1, right_px, y + 1))

    def place(self, x: float, y: float, radius: float, content: str) -> Markup:
        """The label at the first free place: right, left, above, below, then further away, with a line to the point."""
        width, gap = text_width_px(content), radius + 5
        for shift in range(0, 120, 4):
            for sign in (1, -1):
                for anchor, left in (("start", x + gap), ("end", x - gap - width), ("middle", x - width / 2)):
                    away = gap + 8 if anchor == "middle" and shift < gap + 8 else shift
                    middle = y + sign * away
                    box = (left, middle - 8, left + width, middle + 8)
                    if self._free(box):
                        self._taken.append(box)
                        return self._label(x, y, anchor, box, content, far=away > gap + 8)
        return text(x + gap, y + 4, content)

    def _label(
        self, x: float, y: float, anchor: str, box: tuple[float, float, float, float], content: str, *, far: bool
    ) -> Markup:
        left, top, right, bottom = box
        at = {"start": left, "end": right, "middle": (left + right) / 2}[anchor]
        middle = (top + bottom) / 2
        leader = line(x, y, at, middle - math.copysign(7, middle - y) if anchor == "middle" else middle, "leader")
        label = text(at, middle + 4, content, anchor=None if anchor == "start" else anchor)
        return join(leader, label) if far else label

    def _free(self, box: tuple[float, float, float, float]) -> bool:
        left, top, right, bottom = self._frame
        if box[0] < left or box[1] < top or box[2] > right or box[3] > bottom:
            return False
        return all(
            box[2] <= other[0] or box[0] >= other[2] or box[3] <= other[1] or box[1] >= other[3]
            for other in self._taken
        )
