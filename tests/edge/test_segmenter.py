"""The class of every pixel, in the picture's own size. The network's answer is known: a constant."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cspdeploy.core.bundle import file_record, write_manifest
from cspdeploy.core.errors import InputError
from cspdeploy.core.golden import Golden, write_golden
from cspdeploy.core.preprocess import preprocess
from cspdeploy.core.spec import ModelSpec, NetworkSpec, Preprocess, Provenance
from cspdeploy.core.types import Artifact, Manifest, TensorInfo
from cspdeploy.edge import Predictor
from cspdeploy.edge.__main__ import main
from cspdeploy.edge.selftest import SelftestRequest, run_selftest
from tests.edge.detectors import CONTRACT, constant_model, write_detector

LABELS = ("ground", "sky", "cat")
HEIGHT, WIDTH = CONTRACT.height_px, CONTRACT.width_px
HALVES = np.repeat([0, 1], HEIGHT // 2)[:, None].repeat(WIDTH, 1)  # ground above, sky below
HALVES[:, : WIDTH // 4] = 2


def _logits(best_HW: np.ndarray) -> np.ndarray:
    """`[1, 3, H, W]` with the best class that is asked for."""
    random = np.random.default_rng(0).normal(0, 1, (1, 3, *best_HW.shape)).astype(np.float32)
    np.put_along_axis(random, best_HW[None, None], 9.0, axis=1)
    return random


def write_segmenter(
    folder: Path, logits_NCHW: np.ndarray, *, contract: Preprocess = CONTRACT, labels: tuple[str, ...] = LABELS
) -> Path:
    """A bundle "parts" with one artifact, "onnx"."""
    folder.mkdir(parents=True)
    path = folder / "parts.onnx"
    path.write_bytes(constant_model({"logits": logits_NCHW}, contract).SerializeToString())
    record = file_record(path)
    artifact = Artifact(
        kind="onnx", file=path.name, format="onnx", precision="fp32", sha256=record.sha256, num_bytes=record.num_bytes,
        opset=17, steps=(),
        inputs=(TensorInfo(name="input", dtype="float32", shape=(1, 3, contract.height_px, contract.width_px)),),
        outputs=(TensorInfo(name="logits", dtype="float32", shape=logits_NCHW.shape),),
    )  # fmt: skip
    spec = ModelSpec(
        name="parts", network=NetworkSpec(family="test", config={}), num_classes=len(labels), preprocess=contract,
        provenance=Provenance(source="user", origin="test"), task="segment", outputs=("logits",),
    )  # fmt: skip
    images = np.random.default_rng(3).integers(0, 256, (4, 20, 36, 3), np.uint8)
    exact = np.nan_to_num(np.repeat(logits_NCHW, len(images), 0))
    write_golden(folder / "golden.npz", Golden(
        images=images, x_NCHW=preprocess(list(images), contract), outputs_fp32={"logits": exact},
        outputs_fp64={"logits": exact.astype(np.float64)},
    ))  # fmt: skip
    write_manifest(folder, Manifest(
        spec=spec, labels=labels, artifacts=(artifact,), files=(file_record(folder / "golden.npz"),), options={},
        tools={},
    ))  # fmt: skip
    return folder


def _picture(width: int, height: int) -> np.ndarray:
    return np.full((height, width, 3), 99, np.uint8)


def test_the_maps_size_and_place_are_the_pictures(tmp_path: Path) -> None:
    with Predictor.open(write_segmenter(tmp_path / "b", _logits(HALVES))) as predictor:
        same = predictor.segment(_picture(WIDTH, HEIGHT))
        large = predictor.segment(_picture(4 * WIDTH, 4 * HEIGHT))
        tall = predictor.segment(_picture(32, 64))  # inside 16x32 px, with 24 grey columns on either side
        small = predictor.segment(_picture(2, 1))
    assert (same.dtype, same.shape) == (np.int64, (HEIGHT, WIDTH))
    np.testing.assert_array_equal(same, HALVES)
    np.testing.assert_array_equal(large, HALVES.repeat(4, 0).repeat(4, 1))
    np.testing.assert_array_equal(tall, HALVES[:, 24:40].repeat(2, 0).repeat(2, 1))
    np.testing.assert_array_equal(small, HALVES[[16]][:, [16, 48]])


def test_what_a_crop_cuts_away_is_no_class(tmp_path: Path) -> None:
    contract = dataclasses.replace(CONTRACT, resize="crop")
    with Predictor.open(write_segmenter(tmp_path / "b", _logits(HALVES), contract=contract)) as predictor:
        found = predictor.segment(_picture(WIDTH, WIDTH))  # the middle 32 rows of 64 are seen
    np.testing.assert_array_equal(found[16:48], HALVES)
    assert (found[:16] == -1).all()
    assert (found[48:] == -1).all()


def test_a_coarser_map_covers_the_whole_input(tmp_path: Path) -> None:
    coarse = np.array([[0, 1], [2, 0]])
    with Predictor.open(write_segmenter(tmp_path / "b", _logits(coarse))) as predictor:
        found = predictor.segment(_picture(WIDTH, HEIGHT))
    np.testing.assert_array_equal(found, coarse.repeat(HEIGHT // 2, 0).repeat(WIDTH // 2, 1))


def test_a_turned_photograph_has_its_map_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(_picture(90, 60)).save(tmp_path / "turned.png", exif=exif)
    assert Predictor.open(write_segmenter(tmp_path / "b", _logits(HALVES))).segment(tmp_path / "turned.png").shape == (
        90, 60,
    )  # fmt: skip


def test_scores_that_are_no_numbers_or_fit_no_label(tmp_path: Path) -> None:
    logits = _logits(HALVES)
    logits[0, 1, 5, 5] = np.nan
    with pytest.raises(InputError, match="NaN"):
        Predictor.open(write_segmenter(tmp_path / "nan", logits)).segment(_picture(9, 9))
    with pytest.raises(InputError, match=r"class scores \[3, 32, 64\] and 2 labels"):
        Predictor.open(write_segmenter(tmp_path / "two", _logits(HALVES), labels=LABELS[:2])).segment(_picture(9, 9))


def test_each_task_says_which_call_it_has(
    tmp_path: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_segmenter(tmp_path / "b", _logits(HALVES))
    with Predictor.open(folder) as predictor:
        assert predictor.task == "segment"
        for wrong in (predictor, predictor.logits):
            with pytest.raises(InputError, match="a class of every pixel") as caught:
                wrong(_picture(9, 9))
            assert ".segment(IMAGE)" in caught.value.fix
        with pytest.raises(InputError, match="not features"):
            predictor.features(_picture(9, 9))
        with pytest.raises(InputError, match="not an image"):
            predictor.segment(b"no image")
    for other, fix in ((tiny_bundle, "classes of the image"), (write_detector(tmp_path / "d"), "its boxes")):
        with (
            Predictor.open(other) as predictor,
            pytest.raises(InputError, match="not a class of every pixel") as caught,
        ):
            predictor.segment(_picture(9, 9))
        assert fix in caught.value.fix
    assert main(["predict", str(folder), "any.png"]) == 2
    assert "a class of every pixel" in capsys.readouterr().err


def test_the_selftest_of_a_segmenter_compares_its_maps(tmp_path: Path) -> None:
    folder = write_segmenter(tmp_path / "b", _logits(HALVES))
    report = run_selftest(folder, SelftestRequest(runtime="ort-cpu", latency=False))
    assert {row.verdict for row in report.checks} == {"pass"}
    golden = {row.artifact: row for row in report.checks if row.check == "golden"}
    assert set(golden) == {"onnx"}
