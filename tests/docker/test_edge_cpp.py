"""docker/edge-cpp: pixels of another language, equal to Python's to the last bit. In its image, built for real.

A network that hands its input through shows what the program fed it: classes are then the values of the input.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx
import pytest
from PIL import Image

from cspdeploy.core.bundle import file_sha256, write_manifest
from cspdeploy.core.detection.spec import Decode, Suppression
from cspdeploy.core.preprocess import preprocess
from cspdeploy.core.spec import ModelSpec, Preprocess
from cspdeploy.core.types import Artifact, Manifest, TensorInfo
from cspdeploy.edge import DetectedBox, Detections, Predictor
from tests.edge.detectors import ALL_DECODES, CONTRACT, write_detector

if TYPE_CHECKING:
    from tests.docker.conftest import Builder, Container

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

HEIGHT, WIDTH = 20, 28
VALUES = 3 * HEIGHT * WIDTH


@pytest.fixture(scope="module")
def container(builder: Builder) -> Container:
    return builder.container(builder.build("edge-cpp"))


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """Where another user may read; pytest's own folders are closed."""
    with tempfile.TemporaryDirectory(prefix="cspdeploy-cpp-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def write_passing_bundle(folder: Path, spec: ModelSpec, contract: Preprocess, *, batch: int | str = 1) -> Path:
    """A bundle whose only artifact gives its input back, `[N, 3 * H * W]`."""
    folder.mkdir()
    model = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[{batch}, 3, {HEIGHT}, {WIDTH}] input) => (float[{batch}, {VALUES}] logits) {{
            logits = Flatten(input)
        }}""")
    onnx.save(model, folder / "pass.onnx")
    artifact = Artifact(
        kind="onnx", file="pass.onnx", format="onnx", precision="fp32", sha256=file_sha256(folder / "pass.onnx"),
        num_bytes=(folder / "pass.onnx").stat().st_size, opset=17, steps=(),
        inputs=(TensorInfo(name="input", dtype="float32", shape=(batch, 3, HEIGHT, WIDTH)),),
        outputs=(TensorInfo(name="logits", dtype="float32", shape=(batch, VALUES)),),
    )  # fmt: skip
    passing = dataclasses.replace(spec, num_classes=VALUES, preprocess=contract)
    labels = tuple(f"value {index}" for index in range(VALUES))
    write_manifest(folder, Manifest(spec=passing, labels=labels, artifacts=(artifact,), files=(), options={}, tools={}))
    return folder


def write_images(folder: Path) -> list[Path]:
    """One of each kind that a program may decode in its own way, with sides that divide nothing."""
    folder.mkdir()
    random = np.random.default_rng(0)
    colour = random.integers(0, 256, (53, 71, 3), np.uint8)
    smooth = np.asarray(Image.fromarray(colour[:9, :11]).resize((131, 97), Image.Resampling.BICUBIC))
    grey16 = random.integers(0, 65536, (31, 45), np.uint16)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(colour).save(folder / "colour.png")
    Image.fromarray(colour[:, :, 0]).save(folder / "grey.png")
    Image.fromarray(grey16).save(folder / "grey16.png")
    Image.fromarray(colour).quantize(40).save(folder / "palette.png")
    Image.fromarray(np.dstack([colour, colour[:, :, 0]])).save(folder / "transparent.png")
    Image.fromarray(colour[:, :, 0]).convert("1").save(folder / "bits.png")
    Image.fromarray(colour[:5, :4]).save(folder / "small.png")
    Image.fromarray(colour).save(folder / "colour.ppm")
    Image.fromarray(colour[:, :, 0]).save(folder / "grey.pgm")
    Image.fromarray(smooth).save(folder / "photo.jpg", quality=85)
    Image.fromarray(smooth).save(folder / "progressive.jpg", quality=85, progressive=True, subsampling=0)
    Image.fromarray(smooth[:, :, 0]).save(folder / "grey.jpg")
    Image.fromarray(smooth).save(folder / "turned.jpg", exif=turned)
    Image.fromarray(smooth[:33, :34]).save(folder / "odd.jpg", quality=60)
    Image.fromarray(colour[:, :33]).save(folder / "tall.png")  # Pillow resizes its height first
    Image.fromarray(np.tile(colour, (4, 1, 1))[:200, :9]).save(folder / "thin.png")
    return sorted(folder.iterdir())


def classify(container: Container, place: Path, bundle: Path, names: list[str], *options: str) -> list[dict[str, Any]]:
    volumes = [f"{bundle}:/bundle:ro", f"{place / 'images'}:/images:ro"]
    images = [f"/images/{name}" for name in names]
    done = container.run_app("--bundle", "/bundle", "--logits", *options, *images, volumes=volumes, check=False)
    assert "error" not in done.stderr.split("\n", maxsplit=1)[0].split(":")[0], done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kind_of_image_by_every_contract_gives_pythons_input_to_the_last_bit(
    container: Container, place: Path, tiny_spec: ModelSpec
) -> None:
    images = write_images(place / "images")
    base = dataclasses.replace(
        tiny_spec.preprocess, height_px=HEIGHT, width_px=WIDTH, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    )
    fits: list[tuple[Literal["crop", "stretch", "letterbox"], float]] = [
        ("crop", 0.875), ("crop", 1.0), ("stretch", 1.0), ("letterbox", 1.0)
    ]  # fmt: skip
    filters: list[tuple[Literal["bilinear", "bicubic", "nearest"], Literal["rgb", "bgr"]]] = [
        ("bilinear", "rgb"), ("bicubic", "bgr"), ("nearest", "rgb")
    ]  # fmt: skip
    contracts = [
        dataclasses.replace(base, resize=resize, interpolation=interpolation, crop_pct=crop, channel_order=order)
        for resize, crop in fits
        for interpolation, order in filters
    ]
    for index, contract in enumerate(contracts):
        bundle = write_passing_bundle(place / f"bundle-{index}", tiny_spec, contract)
        lines = classify(container, place, bundle, [path.name for path in images])
        for path, line in zip(images, lines, strict=True):
            expected = preprocess([path], contract).ravel()
            found = np.array(line["logits"], np.float32)
            np.testing.assert_array_equal(found, expected, err_msg=f"{path.name} {contract}")


def test_a_fixed_batch_is_filled_and_a_free_one_is_not(container: Container, place: Path, tiny_spec: ModelSpec) -> None:
    contract = dataclasses.replace(tiny_spec.preprocess, height_px=HEIGHT, width_px=WIDTH)
    for batch in (3, "N"):
        bundle = write_passing_bundle(place / f"batch-{batch}", tiny_spec, contract, batch=batch)
        line = classify(container, place, bundle, ["photo.jpg"])[0]
        expected = preprocess([place / "images/photo.jpg"], contract).ravel()
        np.testing.assert_array_equal(np.array(line["logits"], np.float32), expected)


def test_broken_images_are_told_and_the_others_answered(
    container: Container, place: Path, tiny_spec: ModelSpec
) -> None:
    contract = dataclasses.replace(tiny_spec.preprocess, height_px=HEIGHT, width_px=WIDTH)
    bundle = write_passing_bundle(place / "broken", tiny_spec, contract)
    folder = place / "images"
    for name in ("photo.jpg", "colour.png", "colour.ppm"):
        data = (folder / name).read_bytes()
        (folder / f"cut-{name}").write_bytes(data[: len(data) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("no image")
    Image.new("CMYK", (30, 30)).save(folder / "cmyk.jpg")
    (folder / "huge.ppm").write_bytes(b"P6 99999 99999 255 ")
    bad = ["cut-photo.jpg", "cut-colour.png", "cut-colour.ppm", "empty.png", "text.jpg", "cmyk.jpg", "huge.ppm"]
    bad.append("gone.png")
    lines = classify(container, place, bundle, [*bad, "photo.jpg"])
    assert [line["image"].removeprefix("/images/") for line in lines if "error" in line] == bad
    assert all(line["image"] in line["error"] for line in lines[:-1])
    assert "predictions" in lines[-1]


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        ("hash", 1, "SHA-256 differs"),
        ("schema", 2, "schema_version 2, expected 3"),
        ("leaves", 2, "leaves the bundle's folder"),
        ("frontend", 2, "takes no float tensor"),
        ("resize", 2, "preprocessing 'seam': unknown"),
        ("json", 2, "manifest.json"),
        ("opset", 3, "ONNX Runtime 1."),
    ],
)
def test_a_bundle_that_is_not_one_is_refused(
    container: Container, place: Path, tiny_spec: ModelSpec, fault: str, code: int, said: str
) -> None:
    contract = dataclasses.replace(tiny_spec.preprocess, height_px=HEIGHT, width_px=WIDTH)
    bundle = write_passing_bundle(place / f"fault-{fault}", tiny_spec, contract)
    manifest = json.loads((bundle / "manifest.json").read_text())
    artifact = manifest["artifacts"][0]
    if fault == "hash":
        with (bundle / "pass.onnx").open("ab") as file:
            file.write(b"\0")
    elif fault == "schema":
        manifest["schema_version"] = 2
    elif fault == "leaves":
        shutil.copy(bundle / "pass.onnx", place / "pass.onnx")
        artifact["file"] = "../pass.onnx"
    elif fault == "frontend":
        artifact["frontend"] = {"channel_order": "rgb", "resize": False, "top_k": 0, "max_difference": 0.0}
    elif fault == "resize":
        manifest["spec"]["preprocess"]["resize"] = "seam"
    elif fault == "opset":
        model = onnx.load(bundle / "pass.onnx")
        model.opset_import[0].version = 999
        onnx.save(model, bundle / "pass.onnx")
        artifact["sha256"] = file_sha256(bundle / "pass.onnx")
    text = "{" if fault == "json" else json.dumps(manifest)
    (bundle / "manifest.json").write_text(text)
    volumes = [f"{bundle}:/bundle:ro", f"{place / 'images'}:/images:ro"]
    done = container.run_app("--bundle", "/bundle", "/images/photo.jpg", volumes=volumes, check=False)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr.splitlines()[0]


def find_boxes(
    container: Container, place: Path, bundle: Path, names: list[str], *options: str
) -> tuple[int, str, str]:
    volumes = [f"{bundle}:/bundle:ro", f"{place / 'images'}:/images:ro"]
    images = [f"/images/{name}" for name in names]
    done = container.run_app("--bundle", "/bundle", *options, *images, volumes=volumes, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("decode", ALL_DECODES)
def test_boxes_are_pythons_in_every_contract(container: Container, place: Path, decode: Decode) -> None:
    names = ["colour.png", "small.png", "thin.png", "turned.jpg"]
    rule = Suppression(score_threshold=0.3, iou_threshold=0.5, max_detections=20)
    for resize in ("letterbox", "crop", "stretch"):
        contract = dataclasses.replace(CONTRACT, resize=resize, crop_pct=0.875)  # type: ignore[arg-type]
        bundle = write_detector(
            place / f"boxes-{decode}-{resize}", decode=decode, contract=contract, suppression=rule
        )  # fmt: skip
        code, lines, told = find_boxes(container, place, bundle, names)
        assert (code, told) == (0, "")
        expected = Predictor.open(bundle).predict([place / "images" / name for name in names])
        for line, boxes in zip(map(json.loads, lines.splitlines()), expected, strict=True):
            assert isinstance(boxes, Detections)
            assert len(line["boxes"]) == len(boxes) == 20
            assert [one["label"] for one in line["boxes"]] == [one.label for one in boxes]
            for side in ("left", "top", "right", "bottom", "score"):
                found = [one[side] for one in line["boxes"]]
                # The C library's exponential and numpy's round the last bit of float32 differently.
                np.testing.assert_allclose(found, [getattr(one, side) for one in boxes], rtol=1e-5, atol=2e-3)


def test_thresholds_of_the_application_and_lines_of_text(container: Container, place: Path) -> None:
    decoded, suppressed = (write_detector(place / f"asked-{decode}", decode=decode) for decode in ("decoded", "nms"))  # type: ignore[arg-type]
    asked = ("--score-threshold", "0.5", "--iou-threshold", "0.3", "--max-detections", "4", "--text")
    image = place / "images/colour.png"
    expected = Predictor.open(decoded)(image, score=0.5, iou=0.3, max_detections=4)
    code, text, _ = find_boxes(container, place, decoded, ["colour.png"], *asked)
    assert (code, text.splitlines()[0], len(text.splitlines())) == (0, "/images/colour.png", 5)
    for line, box in zip(text.splitlines()[1:], expected, strict=True):
        assert isinstance(box, DetectedBox)
        assert line == f"  {box.score:.3f}  {box.label}  {box.left:.0f},{box.top:.0f},{box.right:.0f},{box.bottom:.0f}"
    for options, said in [
        (("--score-threshold", "0.1"), "has suppressed by other thresholds already"),
        (("--max-detections", "0"), "out of range"),
        (("--iou-threshold", "much"), "--iou-threshold much: expected a number"),
        (("--logits",), "--logits: the bundle gives boxes"),
    ]:
        code, text, told = find_boxes(container, place, suppressed, ["colour.png"], *options)
        assert (code, text, said in told) == (2, "", True), told
    code, text, _ = find_boxes(container, place, suppressed, ["colour.png"], "--score-threshold", "0.99", "--text")
    assert (code, text) == (0, "/images/colour.png\n  no box above 0.99\n")


def test_wild_outputs_of_a_detector(container: Container, place: Path) -> None:
    random = np.random.default_rng(0)
    corner = random.uniform(-9, 60, (1, 5000, 2)).astype(np.float32)
    many = {
        "boxes": np.concatenate([corner, corner + random.uniform(0, 9, corner.shape).astype(np.float32)], -1),
        "scores": random.uniform(0.2, 0.9, (1, 5000, 3)).astype(np.float32),
    }
    many["boxes"][0, ::7, 2] = np.inf
    many["boxes"][0, ::11, 1] = 1 << 21
    many["scores"][0, ::5] = np.nan
    bundle = write_detector(place / "wild", outputs=many)
    code, lines, _ = find_boxes(container, place, bundle, ["colour.png"])
    expected = Predictor.open(bundle)(place / "images/colour.png")
    found = json.loads(lines)["boxes"]
    assert (code, [one["index"] for one in found]) == (0, [one.index for one in expected])
    assert [one["left"] for one in found] == pytest.approx([one.left for one in expected], abs=1e-3)
    none = {name: np.full_like(array, np.nan) for name, array in many.items()}
    code, lines, _ = find_boxes(container, place, write_detector(place / "nan", outputs=none), ["colour.png"])
    assert (code, "is NaN throughout" in json.loads(lines)["error"]) == (2, True)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"artifact": {"decode": "trt"}}, "a plugin of TensorRT"),
        ({"artifact": {"decode": "shapes"}}, "contract 'shapes': unknown"),
        ({"detection": {"heads": []}}, "spec.detection broken"),
        ({"detection": {"heads": [{"output": "a"}]}}, "manifest.json"),
        ({"detection": {"suppression": {"score_threshold": 2, "iou_threshold": 0.4, "max_detections": 3}}}, "range"),
    ],
)
def test_a_detector_that_is_not_one_is_refused(
    container: Container, place: Path, changed: dict[str, dict[str, Any]], said: str
) -> None:
    with tempfile.TemporaryDirectory(dir=place) as folder:
        Path(folder).chmod(0o755)
        bundle = write_detector(Path(folder) / "b")
        manifest = json.loads((bundle / "manifest.json").read_text())
        manifest["artifacts"][0] |= changed.get("artifact", {})
        manifest["spec"]["detection"] |= changed.get("detection", {})
        (bundle / "manifest.json").write_text(json.dumps(manifest))
        code, text, told = find_boxes(container, place, bundle, ["colour.png"])
    assert (code, text) == (2, "")
    assert said in told
