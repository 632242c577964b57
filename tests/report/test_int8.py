from __future__ import annotations

import dataclasses
from pathlib import Path

from rich.console import Console

from cspdeploy.core.bundle import read_manifest
from cspdeploy.core.types import Manifest, StepRecord
from cspdeploy.report.html.making import step_list
from cspdeploy.report.int8 import front_rows, int8_lines, tried_rows
from cspdeploy.report.steps import render_steps

FACTS = {
    "mode": "static", "placement": "ort-cpu", "runtime": "ort-cpu", "sqnr_db": 41.3, "agreement": 0.9975,
    "images": "photos (256 images)", "images_sha256": "0123456789abcdef", "num_held_out": 64,
    "operators_on_engine": {"Conv": 1, "QLinearConv": 72}, "unproven": "", "fell_back": [],
    "tried": [{"scheme": "minmax", "sqnr_db": 36.4}, {"scheme": "<through>", "sqnr_db": 41.3}],
    "float_layers": [{"node": "head.fc", "reason": "head"}, {"node": "head.pool", "reason": "head"}],
    "findings": [{"severity": "warning", "text": "9 images: later ones will exceed the ranges", "fix": "more"}],
    "search": {
        "stopped": "found", "evaluations": 7, "reason": "stem in float: 44.0 dB", "failures": {"crash": 2},
        "front": [
            {"scheme": "all", "sqnr_db": 41.3, "top1": None, "latency_of_fp32": 0.4, "meets": False},
            {"scheme": "stem in float", "sqnr_db": 44.0, "top1": None, "latency_of_fp32": None, "meets": True},
        ],
    },
}  # fmt: skip


def test_lines_say_images_engine_floats_and_search() -> None:
    assert dict(int8_lines(FACTS)) == {
        "images": "photos (256 images), judged on 64 that nothing was fitted to, SHA-256 0123456789ab",
        "engine": "ort-cpu runs 72 QLinearConv, 1 Conv",
        "in float on purpose": "head.fc, head.pool (head)",
        "search": "7 files judged, found: stem in float: 44.0 dB; 2 could not be judged: crash",
        "warning": "9 images: later ones will exceed the ranges",
    }


def test_best_of_what_was_tried_comes_first() -> None:
    assert tried_rows(FACTS) == [("<through>", "41.3 dB"), ("minmax", "36.4 dB")]


def test_front_is_told_with_what_is_known_of_each_point() -> None:
    assert front_rows(FACTS) == [("all", "41.3 dB", "0.40x", "no"), ("stem in float", "44.0 dB", "", "yes")]


def test_facts_that_are_not_there_have_no_line() -> None:
    assert int8_lines({}) == []
    assert tried_rows({}) == []
    assert front_rows({}) == []
    assert int8_lines({"unproven": "no engine for tensorrt here"}) == [("not proven", "no engine for tensorrt here")]


def test_engine_that_falls_back_to_float_is_a_warning_and_long_lists_are_counted() -> None:
    ((name, text),) = int8_lines({"fell_back": [f"n{i}" for i in range(9)]})
    assert name == "warning"
    assert text == "the engine computes in float: n0, n1, n2, n3, n4, n5 and 3 more"


def _with_step(manifest: Manifest) -> Manifest:
    step = StepRecord(name="int8", outcome="done", detail="41.3 dB", facts=FACTS)
    made = manifest.artifacts[1]
    made = dataclasses.replace(made, steps=(*made.steps, step))
    return dataclasses.replace(manifest, artifacts=(manifest.artifacts[0], made))


def test_terminal_and_page_show_them(tiny_bundle: Path) -> None:
    manifest = _with_step(read_manifest(tiny_bundle))
    console = Console(width=200)
    with console.capture() as captured:
        console.print(render_steps("here", manifest))
    assert "engine: ort-cpu runs 72 QLinearConv, 1 Conv" in captured.get()
    page = str(step_list(manifest))
    assert "<dt>engine</dt>" in page
    assert "&lt;through&gt;" in page
    assert "<through>" not in page
    assert "stem in float" in page
