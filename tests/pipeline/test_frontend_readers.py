"""What others make of files with preprocessing in the graph: the card, the page, blame, the accuracy."""

from __future__ import annotations

import dataclasses
import html
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cspdeploy.check.blame.prepare import BlameRequest, prepare
from cspdeploy.check.inspect import inspect_onnx
from cspdeploy.check.loose_file import file_subject
from cspdeploy.core.bundle import read_manifest
from cspdeploy.core.card import read_card, stamp_card
from cspdeploy.core.datasets import LabelledImages
from cspdeploy.core.errors import InputError
from cspdeploy.core.golden import read_golden
from cspdeploy.core.onnx_graph import read_onnx
from cspdeploy.core.preprocess import list_images, preprocess
from cspdeploy.core.spec import Provenance
from cspdeploy.pipeline.foreign import OnnxOrigin
from cspdeploy.pipeline.frontend_step import (
    synthetic_photographs,
)
from cspdeploy.report.card import card_lines
from cspdeploy.report.html.page import render_report
from tests.pipeline.frontend_parts import U8_KINDS, contract_of, quick_verify, row_of

# --- the card ---


def test_every_onnx_file_says_what_it_is(plain: Path) -> None:
    manifest = read_manifest(plain)
    for artifact in manifest.artifacts:
        if artifact.format != "onnx":
            continue
        card = inspect_onnx(plain / artifact.file).card
        assert card is not None
        assert (card.model, card.artifact, card.labels) == ("tiny", artifact.kind, manifest.labels)
        assert (card.preprocess, card.provenance) == (manifest.spec.preprocess, manifest.spec.provenance)
        assert card.frontend == artifact.frontend
        assert card.outputs == tuple(value.name for value in artifact.outputs)
        assert card.tool.startswith("cspdeploy ")


def test_card_is_the_contract_of_a_file_by_itself(plain: Path, tmp_path: Path) -> None:
    """Exported again without --preprocess and --names: labels, contract and UNTRAINED go along."""
    path = tmp_path / "other.onnx"
    shutil.copy(plain / "tiny.onnx", path)
    card = read_card(read_onnx(path).metadata, name="other.onnx")
    assert card is not None
    stamp_card(path, dataclasses.replace(card, provenance=Provenance(source="random")))
    origin = OnnxOrigin(
        path, preprocess=None, images=_pictures(tmp_path / "pictures"), names=None, size_px=None, opset=None,
        max_opset=None, operators=frozenset(), dynamic_batch=False,
    )  # fmt: skip
    manifest = read_manifest(plain)
    assert (origin.spec.preprocess, origin.spec.task) == (manifest.spec.preprocess, "classify")
    assert origin.labels == manifest.labels
    assert origin.spec.provenance.untrained
    subject = file_subject(path, images=tmp_path / "pictures", reference=False)
    images = list_images(tmp_path / "pictures")
    np.testing.assert_array_equal(
        next(iter(subject.feeds.values())), preprocess([str(image) for image in images], manifest.spec.preprocess)
    )


def _pictures(folder: Path) -> Path:
    folder.mkdir()
    for i, picture in enumerate(synthetic_photographs(contract_of("crop", "bilinear", (40, 40)))):
        Image.fromarray(picture).save(folder / f"{i}.png")
    return folder


def test_card_for_a_reader(plain: Path) -> None:
    card = inspect_onnx(plain / "tiny.int8.u8.onnx").card
    lines = dict(card_lines(card))
    assert lines["labels"] == "label 0, label 1, label 2, label 3, label 4, ... (10 in all)"
    assert lines["image"] == "32x32 px RGB, shorter side, then the centre, bilinear"
    assert "in the graph, from BGR bytes, and the 3 likeliest classes at its end" in lines["preprocessing"]
    assert card is not None
    untrained = dataclasses.replace(card, provenance=Provenance(source="random"), frontend=None)
    lines = dict(card_lines(untrained))
    assert lines["weights from"].startswith("UNTRAINED")
    assert lines["preprocessing"].endswith("by the application")


# --- what else looks at such files ---


def test_blame_names_the_file_that_takes_floats(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"behind it the nodes of tiny\.int8\.onnx") as caught:
        prepare(BlameRequest(artifact=plain / "tiny.int8.u8.onnx"), folder=tmp_path)
    assert caught.value.fix == f"cspdeploy blame {plain / 'tiny.int8.onnx'}"


def test_page_shows_them_and_keeps_its_snippets_to_files_that_take_floats(plain: Path) -> None:
    manifest = read_manifest(plain)
    golden, report = read_golden(plain / "golden.npz"), quick_verify(plain, audit=False)
    page = str(render_report(plain, manifest=manifest, golden=golden, report=report))
    assert "input image, uint8 [N, H, W, 3] BGR, of 32x32 px" in page
    assert 'ort.InferenceSession("tiny.onnx"' in html.unescape(page).replace('<span class="string">', "").replace(
        "</span>", ""
    )


def test_accuracy_is_that_of_the_file_without(plain: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (20, 32, 32), np.uint8)
    data = LabelledImages(
        name="x", labels=read_manifest(plain).labels, classes=np.arange(20, dtype=np.int64) % 10, stored=pictures
    )
    report = quick_verify(plain, accuracy=data, audit=False)
    for kind in U8_KINDS:
        assert row_of(report, kind).accuracy_images == 20
        assert row_of(report, kind).top1 == row_of(report, kind.removesuffix("-u8")).top1
