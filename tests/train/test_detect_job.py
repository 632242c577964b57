from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from cspdeploy.core.bundle import file_sha256
from cspdeploy.core.codec import from_json, to_json
from cspdeploy.core.detection.average_precision import TrueBoxes
from cspdeploy.core.detection.labelled import LabelledBoxes
from cspdeploy.core.detection.spec import Detection, DetectionHead
from cspdeploy.core.errors import DeviceMemoryError, InputError
from cspdeploy.core.model_folder import read_calibration, read_labels, read_spec
from cspdeploy.core.spec import ModelSpec
from cspdeploy.nets.darknet.sections import Convolutional, DarknetConfig, Yolo
from cspdeploy.nets.registry import build
from cspdeploy.nets.weights import load_weights, read_checkpoint, read_state_dict
from cspdeploy.train import detect_job
from cspdeploy.train.anchors import find_anchors
from cspdeploy.train.detect_data import BoxLoader
from cspdeploy.train.detect_folder import open_boxes
from cspdeploy.train.detect_job import DetectionTrainingReport, detector_spec, fitted, train_detection_model
from cspdeploy.train.detect_loop import (
    OBJECT_PRIOR,
    DetectionRecipe,
    DetectionRecord,
    describe_data,
    measure_map,
    train_detector,
)

RECIPE = DetectionRecipe(epochs=2, batch=4, max_learning_rate=1e-2, seed=3)
SHORT = dataclasses.replace(RECIPE, epochs=1)
MODEL_FILES = {"spec.json", "model.safetensors", "labels.txt", "calibration.npz", "train.json"}


class Run(NamedTuple):
    model: nn.Module
    curve: list[DetectionRecord]
    checkpoint: Path


def _loaders(spec: ModelSpec, folder: Path) -> dict[str, BoxLoader]:
    training, testing = (open_boxes(folder, split=split) for split in ("train", "test"))
    return {
        "training": BoxLoader(training, spec.preprocess, batch=4, mosaic_epochs=2),
        "testing": BoxLoader(testing, spec.preprocess, batch=8),
    }


