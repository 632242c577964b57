from __future__ import annotations

import dataclasses

from cspdeploy.core.results import VerifyReport
from cspdeploy.report.html.tradeoff import Choice, frontier, list_choices, tradeoff_chart


def _choice(name: str, p50_ms: float, num_bytes: int, top1: float | None = None) -> Choice:
    return Choice(name=name, artifact=name, p50_ms=p50_ms, num_bytes=num_bytes, top1=top1, interval_ms=(p50_ms, p50_ms))


def _names(*choices: Choice) -> list[str]:
    return [choice.name for choice in frontier(choices)]


def test_a_choice_that_is_slower_and_larger_is_beaten() -> None:
    assert _names(_choice("a", 10, 100), _choice("b", 20, 200), _choice("c", 30, 50)) == ["a", "c"]


def test_accuracy_saves_a_choice_that_is_slower_and_larger() -> None:
    assert _names(_choice("a", 10, 100, 0.9), _choice("b", 20, 200, 0.95)) == ["a", "b"]


def test_accuracy_counts_only_where_all_have_one() -> None:
    assert _names(_choice("a", 10, 100), _choice("b", 20, 200, 0.95)) == ["a"]


def test_a_difference_of_half_a_percent_in_size_saves_nobody() -> None:
    assert _names(_choice("a", 10, 10_050, 0.9), _choice("b", 20, 10_000, 0.9)) == ["a"]


def test_equal_choices_do_not_beat_each_other() -> None:
    assert _names(_choice("a", 10, 100), _choice("b", 10, 100)) == ["a", "b"]


def test_broken_artifacts_are_no_choice_and_are_named(tiny_report: VerifyReport) -> None:
    assert "onnx-int8" not in {choice.artifact for choice in list_choices(tiny_report.rows)}
    assert "Left out, since broken: onnx-int8 on ort-cpu." in tradeoff_chart(tiny_report.rows)


def test_size_goes_up_where_accuracy_is_unknown(tiny_report: VerifyReport) -> None:
    rows = [dataclasses.replace(row, top1=None) for row in tiny_report.rows]
    assert "file size, MB" in tradeoff_chart(rows)
    assert "top-1 accuracy, %" in tradeoff_chart(tiny_report.rows)


def test_one_choice_is_no_picture(tiny_report: VerifyReport) -> None:
    assert tradeoff_chart(tiny_report.rows[:3]) == ""
