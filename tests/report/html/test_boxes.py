"""Boxes on the golden images of a detector."""

from __future__ import annotations

import dataclasses
import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[2] / "check"))
import detectors

from cspdeploy.check.ladder import VerifySettings, verify_bundles
from cspdeploy.core.bundle import read_manifest
from cspdeploy.core.golden import read_golden
from cspdeploy.core.results import ImageBoxes, VerifyReport
from cspdeploy.report.html.boxes import reference_boxes
from cspdeploy.report.html.page import render_report
from cspdeploy.report.tables import render_verify


@pytest.fixture
def verified(tmp_path: Path) -> tuple[Path, VerifyReport]:
    folder = detectors.make_bundle(tmp_path / "tiny", "decoded")
    settings = VerifySettings(runtimes=("ort-cpu",), latency=None, isolate=False, audit=False)
    return folder, verify_bundles([folder], settings)


def page(folder: Path, report: VerifyReport) -> str:
    manifest, golden = read_manifest(folder), read_golden(folder / "golden.npz")
    return render_report(folder, manifest=manifest, golden=golden, report=report)


def test_all_found_again(verified: tuple[Path, VerifyReport]) -> None:
    folder, report = verified
    total = sum(map(len, reference_boxes(read_golden(folder / "golden.npz"), read_manifest(folder))))
    text = page(folder, report)
    assert "Every artifact finds the same ones." in text
    assert text.count('class="box matched"') == total > 20
    assert 'class="box lost"' not in text


def test_lost_and_new_have_lines_of_their_own(verified: tuple[Path, VerifyReport]) -> None:
    folder, report = verified
    changed = ImageBoxes(lost=(0,), new=((10.0, 10.0, 30.0, 40.0, 0.5, 1.0),))
    rows = tuple(
        dataclasses.replace(row, boxes=(row.boxes[0], changed, *row.boxes[2:]), box_recall=0.95) if row.boxes else row
        for row in report.rows
    )
    text = page(folder, dataclasses.replace(report, rows=rows))
    assert text.count('class="box lost"') == text.count('class="box new"') == 1
    lost, new = (text[text.index(f'class="box {kind}"') - 200 :][:200] for kind in ("lost", "new"))
    dashes = [part.split('stroke-dasharray="')[1].split('"')[0] for part in (lost, new)]
    assert "none" not in dashes
    assert dashes[0] != dashes[1]
    assert "new: pear 0.50" in text
    assert "1 lost, 1 new" in text
    assert text.index('aria-label="golden image 1:') < text.index(
        'aria-label="golden image 0:'
    )  # what differs is first


def test_boxes_that_nothing_was_compared_with_are_the_originals(verified: tuple[Path, VerifyReport]) -> None:
    folder, report = verified
    total = sum(map(len, reference_boxes(read_golden(folder / "golden.npz"), read_manifest(folder))))
    text = page(folder, dataclasses.replace(report, rows=()))
    assert text.count('class="box original"') == total > 20
    assert "matched" not in text[text.index('class="cards boxes"') :].partition("</ul>")[0]
    assert "No artifact was asked." in text


def test_boxes_that_are_not_drawn_are_counted(verified: tuple[Path, VerifyReport]) -> None:
    folder, report = verified
    changed = ImageBoxes(new=((10.0, 10.0, 30.0, 40.0, 0.5, 1.0),), more_new=70)
    rows = tuple(
        dataclasses.replace(row, boxes=(changed, *row.boxes[1:])) if row.artifact == "onnx" else row
        for row in report.rows
    )
    text = page(folder, dataclasses.replace(report, rows=rows))
    assert text.count('class="box new"') == 1
    assert "0 lost, 71 new" in text
    assert "71 new</span>" in text


def test_the_table_has_boxes_in_place_of_the_first_class(verified: tuple[Path, VerifyReport]) -> None:
    text = io.StringIO()
    Console(width=200, file=text).print(render_verify(verified[1]))
    assert "same boxes" in text.getvalue()
    assert "same top-1" not in text.getvalue()
