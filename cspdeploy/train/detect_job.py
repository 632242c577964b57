"""A detector's training from a labelled folder to a whole `models/<name>/`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch

from cspdeploy.core.codec import from_json, to_json
from cspdeploy.core.detection.labelled import LabelledBoxes
from cspdeploy.core.detection.spec import Detection
from cspdeploy.core.errors import InputError
from cspdeploy.core.spec import Accuracy, ModelSpec, NetworkSpec, Provenance
from cspdeploy.nets.darknet.sections import Convolutional, DarknetConfig, Yolo
from cspdeploy.nets.registry import find_network, spec_of
from cspdeploy.train.anchors import find_anchors, mean_best_overlap, with_anchors
from cspdeploy.train.detect_data import BoxLoader
from cspdeploy.train.detect_folder import open_boxes
from cspdeploy.train.detect_loop import DetectionRecipe, DetectionRecord, measure_map, train_detector
from cspdeploy.train.failures import explained
from cspdeploy.train.job import (
    CHECKPOINT_FILE,
    NUM_CALIBRATION_IMAGES,
    finish_folder,
    require_free,
    write_and_read_back,
)  # fmt: skip
from cspdeploy.train.loop import Progress
from cspdeploy.train.precision import true_float32
from cspdeploy.train.workers import NO_WORKERS, Workers

__all__ = ["DetectionTrainingReport", "detector_spec", "train_detection_model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectionTrainingReport:
    """What a run made. `accuracy` is that of the FP16 file as it lies in the folder, read back and run in FP32.

    Attributes:
        anchor_overlap: mean overlap of the training boxes with their best anchor, in [0, 1].
    """

    folder: str
    accuracy: Accuracy
    anchors: tuple[tuple[float, float], ...]
    anchor_overlap: float
    curve: tuple[DetectionRecord, ...]


def detector_spec(name: str, *, size_px: int | None) -> ModelSpec:
    """The description of a registry detector at that size, its classes and anchors still the published ones.

    Raises:
        InputError: no such network, one that is no detector, or a size that its strides do not divide.
    """
    network = find_network(name)
    if network.detection is None:
        raise InputError(f"model '{name}': a classifier, expected a detector", fix="see: cspdeploy list")
    side_px = network.preprocess.height_px if size_px is None else size_px
    coarsest = max(head.stride_px for head in network.detection.heads)
    if side_px < coarsest or side_px % coarsest:
        nearest = max(coarsest, round(side_px / coarsest) * coarsest)
        raise InputError(f"--size {side_px}: expected a multiple of {coarsest} px", fix=f"--size {nearest}")
    return spec_of(network, preprocess=network.preprocess.with_size(side_px, side_px))


def train_detection_model(
    spec: ModelSpec,
    *,
    data: Path,
    models: Path,
    recipe: DetectionRecipe,
    command: str,
    resume: bool = False,
    overwrite: bool = False,
    workers: Workers = NO_WORKERS,
    progress: Progress = lambda what, done, total: None,
) -> DetectionTrainingReport:
    """Train the detector of `spec` on a labelled folder and write `models/<name>/` in one rename.

    Of several workers the first one writes; the report is the same on all of them. The number of classes and the
    anchors are those of the data, whatever `spec` has.

    Args:
        data: a folder (`cspdeploy.train.detect_folder.open_boxes`).
        models: where the model's folder goes; the checkpoint of the run lies beside it, in `.<name>.run/`.
        command: the command line, kept in spec.json.
        workers: this process among those that train together; their number has to divide the batch.

    Raises:
        InputError: bad data, a model or an unfinished run already there, a batch that cannot be divided, or a loss that
            is not finite.
        CspDeployError: as `cspdeploy.train.loop.run_epochs`.
    """
    folder, run = models / spec.name, models / f".{spec.name}.run"
    require_free(folder, run, resume=resume, overwrite=overwrite)
    training, testing = (open_boxes(data, split=split) for split in ("train", "test"))
    if training.labels != testing.labels:
        raise InputError(f"{data}: train and val have different classes", fix="give both the same class names")
    workers.require_batch(recipe.batch, num_images=len(training))
    loader = BoxLoader(training, spec.preprocess, batch=recipe.batch, mosaic_epochs=recipe.mosaic_epochs)
    judge = BoxLoader(testing, spec.preprocess, batch=workers.each(recipe.batch))
    progress(f"reading {len(training)} + {len(testing)} images", 0, 1)
    anchors = find_anchors(loader.sizes(), _num_anchors(spec), seed=recipe.seed)
    spec = fitted(spec, num_classes=len(training.labels), anchors=anchors)
    trained = train_detector(
        spec, recipe, training=loader, testing=judge, checkpoint=run / CHECKPOINT_FILE, resume=resume,
        workers=workers, progress=progress,
    )  # fmt: skip
    with explained(workers, batch=recipe.batch, kept=True), true_float32(workers.device):
        reread = write_and_read_back(run, spec, trained.model, workers=workers)
        accuracy = _measure(reread, spec, judge, workers)
    if workers.is_first:
        provenance = Provenance(
            source="trained", origin=f"{spec.name} on {training.name}", dataset=training.name, command=command,
            accuracy=accuracy,
        )  # fmt: skip
        finish_folder(
            run, folder, dataclasses.replace(spec, provenance=provenance), trained, recipe=recipe,
            labels=training.labels, num_images=len(training), calibration=_calibration_images(training, loader),
        )  # fmt: skip
    return DetectionTrainingReport(
        folder=str(folder), accuracy=accuracy, anchors=anchors, curve=tuple(trained.curve),
        anchor_overlap=mean_best_overlap(loader.sizes(), anchors),
    )  # fmt: skip


def _num_anchors(spec: ModelSpec) -> int:
    return sum(len(head.anchors) for head in cast("Detection", spec.detection).heads)


def fitted(spec: ModelSpec, *, num_classes: int, anchors: tuple[tuple[float, float], ...]) -> ModelSpec:
    """The same network with heads for that many classes and with those anchors, smallest for the finest stride."""
    detection = with_anchors(cast("Detection", spec.detection), anchors)
    network = spec.network
    if network.family == "darknet":  # whose configuration says both as well
        config = from_json(DarknetConfig, network.config, where="$.network.config").with_size(
            spec.preprocess.height_px, spec.preprocess.width_px
        )
        network = NetworkSpec(
            family=network.family, config=to_json(_fitted_cfg(config, detection, num_classes, anchors))
        )
    return dataclasses.replace(spec, network=network, num_classes=num_classes, detection=detection)


def _fitted_cfg(
    config: DarknetConfig, detection: Detection, num_classes: int, anchors: tuple[tuple[float, float], ...]
) -> DarknetConfig:
    layers, heads = list(config.layers), iter(detection.heads)
    for index, layer in enumerate(layers):
        if not isinstance(layer, Yolo):
            continue
        own = next(heads).anchors
        mask = tuple(anchors.index(pair) for pair in own)
        layers[index] = dataclasses.replace(layer, classes=num_classes, anchors=anchors, mask=mask)
        before = layers[index - 1]
        if isinstance(before, Convolutional):
            layers[index - 1] = dataclasses.replace(before, filters=len(mask) * (5 + num_classes))
    return dataclasses.replace(config, layers=tuple(layers))


def _measure(model: torch.nn.Module, spec: ModelSpec, testing: BoxLoader, workers: Workers) -> Accuracy:
    found = measure_map(
        model, cast("Detection", spec.detection), testing, num_classes=spec.num_classes, workers=workers
    )
    return Accuracy(
        dataset=testing.data.name, num_images=found.num_images, map50=round(found.map50, 5), map=round(found.map, 5)
    )


def _calibration_images(data: LabelledBoxes, loader: BoxLoader) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Pictures spread evenly over the training set, at the size of the contract."""
    indices = np.linspace(0, len(data) - 1, min(NUM_CALIBRATION_IMAGES, len(data))).astype(np.int64)
    return np.stack([loader.boxed(index).pixels_HWC for index in indices.tolist()])
