from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cspdeploy.report.html.markup import Markup
from cspdeploy.report.html.svg import Axis, Placer, artifact_class, svg, text_width_px

POSITIVE = st.floats(1e-6, 1e6)


@given(st.lists(POSITIVE, min_size=1, max_size=20))
def test_an_axis_holds_its_values_in_order_and_has_round_ticks_inside(values: list[float]) -> None:
    axis = Axis.around(values, px=(10.0, 300.0))
    pixels = [axis.at(value) for value in sorted(values)]
    assert pixels == sorted(pixels)
    assert all(10 <= pixel <= 300 for pixel in pixels)
    ticks = axis.ticks(6)
    assert len(ticks) <= 12
    assert all(axis.low * 0.999 <= tick <= axis.high * 1.001 for tick in ticks)


@pytest.mark.parametrize(("low", "high", "log"), [(10.0, 12.0, False), (1.0, 100.0, True), (0.0, 100.0, False)])
def test_logarithmic_only_over_a_wide_span_above_zero(low: float, high: float, log: bool) -> None:
    assert Axis.around([low, high], px=(0.0, 1.0)).log is log


def test_values_beyond_the_ends_stand_at_the_edge() -> None:
    axis = Axis(0.0, 10.0, 0.0, 100.0)
    assert (axis.at(-5.0), axis.at(5.0), axis.at(50.0)) == (0.0, 50.0, 100.0)


def test_an_axis_upwards_runs_against_the_pixels() -> None:
    axis = Axis(0.0, 10.0, 100.0, 0.0)
    assert axis.at(10.0) == 0.0


def _boxes(labels: list[Markup]) -> list[tuple[float, float, float, float]]:
    found = []
    for label in labels:
        match = re.search(r'<text x="([\d.]+)" y="([\d.]+)"(?: text-anchor="(\w+)")?>([^<]+)<', label)
        assert match is not None, label
        x, y, anchor, words = float(match[1]), float(match[2]), match[3], match[4]
        width = text_width_px(words)
        left = x - {"end": width, "middle": width / 2}.get(anchor or "", 0.0)
        found.append((left, y - 10, left + width, y + 2))
    return found


def test_labels_of_points_on_top_of_one_another_do_not_overlap() -> None:
    placer = Placer(left_px=0, right_px=400, top_px=0, bottom_px=300)
    placer.block(200, 150, 8)
    boxes = _boxes([placer.place(200, 150, 8, f"artifact {i}") for i in range(6)])
    for i, a in enumerate(boxes):
        assert 0 <= a[0] < a[2] <= 400
        for b in boxes[:i]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_no_label_is_struck_through_by_a_line() -> None:
    placer = Placer(left_px=0, right_px=400, top_px=0, bottom_px=300)
    placer.block(200, 150, 6)
    placer.block_line(50, 350, 150)
    ((_, top, _, bottom),) = _boxes([placer.place(200, 150, 6, "artifact")])
    assert bottom < 150 or top > 150


def test_a_drawing_is_read_out_as_its_title() -> None:
    made = svg(100, 50, title="A & B", name="x")
    assert 'role="img"' in made
    assert '<title id="x-100">A &amp; B</title>' in made
    assert 'aria-labelledby="x-100"' in made


def test_an_artifact_of_unknown_kind_has_a_colour_too() -> None:
    assert artifact_class("onnx") == "a-onnx"
    assert artifact_class('x" onload="y') == "a-other"
