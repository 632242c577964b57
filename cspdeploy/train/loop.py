"""The training loop, to be read from top to bottom, and what it trains networks with.

SGD with Nesterov momentum under a one-cycle learning rate, label smoothing, flips and shifts, bfloat16 autocast on the
CPU, and an exponential moving average of the weights, which is what is evaluated and kept.
"""

from __future__ import annotations

import copy
import itertools
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from cspdeploy.core.codec import JsonObject, from_json, to_json
from cspdeploy.core.errors import InputError
from cspdeploy.core.spec import ModelSpec
from cspdeploy.nets.registry import build
from cspdeploy.nets.weights import read_checkpoint
from cspdeploy.train.data import BatchLoader
from cspdeploy.train.gemm_conv import use_gemm_convolutions
from cspdeploy.train.metrics import measure_accuracy

__all__ = ["BaseRecipe", "EpochRecord", "Recipe", "Trainer", "run_epochs", "train", "write_curve"]

Progress = Callable[[str, int, int], None]
"""What is being done now, steps done, steps in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseRecipe:
    """What every run has. Learning rates are for the batch given; nothing is rescaled behind the caller's back."""

    epochs: int
    batch: int
    max_learning_rate: float
    ema_decay: float
    seed: int


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


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochRecord:
    """One line of the curve. Accuracies are of the averaged weights on the test split, in [0, 1]."""

    epoch: int
    train_loss: float
    test_top1: float
    test_top5: float
    learning_rate: float
    seconds: float


class Trainer(ABC):
    """Model, its average, optimizer and schedule: all that a checkpoint must hold. `loss` is the subclass's own.

    Args:
        average: a second module of the same parameters, which is what is evaluated and kept.
        identity: what is trained, and on what, beside the recipe: JSON that a run must share with the one it resumes.
    """

    dtype = torch.float32
    """Of the averaged model's evaluation: bfloat16 runs it under autocast."""

    def __init__(
        self,
        model: nn.Module,
        average: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        recipe: BaseRecipe,
        steps_per_epoch: int,
        identity: JsonObject,
    ) -> None:
        self.model, self.average, self.optimizer = model, average.requires_grad_(False), optimizer
        self.recipe, self.steps_per_epoch, self.identity = recipe, steps_per_epoch, identity
        # At least 5 steps: the first phase of 4 would have length zero, by which OneCycleLR divides.
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, recipe.max_learning_rate, total_steps=max(5, recipe.epochs * steps_per_epoch),
            pct_start=0.25, cycle_momentum=False,
        )  # fmt: skip
        self.curve: list[EpochRecord] = []
        self.num_steps = 0

    @abstractmethod
    def loss(self, x_NCHW: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """Of one batch, a scalar."""

    def after_step(self) -> None:  # noqa: B027  # most have nothing to do
        """What must hold of the parameters is made to hold again."""

    def step(self, x_NCHW: torch.Tensor, classes: torch.Tensor) -> float:
        """One step on one batch `[N, 3, H, W]`; its loss."""
        self.model.train()
        loss = self.loss(x_NCHW, classes)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.after_step()
        self._update_average()
        return loss.item()

    def _update_average(self) -> None:
        self.num_steps += 1
        # Short at first, so that the random start does not linger.
        decay = min(self.recipe.ema_decay, self.num_steps / (self.num_steps + 10))
        pairs = zip(self.average.state_dict().values(), self.model.state_dict().values(), strict=True)
        floats = [(kept, new) for kept, new in pairs if kept.is_floating_point()]
        torch._foreach_lerp_([kept for kept, _ in floats], [new for _, new in floats], 1 - decay)

    def state(self) -> JsonObject:
        """All that a run which goes on needs."""
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "num_steps": self.num_steps,
            "curve": [to_json(record) for record in self.curve],
            "recipe": asdict(self.recipe),
            "identity": self.identity,
            "steps_per_epoch": self.steps_per_epoch,
        }

    def load_state(self, state: JsonObject, source: Path) -> None:
        """Go on from there.

        Raises:
            InputError: not a checkpoint, or one of another recipe, network or data set.
        """
        if missing := sorted(self.state().keys() - state.keys()):
            raise InputError(f"{source}: not a checkpoint of a training run (no {', '.join(missing)})")
        if state["recipe"] != asdict(self.recipe):
            changed = sorted(k for k, v in asdict(self.recipe).items() if state["recipe"].get(k) != v)
            raise InputError(
                f"{source}: was trained with another recipe ({', '.join(changed)} differ)",
                fix="resume with the options of the first run, or delete the checkpoint",
            )
        if state["identity"] != self.identity or state["steps_per_epoch"] != self.steps_per_epoch:
            raise InputError(
                f"{source}: was trained on other data or another network",
                fix="resume with the options of the first run, or delete the checkpoint",
            )
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.num_steps = state["num_steps"]
        self.curve = [from_json(EpochRecord, record) for record in state["curve"]]


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
    training: BatchLoader,
    testing: BatchLoader,
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
        top1, top5 = measure_accuracy(trainer.average, testing.in_order(), dtype=trainer.dtype)
        record = EpochRecord(
            epoch=epoch + 1, train_loss=round(sum(losses) / len(losses), 5), test_top1=round(top1, 5),
            test_top5=round(top5, 5), learning_rate=round(rate, 6), seconds=round(time.monotonic() - started, 1),
        )  # fmt: skip
        trainer.curve.append(record)
        _write_checkpoint(checkpoint, trainer.state())
        progress(f"epoch {epoch + 1}/{recipe.epochs} done, test top-1 {100 * top1:.2f} %", 1, 1)


def _write_checkpoint(path: Path, state: JsonObject) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    torch.save(state, beside)
    beside.replace(path)


def write_curve(path: Path, recipe: BaseRecipe, curve: list[EpochRecord], *, num_images: int) -> None:
    """train.json: the recipe, the number of training images, and one record an epoch."""
    data = {"recipe": to_json(recipe), "num_images": num_images, "epochs": [to_json(record) for record in curve]}
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
