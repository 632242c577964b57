"""A training run from a data set's name to a whole `models/<name>/`."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cspdeploy.core.bundle import file_sha256
from cspdeploy.core.datasets import FASHION_MNIST, LabelledImages, open_dataset
from cspdeploy.core.errors import InputError
from cspdeploy.core.model_folder import (
    CALIBRATION_FILE,
    CURVE_FILE,
    LABELS_FILE,
    WEIGHTS_FILE,
    write_calibration,
    write_spec,
    write_text,
)  # fmt: skip
from cspdeploy.core.preprocess import load_image, resize_image
from cspdeploy.core.spec import Accuracy, ModelSpec, Preprocess, Provenance
from cspdeploy.nets.network import Network
from cspdeploy.nets.registry import build, find_network, spec_of
from cspdeploy.nets.weights import load_weights, read_state_dict, write_safetensors
from cspdeploy.train.data import BatchLoader, measure_mean_std
from cspdeploy.train.failures import explained
from cspdeploy.train.loop import BaseRecipe, EpochRecord, Progress, Recipe, TrainedRun, train, write_curve
from cspdeploy.train.metrics import measure_accuracy
from cspdeploy.train.precision import true_float32
from cspdeploy.train.workers import NO_WORKERS, Workers

__all__ = ["TrainingReport", "finish_folder", "require_free", "train_model", "write_and_read_back"]

NUM_CALIBRATION_IMAGES = 512
CHECKPOINT_FILE = "checkpoint.pt"
FINISHED_FOLDER = "model"
"""In that of the run, until it goes to its place."""
DEFAULT_SIZE_PX = {FASHION_MNIST: 32}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingReport:
    """What a run made. `accuracy` is that of the FP16 file as it lies in the folder, read back and run in FP32."""

    folder: str
    accuracy: Accuracy
    curve: tuple[EpochRecord, ...]


def train_model(
    name: str,
    *,
    data: str,
    models: Path,
    recipe: Recipe,
    size_px: int | None,
    command: str,
    resume: bool,
    overwrite: bool,
    workers: Workers = NO_WORKERS,
    progress: Progress = lambda what, done, total: None,
) -> TrainingReport:
    """Train the network `name` on `data` and write `models/<name>/` in one rename.

    Of several workers the first one writes; the report is the same on all of them.

    Args:
        data: "fashion-mnist" or a folder (`cspdeploy.core.datasets.open_dataset`).
        models: where the model's folder goes; the checkpoint of the run lies beside it, in `.<name>.run/`.
        size_px: side of the square input; None: the data set's own, else the network's.
        command: the command line, kept in spec.json.
        workers: this process among those that train together; their number has to divide the batch.

    Raises:
        InputError: unknown network or data, a model or an unfinished run already there, a batch that cannot be divided,
            or a loss that is not finite.
        CspDeployError: as `cspdeploy.train.loop.run_epochs`.
    """
    network = _find_classifier(name)
    folder, run = models / network.name, models / f".{network.name}.run"
    require_free(folder, run, resume=resume, overwrite=overwrite)
    training, testing = (open_dataset(data, split=split) for split in ("train", "test"))
    if training.labels != testing.labels:
        raise InputError(f"{data}: train and test have different classes", fix="give both the same class folders")
    workers.require_batch(recipe.batch, num_images=len(training))
    side_px = DEFAULT_SIZE_PX.get(data, network.preprocess.height_px) if size_px is None else size_px
    spec = _fitted(network, training, side_px=side_px)
    progress(f"reading {len(training)} + {len(testing)} images", 0, 1)
    judge = BatchLoader(testing, spec.preprocess, batch=workers.each(recipe.batch))
    trained = train(
        spec, recipe, training=BatchLoader(training, spec.preprocess, batch=recipe.batch), testing=judge,
        checkpoint=run / CHECKPOINT_FILE, resume=resume, workers=workers, progress=progress,
    )  # fmt: skip
    with explained(workers, batch=recipe.batch, kept=True), true_float32(workers.device):
        reread = write_and_read_back(run, spec, trained.model, workers=workers)
        top1, top5 = measure_accuracy(reread, judge.in_order(share=workers.share), workers=workers)
    accuracy = Accuracy(dataset=testing.name, num_images=len(testing), top1=top1, top5=top5)
    if workers.is_first:
        provenance = Provenance(
            source="trained", origin=f"{name} on {training.name}", dataset=training.name, command=command,
            accuracy=accuracy,
        )  # fmt: skip
        finish_folder(
            run, folder, dataclasses.replace(spec, provenance=provenance), trained, recipe=recipe,
            labels=training.labels, num_images=len(training),
            calibration=_calibration_images(training, spec.preprocess),
        )  # fmt: skip
    return TrainingReport(folder=str(folder), accuracy=accuracy, curve=tuple(trained.curve))


def _find_classifier(name: str) -> Network:
    network = find_network(name)
    if spec_of(network).task != "classify":
        raise InputError(
            f"model '{name}': gives no classes of images, expected a classifier", fix="see: cspdeploy list"
        )
    return network


def _fitted(network: Network, training: LabelledImages, *, side_px: int) -> ModelSpec:
    """With the classes of the data and a contract of that size, in which the data's own mean and deviation stand."""
    if side_px < 1:
        raise InputError(f"--size: got {side_px} px, expected a positive number")
    contract = dataclasses.replace(network.preprocess.with_size(side_px, side_px), crop_pct=1.0)
    mean, std = measure_mean_std(training, contract)
    contract = dataclasses.replace(contract, mean=mean, std=std)
    return spec_of(network, num_classes=len(training.labels), preprocess=contract)


