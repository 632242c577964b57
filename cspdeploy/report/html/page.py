"""report.html of a bundle: one file without a network, a script that matters, or anything to install."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from cspdeploy.core.golden import Golden
from cspdeploy.core.model_folder import write_text
from cspdeploy.core.results import LayerCurve, ParityRow, VerifyReport
from cspdeploy.core.sizes import contract_of, size_of, sizes_of
from cspdeploy.core.types import Artifact, Frontend, Manifest
from cspdeploy.report.html.boxes import box_cards, box_words
from cspdeploy.report.html.errors import curve_chart, curve_tables, histogram_chart
from cspdeploy.report.html.images import MAX_IMAGES, disagreements, image_cards, image_table, reference_of
from cspdeploy.report.html.ladder import limit_table, matrix, reasons, regression_table
from cspdeploy.report.html.latency import latency_chart, latency_table
from cspdeploy.report.html.making import audit_table, environment_lists, file_table, placement_table, step_list
from cspdeploy.report.html.markup import Markup, join, tag
from cspdeploy.report.html.rows import artifact_rows, bundle_rows, rows_of_size
from cspdeploy.report.html.sessions import session_table
from cspdeploy.report.html.snippet import snippet_markup
from cspdeploy.report.html.tradeoff import tradeoff_chart
from cspdeploy.report.html.usage import snippets_for
from cspdeploy.report.html.verdict import header, sentence

__all__ = ["REPORT_FILE", "render_report", "write_report"]

REPORT_FILE = "report.html"
"""The one file of a bundle without a hash in the manifest: it carries timings."""

_SCRIPT = """\
addEventListener("beforeprint",()=>document.querySelectorAll("details").forEach(d=>d.open=true));
if(navigator.clipboard)document.querySelectorAll("pre").forEach(p=>{const b=document.createElement("button");
b.textContent="Copy";b.type="button";b.onclick=async()=>{await navigator.clipboard.writeText(p.textContent);
b.textContent="Copied";setTimeout(()=>b.textContent="Copy",1500)};p.before(b)});
"""
"""Niceties alone: everything is printed, and code can be copied."""
# Nothing is fetched, whatever a label or a manifest smuggles in.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def write_report(
    folder: Path, *, manifest: Manifest, golden: Golden, report: VerifyReport, curves: tuple[LayerCurve, ...] = ()
) -> Path:
    """Write `report.html` into a bundle, whole or not at all. The same inputs give the same bytes.

    Args:
        folder: the bundle.
        golden: of its first size.
        report: of this bundle, or of several of which it is one; without rows, the page says that nothing was verified.
        curves: error along the layers, for as many artifacts as it was measured.

    Returns:
        The file.
    """
    path = folder / REPORT_FILE
    write_text(path, render_report(folder, manifest=manifest, golden=golden, report=report, curves=curves))
    return path


def render_report(
    folder: Path, *, manifest: Manifest, golden: Golden, report: VerifyReport, curves: tuple[LayerCurve, ...] = ()
) -> str:
    """The page of `write_report` as text."""
    rows = bundle_rows(report, folder)
    first = sizes_of(manifest.artifacts)[0]
    sections = [
        section for section in (
            _ladder(rows, manifest), _regressions(report), _speed(rows), _error(rows, curves),
            _images(golden, manifest, rows_of_size(rows, first)), _use(manifest, rows), _limits(rows), _what(rows),
            _steps(manifest), _environment(manifest, report),
        ) if section is not None
    ]  # fmt: skip
    style = resources.files("cspdeploy.report.html").joinpath("style.css").read_text(encoding="utf-8")
    _, words = sentence(manifest, report, rows)
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="description", content=words),
        tag("title", f"{manifest.spec.name}: verification report"),
        tag("style", Markup(style)),
    )  # fmt: skip
    body = tag(
        "body",
        header(manifest, report, rows),
        tag("nav", tag("ul", *(tag("li", tag("a", title, href=f"#{name}")) for name, title, _ in sections)),
            aria_label="Contents"),
        tag("main", *(section for _, _, section in sections)),
        tag("footer", tag("p", f"Written by cspdeploy {manifest.tools.get('cspdeploy', '')}".strip() + ".")),
        tag("script", Markup(_SCRIPT)),
    )  # fmt: skip
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


_Section = tuple[str, str, Markup]


def _section(name: str, title: str, lead: str, *parts: Markup) -> _Section | None:
    """A section with its heading in the margin; none where there is nothing to show."""
    if not any(parts):
        return None
    aside = tag("div", tag("h2", title), tag("p", lead), class_="margin")
    return name, title, tag("section", aside, tag("div", *parts, class_="content"), id=name)


def _ladder(rows: Sequence[ParityRow], manifest: Manifest) -> _Section | None:
    if not artifact_rows(rows):
        return None
    lead = "Each artifact is made from an earlier one. The first one that breaks is where the fault is."
    return _section("ladder", "Ladder", lead, matrix(rows, manifest), reasons(rows))


def _regressions(report: VerifyReport) -> _Section | None:
    lead = "What changed for somebody who replaces the old bundle by this one."
    return _section("change", "Change", lead, regression_table(report.regressions, report.against))


def _speed(rows: Sequence[ParityRow]) -> _Section | None:
    lead = "Timed in turns, so that a slow minute of the machine falls on all alike."
    return _section("speed", "Speed and size", lead, tradeoff_chart(rows), latency_chart(rows), latency_table(rows))


def _error(rows: Sequence[ParityRow], curves: Sequence[LayerCurve]) -> _Section | None:
    lead = "How large the errors are, and where in the network they come from."
    judged = artifact_rows(rows)
    return _section("error", "Error", lead, histogram_chart(judged), curve_chart(curves), curve_tables(curves))


def _images(golden: Golden, manifest: Manifest, rows: Sequence[ParityRow]) -> _Section | None:
    num, judged, reference = len(golden.images), artifact_rows(rows), reference_of(golden, manifest)
    checked = any(row.verdict not in ("not-checkable", "not-checked") for row in judged)
    lead = f"{f'{MAX_IMAGES} of the' if num > MAX_IMAGES else 'The'} {num} images that "
    lead += "everything was compared on." if checked else "its outputs are recorded for; nothing was compared on them."
    if manifest.spec.provenance.untrained:
        lead += " The weights are random: UNTRAINED, no decision means anything."
    if manifest.spec.detection is not None:
        words = tag("p", box_words(golden, manifest, judged), class_="lead")
        return _section("images", "Images", lead, words, box_cards(golden, manifest, judged))
    if reference is None:
        said = "The outputs are no classes, so there is no decision to show."
    elif not any(row.decisions for row in judged):
        said = "The first class of the original and its probability; no artifact was asked."
    else:
        said = _agreement_words(len(disagreements(judged, reference)))
    return _section(
        "images", "Images", lead, tag("p", said, class_="lead"), image_cards(golden, manifest, judged),
        image_table(golden, manifest, judged),
    )  # fmt: skip


def _agreement_words(differing: int) -> str:
    if not differing:
        return "Every artifact says the same first class as the original on every image."
    which, they = ("one of them", "it comes") if differing == 1 else (f"{differing} of them", "they come")
    return f"On {which} some artifact says another class than the original: {they} first, marked."


def _use(manifest: Manifest, rows: Sequence[ParityRow]) -> _Section | None:
    lead = "Without cspdeploy, true for this model's names, shapes and preprocessing."
    artifact = _recommended(manifest, rows)
    if artifact is None:
        return None
    alike = [made for made in manifest.artifacts if made.format == "onnx" and made.inputs == artifact.inputs]
    others = [made.file for made in alike if made != artifact]
    same = join(" takes the same input and gives the same output." if len(others) == 1 else
                " take the same input and give the same output.")  # fmt: skip
    said = tag("p", "Run it in the folder of the bundle. ", *_names(others), same if others else "", class_="lead")
    of_image = [
        made for made in manifest.artifacts
        if made.frontend is not None and size_of(made.kind) == size_of(artifact.kind)
    ]  # fmt: skip
    bytes_in = [made.file for made in of_image]
    if of_image:
        takes = " takes" if len(bytes_in) == 1 else " take"
        words = f"{takes} the bytes of a picture: {_bytes_words(manifest, of_image[0])}"
        said = join(said, tag("p", *_names(bytes_in), join(words), class_="lead"))
    snippets = [
        snippet_markup(snippet, snippet.write(manifest, artifact)) for snippet in snippets_for(manifest, artifact)
    ]
    return _section("use", "Use it", lead, said, *snippets)


def _bytes_words(manifest: Manifest, artifact: Artifact) -> str:
    frontend, contract = artifact.frontend or Frontend(), contract_of(manifest, artifact)
    size = "any size" if frontend.resize else f"{contract.height_px}x{contract.width_px} px, resized as below"
    classes = f"; outputs probabilities and classes hold the {frontend.top_k} likeliest" if frontend.top_k else ""
    order = frontend.channel_order.upper()
    return f"input image, uint8 [N, H, W, 3] {order}, of {size}, nothing else to prepare{classes}."


def _names(files: Sequence[str]) -> list[Markup]:
    parts: list[Markup] = []
    for i, file in enumerate(files):
        parts += [join(", ")] if i else []
        parts.append(tag("code", file))
    return parts


def _recommended(manifest: Manifest, rows: Sequence[ParityRow]) -> Artifact | None:
    """The first ONNX file that nothing speaks against; any ONNX file if all are broken."""
    broken = {row.artifact for row in rows if row.failed}
    # Of those that take floats, for the snippets show how these are made; with the image in the graph it is one line.
    files = [made for made in manifest.artifacts if made.format == "onnx" and made.frontend is None]
    return next((artifact for artifact in files if artifact.kind not in broken), files[0] if files else None)


def _limits(rows: Sequence[ParityRow]) -> _Section | None:
    lead = "Each follows from a measurement or from a model of rounding, unless it was given by hand."
    return _section("limits", "Limits", lead, limit_table(rows))


def _what(rows: Sequence[ParityRow]) -> _Section | None:
    lead = "What the files hold, where their nodes really run, and how the engines were set."
    tables = (audit_table(rows), placement_table(rows), session_table(rows))
    return _section("files", "Inside the files", lead, *tables)


def _steps(manifest: Manifest) -> _Section | None:
    lead = "From the network to each file, step by step."
    return _section("steps", "How it was made", lead, step_list(manifest), file_table(manifest))


def _environment(manifest: Manifest, report: VerifyReport) -> _Section | None:
    lead = "The machine and versions that these numbers hold for."
    return _section("environment", "Environment", lead, environment_lists(manifest, report))
