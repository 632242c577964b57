"""How a detector is trained: any network that has a `Detection`, from fresh weights.

AdamW under a learning rate that warms up and falls as a cosine, autocast to a half type, an exponential moving average
of the weights, which is what is evaluated and kept, and mean average precision after each epoch. On one worker or
several, on CPUs or GPUs (`cspdeploy.train.workers`).
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from cspdeploy.core.codec import JsonObject, to_json
from cspdeploy.core.detection.average_precision import (
    MAP_SUPPRESSION,
    MeanAveragePrecision,
    TrueBoxes,
    average_precision,
)
from cspdeploy.core.detection.boxes import Boxes, suppress, to_picture
from cspdeploy.core.detection.labelled import LabelledBoxes
from cspdeploy.core.detection.spec import Detection
from cspdeploy.core.spec import ModelSpec
from cspdeploy.nets.detection import DecodedDetector
from cspdeploy.nets.registry import build
from cspdeploy.train.detect_data import BoxLoader
from cspdeploy.train.detect_loss import DetectionLoss
from cspdeploy.train.failures import explained
from cspdeploy.train.feed import on_device
from cspdeploy.train.gemm_conv import use_gemm_convolutions
from cspdeploy.train.loop import BaseRecipe, Batches, Progress, TrainedRun, Trainer, run_epochs
from cspdeploy.train.precision import autocast, device_of
from cspdeploy.train.workers import NO_WORKERS, Workers

__all__ = ["DetectionRecipe", "DetectionRecord", "measure_map", "train_detector"]

OBJECT_PRIOR = 0.01
"""Objectness of a fresh network. At one half, what it starts with otherwise, the hundreds of empty places of a picture
drown the few that are not for the first epochs. Source: focal loss, arXiv 1708.02002, section 3.3."""
MAX_GRAD_NORM = 10.0  # a fresh detector's first steps; gradients of a settled one are below 5
MOSAIC_UNTIL = 0.8  # of the epochs


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectionRecipe(BaseRecipe):
    """How to train a detector from its start."""

    epochs: int = 60
    batch: int = 16
    max_learning_rate: float = 2e-3
    weight_decay: float = 0.02
    """On convolution weights; not on biases and norms."""
    ema_decay: float = 0.998
    """Per step; an average over about the last 500 steps."""
    seed: int = 0

    @property
    def mosaic_epochs(self) -> int:
        """The first epochs, in which half of the pictures are mosaics."""
        return round(self.epochs * MOSAIC_UNTIL)


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectionRecord:
    """One line of the curve. Precisions are of the averaged weights on the validation split, in [0, 1]."""

    epoch: int
    train_loss: float
    test_map50: float
    test_map: float
    learning_rate: float
    seconds: float


class _DetectorTrainer(Trainer):
    """Of a detector from its start: AdamW, a half type."""

    dtype = torch.bfloat16
    targets_on_device = False  # the loss decides on the CPU which place finds which box
    record = DetectionRecord
    warm_up = 0.1

    def __init__(
        self,
        spec: ModelSpec,
        recipe: DetectionRecipe,
        steps_per_epoch: int,
        *,
        data: JsonObject | None = None,
        workers: Workers = NO_WORKERS,
    ) -> None:
        torch.manual_seed(recipe.seed)  # drawn on the CPU: the same start on every device
        self.detection = cast("Detection", spec.detection)
        model = build(spec)
        _start_empty(model, self.detection, spec.num_classes)
        model = model.to(workers.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        average = copy.deepcopy(model)
        if workers.device.type == "cpu":
            use_gemm_convolutions(model)
        decayed = [p for p in model.parameters() if p.ndim > 1]
        free = [p for p in model.parameters() if p.ndim <= 1]
        optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": free, "weight_decay": 0.0}],
            lr=recipe.max_learning_rate, foreach=True,
        )  # fmt: skip
        logits = _leave_out_sigmoids(model, self.detection)
        self._loss = DetectionLoss(self.detection, logits=logits, workers=workers)
        self._num_classes = spec.num_classes
        super().__init__(
            model, average, optimizer, recipe=recipe, steps_per_epoch=steps_per_epoch,
            identity={"spec": to_json(spec), "data": data}, workers=workers,
        )  # fmt: skip

    def loss(self, x_NCHW: Tensor, classes: Tensor) -> Tensor:
        return self._loss(self.predict(x_NCHW), classes).total

    def before_step(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM, foreach=True)

    def evaluate(self, testing: Batches) -> dict[str, float]:
        found = measure_map(
            self.average, self.detection, cast("BoxLoader", testing), num_classes=self._num_classes, dtype=self.dtype,
            workers=self.workers,
        )  # fmt: skip
        return {"test_map50": found.map50, "test_map": found.map}


def _leave_out_sigmoids(model: nn.Module, detection: Detection) -> bool:
    """Let heads that end in a sigmoid (new_coords) give what they have before it; whether they do now.

    Only where each sigmoid of the network is that of a head: a gate in the midst of it stays.
    """
    found = [
        (module, name) for module in model.modules() for name, child in module.named_children()
        if isinstance(child, nn.Sigmoid)
    ]  # fmt: skip
    if not all(head.new_coords for head in detection.heads) or len(found) != len(detection.heads):
        return False
    for module, name in found:
        setattr(module, name, nn.Identity())
    return True


def describe_data(training: LabelledBoxes, testing: LabelledBoxes) -> JsonObject:
    """What two runs on the same data share: the names of the classes, and what is labelled in which picture."""
    return {
        "labels": list(training.labels), "training_sha256": _labels_sha256(training),
        "testing_sha256": _labels_sha256(testing),
    }  # fmt: skip


def _labels_sha256(data: LabelledBoxes) -> str:
    """Of each picture's path, relative to what all of them share, its boxes, classes, and which of them count."""
    root = os.path.commonpath([path.parent for path in data.paths])
    digest = hashlib.sha256()
    for path, truth in zip(data.paths, data.stored, strict=True):
        rows = [path.relative_to(root).as_posix(), truth.boxes_M4.tolist(), truth.classes_M.tolist(),
                truth.uncounted.tolist()]  # fmt: skip
        digest.update(json.dumps(rows).encode() + b"\n")
    return digest.hexdigest()


