from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cspdeploy.core.errors import InputError
from cspdeploy.quant.budget import Budget, Judgement, earns_its_place, parse_budget
from cspdeploy.quant.pareto import pareto_front


def judgement(sqnr_db: float = 40.0, **changes: object) -> Judgement:
    return Judgement(sqnr_db=sqnr_db, num_images=100, **{"runtime": "ort-cpu", **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.5", Budget(max_drop_points=0.5)), ("0", Budget(max_drop_points=0.0)), (" .1 ", Budget(max_drop_points=0.1)),
        ("36dB", Budget(min_sqnr_db=36.0)), ("34.5 db", Budget(min_sqnr_db=34.5)), (None, Budget()),
    ],
)  # fmt: skip
def test_max_drop_is_points_or_decibels(text: str | None, expected: Budget) -> None:
    assert parse_budget(max_drop=text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12.5", Budget(max_latency_ms=12.5)),
        ("0.5x", Budget(max_latency_ratio=0.5)),
        ("1 X", Budget(max_latency_ratio=1)),
    ],
)
def test_max_latency_is_milliseconds_or_a_share_of_fp32(text: str, expected: Budget) -> None:
    assert parse_budget(max_latency=text) == expected


@pytest.mark.parametrize(
    "text", ["", "-1", "half", "0.5 of", "36 bels", "nan", "inf", "1e3", "101", "151dB", "0.5x", "\u0661"]
)
def test_max_drop_of_no_such_form_is_refused_with_a_fix(text: str) -> None:
    with pytest.raises(InputError, match="--max-drop") as caught:
        parse_budget(max_drop=text)
    assert "--max-drop" in caught.value.fix


@pytest.mark.parametrize("text", ["", "-1", "0", "0x", "fast", "12 s", "36dB", "nan"])
def test_max_latency_of_no_such_form_is_refused_with_a_fix(text: str) -> None:
    with pytest.raises(InputError, match="--max-latency") as caught:
        parse_budget(max_latency=text)
    assert "--max-latency" in caught.value.fix


def test_budget_says_itself_in_words() -> None:
    assert str(parse_budget(max_drop="0.5", max_latency="0.5x")) == (
        "within 0.5 points of top-1 and within 0.5x of FP32's latency"
    )
    assert str(Budget()) == ""


def test_file_within_the_budget_earns_its_place() -> None:
    fast = judgement(speed=2.5, latency_ms=4.0, fp32_latency_ms=10.0, verdict="faster", agreement=0.995)
    earns, why = earns_its_place(fast, Budget(min_sqnr_db=36.0, max_latency_ratio=0.5, max_latency_ms=4.0))
    assert earns
    assert why == "40.0 dB, 99.50 % agreement, 2.50x FP32's speed on ort-cpu"


@pytest.mark.parametrize(
    ("changes", "budget", "words"),
    [
        ({"speed": 0.8, "verdict": "slower"}, Budget(), "slower than FP32 on ort-cpu"),
        ({"speed": 1.6, "verdict": "faster"}, Budget(max_latency_ratio=0.5), "0.62x of FP32's latency"),
        ({"speed": 3.0, "verdict": "faster", "latency_ms": 4.2}, Budget(max_latency_ms=4.0), "4.2 ms"),
        ({}, Budget(min_sqnr_db=40.1), "40.0 dB"),
        ({"top1": 0.93, "top1_fp32": 0.9361}, Budget(max_drop_points=0.6), "loses 0.61 points"),
    ],
)
def test_file_that_is_slower_or_outside_the_budget_does_not(
    changes: dict[str, object], budget: Budget, words: str
) -> None:
    earns, why = earns_its_place(judgement(**changes), budget)
    assert not earns
    assert words in why


@pytest.mark.parametrize("sqnr_db", [-math.inf, math.nan])
def test_file_whose_outputs_are_not_finite_never_does(sqnr_db: float) -> None:
    assert not earns_its_place(judgement(sqnr_db), Budget())[0]


def test_file_as_fast_as_fp32_does_and_says_so() -> None:
    earns, why = earns_its_place(judgement(speed=1.0, verdict="indistinguishable"), Budget())
    assert earns
    assert "no faster than FP32" in why


def test_drop_of_exactly_the_budget_is_within_it() -> None:
    assert judgement(top1=0.93, top1_fp32=0.9305).meets(Budget(max_drop_points=0.05))


def test_gain_is_within_a_budget_of_no_drop() -> None:
    assert judgement(top1=0.94, top1_fp32=0.93).meets(Budget(max_drop_points=0.0))


def test_points_without_labels_are_refused() -> None:
    with pytest.raises(InputError, match="labelled"):
        judgement().meets(Budget(max_drop_points=0.5))


points = st.lists(
    st.tuples(st.sampled_from([1.0, 2.0, 3.0, math.nan, -math.inf]), st.sampled_from([1.0, 2.0, 3.0, math.nan]))
)


@given(points)
def test_front_is_what_nothing_dominates(found: list[tuple[float, float]]) -> None:
    def dominates(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return a[0] >= b[0] and a[1] <= b[1] and a != b

    front = [found[i] for i in pareto_front(found)]
    known = [point for point in found if not any(map(math.isnan, point))]
    assert len(set(front)) == len(front)
    assert set(front) == {point for point in known if not any(dominates(other, point) for other in known)}
    assert [cost for _, cost in front] == sorted(cost for _, cost in front)
