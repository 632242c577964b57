from __future__ import annotations

import html
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cspdeploy.report.html.markup import (
    Column,
    Markup,
    bytes_text,
    join,
    ms_text,
    percent_text,
    scientific,
    table,
    tag,
)  # fmt: skip


@given(st.text())
def test_text_never_becomes_markup(text: str) -> None:
    made = tag("p", text, title=text)
    title, _, inner = made.removeprefix('<p title="').removesuffix("</p>").partition('">')
    assert made.count("<") == made.count(">") == 2
    assert html.unescape(title) == html.unescape(inner) == text


def test_markup_is_kept_and_everything_else_escaped() -> None:
    assert tag("p", tag("b", "<x>"), "&") == "<p><b>&lt;x&gt;</b>&amp;</p>"
    assert join("<", Markup("<br>")) == "&lt;<br>"
    assert tag("a", "x", href='"onclick="y') == '<a href="&quot;onclick=&quot;y">x</a>'


def test_attributes() -> None:
    made = tag("img", class_="a", data_label="b", alt="", width=12.3456, height=None)
    assert made == '<img class="a" data-label="b" alt="" width="12.35">'


def test_table_names_its_cells_for_the_fold_and_for_screen_readers() -> None:
    made = table([Column(name="file"), Column(name="size", number=True)], [("a", "1 MB"), ("b", "")], caption="Files")
    assert "<caption>Files</caption>" in made
    assert '<th scope="row" role="rowheader">a</th>' in made
    assert '<td role="cell" class="n" data-label="size"><div>1 MB</div></td>' in made
    assert 'class="n empty"' in made


def test_table_with_a_row_too_many_classes() -> None:
    with pytest.raises(ValueError, match="argument"):
        table([Column(name="a")], [("x",)], caption="", row_classes=("a", "b"))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""), (0.0, "0"), (math.inf, "not finite"), (math.nan, "not finite"),
        (1.94e-7, "1.9\u2009\u00d7\u200910<sup>\u22127</sup>"), (9.96, "1.0\u2009\u00d7\u200910<sup>1</sup>"),
    ],
)  # fmt: skip
def test_scientific(value: float | None, text: str) -> None:
    assert scientific(value) == text


@pytest.mark.parametrize(
    ("num", "text"), [(None, ""), (0, ""), (999, "999 B"), (53_268_494, "53.3 MB"), (2_100_000_000, "2.1 GB")]
)
def test_bytes(num: int | None, text: str) -> None:
    assert bytes_text(num).replace("\xa0", " ") == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (0.01574, "0.0157 ms"),
        (1e-9, "0.000000 ms"),
        (0.0, "0.000 ms"),
        (0.1234, "0.123 ms"),
        (9.1301, "9.13 ms"),
        (123.45, "123.5 ms"),
        (1234.5, "1,234 ms"),
    ],
)
def test_ms(value: float | None, text: str) -> None:
    assert ms_text(value).replace("\xa0", " ") == text


@pytest.mark.parametrize(
    ("share", "text"), [(None, ""), (1.0, "100 %"), (0.99999, "99.99 %"), (0.9341, "93.41 %"), (0.0, "0.00 %")]
)
def test_almost_all_is_never_called_all(share: float | None, text: str) -> None:
    assert percent_text(share).replace("\xa0", " ") == text
