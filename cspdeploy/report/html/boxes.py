"""The golden images of a detector with its boxes: found again, lost, and new. Shapes: as in `core.detection`.

Each has a line of its own, so that nobody has to tell colours apart: matched solid, lost dashed, new dotted. Where
nothing was compared, they are the original's and no more.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cspdeploy.core.detection.boxes import Boxes, to_picture
from cspdeploy.core.detection.postprocess import find_boxes
from cspdeploy.core.golden import Golden
from cspdeploy.core.results import ParityRow
from cspdeploy.core.types import Manifest
from cspdeploy.report.html.images import MAX_IMAGES, image_data_uri
from cspdeploy.report.html.markup import Markup, join, percent_text, tag
from cspdeploy.report.html.rows import row_name

__all__ = ["box_cards", "box_words", "boxing_rows", "reference_boxes"]

PICTURE_PX = 320
"""Longer side of a picture: boxes of a twentieth of it can be told apart."""
_LINES = {
    "original": ("#0b57a4", ""), "matched": ("#1a7f37", ""), "lost": ("#b42318", "8 4"), "new": ("#7a3ff2", "2 3"),
}  # fmt: skip


def reference_boxes(golden: Golden, manifest: Manifest) -> list[Boxes]:
    """The original's boxes of each golden image, in the network's input; none where it is no detector."""
    detection = manifest.spec.detection
    if detection is None:
        return []
    exact = {name: np.asarray(array, np.float32) for name, array in golden.outputs_fp64.items()}
    return find_boxes(exact, detection, detection.network_decode)


def boxing_rows(rows: Sequence[ParityRow], num_images: int) -> list[ParityRow]:
    """Rows that say something of every image."""
    return [row for row in rows if len(row.boxes) == num_images]


def box_words(golden: Golden, manifest: Manifest, rows: Sequence[ParityRow]) -> str:
    """How many boxes there are, and what became of them."""
    total = sum(len(boxes) for boxes in reference_boxes(golden, manifest))
    rule = manifest.spec.detection.suppression if manifest.spec.detection else None
    at = f" above a score of {rule.score_threshold:g}" if rule else ""
    said = f"The original finds {total} box{'es' if total != 1 else ''}{at}."
    judged = boxing_rows(rows, len(golden.images))
    if not judged:
        return f"{said} No artifact was asked."
    if all(not one.lost and not one.new for row in judged for one in row.boxes):
        return f"{said} Every artifact finds the same ones."
    return f"{said} Solid: found again. Dashed: lost by some artifact. Dotted: new, by some artifact."


def box_cards(golden: Golden, manifest: Manifest, rows: Sequence[ParityRow]) -> Markup:
    """A picture an image, those first on which artifacts lose or add a box."""
    expected = reference_boxes(golden, manifest)
    judged = boxing_rows(rows, len(golden.images))
    differing = [i for i in range(len(expected)) if any(row.boxes[i].lost or row.boxes[i].new for row in judged)]
    order = [*differing, *(i for i in range(len(expected)) if i not in set(differing))][:MAX_IMAGES]
    cards = [_card(i, golden, manifest, expected[i], judged, differs=i in set(differing)) for i in order]
    return join(_counts(judged), tag("ul", *cards, class_="cards boxes"))


def _counts(rows: Sequence[ParityRow]) -> Markup:
    """A line an artifact that differs."""
    items = []
    for row in rows:
        lost, new = sum(len(one.lost) for one in row.boxes), sum(one.num_new for one in row.boxes)
        if lost or new:
            share = percent_text(row.box_recall)
            items.append(tag("li", f"{row_name(row)}: {lost} lost, {new} new; finds {share} of the original's boxes"))
    return tag("ul", *items, class_="reasons") if items else Markup("")


def _card(
    i: int, golden: Golden, manifest: Manifest, expected: Boxes, rows: Sequence[ParityRow], *, differs: bool
) -> Markup:
    height, width = golden.images[i].shape[:2]
    lost = sorted({place for row in rows for place in row.boxes[i].lost if place < len(expected)})
    kept = [place for place in range(len(expected)) if place not in set(lost)]
    new = np.array([box for row in rows for box in row.boxes[i].new], np.float64).reshape(-1, 6)
    known = "matched" if rows else "original"
    groups = {
        known: _part(expected, kept), "lost": _part(expected, lost),
        "new": Boxes(boxes_M4=new[:, :4].astype(np.float32), scores_M=new[:, 4].astype(np.float32),
                     classes_M=new[:, 5].astype(np.int64)),
    }  # fmt: skip
    shapes = [
        shape for kind, boxes in groups.items()
        for shape in _shapes(kind, to_picture(boxes, manifest.spec.preprocess, width=width, height=height), manifest,
                             scale=max(width, height) / PICTURE_PX)
    ]  # fmt: skip
    counts = {known: len(kept), "lost": len(lost), "new": sum(row.boxes[i].num_new for row in rows)}
    words = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count) or "no box"
    image = tag("image", href=image_data_uri(golden.images[i], longest_px=PICTURE_PX), width=width, height=height)
    picture = tag(
        "svg", image, *shapes, viewBox=f"0 0 {width} {height}", role="img", aria_label=f"golden image {i}: {words}"
    )
    return tag("li", picture, tag("span", f"{i}: {words}", class_="index"), class_="differs" if differs else None)


def _part(boxes: Boxes, places: Sequence[int]) -> Boxes:
    return Boxes(
        boxes_M4=boxes.boxes_M4[list(places)], scores_M=boxes.scores_M[list(places)],
        classes_M=boxes.classes_M[list(places)],
    )  # fmt: skip


def _shapes(kind: str, boxes: Boxes, manifest: Manifest, *, scale: float) -> list[Markup]:
    """A light line under each dark one, so that it is seen on any picture; a title for the pointer."""
    colour, dashes = _LINES[kind]
    dashes = " ".join(f"{float(part) * scale:.4g}" for part in dashes.split()) or "none"
    found = []
    for box, score, index in zip(boxes.boxes_M4, boxes.scores_M, boxes.classes_M, strict=True):
        left, top, right, bottom = (float(side) for side in box)
        name = manifest.labels[int(index)] if 0 <= index < len(manifest.labels) else f"class {index}"
        place = {"x": left, "y": top, "width": max(right - left, 0.0), "height": max(bottom - top, 0.0)}
        under = tag("rect", **place, fill="none", stroke="#fff", stroke_width=4 * scale, stroke_opacity="0.7")
        line = tag(
            "rect", tag("title", f"{kind}: {name} {score:.2f}"), **place, fill="none", stroke=colour,
            stroke_width=2 * scale, stroke_dasharray=dashes, class_=f"box {kind}",
        )  # fmt: skip
        found += [under, line]
    return found
