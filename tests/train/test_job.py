from __future__ import annotations

import dataclasses
import gzip
import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cspdeploy.core.bundle import file_sha256
from cspdeploy.core.datasets import open_dataset
from cspdeploy.core.errors import DeviceMemoryError, InputError
from cspdeploy.core.model_folder import read_calibration, read_labels, read_spec
from cspdeploy.core.spec import ModelSpec, Preprocess
from cspdeploy.nets import registry
from cspdeploy.nets.cspnet import CspNetConfig
from cspdeploy.nets.registry import build
from cspdeploy.nets.weights import load_weights, read_state_dict
from cspdeploy.train import job
from cspdeploy.train.data import BatchLoader
from cspdeploy.train.job import TrainingReport, train_model
from cspdeploy.train.loop import Recipe
from cspdeploy.train.metrics import measure_accuracy

MODEL_FILES = {"spec.json", "model.safetensors", "labels.txt", "calibration.npz", "train.json"}
RECIPE = Recipe(epochs=2, batch=8, max_learning_rate=0.05)
SHORT = Recipe(epochs=1, batch=16)


@pytest.fixture(autouse=True, scope="module")
def tiny_network(tiny_config: CspNetConfig, tiny_contract: Preprocess) -> Iterator[None]:
    row = registry.NETWORKS["cspdarknet53"]
    network = dataclasses.replace(row, name="tiny", config=tiny_config, preprocess=tiny_contract, checkpoint="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.NETWORKS, "tiny", network)
        yield


def _train(data: Path, models: Path, **changes: Any) -> TrainingReport:
    options: dict[str, Any] = {
        "name": "tiny", "recipe": SHORT, "size_px": None, "command": "cspdeploy train tiny", "resume": False,
        "overwrite": False,
    }  # fmt: skip
    return train_model(data=str(data), models=models, **{**options, **changes})


class Trained(NamedTuple):
    report: TrainingReport
    folder: Path
    spec: ModelSpec


@pytest.fixture(scope="module")
def trained(stripes_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A whole run; tests only read what it wrote."""
    models = tmp_path_factory.mktemp("models")
    report = _train(stripes_folder, models, recipe=RECIPE)
    return Trained(report, models / "tiny", read_spec(models / "tiny"))


def test_writes_a_whole_model_folder_and_nothing_beside_it(trained: Trained) -> None:
    assert {path.name for path in trained.folder.iterdir()} == MODEL_FILES
    assert list(trained.folder.parent.iterdir()) == [trained.folder]  # the run's own folder is gone
    assert trained.report.folder == str(trained.folder)


def test_description_tells_where_the_weights_come_from(trained: Trained) -> None:
    provenance = trained.spec.provenance
    assert provenance.source == "trained"
    assert provenance.weights_sha256 == file_sha256(trained.folder / "model.safetensors")
    assert provenance.command == "cspdeploy train tiny"
    assert provenance.accuracy == trained.report.accuracy
    assert trained.spec.num_classes == 2
    assert (trained.spec.preprocess.height_px, trained.spec.preprocess.crop_pct) == (32, 1.0)


def test_weights_are_fp16(trained: Trained) -> None:
    tensors = load_file(trained.folder / "model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.float16, torch.int64}


def test_labels_calibration_and_curve(trained: Trained) -> None:
    assert read_labels(trained.folder / "labels.txt", num_classes=2) == ("flat", "upright")
    assert read_calibration(trained.folder / "calibration.npz").shape == (32, 32, 32, 3)
    curve = json.loads((trained.folder / "train.json").read_text())
    assert [row["epoch"] for row in curve["epochs"]] == [record.epoch for record in trained.report.curve] == [1, 2]
    assert curve["recipe"]["batch"] == 8
    (place,) = curve["places"]
    assert (place["from_epoch"], place["device"], place["workers"], place["dtype"]) == (1, "cpu", 1, "bfloat16")


def test_reported_accuracy_is_that_of_the_files(trained: Trained, stripes_folder: Path) -> None:
    model = build(trained.spec)
    load_weights(model, read_state_dict(trained.folder / "model.safetensors"), source="tiny")
    testing = BatchLoader(open_dataset(str(stripes_folder), split="test"), trained.spec.preprocess, batch=8)
    accuracy = trained.report.accuracy
    assert measure_accuracy(model, testing.in_order()) == (accuracy.top1, accuracy.top5)
    assert accuracy.num_images == 16


def test_normalisation_is_measured_on_the_training_images(trained: Trained) -> None:
    pixels = read_calibration(trained.folder / "calibration.npz") / 255
    assert trained.spec.preprocess.mean == pytest.approx(pixels.mean((0, 1, 2)), abs=1e-4)
    assert trained.spec.preprocess.std == pytest.approx(pixels.std((0, 1, 2)), abs=1e-4)


def test_interrupted_and_resumed_run_writes_the_same_files(
    trained: Trained, stripes_folder: Path, tmp_path: Path
) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if what.startswith("epoch 2/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _train(stripes_folder, tmp_path, recipe=RECIPE, progress=interrupt)
    assert not (tmp_path / "tiny").exists()
    with pytest.raises(InputError, match="holds an unfinished run") as caught:
        _train(stripes_folder, tmp_path, recipe=RECIPE)
    assert "--resume" in caught.value.fix
    _train(stripes_folder, tmp_path, recipe=RECIPE, resume=True)
    for name in MODEL_FILES - {"train.json"}:  # which tells the time that it took
        assert (tmp_path / "tiny" / name).read_bytes() == (trained.folder / name).read_bytes(), name


def test_size_on_request(stripes_folder: Path, tmp_path: Path) -> None:
    _train(stripes_folder, tmp_path, size_px=16)
    assert read_spec(tmp_path / "tiny").preprocess.width_px == 16
    assert read_calibration(tmp_path / "tiny" / "calibration.npz").shape == (32, 16, 16, 3)


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A file in the place where the model is to go."""
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "mine.txt").write_text("precious")
    return tmp_path / "tiny" / "mine.txt"


def test_folder_that_is_there_is_refused(stripes_folder: Path, precious: Path) -> None:
    with pytest.raises(InputError, match="exists already") as caught:
        _train(stripes_folder, precious.parents[1])
    assert "--overwrite" in caught.value.fix
    assert precious.read_text() == "precious"
    assert list(precious.parents[1].iterdir()) == [precious.parent]


def test_overwrite_replaces_the_folder(stripes_folder: Path, precious: Path) -> None:
    _train(stripes_folder, precious.parents[1], overwrite=True)
    assert {path.name for path in precious.parent.iterdir()} == MODEL_FILES
    assert list(precious.parents[1].iterdir()) == [precious.parent]


def test_failed_run_keeps_the_old_folder(stripes_folder: Path, precious: Path) -> None:
    recipe = dataclasses.replace(SHORT, batch=4, max_learning_rate=1e38)
    with pytest.raises(InputError, match="loss is"):
        _train(stripes_folder, precious.parents[1], overwrite=True, recipe=recipe)
    assert precious.read_text() == "precious"


def test_no_memory_left_for_the_last_measurement(
    trained: Trained, stripes_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All epochs are kept: with the same options, on a machine that has room, the run ends as it would have."""
    with monkeypatch.context() as patch:
        patch.setattr(job, "measure_accuracy", lambda *args, **options: torch.empty(1 << 60))
        for resume in (False, True):
            with pytest.raises(DeviceMemoryError, match="finished epochs are kept") as caught:
                _train(stripes_folder, tmp_path, recipe=RECIPE, resume=resume)
            assert "--resume" in caught.value.fix
    assert not (tmp_path / "tiny").exists()
    report = _train(stripes_folder, tmp_path, recipe=RECIPE, resume=True)
    assert report.accuracy == trained.report.accuracy


def test_idx_images_are_kept_for_calibration_as_stored(tmp_path: Path) -> None:
    """28x28 grey, not the 32x32 RGB that the network takes."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 28, 28), np.uint8)
    for prefix in ("train", "t10k"):
        images = struct.pack(">4I", 0x0803, *pixels.shape) + pixels.tobytes()
        labels = struct.pack(">2I", 0x0801, 32) + bytes(i % 10 for i in range(32))
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (tmp_path / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    _train(tmp_path, tmp_path / "models")
    assert np.array_equal(read_calibration(tmp_path / "models" / "tiny" / "calibration.npz"), pixels)
    assert len(read_labels(tmp_path / "models" / "tiny" / "labels.txt", num_classes=10)) == 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"name": "tyny"}, "did you mean 'tiny'"), ({"data": "none"}, "not a folder"), ({"size_px": 0}, "size"),
     ({"size_px": -32}, "size")],
    ids=str,
)  # fmt: skip
def test_wrong_request_leaves_nothing_behind(
    stripes_folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    data = tmp_path / changes.pop("data") if "data" in changes else stripes_folder
    with pytest.raises(InputError, match=message):
        _train(data, tmp_path / "models", **changes)
    assert not (tmp_path / "models").exists()


def test_splits_with_different_classes_are_refused(stripes_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(stripes_folder, tmp_path / "data")
    (tmp_path / "data" / "test" / "flat").rename(tmp_path / "data" / "test" / "round")
    with pytest.raises(InputError, match="different classes"):
        _train(tmp_path / "data", tmp_path / "models")
