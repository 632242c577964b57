"""The training loop, to be read from top to bottom, and what it trains networks with.

SGD with Nesterov momentum under a one-cycle learning rate, label smoothing, flips and shifts, bfloat16 autocast on the
CPU, and an exponential moving average of the weights, which is what is evaluated and kept.
"""

from __future__ import annotations

import copy
import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cspdeploy.core.codec import JsonObject, to_json
from cspdeploy.core.errors import InputError
from cspdeploy.core.spec import ModelSpec
from cspdeploy.nets.registry import build
from cspdeploy.nets.weights import read_checkpoint
from cspdeploy.train.data import BatchLoader
from cspdeploy.train.gemm_conv import use_gemm_convolutions
from cspdeploy.train.trainer import BaseRecipe, Batches, EpochRecord, Trainer

__all__ = [
    "BaseRecipe",
    "Batches",
    "EpochRecord",
    "Recipe",
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
    """Of a network from its start: SGD, label smoothing, bfloat16."""

    dtype = torch.bfloat16

    def __init__(self, spec: ModelSpec, recipe: Recipe, steps_per_epoch: int) -> None:
        torch.manual_seed(recipe.seed)
        model = build(spec).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if hasattr(model, "zero_init_residual"):
            model.zero_init_residual()
        average = copy.deepcopy(model)
        use_gemm_convolutions(model)
        decayed = [p for p in model.parameters() if p.ndim > 1]
        free = [p for p in model.parameters() if p.ndim <= 1]
        optimizer = torch.optim.SGD(
            [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": free, "weight_decay": 0.0}],
            lr=recipe.max_learning_rate, momentum=recipe.momentum, nesterov=True, foreach=True,
        )  # fmt: skip
        self._label_smoothing = recipe.label_smoothing
        super().__init__(
            model, average, optimizer, recipe=recipe, steps_per_epoch=steps_per_epoch, identity=to_json(spec)
        )

    def loss(self, x_NCHW: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(x_NCHW)
        return nn.functional.cross_entropy(logits.float(), classes, label_smoothing=self._label_smoothing)


def train(
    spec: ModelSpec,
    recipe: Recipe,
    *,
    training: BatchLoader,
    testing: BatchLoader,
    checkpoint: Path,
    resume: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> tuple[nn.Module, list[EpochRecord]]:
    """Train the network of `spec`; returns the averaged model in evaluation mode and the curve.

    Raises:
        InputError: as `run_epochs`.
    """
    trainer = _NetworkTrainer(spec, recipe, training.num_batches(training=True))
    run_epochs(trainer, training=training, testing=testing, checkpoint=checkpoint, resume=resume, progress=progress)
    return trainer.average.eval(), trainer.curve


def run_epochs(
    trainer: Trainer,
    *,
    training: Batches,
    testing: Batches,
    checkpoint: Path,
    resume: bool,
    progress: Progress,
) -> None:
    """Train to the end of the recipe.

    After each epoch the whole state goes to `checkpoint`, written beside and renamed, so an interruption loses at
    most the epoch under way. With `resume` the run goes on as if it had never stopped, batch for batch.

    Raises:
        InputError: `resume` and the checkpoint is missing or of another recipe; the loss is not finite.
    """
    recipe = trainer.recipe
    if resume:
        trainer.load_state(read_checkpoint(checkpoint), checkpoint)
    for epoch in range(len(trainer.curve), recipe.epochs):
        started = time.monotonic()
        losses: list[float] = []
        rate = float(trainer.schedule.get_last_lr()[0])
        batches = itertools.islice(training.epoch(seed=(recipe.seed, epoch)), trainer.steps_per_epoch)
        for i, (x_NCHW, classes) in enumerate(batches):
            losses.append(trainer.step(x_NCHW, classes))
            if not losses[-1] < float("inf"):
                raise InputError(
                    f"loss is {losses[-1]} in epoch {epoch + 1}, step {i + 1}", fix="train with a lower --learning-rate"
                )
            progress(f"epoch {epoch + 1}/{recipe.epochs}, loss {losses[-1]:.3f}", i + 1, trainer.steps_per_epoch)
        found = trainer.evaluate(testing)
        record = trainer.record(
            epoch=epoch + 1, train_loss=round(sum(losses) / len(losses), 5), learning_rate=round(rate, 6),
            seconds=round(time.monotonic() - started, 1), **{name: round(value, 5) for name, value in found.items()},
        )  # fmt: skip
        trainer.curve.append(record)
        _write_checkpoint(checkpoint, trainer.state())
        progress(f"epoch {epoch + 1}/{recipe.epochs} done, {_headline(found)}", 1, 1)


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


def write_curve(path: Path, recipe: BaseRecipe, curve: Sequence[Any], *, num_images: int) -> None:
    """train.json: the recipe, the number of training images, and one record an epoch."""
    data = {"recipe": to_json(recipe), "num_images": num_images, "epochs": [to_json(record) for record in curve]}
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
