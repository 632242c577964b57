"""Time of the CUDA benchmark: what is left of it, what became of each stage, and whether the next is begun."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cuda_budget import Budget, Pace

from cspdeploy.core.errors import InputError


class _Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_budget_counts_down_and_notes_what_became_of_each_stage() -> None:
    clock = _Clock()
    budget = Budget(60.0, clock=clock)
    with budget.stage("first"):
        clock.now += 20
    with budget.stage("second"):
        clock.now += 5
        raise InputError("no such thing", fix="make it")
    budget.skip("third")
    assert [(one.name, one.outcome, one.seconds, one.reason) for one in budget.stages] == [
        ("first", "done", 20.0, ""),
        ("second", "not done", 5.0, "no such thing (fix: make it)"),
        ("third", "not done", 0.0, "not measured: out of time"),
    ]
    assert budget.left == 35.0
    assert (budget.allows(35.0), budget.allows(35.1)) == (True, False)
    assert (budget.share(0.4), budget.share(0.4, most=10.0)) == (14.0, 10.0)
    clock.now += 100
    assert budget.left < 0
    assert not budget.allows(0.0)
    assert budget.share(0.5) == 0.0


def test_a_fault_of_the_benchmark_is_noted_and_not_swallowed() -> None:
    budget = Budget(60.0, clock=_Clock())
    with pytest.raises(ZeroDivisionError), budget.stage("broken"):
        raise ZeroDivisionError("division")
    assert budget.stages[0].reason == "ZeroDivisionError: division"


def test_the_dearest_group_seen_decides_whether_the_next_is_begun() -> None:
    pace = Pace(2.0)
    assert pace.need(10) == 20.0
    pace.note(5.0, 10)
    assert pace.need(10) == 5.0
    pace.note(40.0, 10)
    pace.note(5.0, 10)
    pace.note(1.0, 0)
    assert pace.need(10) == 40.0