def _start_empty(model: nn.Module, detection: Detection, num_classes: int) -> None:
    """Let the objectness of a fresh network be `OBJECT_PRIOR` where its heads are convolutions with a bias."""
    wanted = [len(head.anchors) * (5 + num_classes) for head in detection.heads]
    biased = [conv for conv in model.modules() if isinstance(conv, nn.Conv2d) and conv.bias is not None]
    heads = [conv for conv in biased if conv.out_channels in wanted]
    with torch.no_grad():
        for conv in heads:
            objectness = cast("Tensor", conv.bias).view(-1, 5 + num_classes)[:, 4]
            objectness.fill_(math.log(OBJECT_PRIOR / (1 - OBJECT_PRIOR)))


class _Heads(nn.Module):
    """The raw maps of a network as float32, whatever it computes in: above 256, bfloat16 skips every other pixel."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.dtype = network, dtype

    def forward(self, x_NCHW: Tensor) -> tuple[Tensor, ...]:
        with autocast(x_NCHW.device, self.dtype):
            raw = self.network(x_NCHW)
        return tuple(head_NCHW.float() for head_NCHW in raw)


@torch.inference_mode()
def measure_map(
    network: nn.Module, detection: Detection, testing: BoxLoader, *, num_classes: int,
    dtype: torch.dtype = torch.float32, workers: Workers = NO_WORKERS,
) -> MeanAveragePrecision:  # fmt: skip
    """Mean average precision of a network of raw heads on a labelled set, in evaluation mode, on its device.

    In the pixels of the pictures, boxes cut at their edges: as `verify --accuracy` has it of the exported files.

    Args:
        dtype: float32, or a half type to run under autocast.
        workers: that measure together: each finds the boxes of its batches, the first one counts them all, and the
            figure is that of one worker.
    """
    device = device_of(network)
    decoded = DecodedDetector(_Heads(network, dtype), detection).eval().to(device)
    indices = iter(testing.indices_in_order(share=workers.share))
    own: list[tuple[int, TrueBoxes, Boxes]] = []
    for x_NCHW, _ in on_device(testing.in_order(share=workers.share), device, targets=False):
        boxes_NA4, scores_NAC = (tensor.cpu().numpy() for tensor in decoded(x_NCHW))
        for boxes_A4, scores_AC in zip(boxes_NA4, scores_NAC, strict=True):
            index = next(indices)
            truth, width, height = testing.in_picture(index)
            left = suppress(boxes_A4, scores_AC, MAP_SUPPRESSION)
            own.append((index, truth, to_picture(left, testing.contract, width=width, height=height)))
    found = sorted(workers.gather(own), key=lambda row: row[0])
    judged: MeanAveragePrecision = workers.from_first(
        average_precision([truth for _, truth, _ in found], [boxes for _, _, boxes in found], num_classes)
        if workers.is_first else None
    )  # fmt: skip
    return judged


def train_detector(
    spec: ModelSpec,
    recipe: DetectionRecipe,
    *,
    training: BoxLoader,
    testing: BoxLoader,
    checkpoint: Path,
    resume: bool = False,
    workers: Workers = NO_WORKERS,
    progress: Progress = lambda what, done, total: None,
) -> TrainedRun:
    """Train the detector of `spec`, whose heads have their anchors; on each worker the result is the same.

    Raises:
        CspDeployError: as `cspdeploy.train.loop.run_epochs`.
    """
    with explained(workers, batch=recipe.batch, kept=False):
        trainer = _DetectorTrainer(
            spec, recipe, training.num_batches(training=True), data=describe_data(training.data, testing.data),
            workers=workers,
        )  # fmt: skip
    return run_epochs(
        trainer, training=training, testing=testing, checkpoint=checkpoint, resume=resume, progress=progress
    )  # fmt: skip
