"""Boxes in the application's own picture, whatever the contract of the artifact."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cspdeploy.cli.app import main as cspdeploy_main
from cspdeploy.core.bundle import read_manifest, write_manifest
from cspdeploy.core.compare import Comparison
from cspdeploy.core.detection.boxes import to_picture
from cspdeploy.core.detection.spec import Decode, Suppression
from cspdeploy.core.errors import InputError
from cspdeploy.core.golden import Golden
from cspdeploy.core.tolerance import limits_for
from cspdeploy.edge import Detections, Predictor
from cspdeploy.edge.__main__ import main
from cspdeploy.edge.drawing import draw_on
from cspdeploy.edge.results import DetectedBox
from cspdeploy.edge.selftest import SelftestRequest, run_selftest
from cspdeploy.edge.selftest_boxes import compare_detector
from tests.edge.detectors import (
    ALL_DECODES,
    CONTRACT,
    LABELS,
    detection_of,
    expected_boxes,
    outputs_of,
    raw_heads,
    write_detector,
)

PICTURE = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)


def _rows(found: object) -> np.ndarray:
    assert isinstance(found, Detections)
    return np.array([[one.left, one.top, one.right, one.bottom, one.score, one.index] for one in found])


def _one_box(box: list[float], *, score: float = 0.9) -> dict[str, np.ndarray]:
    return {"boxes": np.array([[box]], np.float32), "scores": np.array([[[0.1, score, 0.2]]], np.float32)}


@pytest.mark.parametrize("decode", ALL_DECODES)
def test_every_contract_gives_the_same_boxes_in_the_picture(tmp_path: Path, decode: Decode) -> None:
    with Predictor.open(write_detector(tmp_path / "b", decode=decode)) as predictor:
        found = predictor(PICTURE)
        streamed = [item.result for item in predictor.stream([PICTURE, PICTURE])]
        assert predictor.predict([PICTURE, PICTURE]) == streamed == [found, found]
    expected = to_picture(expected_boxes(detection_of("decoded")), CONTRACT, width=90, height=60)
    assert len(expected) > 5
    np.testing.assert_allclose(_rows(found)[:, :4], expected.boxes_M4, atol=1e-3)
    np.testing.assert_allclose(_rows(found)[:, 4], expected.scores_M, atol=1e-6)
    assert [one.label for one in found] == [LABELS[index] for index in expected.classes_M]
    assert isinstance(found, Detections)
    assert not found.untrained
    assert found[0] == found.boxes[0]


@pytest.mark.parametrize(
    ("resize", "size", "inside", "expected"),
    [
        ("letterbox", (64, 64), (16, 0, 48, 32), (0, 0, 64, 64)),  # grey to the left and the right
        ("letterbox", (200, 20), (0, 13, 64, 19), (0, 0, 200, 20)),  # and above and below
        ("stretch", (128, 128), (0, 0, 32, 32), (0, 0, 64, 128)),
        ("crop", (128, 128), (0, 0, 64, 32), (0, 32, 128, 96)),
        ("letterbox", (64, 32), (-50, -50, 500, 500), (0, 0, 64, 32)),  # cut at the edges
        ("letterbox", (6000, 2), (0, 15, 64, 16), (0, 0, 6000, 2)),
    ],
)
def test_boxes_lie_where_the_contract_put_the_picture(
    tmp_path: Path, resize: str, size: tuple[int, int], inside: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    contract = dataclasses.replace(CONTRACT, resize=resize)
    folder = write_detector(tmp_path / "b", outputs=_one_box([float(one) for one in inside]), contract=contract)
    found = Predictor.open(folder)(np.full((size[1], size[0], 3), 99, np.uint8))
    np.testing.assert_allclose(_rows(found)[0, :4], expected, atol=1e-3)


def test_a_turned_photograph_has_its_boxes_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PICTURE).save(tmp_path / "turned.png", exif=exif)  # 90x60 as stored, 60x90 upright
    folder = write_detector(tmp_path / "b", outputs=_one_box([-99, -99, 99, 99]))
    assert _rows(Predictor.open(folder)(tmp_path / "turned.png"))[0, :4].tolist() == [0, 0, 60, 90]


def test_thresholds_of_the_application(tmp_path: Path) -> None:
    predictor = Predictor.open(write_detector(tmp_path / "b"))
    plain = _rows(predictor(PICTURE))
    assert len(_rows(predictor(PICTURE, score=0.1))) > len(plain)
    assert (_rows(predictor(PICTURE, score=0.5))[:, 4] > 0.5).all()
    np.testing.assert_array_equal(_rows(predictor(PICTURE, max_detections=2)), plain[:2])
    assert len(_rows(predictor(PICTURE, iou=1.0))) > len(plain) > len(_rows(predictor(PICTURE, iou=0.01)))
    for wrong in ({"score": 1.0}, {"score": float("nan")}, {"iou": 0.0}, {"max_detections": 0}, {"score": "high"}):
        with pytest.raises(InputError):
            predictor(PICTURE, **wrong)


def test_what_the_graph_has_suppressed_cannot_be_had_back(tmp_path: Path) -> None:
    predictor = Predictor.open(write_detector(tmp_path / "b", decode="nms"))
    plain = _rows(predictor(PICTURE))
    np.testing.assert_array_equal(_rows(predictor(PICTURE, score=0.5)), plain[plain[:, 4] > 0.5])
    np.testing.assert_array_equal(_rows(predictor(PICTURE, max_detections=1, iou=0.45)), plain[:1])
    for wrong in ({"score": 0.1}, {"iou": 0.3}, {"max_detections": 301}):
        with pytest.raises(InputError, match=r"the graph of spots\.onnx suppresses by") as caught:
            predictor(PICTURE, **wrong)
        assert "--decode decoded" in caught.value.fix


def test_a_contract_of_tensorrt_is_refused(tmp_path: Path) -> None:
    folder = write_detector(tmp_path / "b")
    manifest = read_manifest(folder)
    artifact = dataclasses.replace(manifest.artifacts[0], decode="trt")
    write_manifest(folder, dataclasses.replace(manifest, artifacts=(artifact,)))
    with pytest.raises(InputError, match="plugin of TensorRT") as caught:
        Predictor.open(folder)(PICTURE)
    assert "--decode nms" in caught.value.fix
    assert main(["selftest", str(folder)]) == 3  # nothing here can check it


def test_what_is_asked_of_the_wrong_kind_of_network(tmp_path: Path, tiny_bundle: Path) -> None:
    predictor = Predictor.open(write_detector(tmp_path / "b"))
    for call in (predictor.logits, predictor.features):
        with pytest.raises(InputError, match=r"spots: gives boxes.*, not") as caught:
            call(PICTURE)
        assert "predictor(image)" in caught.value.fix
    with pytest.raises(InputError, match="score: tiny gives classes, not boxes"):
        Predictor.open(tiny_bundle)(PICTURE, score=0.5)


def test_scores_that_are_no_numbers(tmp_path: Path) -> None:
    outputs = _one_box([0, 0, 9, 9])
    outputs["scores"][:] = np.nan
    with pytest.raises(InputError, match="output 'scores' is NaN throughout"):
        Predictor.open(write_detector(tmp_path / "all", outputs=outputs))(PICTURE)
    outputs["scores"][0, 0, 1] = 0.75
    assert len(_rows(Predictor.open(write_detector(tmp_path / "some", outputs=outputs))(PICTURE))) == 1


def test_thousands_of_boxes(tmp_path: Path) -> None:
    side = np.arange(700, dtype=np.float32)
    boxes = np.stack([side % 60, side // 60, side % 60 + 1, side // 60 + 1], -1)[None]
    outputs = {"boxes": boxes, "scores": np.full((1, 700, 3), 0.9, np.float32)}
    predictor = Predictor.open(write_detector(tmp_path / "b", outputs=outputs, suppression=Suppression()))
    assert len(_rows(predictor(PICTURE))) == 300
    assert len(_rows(predictor(PICTURE, max_detections=4096))) == 2100


def test_a_class_without_a_label_is_refused(tmp_path: Path) -> None:
    folder = write_detector(tmp_path / "b", decode="nms", labels=("cat",))
    with pytest.raises(InputError, match="spots: a box of class"):
        Predictor.open(folder)(PICTURE)


def test_outputs_of_another_contract_are_refused(tmp_path: Path) -> None:
    folder = write_detector(tmp_path / "b", decode="nms", outputs=_one_box([0, 0, 9, 9]))
    with pytest.raises(InputError, match="not the outputs of its contract 'nms'"):
        Predictor.open(folder)(PICTURE)


# --- predict, on the command line ---


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(PICTURE).save(path)
    return path


@pytest.mark.parametrize("program", [main, cspdeploy_main])
def test_predict_tells_boxes(
    tmp_path: Path, photo: Path, capsys: pytest.CaptureFixture[str], program: type[object]
) -> None:
    folder = write_detector(tmp_path / "b", outputs=_one_box([0, 0, 32, 32]))
    assert program(["predict", str(folder), str(photo)]) == 0  # type: ignore[call-arg]
    assert capsys.readouterr().out == f"{photo}\n  0.900  dog  0,0,45,60\n"
    assert program(["predict", str(folder), str(photo), "--json"]) == 0  # type: ignore[call-arg]
    (entry,) = json.loads(capsys.readouterr().out)
    assert set(entry) == {"image", "untrained", "boxes"}
    (box,) = entry["boxes"]
    assert (box["label"], box["index"], box["left"], box["bottom"]) == ("dog", 1, 0.0, 60.0)
    assert set(box) == {"label", "index", "score", "left", "top", "right", "bottom"}
    assert program(["predict", str(folder), str(photo), "--score-threshold", "0.95"]) == 0  # type: ignore[call-arg]
    assert capsys.readouterr().out == f"{photo}\n  no box above 0.95\n"


def test_predict_goes_on_after_a_broken_image(tmp_path: Path, photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.png").write_text("words")
    folder = write_detector(tmp_path / "b", decode="raw", untrained=True)
    assert main(["predict", str(folder), str(tmp_path / "broken.png"), str(photo), "--json"]) == 2
    told = capsys.readouterr()
    first, second = json.loads(told.out)
    assert (first["boxes"], bool(first["error"]), len(second["boxes"]) > 5) == ([], True, True)
    assert "UNTRAINED" in told.err


def test_drawn_pictures_never_replace_what_they_are_made_of(
    tmp_path: Path, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other" / "photo.png"
    other.parent.mkdir()
    other.write_bytes(photo.read_bytes())
    folder, drawn = write_detector(tmp_path / "b", outputs=_one_box([0, 0, 32, 32])), tmp_path / "drawn"
    words = ["predict", str(folder), str(photo), str(other), "--draw", str(drawn)]
    assert cspdeploy_main(words) == 0
    assert sorted(path.name for path in drawn.iterdir()) == ["photo-2.boxes.png", "photo.boxes.png"]
    with Image.open(drawn / "photo.boxes.png") as picture:
        changed = (np.asarray(picture) != PICTURE).any(-1)
    assert changed[0, :45].all()  # its upper side
    assert not changed[5:55, 50:].any()  # and nothing beside it
    given = drawn / "again.boxes.png"
    given.write_bytes(photo.read_bytes())
    (drawn / "again.png").write_bytes(photo.read_bytes())
    capsys.readouterr()
    words = ["predict", str(folder), str(given), str(drawn / "again.png"), "--draw", str(drawn)]
    assert cspdeploy_main(words) == 2
    assert "is an image that is to be read" in capsys.readouterr().err
    assert given.read_bytes() == photo.read_bytes()


def test_draw_asks_for_a_detector_and_a_folder(
    tmp_path: Path, photo: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cspdeploy_main(["predict", str(tiny_bundle), str(photo), "--draw", str(tmp_path / "d")]) == 2
    assert "tiny gives no boxes" in capsys.readouterr().err
    folder = write_detector(tmp_path / "b")
    assert cspdeploy_main(["predict", str(folder), str(photo), "--draw", str(photo)]) == 2
    assert "--draw FOLDER" in capsys.readouterr().err


def test_a_label_is_drawn_within_a_picture_of_any_size() -> None:
    for size in ((1, 1), (400, 3), (64, 64)):
        picture = Image.new("RGB", size)
        box = DetectedBox(label="a\x1blabel " * 20, index=7, score=0.5, left=0, top=0, right=size[0], bottom=size[1])
        draw_on(picture, [box])
        assert np.asarray(picture).any()


# --- selftest ---


def _golden(folder: Path) -> tuple[str, str, dict[str, int]]:
    report = run_selftest(folder, SelftestRequest(latency=False))
    row = next(row for row in report.checks if row.check == "golden")
    assert all(one.verdict != "fail" for one in report.checks if one.check != "golden"), report.checks
    return row.verdict, row.reason, row.boxes


@pytest.mark.parametrize(
    ("decode", "untrained"), [*((decode, False) for decode in ALL_DECODES), ("nms", True), ("raw", True)]
)
def test_selftest_finds_the_boxes_of_the_original(tmp_path: Path, decode: Decode, untrained: bool) -> None:
    verdict, reason, boxes = _golden(write_detector(tmp_path / "b", decode=decode, untrained=untrained))
    assert (verdict, reason) == ("pass", "")
    assert boxes["expected"] == boxes["found"] == boxes["matched"] > 20


@pytest.mark.parametrize(
    ("decode", "fault", "untrained"),
    [
        ("raw", "others", False), ("raw", "NaN", False), ("decoded", "others", True), ("ultralytics", "others", False),
        ("ultralytics", "NaN", True), ("nms", "fewer", False), ("nms", "moved", False), ("nms", "moved", True),
        ("nms", "other classes", True), ("nms", "NaN", True),
    ],
)  # fmt: skip
def test_selftest_fails_where_the_boxes_are_others(tmp_path: Path, decode: Decode, fault: str, untrained: bool) -> None:
    detection = detection_of(decode)
    outputs = {name: array.copy() for name, array in outputs_of(raw_heads(), detection).items()}
    first = next(iter(outputs.values()))
    if fault == "NaN":
        first[:] = np.nan
    elif fault == "fewer":
        outputs["num_detections"][:] = 1
    elif fault == "moved":
        first[..., :2] += 9
    elif fault == "other classes":
        first[..., 5] = (first[..., 5] + 1) % 3
    else:
        outputs = outputs_of(raw_heads(seed=1), detection)
    verdict, reason, _ = _golden(write_detector(tmp_path / "b", decode=decode, outputs=outputs, untrained=untrained))
    assert verdict == "fail", reason


def _judge(decode: Decode, precision: str, outputs: dict[str, np.ndarray], *, untrained: bool = False) -> Comparison:
    detection = detection_of(decode)
    exact = outputs_of(raw_heads(num=4), detection_of("decoded"))
    golden = Golden(
        images=np.zeros((4, 8, 8, 3), np.uint8), x_NCHW=np.zeros((4, 3, 8, 8), np.float32), outputs_fp32=exact,
        outputs_fp64={name: array.astype(np.float64) for name, array in exact.items()},
    )  # fmt: skip
    limits = limits_for(precision, dict.fromkeys(exact, 1e-6), num_quantised=9)
    dtypes = {name: array.dtype.name for name, array in outputs_of(raw_heads(), detection).items()}
    return compare_detector(
        outputs, detection=detection, decode=decode, precision=precision, golden=golden, limits=limits, dtypes=dtypes,
        untrained=untrained,
    )[0]  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize(
    ("fault", "verdict"), [("", "pass"), ("dtype", "dtype"), ("order", "order"), ("permuted", ""), ("shape", "shape")]
)
def test_no_fault_of_form_is_forgiven(precision: str, fault: str, verdict: str) -> None:
    outputs = outputs_of(raw_heads(num=4), detection_of("decoded"))
    if fault == "dtype":
        outputs["scores"] = outputs["scores"].astype(np.float64)
    elif fault == "order":
        outputs = dict(reversed(outputs.items()))
    elif fault == "permuted":
        outputs = {name: array[::-1] for name, array in outputs.items()}
    elif fault == "shape":
        outputs["scores"] = np.concatenate([outputs["scores"]] * 2, -1)
    found = _judge("decoded", precision, outputs)
    assert found.verdict == verdict or (fault == "permuted" and found.verdict in ("order", "numeric")), found.reason


@pytest.mark.parametrize("decode", ["decoded", "nms"])
def test_a_dead_head_fails_in_int8(decode: Decode) -> None:
    raw = raw_heads(num=4)
    raw["head_s16"][:, 4] = -99.0  # its objectness
    found = _judge(decode, "int8", outputs_of(raw, detection_of(decode)))
    assert found.verdict in ("numeric", "decision")


@pytest.mark.parametrize("untrained", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_rows_that_are_not_suppressed_fail(precision: str, untrained: bool) -> None:
    detection = detection_of("nms", suppression=Suppression(iou_threshold=1.0))
    outputs = outputs_of(raw_heads(num=4), detection)
    assert _judge("nms", precision, outputs, untrained=untrained).verdict == "decision"
    assert _judge("nms", precision, outputs_of(raw_heads(num=4), detection_of("nms"))).verdict == "pass"
