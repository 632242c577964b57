from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from cspdeploy.core.golden import Golden
from cspdeploy.core.results import LayerCurve, Regression, Repeats, Verdict, VerifyReport
from cspdeploy.core.types import Manifest, StepRecord
from cspdeploy.report.html import render_report, write_report
from cspdeploy.report.html.rows import VERDICT_WORDS

MAX_BYTES = 2_000_000
HOSTILE = '</title><script>alert(1)</script><img src="https://x.example/y" onerror=alert(2)>'
VOID = {"meta", "img", "br"}


class _Page(HTMLParser):
    """A page taken apart: text, tags, attributes; fails on a tag that is not closed in its place."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert not self._open, f"left open: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


@dataclasses.dataclass
class _Inputs:
    folder: Path
    manifest: Manifest
    golden: Golden
    report: VerifyReport
    curves: tuple[LayerCurve, ...]

    def render(self, **changes: Any) -> str:
        values = {"manifest": self.manifest, "golden": self.golden, "report": self.report, "curves": self.curves}
        return render_report(self.folder, **{**values, **changes})


@pytest.fixture(scope="module")
def inputs(
    tiny_bundle: Path, tiny_manifest: Manifest, tiny_golden: Golden, tiny_report: VerifyReport,
    tiny_curves: tuple[LayerCurve, ...],
) -> _Inputs:  # fmt: skip
    return _Inputs(tiny_bundle, tiny_manifest, tiny_golden, tiny_report, tiny_curves)


def _passing(report: VerifyReport) -> VerifyReport:
    rows = tuple(row for row in report.rows if not row.failed)
    return dataclasses.replace(report, rows=rows, verdict="pass", first_break="")


def _head(source: str) -> str:
    match = re.search(r"<h1>(.*?)</h1>", source)
    assert match is not None
    return _Page(match[1]).text


# --- the verdict ---


def test_a_broken_ladder_says_what_broke_first(inputs: _Inputs) -> None:
    words = _head(inputs.render())
    assert "Broken" in words
    assert "onnx-int8 on ort-cpu is the first to break: too far off; all before it holds." in words


def test_a_sound_bundle_says_so_with_what_was_left_out(inputs: _Inputs) -> None:
    source = inputs.render(report=_passing(inputs.report))
    words = _head(source)
    assert "Verified" in words
    assert "1 of 6 rows could not be checked on this machine" in source
    assert "All 3 artifacts do what the original network does, on 4 runtimes." in words


def test_the_original_file_is_neither_an_artifact_nor_the_fastest_of_them(inputs: _Inputs) -> None:
    rows = tuple(
        dataclasses.replace(row, artifact="original") if row.artifact == "torchscript" else row
        for row in _passing(inputs.report).rows
    )
    fast = dataclasses.replace(rows[2], timing=dataclasses.replace(rows[2].timing, p50_ms=0.001))  # type: ignore[type-var]
    assert fast.artifact == "original"
    report = dataclasses.replace(_passing(inputs.report), rows=(*rows[:2], fast, *rows[3:]))
    head = _Page(inputs.render(report=report)).text.partition("Ladder")[0]
    assert "All 2 artifacts do what the original network does" in head
    assert "original on" not in head


def test_outputs_of_an_unknown_kind_are_not_called_maps(inputs: _Inputs) -> None:
    spec = dataclasses.replace(inputs.manifest.spec, task="features", num_classes=1)
    manifest = dataclasses.replace(inputs.manifest, spec=spec, labels=("class 0",))
    report = dataclasses.replace(inputs.report, rows=(), verdict="not-checked", first_break="", warnings=())
    words = _Page(inputs.render(manifest=manifest, report=report)).text
    assert "1 output" in words
    assert "maps" not in words
    assert "nothing was compared on them" in words


def test_a_bundle_that_nobody_verified_says_so_and_what_to_do(inputs: _Inputs) -> None:
    report = dataclasses.replace(inputs.report, rows=(), verdict="not-checked", first_break="", warnings=())
    page = _Page(inputs.render(report=report, curves=()))
    assert "Not verified" in page.text
    assert "cspdeploy verify . in this folder" in page.text
    assert "holds" not in page.text
    assert "Use it" in page.text


def test_a_regression_breaks_a_bundle_whose_own_rows_hold(inputs: _Inputs) -> None:
    change = Regression(artifact="onnx", runtime="ort-cpu", verdict="worse", reason="slower by 12 %", ratio=0.88)
    report = dataclasses.replace(_passing(inputs.report), verdict="fail", against="old", regressions=(change,))
    page = _Page(inputs.render(report=report))
    assert "onnx on ort-cpu is worse against old." in page.text
    assert "slower by 12 %" in page.text


def test_rows_of_other_bundles_are_left_out(inputs: _Inputs) -> None:
    foreign = [dataclasses.replace(row, bundle="/other/bundle", artifact="foreign") for row in inputs.report.rows]
    report = dataclasses.replace(inputs.report, rows=(*foreign, *inputs.report.rows))
    page = inputs.render(report=report)
    assert page == inputs.render()
    assert "foreign" not in page


def test_untrained_weights_are_told_plainly(inputs: _Inputs) -> None:
    spec = inputs.manifest.spec
    spec = dataclasses.replace(spec, provenance=dataclasses.replace(spec.provenance, source="random"))
    text = _Page(inputs.render(manifest=dataclasses.replace(inputs.manifest, spec=spec))).text
    assert text.count("UNTRAINED") == 2
    assert "UNTRAINED" not in _Page(inputs.render()).text


def test_every_verdict_has_words() -> None:
    assert set(VERDICT_WORDS) == set(get_args(Verdict))


@pytest.mark.parametrize("verdict", get_args(Verdict))
def test_every_verdict_can_be_shown_without_numbers(inputs: _Inputs, verdict: Any) -> None:
    """As a crash or a hang leaves them."""
    row = dataclasses.replace(
        inputs.report.rows[4], verdict=verdict, artifact="onnx", runtime="ort-cpu", reason="it [died]"
    )
    report = dataclasses.replace(inputs.report, rows=(row,))
    assert "it [died]" in _Page(inputs.render(report=report)).text


# --- the file ---


def test_self_contained(inputs: _Inputs) -> None:
    source = inputs.render()
    assert len(source.encode()) < MAX_BYTES
    page = _Page(source)
    for name, value in page.attributes:
        assert not name.startswith("on"), name
        if name in ("src", "href", "xlink:href", "srcset", "action"):
            assert value.startswith(("data:image/", "#")), value
    style = source[source.index("<style>") : source.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert not {"link", "iframe", "object", "form"} & set(page.tags)


def test_64_large_noisy_photographs_stay_below_the_bound(inputs: _Inputs) -> None:
    images = np.random.default_rng(0).integers(0, 256, (80, 256, 256, 3), np.uint8)
    logits = {"logits": np.random.default_rng(1).normal(size=(80, 10))}
    golden = Golden(
        images=images, x_NCHW=np.zeros((80, 3, 2, 2), np.float32), outputs_fp64=logits,
        outputs_fp32={"logits": logits["logits"].astype(np.float32)},
    )  # fmt: skip
    source = inputs.render(golden=golden)
    assert len(source.encode()) < MAX_BYTES
    assert source.count("data:image/jpeg") == 64
    assert "64 of the 80 images" in source


def test_equal_inputs_give_equal_bytes(inputs: _Inputs) -> None:
    assert inputs.render() == inputs.render()


def test_written_whole_beside_and_renamed(inputs: _Inputs, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("old")
    path = write_report(
        tmp_path, manifest=inputs.manifest, golden=inputs.golden, report=inputs.report, curves=inputs.curves
    )
    assert path == tmp_path / "report.html"
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_no_path_of_this_machine(inputs: _Inputs) -> None:
    assert str(inputs.folder.parent) not in inputs.render(report=_passing(inputs.report))


# --- what comes from outside ---


def test_nothing_from_manifest_labels_or_engines_becomes_markup(inputs: _Inputs) -> None:
    manifest = inputs.manifest
    step = StepRecord(
        name=HOSTILE, outcome="kept", detail=HOSTILE,
        facts={"operators_before": {HOSTILE: 1}, "operators_after": {}, "nodes_before": 2, "nodes_after": 1},
    )  # fmt: skip
    artifact = dataclasses.replace(manifest.artifacts[1], file=HOSTILE, sha256=HOSTILE, steps=(step,))
    provenance = dataclasses.replace(manifest.spec.provenance, origin=HOSTILE, dataset=HOSTILE)
    manifest = dataclasses.replace(
        manifest, labels=(HOSTILE,) * 10, artifacts=(artifact,), options={HOSTILE: [HOSTILE]}, tools={HOSTILE: HOSTILE},
        spec=dataclasses.replace(manifest.spec, provenance=provenance),
    )  # fmt: skip
    rows = tuple(
        dataclasses.replace(
            row, artifact=HOSTILE, runtime=HOSTILE, reason=HOSTILE, note=HOSTILE, placement={HOSTILE: 1}
        )
        for row in inputs.report.rows
    )
    report = dataclasses.replace(
        inputs.report, rows=rows, warnings=(HOSTILE,), environment={HOSTILE: HOSTILE}, first_break=HOSTILE
    )
    layers = tuple(dataclasses.replace(layer, node=HOSTILE, module=HOSTILE) for layer in inputs.curves[0].layers[:3])
    curve = dataclasses.replace(inputs.curves[0], artifact=HOSTILE, against=HOSTILE, layers=layers)
    source = inputs.render(manifest=manifest, report=report, curves=(curve,))
    page = _Page(source)
    assert page.tags.count("script") == 1
    assert page.tags.count("img") == len(inputs.golden.images)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "alert(1)" in page.text


# --- the parts ---


def test_every_section_is_there_and_linked(inputs: _Inputs) -> None:
    source = inputs.render()
    ids = re.findall(r'<section id="(\w+)"', source)
    assert ids == ["ladder", "speed", "error", "images", "use", "limits", "files", "steps", "environment"]
    assert re.findall(r'href="#(\w+)"', source) == ids


def test_ids_are_unique(inputs: _Inputs) -> None:
    ids = [value for name, value in _Page(inputs.render()).attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_the_matrix_has_error_share_of_the_limit_and_speed(inputs: _Inputs) -> None:
    source = inputs.render()
    matrix = _Page(source[source.index('id="ladder"') - 9 : source.index('<section id="speed"')]).text
    assert "8 % of its limit" in matrix
    assert "3.33\u00d7 its limit" in matrix
    assert "not checkable here" in matrix
    assert "the preprocessing holds" in matrix


def test_a_share_far_beyond_the_limit_is_a_plain_number(inputs: _Inputs) -> None:
    rows = tuple(
        dataclasses.replace(row, rel_l2=0.206, limit=1e-4) if row.artifact == "onnx-int8" else row
        for row in inputs.report.rows
    )
    assert "2,060\N{MULTIPLICATION SIGN} its limit" in inputs.render(
        report=dataclasses.replace(inputs.report, rows=rows)
    )


def test_a_step_shows_its_graph_before_and_after(inputs: _Inputs) -> None:
    facts = {
        "nodes_before": 12, "nodes_after": 9,
        "operators_before": {"Conv": 4, "Identity": 3}, "operators_after": {"Conv": 4},
    }  # fmt: skip
    step = StepRecord(name="simplify", outcome="done", detail="d", facts=facts)
    artifact = dataclasses.replace(inputs.manifest.artifacts[1], steps=(step,))
    text = _Page(inputs.render(manifest=dataclasses.replace(inputs.manifest, artifacts=(artifact,)))).text
    assert "12 nodes" in text
    assert "Identity 3 0" in text


def test_a_limit_that_was_given_by_hand_says_so(inputs: _Inputs) -> None:
    rows = tuple(
        dataclasses.replace(row, limits=tuple(dataclasses.replace(limit, overridden=True) for limit in row.limits))
        for row in inputs.report.rows
    )
    text = _Page(inputs.render(report=dataclasses.replace(inputs.report, rows=rows))).text
    assert "given with --tolerance" in text
    assert "given with --tolerance" not in _Page(inputs.render()).text


def test_maps_have_no_decisions(inputs: _Inputs) -> None:
    spec = dataclasses.replace(inputs.manifest.spec, task="features")
    rows = tuple(dataclasses.replace(row, decisions=(), top1_agreement=None) for row in inputs.report.rows)
    source = inputs.render(
        manifest=dataclasses.replace(inputs.manifest, spec=spec), report=dataclasses.replace(inputs.report, rows=rows)
    )
    assert "The outputs are no classes" in source
    assert "All decisions" not in source


def test_a_report_without_samples_curves_or_histograms_has_no_empty_charts(inputs: _Inputs) -> None:
    rows = tuple(dataclasses.replace(row, timing=None, error_histogram=(), cold=None) for row in inputs.report.rows)
    source = inputs.render(report=dataclasses.replace(inputs.report, rows=rows), curves=())
    assert "<svg" not in source
    assert 'id="speed"' not in source


def test_tables_and_charts_are_named(inputs: _Inputs) -> None:
    page = _Page(inputs.render())
    assert page.tags.count("table") == page.tags.count("caption") > 5
    assert page.tags.count("svg") == sum(name == "aria-labelledby" for name, _ in page.attributes)
    assert page.tags.count("img") == sum(name == "alt" and bool(value) for name, value in page.attributes)
    assert page.tags.count("h1") == 1


# --- colours ---

TEXT_PAIRS = [
    ("--ink", "--paper"), ("--ink", "--card"), ("--soft", "--paper"), ("--soft", "--card"), ("--accent", "--paper"),
    ("--pass", "--paper"), ("--fail", "--paper"), ("--warn", "--paper"), ("--pass", "--card"),
    ("--fail", "--fail-wash"), ("--soft", "--fail-wash"), ("--warn", "--warn-wash"), ("--a-eager", "--paper"),
    ("--a-torchscript", "--paper"),
    ("--a-onnx", "--paper"), ("--a-onnx-fp16", "--paper"), ("--a-onnx-int8", "--paper"),
]  # fmt: skip


def _luminance(colour: str) -> float:
    values = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("blocks", [(0,), (0, 1), (0, 2)], ids=["light", "dark", "print"])
def test_text_has_the_contrast_of_wcag_aa(blocks: tuple[int, ...]) -> None:
    """A theme is the block of the light one and what its own block overrides."""
    style = resources.files("cspdeploy.report.html").joinpath("style.css").read_text(encoding="utf-8")
    written = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    assert len(written) == 3
    found = re.findall(r"(--[\w-]+): (#[0-9a-f]+)", "".join(written[i] for i in blocks))
    colours = {
        name: value if len(value) == 7 else f"#{''.join(2 * digit for digit in value[1:])}" for name, value in found
    }
    for text, ground in TEXT_PAIRS:
        lighter, darker = sorted((_luminance(colours[text]), _luminance(colours[ground])), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (text, ground)


# --- sessions ---


def test_how_sessions_were_set_has_a_table_where_something_is_known(inputs: _Inputs) -> None:
    assert "How sessions were set" not in _Page(inputs.render()).text
    first = next(row for row in inputs.report.rows if row.rel_l2 is not None)
    told = dataclasses.replace(
        first, settings={"tf32": "off", "tf32 (timed)": "on", HOSTILE: HOSTILE}, tf32_rel_l2=3.1e-4,
        rounding_rel_l2=4.2e-4, events_p50_ms=0.613,
        repeats=Repeats(num_runs=10, num_different=9, max_rel_l2=1.2e-7),
    )  # fmt: skip
    rows = tuple(told if row is first else row for row in inputs.report.rows)
    source = inputs.render(report=dataclasses.replace(inputs.report, rows=rows))
    text = _Page(source).text
    for words in ("How sessions were set", "Verdicts are with TF32 off", "tf32 (timed): on", "10, 9 differ", "0.613"):
        assert words in text, words
    assert "<script>alert(1)" not in source
    bad = dataclasses.replace(told, repeats=Repeats(num_runs=5, num_different=4, max_rel_l2=1.0, first_bad_run=2))
    same = dataclasses.replace(told, repeats=Repeats(num_runs=5, num_different=0, max_rel_l2=0.0), tf32_rel_l2=None)
    for row, words in ((bad, "run 2 is not finite"), (same, "5, all the same to the bit")):
        rows = tuple(row if one is first else one for one in inputs.report.rows)
        text = _Page(inputs.render(report=dataclasses.replace(inputs.report, rows=rows))).text
        assert words in text
        assert ("Verdicts are with TF32 off" in text) == (row is bad)
