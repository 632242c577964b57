from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from cspdeploy.core.datasets import FASHION_MNIST
from cspdeploy.core.errors import InputError
from cspdeploy.core.model_folder import read_labels, read_spec, write_spec
from cspdeploy.core.preprocess import preprocess
from cspdeploy.core.spec import ModelSpec, Provenance
from cspdeploy.export import simplify
from cspdeploy.nets.registry import build
from cspdeploy.nets.weights import load_weights, read_state_dict, write_safetensors
from cspdeploy.pipeline import qat as stage
from cspdeploy.pipeline.qat import QatReport, QatRequest, train_qat
from cspdeploy.pipeline.recipe import ExportRequest, export_bundle
from cspdeploy.quant.assemble import Assembly
from cspdeploy.quant.calibration import open_calibration
from cspdeploy.quant.placements import find_placement
from cspdeploy.quant.plan import fit_weight_grid
from cspdeploy.quant.prepare import prepare_float
from cspdeploy.quant.qat_file import find_qat, load_qat
from cspdeploy.quant.qat_step import quantise_trained
from cspdeploy.quant.qat_train import QatRecipe, QatScore
from cspdeploy.quant.select import Selection, select
from cspdeploy.quant.simulate import simulate
from cspdeploy.quant.torch_graph import TorchGraph
from cspdeploy.runtimes.ort import open_cpu_session
from cspdeploy.train import data as train_data

RECIPE = QatRecipe(epochs=2, batch=8, steps_per_epoch=5, max_learning_rate=0.002, ema_decay=0.5, distillation=1.0)

Progress = Callable[[str, int, int], None]


