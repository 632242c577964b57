"""The head of the page: the verdict in one sentence, the figures that matter, and what to beware of."""

from __future__ import annotations

from collections.abc import Sequence

from cspdeploy.core.catalog import EAGER
from cspdeploy.core.results import ParityRow, VerifyReport
from cspdeploy.core.sizes import base_kind, sizes_of
from cspdeploy.core.types import Manifest
from cspdeploy.report.html.markup import Markup, bytes_text, ms_text, percent_text, tag
from cspdeploy.report.html.rows import VERDICT_WORDS, artifact_rows, mark, row_name

__all__ = ["banner", "header", "sentence"]

_MAP_RANK = 4  # [N, C, H, W]
_ORIGINALS = frozenset({EAGER, "original"})
"""What the files of a bundle are made from: the network in torch, or an ONNX file from elsewhere."""
UNTRAINED = "UNTRAINED: random weights. The checks hold for the arithmetic; no decision of this model means anything."


def header(manifest: Manifest, report: VerifyReport, rows: Sequence[ParityRow]) -> Markup:
    """Title, sentence, figures, warnings."""
    kind, words = sentence(manifest, report, rows)
    contract, provenance = manifest.spec.preprocess, manifest.spec.provenance
    what = {"classify": f"{len(manifest.labels):,} classes", "features": _features_words(manifest),
            "detect": _boxes_words(manifest), "segment": f"{len(manifest.labels):,} classes of pixels"}  # fmt: skip
    own = (contract.height_px, contract.width_px)
    sizes = [size_px or own for size_px in sizes_of(manifest.artifacts)]
    listed = ", ".join(f"{height} \N{MULTIPLICATION SIGN} {width}" for height, width in sizes)
    facts = [f"{listed} px", what[manifest.spec.task]]
    facts += [provenance.dataset] if provenance.dataset else []
    status = {"pass": "Verified", "fail": "Broken", "open": "Not verified"}[kind]
    return tag(
        "header",
        tag("p", tag("b", manifest.spec.name), *(f" \N{MIDDLE DOT} {fact}" for fact in facts), class_="what"),
        tag("h1", mark(kind, status), tag("span", words, class_="sentence")),
        *_skipped(rows),
        *banner(manifest, report),
        _figures(rows),
        class_=kind,
    )  # fmt: skip


def _is_original(row: ParityRow) -> bool:
    return base_kind(row.artifact) in _ORIGINALS


def _boxes_words(manifest: Manifest) -> str:
    return f"boxes of {len(manifest.labels):,} class{'es' if len(manifest.labels) != 1 else ''}"


def _features_words(manifest: Manifest) -> str:
    """An ONNX file from elsewhere may give anything."""
    shapes = [value.shape for value in manifest.artifacts[0].outputs]
    if all(len(shape) == _MAP_RANK for shape in shapes):
        return "feature maps"
    return "1 output" if len(shapes) == 1 else f"{len(shapes)} outputs"


def sentence(manifest: Manifest, report: VerifyReport, rows: Sequence[ParityRow]) -> tuple[str, str]:
    """Kind ("pass", "fail", "open") and the verdict in words."""
    name = manifest.spec.name
    failed = [row for row in rows if row.failed]
    checked = [row for row in artifact_rows(rows) if row.verdict not in ("not-checkable", "not-checked")]
    worse = [change for change in report.regressions if change.verdict in ("worse", "gone")]
    if failed:
        first, others = failed[0], len(failed) - 1
        before = artifact_rows(rows)[: artifact_rows(rows).index(first)] if first in artifact_rows(rows) else []
        sound = "; all before it holds" if any(row.verdict == "pass" for row in before) else ""
        more = f"; {others} more {'fail' if others > 1 else 'fails'}" if others else ""
        return "fail", f"{row_name(first)} is the first to break: {VERDICT_WORDS[first.verdict]}{sound}{more}."
    if worse:
        change = worse[0]
        return "fail", f"{change.artifact} on {change.runtime} is {change.verdict} against {report.against}."
    if report.verdict == "fail":
        return "fail", f"The check failed: {report.first_break}."
    if report.verdict == "not-checked" or not checked:
        return "open", f"Nothing has compared the files of {name} with the original network yet."
    runtimes = len({row.runtime for row in checked})
    artifacts = len({row.artifact for row in checked if not _is_original(row)})
    files = "one artifact does" if artifacts == 1 else f"all {artifacts} artifacts do"
    where = "on one runtime" if runtimes == 1 else f"on {runtimes} runtimes"
    return "pass", f"{files[0].upper()}{files[1:]} what the original network does, {where}."


def _skipped(rows: Sequence[ParityRow]) -> list[Markup]:
    judged = artifact_rows(rows)
    skipped = sum(row.verdict == "not-checkable" for row in judged)
    words = f"{skipped} of {len(judged)} rows could not be checked on this machine; the ladder says why."
    return [tag("p", words, class_="remark")] if skipped else []


def banner(manifest: Manifest, report: VerifyReport) -> list[Markup]:
    """What a reader must know before the rest."""
    found = []
    if manifest.spec.provenance.untrained or report.untrained:
        found.append(UNTRAINED)
    if not report.rows:
        found.append(
            "Before you use it, run cspdeploy verify . in this folder: a file that was not verified on its runtime "
            "proves nothing."
        )
    found += report.warnings
    return [tag("p", mark("warn", words[:1].upper() + words[1:]), class_="banner") for words in found]


def _figures(rows: Sequence[ParityRow]) -> Markup:
    """The numbers that somebody who picks an artifact looks for first."""
    judged = artifact_rows(rows)
    sound = [row for row in judged if not row.failed and row.verdict != "not-checkable"]
    figures: list[tuple[str, str, str]] = []
    timed = [(row.timing.p50_ms, row_name(row)) for row in sound if row.timing and not _is_original(row)]
    if timed:
        p50_ms, name = min(timed)
        figures.append(("fastest", ms_text(p50_ms), name))
    sized = [row for row in sound if row.num_bytes and not _is_original(row)]
    if sized:
        smallest = min(sized, key=lambda row: row.num_bytes)
        figures.append(("smallest", bytes_text(smallest.num_bytes), smallest.artifact))
    measured = [row for row in sound if row.top1 is not None]
    if measured:
        best = max(measured, key=lambda row: row.top1 or 0.0)
        lowest = min(row.top1 or 0.0 for row in measured)
        low, high = percent_text(lowest), percent_text(best.top1)
        shown = high if low == high else f"{low[:-2]}\N{EN DASH}{high}"
        figures.append(("top-1 accuracy", shown, f"on {best.accuracy_images:,} labelled images"))
    agreeing = [row for row in judged if row.top1_agreement is not None]
    if agreeing:
        worst = min(agreeing, key=lambda row: row.top1_agreement or 0.0)
        where = "every artifact" if worst.top1_agreement == 1 else f"at least, by {row_name(worst)}"
        figures.append(("same first class", percent_text(worst.top1_agreement), f"{where}, {worst.num_images} images"))
    boxing = [row for row in judged if row.num_boxes and row.box_recall is not None]
    if boxing:
        fewest = min(boxing, key=lambda row: row.box_recall or 0.0)
        where = "every artifact" if fewest.box_recall == 1 else f"at least, by {row_name(fewest)}"
        figures.append(("same boxes", percent_text(fewest.box_recall), f"{where}, of {fewest.num_boxes} boxes"))
    items = [
        tag("div", tag("dt", name), tag("dd", tag("b", value), tag("small", where))) for name, value, where in figures
    ]
    return tag("dl", *items, class_="figures") if items else Markup("")