@pytest.fixture(scope="module")
def straight(detector_spec: ModelSpec, boxes_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two epochs without a break."""
    checkpoint = tmp_path_factory.mktemp("run") / "c.pt"
    model, curve, _ = train_detector(
        detector_spec, RECIPE, **_loaders(detector_spec, boxes_folder), checkpoint=checkpoint
    )
    return Run(model, curve, checkpoint)


def test_loss_falls_and_precision_is_measured(straight: Run) -> None:
    first, last = straight.curve
    assert (first.epoch, last.epoch) == (1, 2)
    assert last.train_loss < first.train_loss
    assert 0 <= last.test_map <= last.test_map50 <= 1


def test_the_average_of_the_weights_is_kept(straight: Run) -> None:
    state, key = read_checkpoint(straight.checkpoint), "layers.0.conv.weight"
    assert torch.equal(straight.model.state_dict()[key], state["average"][key])
    assert not torch.equal(state["model"][key], state["average"][key])


def test_interrupted_and_resumed_run_equals_the_straight_one(
    detector_spec: ModelSpec, boxes_folder: Path, straight: Run, tmp_path: Path
) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if what.startswith("epoch 2/"):
            raise KeyboardInterrupt

    options: dict[str, Any] = {**_loaders(detector_spec, boxes_folder), "checkpoint": tmp_path / "c.pt"}
    with pytest.raises(KeyboardInterrupt):
        train_detector(detector_spec, RECIPE, **options, progress=interrupt)
    model, curve, _ = train_detector(detector_spec, RECIPE, **options, resume=True)
    assert [dataclasses.replace(record, seconds=0.0) for record in curve] == [
        dataclasses.replace(record, seconds=0.0) for record in straight.curve
    ]
    weights = straight.model.state_dict()
    assert [key for key, value in model.state_dict().items() if not torch.equal(value, weights[key])] == []


def test_resume_with_other_anchors_is_refused(
    detector_spec: ModelSpec, boxes_folder: Path, straight: Run
) -> None:  # fmt: skip
    anchors = ((5.0, 5.0), (9.0, 9.0), (13.0, 13.0), (17.0, 17.0), (25.0, 25.0), (41.0, 41.0))
    spec = fitted(detector_spec, num_classes=3, anchors=anchors)
    with pytest.raises(InputError, match="other data or another network"):
        train_detector(spec, RECIPE, **_loaders(spec, boxes_folder), checkpoint=straight.checkpoint, resume=True)


@pytest.mark.parametrize("change", ["box", "class", "names", "test split"])
def test_resume_on_other_data_is_refused(
    detector_spec: ModelSpec, boxes_folder: Path, straight: Run, tmp_path: Path, change: str
) -> None:
    """As many pictures, so that nothing but the labels tells it. The same set at another place is the same."""
    folder = Path(shutil.copytree(boxes_folder, tmp_path / "moved"))
    same = describe_data(*(open_boxes(folder, split=split) for split in ("train", "test")))
    assert same == describe_data(*(open_boxes(boxes_folder, split=split) for split in ("train", "test")))
    if change == "names":
        (folder / "classes.txt").write_text("red\nblue\ngreen\n")
    else:
        path = folder / "labels" / ("val" if change == "test split" else "train") / "000.txt"
        index, *sides = path.read_text().splitlines()[0].split()
        if change == "class":
            index = str((int(index) + 1) % 3)
        else:
            sides = ["0.5", "0.5", "0.25", "0.25"]
        path.write_text("\n".join([" ".join([index, *sides]), *path.read_text().splitlines()[1:]]) + "\n")
    with pytest.raises(InputError, match="other data or another network"):
        train_detector(
            detector_spec, RECIPE, **_loaders(detector_spec, folder), checkpoint=straight.checkpoint, resume=True
        )


def test_heads_that_end_in_a_sigmoid_are_trained_before_it(detector_spec: ModelSpec) -> None:
    from cspdeploy.train.detect_loop import _DetectorTrainer

    config = from_json(DarknetConfig, detector_spec.network.config)
    layers = [
        dataclasses.replace(layer, new_coords=True) if isinstance(layer, Yolo)
        else dataclasses.replace(layer, activation="logistic")
        if isinstance(layer, Convolutional) and layer.activation == "linear" else layer
        for layer in config.layers
    ]  # fmt: skip
    network = dataclasses.replace(
        detector_spec.network, config=to_json(dataclasses.replace(config, layers=tuple(layers)))
    )
    assert detector_spec.detection is not None
    heads = tuple(dataclasses.replace(head, new_coords=True) for head in detector_spec.detection.heads)
    detection = dataclasses.replace(detector_spec.detection, heads=heads)
    trainer = _DetectorTrainer(dataclasses.replace(detector_spec, network=network, detection=detection), RECIPE, 1)
    with torch.no_grad():
        raw, squashed = (net.eval()(torch.rand(1, 3, 64, 64)) for net in (trainer.model, trainer.average))
    assert min(x.min().item() for x in raw) < 0
    assert all(0 < x.min().item() <= x.max().item() < 1 for x in squashed)


def test_precision_is_that_of_verify(detector_spec: ModelSpec, tmp_path: Path) -> None:
    """A found box that reaches over the edge is cut there, and one that is difficult costs nothing."""
    data = LabelledBoxes(
        name="one", labels=("red", "green", "blue"), paths=(tmp_path / "a.png",),
        stored=(TrueBoxes(
            boxes_M4=np.array([[0.0, 20, 40, 60], [60.0, 60, 100, 100]]), classes_M=np.array([0, 0]),
            ignored_M=np.array([False, True]),
        ),),
    )  # fmt: skip
    Image.new("RGB", (128, 128)).save(tmp_path / "a.png")

    class Network(nn.Module):
        """Of an input of 64 px: a box from -20, 10 to 20, 30, and one of higher score where the difficult one is."""

        def forward(self, x_NCHW: torch.Tensor) -> tuple[torch.Tensor, ...]:
            raw = torch.full((1, 2, 8, 2, 2), -20.0)
            raw[0, 0, :6, 0, 0] = torch.tensor([-20.0, math.log(0.625 / 0.375), 0.0, 0.0, 1.0, 9.0])
            raw[0, 1, :6, 1, 1] = torch.tensor([-math.log(3), -math.log(3), 0.0, 0.0, 2.0, 9.0])
            return (raw.reshape(1, 16, 2, 2),)

    head = DetectionHead(output="head_s32", stride_px=32, anchors=((40.0, 20.0), (20.0, 20.0)))
    loader = BoxLoader(data, detector_spec.preprocess, batch=1)
    found = measure_map(Network(), Detection(heads=(head,)), loader, num_classes=3)
    assert (found.map, found.num_boxes) == (pytest.approx(1.0), 1)
    (_, targets) = next(loader.in_order())
    assert targets[:, 1].tolist() == [0.0, -1.0]
    assert len(loader.sizes()) == 1


def test_a_fresh_network_sees_nothing(detector_spec: ModelSpec) -> None:
    from cspdeploy.train.detect_loop import _DetectorTrainer

    trainer = _DetectorTrainer(detector_spec, RECIPE, 1)
    with torch.no_grad():
        raw = trainer.average.eval()(torch.rand(2, 3, 64, 64))
    objectness = torch.cat([x.reshape(2, 3, 8, -1)[:, :, 4].flatten() for x in raw]).sigmoid()
    assert objectness.mean().item() == pytest.approx(OBJECT_PRIOR, rel=0.5)


def test_the_cfg_follows_classes_and_anchors(detector_spec: ModelSpec) -> None:
    anchors = tuple((4.0 + 6 * i, 5.0 + 6 * i) for i in range(6))
    spec = fitted(detector_spec, num_classes=7, anchors=anchors)
    assert spec.detection is not None
    assert [head.anchors for head in spec.detection.heads] == [anchors[3:], anchors[:3]]
    raw = build(spec).eval()(torch.zeros(1, 3, 64, 64))
    assert [tuple(x.shape) for x in raw] == [(1, 36, 2, 2), (1, 36, 4, 4)]


class Trained(NamedTuple):
    report: DetectionTrainingReport
    folder: Path
    spec: ModelSpec


@pytest.fixture(scope="module")
def trained(detector_spec: ModelSpec, boxes_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A whole run; tests only read what it wrote."""
    models = tmp_path_factory.mktemp("models")
    report = train_detection_model(
        detector_spec, data=boxes_folder, models=models, recipe=RECIPE, command="cspdeploy train tiny-detector"
    )
    return Trained(report, models / "tiny-detector", read_spec(models / "tiny-detector"))


def test_writes_a_whole_model_folder_and_nothing_beside_it(trained: Trained) -> None:
    assert {path.name for path in trained.folder.iterdir()} == MODEL_FILES
    assert list(trained.folder.parent.iterdir()) == [trained.folder]
    assert read_labels(trained.folder / "labels.txt", num_classes=3) == ("red", "green", "blue")
    assert read_calibration(trained.folder / "calibration.npz").shape == (16, 64, 64, 3)
    curve = json.loads((trained.folder / "train.json").read_text())
    assert [row["test_map50"] for row in curve["epochs"]] == [record.test_map50 for record in trained.report.curve]


def test_description_tells_anchors_and_precision(trained: Trained, boxes_folder: Path) -> None:
    spec = trained.spec
    assert (spec.task, spec.num_classes, spec.provenance.source) == ("detect", 3, "trained")
    assert spec.provenance.accuracy == trained.report.accuracy
    assert spec.provenance.weights_sha256 == file_sha256(trained.folder / "model.safetensors")
    assert spec.detection is not None
    sizes = _loaders(spec, boxes_folder)["training"].sizes()
    anchors = find_anchors(sizes, 6, seed=3)
    assert trained.report.anchors == anchors
    assert {pair for head in spec.detection.heads for pair in head.anchors} == set(anchors)
    assert trained.report.anchor_overlap > 0.5


def test_reported_precision_is_that_of_the_files(trained: Trained, boxes_folder: Path) -> None:
    spec = trained.spec
    model = build(spec)
    load_weights(model, read_state_dict(trained.folder / "model.safetensors"), source="tiny")
    assert spec.detection is not None
    testing = _loaders(spec, boxes_folder)["testing"]
    found = measure_map(model, spec.detection, testing, num_classes=3)
    accuracy = trained.report.accuracy
    assert (accuracy.map50, accuracy.map) == (round(found.map50, 5), round(found.map, 5))
    assert accuracy.num_images == 6


def test_no_memory_left_for_the_last_measurement(
    detector_spec: ModelSpec, boxes_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"data": boxes_folder, "models": tmp_path, "recipe": SHORT, "command": "train"}
    with monkeypatch.context() as patch:
        patch.setattr(detect_job, "measure_map", lambda *args, **options: torch.empty(1 << 60))
        with pytest.raises(DeviceMemoryError, match="finished epochs are kept"):
            train_detection_model(detector_spec, **options)
    assert train_detection_model(detector_spec, **options, resume=True).accuracy.num_images == 6


def test_an_existing_model_is_not_written_over(trained: Trained, detector_spec: ModelSpec, boxes_folder: Path) -> None:
    with pytest.raises(InputError, match="exists already"):
        train_detection_model(detector_spec, data=boxes_folder, models=trained.folder.parent, recipe=RECIPE, command="")


def test_a_classifier_is_no_detector() -> None:
    with pytest.raises(InputError, match="model 'cspresnet50': a classifier, expected a detector"):
        detector_spec("cspresnet50", size_px=None)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_boxes_of_sixteen_pictures_are_learnt(
    detector_spec: ModelSpec, make_boxes_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Judged by the pictures that it is trained on."""
    folder = make_boxes_folder(16, 0)
    for kind in ("images", "labels"):
        (folder / kind / "val").rmdir()
        shutil.copytree(folder / kind / "train", folder / kind / "val")
    recipe = DetectionRecipe(epochs=60, batch=4, max_learning_rate=1e-2, ema_decay=0.95)
    report = train_detection_model(detector_spec, data=folder, models=tmp_path, recipe=recipe, command="")
    first, last = report.curve[0], report.curve[-1]
    assert last.train_loss < 0.5 * first.train_loss
    assert (report.accuracy.map50 or 0) > 0.5