def _coarse(assembly: Assembly, *, method: str, progress: Progress) -> Selection:
    """Min-max ranges, and weights of 4 bits: much that training can repair, and quickly chosen."""
    selection = select(assembly, method="minmax" if method == "auto" else method, progress=progress)
    plan = selection.plan
    values = {name: plan.values.get(name, assembly.graph.weights[name].numpy()) for name in plan.weights}
    weights = {name: fit_weight_grid(values[name], axis=grid.axis, limit=7) for name, grid in plan.weights.items()}
    return dataclasses.replace(selection, plan=dataclasses.replace(plan, weights=weights))


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """One thread, no choice of ranges, no onnxsim: none of these is what is tested here. No augmentation either: to an
    untrained network a picture that is shifted is another one, and says nothing of those of the test."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "select", _coarse)
        patch.setattr(train_data, "augment", lambda images, rng, **part: images)
        patch.setattr(simplify, "_CHILD", ["false"])
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tiny_spec: ModelSpec, photos: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten photographs with grain, as files: each is a class, four times to train on and once to test on."""
    root = tmp_path_factory.mktemp("labelled")
    rng = np.random.default_rng(0)
    for i in range(5 * tiny_spec.num_classes):
        label = i % tiny_spec.num_classes
        place = root / ("train" if i >= tiny_spec.num_classes else "test") / f"label {label}"
        place.mkdir(parents=True, exist_ok=True)
        grain = rng.integers(-8, 9, photos[label].shape)
        Image.fromarray((photos[label] + grain).clip(0, 255).astype(np.uint8)).save(place / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def decided(photo_models: Path, photos: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`photo_models` with a head that tells images apart: that of random weights gives all the same. Read-only."""
    models = Path(shutil.copytree(photo_models, tmp_path_factory.mktemp("decided") / "models"))
    spec, weights = read_spec(models / "tiny"), models / "tiny" / "model.safetensors"
    network = build(spec).eval()
    load_weights(network, read_state_dict(weights), source="")
    with torch.no_grad():
        logits = network(torch.from_numpy(preprocess(list(photos), spec.preprocess)))
        head: Any = network.get_submodule("head.fc")
        head.weight /= logits.std(0)[:, None]
        head.bias.copy_((head.bias - logits.mean(0)) / logits.std(0))
    write_safetensors(weights, network, dtype=torch.float32)
    return models


@pytest.fixture
def models(decided: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(decided, tmp_path / "models"))


def _train(models: Path, data: Path | None, **changes: Any) -> QatReport:
    request = QatRequest(model="tiny", models=models, data=None if data is None else str(data), recipe=RECIPE,
                         command="the command")  # fmt: skip
    progress = changes.pop("progress", lambda what, done, total: None)
    return train_qat(dataclasses.replace(request, **changes), progress=progress)


@pytest.fixture(scope="module")
def trained(decided: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, QatReport]:
    """A models folder with a fine-tuned model, and the report. Read-only."""
    models = Path(shutil.copytree(decided, tmp_path_factory.mktemp("trained") / "models"))
    return models, _train(models, data)


def test_plan_lies_in_the_model_folder_and_the_rest_is_as_it_was(
    trained: tuple[Path, QatReport], decided: Path
) -> None:
    models, report = trained
    assert report.kept, (report.before, report.after)
    placement = find_placement(None).name
    before = {path.name: path.read_bytes() for path in (decided / "tiny").iterdir()}
    after = {path.name: path.read_bytes() for path in (models / "tiny").iterdir()}
    assert set(after) - set(before) == {f"qat-{placement}.safetensors"}
    assert all(after[name] == content for name, content in before.items())
    assert [path.name for path in models.iterdir()] == ["tiny"]
    assert report.file == str(find_qat(models / "tiny", placement))


def test_record_tells_how_and_what_it_brought(trained: tuple[Path, QatReport]) -> None:
    report = trained[1]
    found = load_qat(Path(report.file))
    assert found.record["command"] == "the command"
    assert (found.record["num_images"], found.record["dataset"]) == (40, report.dataset)
    assert found.record["recipe"]["distillation"] == RECIPE.distillation
    assert found.record["after"]["loss"] == report.after.loss < report.before.loss == found.record["before"]["loss"]
    assert len(found.record["epochs"]) == len(report.curve) == 2
    assert found.origin.placement == report.placement
    json.dumps(found.record)


@pytest.fixture(scope="module")
def source(trained: tuple[Path, QatReport], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float file of an export of the fine-tuned model."""
    output = tmp_path_factory.mktemp("exported")
    return Path(export_bundle(ExportRequest(model="tiny", models=trained[0], output=output)).folder) / "tiny.onnx"


@pytest.mark.usefixtures("int8_is_faster")
def test_export_of_it_is_its_plan_to_the_bit(
    trained: tuple[Path, QatReport], source: Path, photos: np.ndarray, tiny_spec: ModelSpec, tmp_path: Path
) -> None:
    """The float file that an export makes is one that the plan fits."""
    target = tmp_path / "tiny.int8.onnx"
    plan, placement = load_qat(Path(trained[1].file)), find_placement(None)
    images = open_calibration(photos[:32], tiny_spec.preprocess)
    sha256 = plan.origin.weights_sha256
    step = quantise_trained(source, target, images, plan, placement=placement, weights_sha256=sha256)
    assert step.outcome == "done", step.detail
    assert "fine-tuned" in step.detail
    assert step.facts["qat"] == plan.record
    graph = TorchGraph(prepare_float(onnx.load(source), placement=placement))
    x_NCHW = next(images.batches(8))
    session = open_cpu_session(target)
    got = np.concatenate([session.run({"input": x[None]})["logits"] for x in x_NCHW])
    eager = simulate(graph, plan.plan, [x_NCHW])["logits"]
    assert np.median(np.abs(got - eager)) <= 1e-5 * np.abs(eager).max()

    with pytest.raises(InputError, match="other weights"):
        quantise_trained(source, target, images, plan, placement=placement, weights_sha256="other")
    wide = dataclasses.replace(tiny_spec.preprocess, width_px=64)
    with pytest.raises(InputError, match="64 px width"):
        quantise_trained(
            source, target, open_calibration(photos, wide), plan, placement=placement, weights_sha256=sha256
        )


@pytest.mark.usefixtures("int8_is_slower")
def test_file_that_is_slower_is_refused(
    trained: tuple[Path, QatReport], source: Path, photos: np.ndarray, tiny_spec: ModelSpec, tmp_path: Path
) -> None:
    plan = load_qat(Path(trained[1].file))
    step = quantise_trained(
        source, tmp_path / "t.onnx", open_calibration(photos[:16], tiny_spec.preprocess), plan,
        placement=find_placement(None), weights_sha256=plan.origin.weights_sha256,
    )  # fmt: skip
    assert step.outcome == "kept"
    assert "slower than FP32" in step.detail
    assert not (tmp_path / "t.onnx").exists()


def test_interrupted_run_goes_on_to_the_same_plan(trained: tuple[Path, QatReport], models: Path, data: Path) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if what.startswith("epoch 2/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _train(models, data, progress=interrupt)
    placement = find_placement(None).name
    assert find_qat(models / "tiny", placement) is None
    with pytest.raises(InputError, match="unfinished run") as caught:
        _train(models, data)
    assert "--resume" in caught.value.fix
    report = _train(models, data, resume=True)
    assert Path(report.file).read_bytes() != b""
    got, straight = load_qat(Path(report.file)).plan, load_qat(Path(trained[1].file)).plan
    assert {name: whole.tobytes() for name, whole in got.integers.items()} == {
        name: whole.tobytes() for name, whole in straight.integers.items()
    }
    assert [path.name for path in models.iterdir()] == ["tiny"]
    with pytest.raises(InputError, match="exists already"):
        _train(models, data)


def test_training_that_helps_nothing_leaves_nothing(models: Path, data: Path) -> None:
    """Such as with a rate that shakes every weight out of its place."""
    report = _train(models, data, recipe=dataclasses.replace(RECIPE, max_learning_rate=500.0))
    assert not report.kept
    assert report.after.loss >= report.before.loss
    assert not Path(report.file).exists()
    assert [path.name for path in models.iterdir()] == ["tiny"]


@pytest.mark.parametrize(
    ("top1", "loss", "better"), [(0.9, 0.4, True), (0.899, 0.4, True), (0.898, 0.4, False), (0.95, 0.5, False)]
)
def test_better_is_less_loss_and_no_fewer_images(top1: float, loss: float, better: bool) -> None:
    before = QatScore(num_images=1000, top1=0.9, top5=1.0, agreement=1.0, loss=0.5)
    assert stage._is_better(dataclasses.replace(before, top1=top1, loss=loss), before) is better


# --- refusals ---


def test_resume_without_a_run(models: Path, data: Path) -> None:
    with pytest.raises(InputError, match="no finished epoch") as caught:
        _train(models, data, resume=True)
    assert caught.value.fix == "leave out --resume"


def test_labels_must_be_those_of_the_model(models: Path, data: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(data, tmp_path / "other"))
    for split in ("train", "test"):
        (other / split / "label 0").rename(other / split / "another")
    with pytest.raises(InputError, match="not those of 'tiny'"):
        _train(models, other)


def test_folder_without_labels(models: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "train" / "label 0", tmp_path / "flat")
    with pytest.raises(InputError, match="class folders"):
        _train(models, tmp_path / "flat")


def test_data_is_needed_unless_it_is_known(models: Path) -> None:
    with pytest.raises(InputError, match="no labelled images") as caught:
        _train(models, None)
    assert "--data" in caught.value.fix


def test_data_that_the_model_was_trained_on_is_the_default(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = read_spec(models / "tiny")
    provenance = Provenance(source="trained", dataset=f"{FASHION_MNIST}/train")
    write_spec(models / "tiny", dataclasses.replace(spec, provenance=provenance))
    asked: list[str] = []

    def refuse(name: str, *, split: str) -> None:
        asked.append(f"{name} {split}")
        raise InputError("enough")

    monkeypatch.setattr(stage, "open_dataset", refuse)
    with pytest.raises(InputError, match="enough"):
        _train(models, None)
    assert asked == [f"{FASHION_MNIST} train"]


def test_model_must_be_a_trained_folder(models: Path, data: Path) -> None:
    with pytest.raises(InputError, match="unknown"):
        _train(models, data, model="tinny")


def test_labels_file_is_that_of_the_data(models: Path, tiny_spec: ModelSpec) -> None:
    assert read_labels(models / "tiny" / "labels.txt", num_classes=tiny_spec.num_classes)[0] == "label 0"
