"""A training run from a data set's name to a whole `models/<name>/`."""

from __future__ import annotations

import dataclasses
import shutil
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
from cspdeploy.nets.registry import build, find_network, spec_of
from cspdeploy.nets.weights import load_weights, read_state_dict, write_safetensors
from cspdeploy.train.data import BatchLoader, measure_mean_std
from cspdeploy.train.loop import EpochRecord, Progress, Recipe, train, write_curve
from cspdeploy.train.metrics import measure_accuracy
from cspdeploy.train.workers import NO_WORKERS, Workers

__all__ = ["TrainingReport", "replace_folder", "require_free", "train_model", "write_and_read_back"]

NUM_CALIBRATION_IMAGES = 512
CHECKPOINT_FILE = "checkpoint.pt"
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
    network = find_network(name)
    if spec_of(network).task != "classify":
        raise InputError(
            f"model '{name}': gives no classes of images, expected a classifier", fix="see: cspdeploy list"
        )
    folder, run = models / network.name, models / f".{network.name}.run"
    require_free(folder, run, resume=resume, overwrite=overwrite)
    training, testing = (open_dataset(data, split=split) for split in ("train", "test"))
    if training.labels != testing.labels:
        raise InputError(f"{data}: train and test have different classes", fix="give both the same class folders")
    workers.require_batch(recipe.batch, num_images=len(training))
    side_px = DEFAULT_SIZE_PX.get(data, network.preprocess.height_px) if size_px is None else size_px
    if side_px < 1:
        raise InputError(f"--size: got {side_px} px, expected a positive number")
    contract = dataclasses.replace(network.preprocess.with_size(side_px, side_px), crop_pct=1.0)
    mean, std = measure_mean_std(training, contract)
    contract = dataclasses.replace(contract, mean=mean, std=std)
    spec = spec_of(network, num_classes=len(training.labels), preprocess=contract)
    progress(f"reading {len(training)} + {len(testing)} images", 0, 1)
    testing_loader = BatchLoader(testing, contract, batch=recipe.batch)
    average, curve, places = train(
        spec, recipe, training=BatchLoader(training, contract, batch=recipe.batch), testing=testing_loader,
        checkpoint=run / CHECKPOINT_FILE, resume=resume, workers=workers, progress=progress,
    )  # fmt: skip
    provenance = Provenance(
        source="trained", origin=f"{name} on {training.name}", dataset=training.name, command=command
    )
    finished = run / "model"
    reread, weights = write_and_read_back(finished, spec, average, workers=workers)
    top1, top5 = measure_accuracy(reread, testing_loader.in_order(share=workers.share), workers=workers)
    accuracy = Accuracy(dataset=testing.name, num_images=len(testing), top1=top1, top5=top5)
    if workers.is_first:
        done = dataclasses.replace(provenance, weights_sha256=file_sha256(weights), accuracy=accuracy)
        write_spec(finished, dataclasses.replace(spec, provenance=done))
        write_text(finished / LABELS_FILE, "\n".join(training.labels) + "\n")
        write_calibration(finished / CALIBRATION_FILE, _calibration_images(training, spec.preprocess))
        write_curve(finished / CURVE_FILE, recipe, curve, num_images=len(training), places=places)
        replace_folder(finished, folder)
        shutil.rmtree(run)
    return TrainingReport(folder=str(folder), accuracy=accuracy, curve=tuple(curve))


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
    folder: Path, spec: ModelSpec, model: torch.nn.Module, *, workers: Workers = NO_WORKERS
) -> tuple[torch.nn.Module, Path]:
    """The FP16 weights into a new `folder`; gives the network as whoever loads it will have it, and their file.

    Of several workers the first one writes and reads; all of them have the network, on their device.
    """
    weights = folder / WEIGHTS_FILE
    reread = build(spec)
    if workers.is_first:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_safetensors(weights, model, dtype=torch.float16)
        load_weights(reread, read_state_dict(weights), source=str(weights))
    reread.to(workers.device)
    workers.copy_first(reread)
    return reread, weights


def _calibration_images(data: LabelledImages, contract: Preprocess) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Images spread evenly over the training set: as stored where all have one shape, else resized to the contract."""
    indices = np.linspace(0, len(data) - 1, min(NUM_CALIBRATION_IMAGES, len(data))).astype(np.int64)
    if data.stored is not None:
        return data.stored[indices]
    return np.stack([resize_image(load_image(data.source(int(i))), contract) for i in indices])


def replace_folder(new: Path, place: Path) -> None:
    """Put a finished folder in its place; one that is there goes when the new one is."""
    if place.exists():
        old = place.with_name(f".{place.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        place.rename(old)
        new.rename(place)
        shutil.rmtree(old)
    else:
        new.rename(place)
