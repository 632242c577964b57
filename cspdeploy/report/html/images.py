"""The golden images, and what each artifact says of them. Shapes: N images, C classes, H height, W width."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from cspdeploy.core.golden import Golden
from cspdeploy.core.metrics import softmax, top_k
from cspdeploy.core.results import ParityRow
from cspdeploy.core.types import Manifest
from cspdeploy.report.html.markup import Column, Markup, join, percent_text, table, tag
from cspdeploy.report.html.rows import row_name

__all__ = ["MAX_IMAGES", "Reference", "disagreements", "image_cards", "image_data_uri", "image_table", "reference_of"]

MAX_IMAGES = 64
"""As many as an export stores at most; 64 thumbnails are under 400 kB whatever they show."""
_THUMBNAIL_PX = 96
# A PNG of a few thousand pixels is smaller than a JPEG with its tables, and keeps small pictures exact.
_PNG_UP_TO_PIXELS = 64 * 64
_JPEG_QUALITY = 80


@dataclass(frozen=True, slots=True)
class Reference:
    """The original's first class of each image `[N]`, and its softmax probability `[N]`."""

    classes_N: npt.NDArray[np.int64]
    probabilities_N: npt.NDArray[np.float64]


def reference_of(golden: Golden, manifest: Manifest) -> Reference | None:
    """What the FP64 original decides; None where its outputs are no classes."""
    logits_NC = next(iter(golden.outputs_fp64.values()))
    if manifest.spec.task != "classify" or logits_NC.ndim != 2 or logits_NC.shape[1] != len(manifest.labels):
        return None
    classes_N = top_k(logits_NC, 1)[:, 0]
    return Reference(classes_N, softmax(logits_NC)[np.arange(len(logits_NC)), classes_N])


def image_data_uri(image: npt.NDArray[np.uint8], *, longest_px: int = _THUMBNAIL_PX) -> str:
    """A thumbnail of `[H, W]` or `[H, W, 3]` as a data URI; the same pixels give the same bytes."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    picture.thumbnail((longest_px, longest_px), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small = picture.width * picture.height <= _PNG_UP_TO_PIXELS
    if small:
        picture.save(buffer, "PNG", optimize=True)
    else:
        picture.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def deciding_rows(rows: Sequence[ParityRow], num_images: int) -> list[ParityRow]:
    """Rows that say something of every image."""
    return [row for row in rows if len(row.decisions) == num_images]


def disagreements(rows: Sequence[ParityRow], reference: Reference) -> dict[int, list[ParityRow]]:
    """The images of which some rows say another class than the original, with these rows."""
    deciding = deciding_rows(rows, len(reference.classes_N))
    found = {
        i: [row for row in deciding if row.decisions[i].index != expected]
        for i, expected in enumerate(reference.classes_N.tolist())
    }
    return {i: others for i, others in found.items() if others}


def image_cards(golden: Golden, manifest: Manifest, rows: Sequence[ParityRow]) -> Markup:
    """A card an image, those on which artifacts disagree first."""
    reference = reference_of(golden, manifest)
    differing = disagreements(rows, reference) if reference else {}
    order = [*differing, *(i for i in range(len(golden.images)) if i not in differing)][:MAX_IMAGES]
    cards = [
        _card(i, golden, _says(i, manifest, rows, reference, differing.get(i, [])), differs=i in differing)
        for i in order
    ]
    return tag("ul", *cards, class_="cards")


def _card(i: int, golden: Golden, says: Sequence[Markup], *, differs: bool) -> Markup:
    height, width = golden.images[i].shape[:2]
    picture = tag(
        "img", src=image_data_uri(golden.images[i]), alt=f"golden image {i}", loading="lazy", width=width,
        height=height, class_="pixels" if max(height, width) < _THUMBNAIL_PX else None,
    )  # fmt: skip
    return tag("li", picture, tag("span", str(i), class_="index"), *says, class_="differs" if differs else None)


def _says(
    i: int, manifest: Manifest, rows: Sequence[ParityRow], reference: Reference | None, others: Sequence[ParityRow]
) -> list[Markup]:
    """The original's class with its probability, and each other class with the row that says it."""
    if reference is None:
        return []
    label = manifest.labels[int(reference.classes_N[i])]
    lines = [tag("b", label), tag("span", _range(i, rows, reference), class_="probability")]
    for row in others:
        decision = row.decisions[i]
        said = f"{_label(manifest, decision.index)} {percent_text(decision.probability, digits=1)}"
        lines.append(tag("span", tag("i", row_name(row)), said, class_="other"))
    return lines


def _label(manifest: Manifest, index: int) -> str:
    return manifest.labels[index] if 0 <= index < len(manifest.labels) else f"class {index}"


def _range(i: int, rows: Sequence[ParityRow], reference: Reference) -> str:
    """The probability of the original's class, over the original and all artifacts that agree."""
    expected = int(reference.classes_N[i])
    agreeing = [
        row.decisions[i].probability
        for row in deciding_rows(rows, len(reference.classes_N))
        if row.decisions[i].index == expected
    ]
    all_of_them = [float(reference.probabilities_N[i]), *agreeing]
    first, last = (percent_text(end, digits=1) for end in (min(all_of_them), max(all_of_them)))
    return last if first == last else f"{first[:-2]}\N{EN DASH}{last}"


def image_table(golden: Golden, manifest: Manifest, rows: Sequence[ParityRow]) -> Markup:
    """Every decision of every artifact, in a fold; nothing where nothing decides."""
    reference = reference_of(golden, manifest)
    deciding = deciding_rows(rows, len(golden.images))
    if reference is None or not deciding:
        return Markup("")
    columns = [Column(name="image"), Column(name="original"), *(Column(name=row_name(row)) for row in deciding)]
    lines = []
    for i, expected in enumerate(reference.classes_N.tolist()):
        cells = [_decision(manifest, expected, float(reference.probabilities_N[i]), differs=False)]
        for row in deciding:
            found = row.decisions[i]
            cells.append(_decision(manifest, found.index, found.probability, differs=found.index != expected))
        lines.append([str(i), *cells])
    caption = "First class and its probability. Marked: another class than the original's."
    return tag(
        "details",
        tag("summary", "All decisions of all artifacts"),
        tag("div", table(columns, lines, caption=caption), class_="scroll", tabindex="0"),
    )


def _decision(manifest: Manifest, index: int, probability: float, *, differs: bool) -> Markup:
    words = f"{_label(manifest, index)} {percent_text(probability, digits=1)}"
    sign = tag("span", "\N{NOT EQUAL TO} ", class_="sign")
    return tag("span", sign, join(words), class_="mark fail") if differs else join(words)
