"""What a training run holds between its steps: model, average, optimizer, schedule, curve; and its checkpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from cspdeploy.core.codec import JsonObject, from_json, to_json
from cspdeploy.core.errors import InputError
from cspdeploy.train.metrics import measure_accuracy
from cspdeploy.train.precision import autocast, choose_dtype, make_scaler
from cspdeploy.train.share import Share
from cspdeploy.train.workers import NO_WORKERS, Workers

__all__ = ["BaseRecipe", "Batches", "EpochRecord", "Trainer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseRecipe:
    """What every run has. Learning rates are for the batch given; nothing is rescaled behind the caller's back.

    The batch is that of a step over all workers, so that a recipe is the same on any number of them.
    """

    epochs: int
    batch: int
    max_learning_rate: float
    ema_decay: float
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochRecord:
    """One line of the curve. Accuracies are of the averaged weights on the test split, in [0, 1]."""

    epoch: int
    train_loss: float
    test_top1: float
    test_top5: float
    learning_rate: float
    seconds: float


class Batches(Protocol):
    """A labelled set, batch by batch: images `[N, 3, H, W]` float32 and what is to be learnt of them."""

    def num_batches(self, *, training: bool) -> int:
        """Of an epoch."""

    def epoch(self, *, seed: tuple[int, int], share: Share = ...) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Shuffled and augmented, the same for the same seed (seed, epoch); of each batch the part of `share`."""

    def in_order(self, *, share: Share = ...) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Every image once, as it is; of several workers each takes whole batches, by turns."""


class Trainer(ABC):
    """Model, its average, optimizer and schedule: all that a checkpoint must hold. `loss` is the subclass's own.

    As it stands it trains classifiers; another task has its own `record` and `evaluate`.

    Args:
        average: a second module of the same parameters, which is what is evaluated and kept.
        identity: what is trained, and on what, beside the recipe: JSON that a run must share with the one it resumes.
            Device and number of workers are not of it: a run goes on wherever there is room.
        workers: that train together; model and average lie on their device.
    """

    dtype = torch.float32
    """That it computes in: bfloat16 runs under autocast, and is float16 on GPUs that have no bfloat16."""
    targets_on_device = True
    """Whether what is to be learnt of a batch goes to the device with the images."""
    record: type[Any] = EpochRecord
    """Of the curve's lines: epoch, train_loss, learning_rate, seconds, and what `evaluate` gives."""
    warm_up = 0.25
    """Share of the steps in which the learning rate rises."""

    def __init__(
        self,
        model: nn.Module,
        average: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        recipe: BaseRecipe,
        steps_per_epoch: int,
        identity: JsonObject,
        workers: Workers = NO_WORKERS,
    ) -> None:
        self.model, self.average, self.optimizer = model, average.requires_grad_(False), optimizer
        self.workers, self.dtype = workers, choose_dtype(self.dtype, workers.device)
        self._parallel = workers.parallel(model, batch=recipe.batch)
        self._scaler = make_scaler(self.dtype)
        self.recipe, self.steps_per_epoch, self.identity = recipe, steps_per_epoch, identity
        # At least 5 steps: the first phase of 4 would have length zero, by which OneCycleLR divides.
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, recipe.max_learning_rate, total_steps=max(5, recipe.epochs * steps_per_epoch),
            pct_start=self.warm_up, cycle_momentum=False,
        )  # fmt: skip
        self.curve: list[Any] = []
        self.num_steps = 0
        self.places: list[JsonObject] = []
        """Where the epochs were computed, one for each time that the run was begun or resumed."""

    @abstractmethod
    def loss(self, x_NCHW: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """Of one batch, a scalar."""

    def evaluate(self, testing: Batches) -> dict[str, float]:
        """Of the averaged model: the fields of `record` that are the task's own, in [0, 1]."""
        batches = testing.in_order(share=self.workers.share)
        top1, top5 = measure_accuracy(self.average, batches, dtype=self.dtype, workers=self.workers)
        return {"test_top1": top1, "test_top5": top5}

    def before_step(self) -> None:  # noqa: B027  # likewise
        """The gradients are there: the place to bound them."""

    def after_step(self) -> None:  # noqa: B027  # most have nothing to do
        """What must hold of the parameters is made to hold again."""

    def predict(self, x_NCHW: torch.Tensor) -> Any:
        """What the network in training gives, under autocast; gradients are averaged over the workers."""
        with autocast(self.workers.device, self.dtype):
            return self._parallel(x_NCHW)

    def step(self, x_NCHW: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """One step on one batch `[N, 3, H, W]`, or this worker's part of it.

        Returns:
            The loss of the whole batch, a scalar on the device, which may not have computed it yet.
        """
        self.model.train()
        loss = self.loss(x_NCHW, classes)
        self.optimizer.zero_grad()
        self._scaler.scale(loss).backward()
        self._scaler.unscale_(self.optimizer)
        self.before_step()
        scale = self._scaler.get_scale()
        self._scaler.step(self.optimizer)
        self._scaler.update()
        if self._scaler.get_scale() >= scale:  # it falls where gradients were infinite: that step was left out
            self.schedule.step()
            self.after_step()
            self._update_average()
        return self.workers.mean(loss.detach())

    def begin(self) -> None:
        """Note where the epochs from here on are computed."""
        batch = self.recipe.batch
        place = {
            "from_epoch": len(self.curve) + 1, **self.workers.describe(), "dtype": str(self.dtype).rpartition(".")[2],
            "tf32": self.workers.device.type == "cuda",
            "synchronised_batch_norm": self.workers.synchronises_statistics(batch),
        }  # fmt: skip
        self.places = [known for known in self.places if known["from_epoch"] < place["from_epoch"]]
        if not self.places or {**self.places[-1], "from_epoch": 0} != {**place, "from_epoch": 0}:
            self.places.append(place)

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
            "places": self.places,
            "scaler": self._scaler.state_dict(),
        }

    def load_state(self, state: JsonObject, source: Path) -> None:
        """Go on from there.

        Raises:
            InputError: not a checkpoint, or one of another recipe, network or data set.
        """
        if missing := sorted(self.state().keys() - state.keys() - {"places", "scaler"}):  # which older ones lack
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
        if state.get("scaler") and self._scaler.is_enabled():  # empty where the type needed none
            self._scaler.load_state_dict(state["scaler"])
        self.places = list(state.get("places", []))
        self.num_steps = state["num_steps"]
        self.curve = [from_json(self.record, record) for record in state["curve"]]
