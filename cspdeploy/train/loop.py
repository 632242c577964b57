"""The training loop, to be read from top to bottom, and what it trains networks with.

SGD with Nesterov momentum under a one-cycle learning rate, label smoothing, flips and shifts, autocast to a half type,
and an exponential moving average of the weights, which is what is evaluated and kept. On one worker or several, on CPUs
or GPUs (`cspdeploy.train.workers`).
"""

from __future__ import annotations

import copy
import itertools
import json
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from cspdeploy.core.codec import JsonObject, to_json
from cspdeploy.core.errors import InputError
from cspdeploy.core.spec import ModelSpec
from cspdeploy.nets.registry import build
from cspdeploy.nets.weights import read_checkpoint
from cspdeploy.train.data import BatchLoader
from cspdeploy.train.failures import explained
from cspdeploy.train.feed import on_device
from cspdeploy.train.gemm_conv import use_gemm_convolutions
from cspdeploy.train.precision import fast_kernels
from cspdeploy.train.trainer import BaseRecipe, Batches, EpochRecord, Trainer
from cspdeploy.train.workers import NO_WORKERS, Workers

__all__ = [
    "BaseRecipe",
    "Batches",
    "EpochRecord",
    "Recipe",
    "TrainedRun",
    "Trainer",
    "run_epochs",
    "train",
    "write_curve",
]

