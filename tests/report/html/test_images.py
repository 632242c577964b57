from __future__ import annotations

import base64
import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from cspdeploy.core.golden import Golden
from cspdeploy.core.results import ImageDecision, ParityRow, VerifyReport
from cspdeploy.core.types import Manifest
from cspdeploy.report.html.images import (
    disagreements,
    image_cards,
    image_data_uri,
    image_table,
    reference_of,
)  # fmt: skip


def _decoded(uri: str) -> Image.Image:
    kind, _, data = uri.partition(";base64,")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.format is not None
    assert kind == f"data:image/{image.format.lower()}"
    return image


@pytest.mark.parametrize("shape", [(28, 28), (32, 48, 3)])
def test_small_images_are_kept_to_the_pixel(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    np.testing.assert_array_equal(np.asarray(_decoded(image_data_uri(pixels))), pixels)


def test_large_images_become_thumbnails() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (256, 512, 3), np.uint8)
    assert _decoded(image_data_uri(pixels)).size == (96, 48)


@pytest.fixture
def agreeing(tiny_golden: Golden, tiny_manifest: Manifest, tiny_report: VerifyReport) -> ParityRow:
    reference = reference_of(tiny_golden, tiny_manifest)
    assert reference is not None
    decisions = tuple(
        ImageDecision(index=int(index), probability=float(probability))
        for index, probability in zip(reference.classes_N, reference.probabilities_N, strict=True)
    )
    return dataclasses.replace(tiny_report.rows[1], decisions=decisions)


def test_agreement_marks_nothing(tiny_golden: Golden, tiny_manifest: Manifest, agreeing: ParityRow) -> None:
    cards = image_cards(tiny_golden, tiny_manifest, [agreeing])
    assert "differs" not in cards
    assert cards.index("golden image 0") < cards.index("golden image 5")


def test_one_other_class_is_marked_and_comes_first(
    tiny_golden: Golden, tiny_manifest: Manifest, agreeing: ParityRow
) -> None:
    other = (agreeing.decisions[5].index + 1) % 10
    decisions = list(agreeing.decisions)
    decisions[5] = ImageDecision(index=other, probability=0.4375)
    row = dataclasses.replace(agreeing, artifact="onnx-int8", runtime="ort-cpu", decisions=tuple(decisions))
    reference = reference_of(tiny_golden, tiny_manifest)
    assert reference is not None
    assert list(disagreements([agreeing, row], reference)) == [5]
    cards = image_cards(tiny_golden, tiny_manifest, [agreeing, row]).replace("\xa0", " ")
    assert cards.count('class="differs"') == 1
    assert cards.index("golden image 5") < cards.index("golden image 0")
    assert f"onnx-int8 on ort-cpu</i>label {other} 43.8 %" in cards
    table = image_table(tiny_golden, tiny_manifest, [agreeing, row])
    assert table.count("mark fail") == 1


def test_a_row_that_did_not_see_every_image_has_no_say(
    tiny_golden: Golden, tiny_manifest: Manifest, agreeing: ParityRow
) -> None:
    short = dataclasses.replace(agreeing, decisions=agreeing.decisions[:3])
    assert image_table(tiny_golden, tiny_manifest, [short]) == ""


def test_a_class_without_a_label_is_still_shown(
    tiny_golden: Golden, tiny_manifest: Manifest, agreeing: ParityRow
) -> None:
    decisions = (ImageDecision(index=77, probability=0.5), *agreeing.decisions[1:])
    cards = image_cards(tiny_golden, tiny_manifest, [dataclasses.replace(agreeing, decisions=decisions)])
    assert "class 77" in cards