def require_free(folder: Path, run: Path, *, resume: bool, overwrite: bool) -> None:
    """Nothing that a run would write over, unless asked to.

    Raises:
        InputError: a model of that name, or an unfinished run.
    """
    if folder.exists() and not overwrite:
        raise InputError(f"{folder}: exists already", fix="give --overwrite, or train with another --models folder")
    if (run / CHECKPOINT_FILE).exists() and not (resume or overwrite):
        raise InputError(
            f"{run}: holds an unfinished run", fix="give --resume to go on with it, or --overwrite to start anew"
        )


def write_and_read_back(
    run: Path, spec: ModelSpec, model: torch.nn.Module, *, workers: Workers = NO_WORKERS
) -> torch.nn.Module:
    """The FP16 weights into the model's folder in that of the run; gives the network as whoever loads it will have it.

    Of several workers the first one writes and reads; all of them have the network, on their device.
    """
    reread = build(spec)
    if workers.is_first:
        folder = run / FINISHED_FOLDER
        weights = folder / WEIGHTS_FILE
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_safetensors(weights, model, dtype=torch.float16)
        load_weights(reread, read_state_dict(weights), source=str(weights))
    reread.to(workers.device)
    workers.copy_first(reread)
    return reread


def finish_folder(
    run: Path,
    folder: Path,
    spec: ModelSpec,
    trained: TrainedRun,
    *,
    recipe: BaseRecipe,
    labels: Sequence[str],
    num_images: int,
    calibration: np.ndarray[tuple[int, ...], np.dtype[np.uint8]],
) -> None:
    """All that belongs to the weights that `write_and_read_back` has written; then it goes to its place in one rename.

    Args:
        run: where the run kept its checkpoint; removed.
        folder: `models/<name>`.
        spec: whose provenance gets the digest of the weights.
        num_images: of the training set.
        calibration: images `[N, H, W]` or `[N, H, W, 3]`.
    """
    finished = run / FINISHED_FOLDER
    provenance = dataclasses.replace(spec.provenance, weights_sha256=file_sha256(finished / WEIGHTS_FILE))
    write_spec(finished, dataclasses.replace(spec, provenance=provenance))
    write_text(finished / LABELS_FILE, "\n".join(labels) + "\n")
    write_calibration(finished / CALIBRATION_FILE, calibration)
    write_curve(finished / CURVE_FILE, recipe, trained.curve, num_images=num_images, places=trained.places)
    _replace_folder(finished, folder)
    shutil.rmtree(run)


def _calibration_images(data: LabelledImages, contract: Preprocess) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Images spread evenly over the training set: as stored where all have one shape, else resized to the contract."""
    indices = np.linspace(0, len(data) - 1, min(NUM_CALIBRATION_IMAGES, len(data))).astype(np.int64)
    if data.stored is not None:
        return data.stored[indices]
    return np.stack([resize_image(load_image(data.source(int(i))), contract) for i in indices])


def _replace_folder(new: Path, place: Path) -> None:
    """Put a finished folder in its place; one that is there goes when the new one is."""
    if place.exists():
        old = place.with_name(f".{place.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        place.rename(old)
        new.rename(place)
        shutil.rmtree(old)
    else:
        new.rename(place)