Progress = Callable[[str, int, int], None]
"""What is being done now, steps done, steps in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe(BaseRecipe):
    """How to train a network from its start."""

    epochs: int = 14
    batch: int = 128
    max_learning_rate: float = 0.1
    weight_decay: float = 5e-4
    """On convolution and linear weights; not on biases and norms."""
    momentum: float = 0.9
    label_smoothing: float = 0.1
    ema_decay: float = 0.998
    """Per step; an average over about the last 500 steps."""
    seed: int = 0


class _NetworkTrainer(Trainer):
    """Of a network from its start: SGD, label smoothing, a half type."""

    dtype = torch.bfloat16

    def __init__(self, spec: ModelSpec, recipe: Recipe, steps_per_epoch: int, *, workers: Workers = NO_WORKERS) -> None:
        torch.manual_seed(recipe.seed)  # drawn on the CPU: the same start on every device
        model: Any = build(spec)
        if hasattr(model, "zero_init_residual"):
            model.zero_init_residual()
        model = model.to(workers.device, memory_format=torch.channels_last)
        average = copy.deepcopy(model)
        if workers.device.type == "cpu":
            use_gemm_convolutions(model)
        decayed = [p for p in model.parameters() if p.ndim > 1]
        free = [p for p in model.parameters() if p.ndim <= 1]
        optimizer = torch.optim.SGD(
            [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": free, "weight_decay": 0.0}],
            lr=recipe.max_learning_rate, momentum=recipe.momentum, nesterov=True, foreach=True,
        )  # fmt: skip
        self._label_smoothing = recipe.label_smoothing
        super().__init__(
            model, average, optimizer, recipe=recipe, steps_per_epoch=steps_per_epoch, identity=to_json(spec),
            workers=workers,
        )  # fmt: skip

    def loss(self, x_NCHW: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        logits = self.predict(x_NCHW)
        return nn.functional.cross_entropy(logits.float(), classes, label_smoothing=self._label_smoothing)


class TrainedRun(NamedTuple):
    """What training leaves: the averaged model in evaluation mode, the curve, and where its epochs were computed."""

    model: nn.Module
    curve: list[Any]
    places: list[JsonObject]


def train(
    spec: ModelSpec,
    recipe: Recipe,
    *,
    training: BatchLoader,
    testing: BatchLoader,
    checkpoint: Path,
    resume: bool = False,
    workers: Workers = NO_WORKERS,
    progress: Progress = lambda what, done, total: None,
) -> TrainedRun:
    """Train the network of `spec`, on `workers`; on each of them the result is the same.

    Raises:
        CspDeployError: as `run_epochs`.
    """
    with explained(workers, batch=recipe.batch, kept=False):
        trainer = _NetworkTrainer(spec, recipe, training.num_batches(training=True), workers=workers)
    return run_epochs(
        trainer, training=training, testing=testing, checkpoint=checkpoint, resume=resume, progress=progress
    )  # fmt: skip


def run_epochs(
    trainer: Trainer,
    *,
    training: Batches,
    testing: Batches,
    checkpoint: Path,
    resume: bool,
    progress: Progress,
) -> TrainedRun:
    """Train to the end of the recipe.

    After each epoch the whole state goes to `checkpoint`, written beside and renamed, so an interruption loses at
    most the epoch under way. With `resume` the run goes on as if it had never stopped, batch for batch. Of several
    workers the first one writes it, and all of them read it: it has to lie where all of them can.

    Raises:
        InputError: `resume` and the checkpoint is missing or of another recipe; the loss is not finite.
        DeviceMemoryError: a step does not fit into the device's memory.
        RuntimeUnavailableError: another worker ended or hangs.
    """
    workers, recipe = trainer.workers, trainer.recipe
    if resume:
        trainer.load_state(read_checkpoint(checkpoint), checkpoint)
    trainer.begin()
    for epoch in range(len(trainer.curve), recipe.epochs):
        started = time.monotonic()
        rate = float(trainer.schedule.get_last_lr()[0])
        with explained(workers, batch=recipe.batch, kept=epoch > 0), fast_kernels(workers.device):
            losses = _train_epoch(trainer, training, epoch, progress)
            workers.copy_first(trainer.average)  # running averages of batch norm are each worker's own
            found = trainer.evaluate(testing)
        record = trainer.record(
            epoch=epoch + 1, train_loss=round(sum(losses) / len(losses), 5), learning_rate=round(rate, 6),
            seconds=round(time.monotonic() - started, 1), **{name: round(value, 5) for name, value in found.items()},
        )  # fmt: skip
        trainer.curve.append(record)
        if workers.is_first:
            _write_checkpoint(checkpoint, trainer.state())
        progress(f"epoch {epoch + 1}/{recipe.epochs} done, {_headline(found)}", 1, 1)
    return TrainedRun(trainer.average.eval(), trainer.curve, trainer.places)


def _train_epoch(trainer: Trainer, training: Batches, epoch: int, progress: Progress) -> list[float]:
    """The steps of one epoch; the loss of each."""
    recipe, device, share = trainer.recipe, trainer.workers.device, trainer.workers.share
    # What a network itself draws at random is drawn anew from (seed, epoch), so that a checkpoint need not hold it.
    torch.manual_seed(int(np.random.SeedSequence((recipe.seed, epoch, share.rank)).generate_state(1)[0]))
    batches = itertools.islice(training.epoch(seed=(recipe.seed, epoch), share=share), trainer.steps_per_epoch)
    losses = _Losses(epoch, lag=1 if device.type == "cuda" else 0)
    for i, batch in enumerate(on_device(batches, device, targets=trainer.targets_on_device)):
        losses.add(trainer.step(*batch))
        progress(f"epoch {epoch + 1}/{recipe.epochs}{losses.last}", i + 1, trainer.steps_per_epoch)
    return losses.finish()


class _Losses:
    """Of the steps of an epoch, each checked.

    Args:
        lag: so many of them are not read yet. To read one waits for its step: on a GPU the next one is under way by
            then, and there is no gap between the two.
    """

    def __init__(self, epoch: int, *, lag: int) -> None:
        self._epoch, self._lag = epoch, lag
        self._waiting: deque[torch.Tensor] = deque()
        self._values: list[float] = []

    @property
    def last(self) -> str:
        """The newest that is known, as progress tells it."""
        return f", loss {self._values[-1]:.3f}" if self._values else ""

    def add(self, loss: torch.Tensor) -> None:
        self._waiting.append(loss)
        if len(self._waiting) > self._lag:
            self._read()

    def finish(self) -> list[float]:
        """All of them."""
        while self._waiting:
            self._read()
        return self._values

    def _read(self) -> None:
        self._values.append(float(self._waiting.popleft().item()))
        if not self._values[-1] < float("inf"):
            raise InputError(
                f"loss is {self._values[-1]} in epoch {self._epoch + 1}, step {len(self._values)}",
                fix="train with a lower --learning-rate",
            )


def _headline(found: dict[str, float]) -> str:
    """The first figure: "test top-1 91.20 %"."""
    name, value = next(iter(found.items()))
    named = {"test_top1": "test top-1", "test_map50": "test mAP@0.5"}
    return f"{named.get(name, name.replace('_', ' '))} {100 * value:.2f} %"


def _write_checkpoint(path: Path, state: JsonObject) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    torch.save(state, beside)
    beside.replace(path)


def write_curve(
    path: Path,
    recipe: BaseRecipe,
    curve: Sequence[Any],
    *,
    num_images: int,
    places: Sequence[JsonObject] = (),
) -> None:
    """train.json: the recipe, the number of training images, where it was trained, and one record an epoch.

    Args:
        places: `Trainer.places`: device, workers, data type, from which epoch on.
    """
    data: JsonObject = {"recipe": to_json(recipe), "num_images": num_images}
    if places:
        data["places"] = list(places)
    data["epochs"] = [to_json(record) for record in curve]
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
