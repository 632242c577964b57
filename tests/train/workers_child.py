"""One worker of those that tests/train/test_workers.py starts.

Arguments: the folder of its data and its answer; "exact" or "curve", which is what it computes. Where torchrun has not
started it, it starts the workers as copies of itself, so that PyTorch is imported once for all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed, nn

from cspdeploy.core.codec import from_json
from cspdeploy.core.datasets import LabelledImages
from cspdeploy.core.errors import CspDeployError
from cspdeploy.core.json_file import read_json
from cspdeploy.core.spec import ModelSpec
from cspdeploy.train.data import BatchLoader
from cspdeploy.train.detect_data import BoxLoader
from cspdeploy.train.detect_folder import open_boxes
from cspdeploy.train.detect_loop import DetectionRecipe, _DetectorTrainer, measure_map
from cspdeploy.train.loop import Recipe, _NetworkTrainer, run_epochs, train
from cspdeploy.train.metrics import measure_accuracy
from cspdeploy.train.share import Share
from cspdeploy.train.trainer import Trainer
from cspdeploy.train.workers import NO_WORKERS, Workers, open_workers

RECIPE = Recipe(epochs=2, batch=8, max_learning_rate=0.1, seed=3)
BOXES = DetectionRecipe(epochs=1, batch=4, max_learning_rate=1e-2, seed=3)
NUM_STEPS = 4
NUM_FORKED = 2
CURVE_BATCH = 32  # 16 images a worker: with fewer, batch norm's own statistics are another network


class ExactClassifier(_NetworkTrainer):
    """In float32."""

    dtype = torch.float32


class ExactDetector(_DetectorTrainer):
    """In float32."""

    dtype = torch.float32


def freeze_statistics(trainer: Trainer) -> None:
    """Batch norm by its running averages: then a batch may be divided, and nothing but the order of sums changes."""
    for norm in trainer.model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eval()
            norm.train = lambda mode=True, norm=norm: norm  # type: ignore[method-assign,misc]


def stripes(folder: Path, split: str) -> LabelledImages:
    held = np.load(folder / "stripes.npz")
    return LabelledImages(
        name="stripes", labels=("flat", "upright"), classes=held[f"{split}_classes"], stored=held[f"{split}_images"]
    )


def steps(trainer: Trainer, loader: BatchLoader | BoxLoader, share: Share) -> list[float]:
    """The losses of the first steps."""
    batches = [batch for epoch in range(4) for batch in loader.epoch(seed=(3, epoch), share=share)]
    return [float(trainer.step(*batch)) for batch in batches[:NUM_STEPS]]


def compute(folder: Path, workers: Workers) -> dict[str, Any]:
    """All that must not depend on the number of workers: losses of steps, weights after them, figures."""
    spec = from_json(ModelSpec, read_json(folder / "classifier.json"))
    training = BatchLoader(stripes(folder, "train"), spec.preprocess, batch=RECIPE.batch)
    testing = BatchLoader(stripes(folder, "test"), spec.preprocess, batch=5)
    classifier = ExactClassifier(spec, RECIPE, 8, workers=workers)
    freeze_statistics(classifier)
    losses = steps(classifier, training, workers.share)
    accuracy = measure_accuracy(classifier.average, testing.in_order(share=workers.share), workers=workers)

    box_spec = from_json(ModelSpec, read_json(folder / "detector.json"))
    boxes = BoxLoader(open_boxes(folder / "boxes", split="train"), box_spec.preprocess, batch=4, mosaic_epochs=9)
    judge = BoxLoader(open_boxes(folder / "boxes", split="test"), box_spec.preprocess, batch=2)
    detector = ExactDetector(box_spec, BOXES, 4, workers=workers)
    freeze_statistics(detector)
    box_losses = steps(detector, boxes, workers.share)
    options: dict[str, Any] = {"num_classes": 3}
    found = [
        measure_map(detector.average, detector.detection, judge, workers=each, **options)
        for each in (workers, NO_WORKERS)
    ]
    alone = measure_accuracy(classifier.average, testing.in_order())
    return {
        "losses": losses, "weights": classifier.model.state_dict(), "accuracy": [list(accuracy), list(alone)],
        "box_losses": box_losses, "box_weights": detector.model.state_dict(),
        "boxes": [[one.map50, one.map, one.num_images, one.num_boxes] for one in found],
    }  # fmt: skip


def compute_wrong(folder: Path, workers: Workers) -> dict[str, list[float]]:
    """The same losses where every worker takes the slice of the first one."""
    spec = from_json(ModelSpec, read_json(folder / "classifier.json"))
    classifier = ExactClassifier(spec, RECIPE, 8, workers=workers)
    box_spec = from_json(ModelSpec, read_json(folder / "detector.json"))
    detector = ExactDetector(box_spec, BOXES, 4, workers=workers)
    for trainer in (classifier, detector):
        freeze_statistics(trainer)
    first = Share(0, workers.num)
    training = BatchLoader(stripes(folder, "train"), spec.preprocess, batch=RECIPE.batch)
    boxes = BoxLoader(open_boxes(folder / "boxes", split="train"), box_spec.preprocess, batch=4, mosaic_epochs=9)
    return {"losses": steps(classifier, training, first), "box_losses": steps(detector, boxes, first)}


def whole_run(folder: Path, workers: Workers, *, checkpoint: Path, seed: int, resume: bool = False) -> list[float]:
    """As users train, batch norm and bfloat16 included; the loss of each epoch."""
    spec = from_json(ModelSpec, read_json(folder / "classifier.json"))
    loaders = {
        "training": BatchLoader(stripes(folder, "train"), spec.preprocess, batch=CURVE_BATCH),
        "testing": BatchLoader(stripes(folder, "test"), spec.preprocess, batch=CURVE_BATCH),
    }
    recipe = dataclasses.replace(RECIPE, epochs=6, batch=CURVE_BATCH, seed=seed)
    run = train(spec, recipe, **loaders, checkpoint=checkpoint, workers=workers, resume=resume)
    return [record.train_loss for record in run.curve]


class Interrupted(Exception):  # noqa: N818
    """After the first epoch."""


def exact_run(folder: Path, workers: Workers, *, checkpoint: Path, resume: bool, stop: bool) -> dict[str, Any]:
    """Two epochs of the exact classifier, or the first one, or the second one after it."""
    spec = from_json(ModelSpec, read_json(folder / "classifier.json"))
    training = BatchLoader(stripes(folder, "train"), spec.preprocess, batch=RECIPE.batch)
    testing = BatchLoader(stripes(folder, "test"), spec.preprocess, batch=8)
    trainer = ExactClassifier(spec, RECIPE, training.num_batches(training=True), workers=workers)
    freeze_statistics(trainer)

    def interrupt(what: str, done: int, total: int) -> None:
        if stop and what.startswith("epoch 2/"):
            raise Interrupted

    with contextlib.suppress(Interrupted):
        run_epochs(
            trainer, training=training, testing=testing, checkpoint=checkpoint, resume=resume, progress=interrupt
        )
    return {
        "losses": [record.train_loss for record in trainer.curve], "weights": trainer.average.state_dict(),
        "places": trainer.places,
    }  # fmt: skip


def die(folder: Path, workers: Workers) -> None:
    """The last worker kills itself in the midst of the first epoch."""
    spec = from_json(ModelSpec, read_json(folder / "classifier.json"))
    loader = BatchLoader(stripes(folder, "train"), spec.preprocess, batch=RECIPE.batch)

    def kill(what: str, done: int, total: int) -> None:
        if done == 2 and not workers.is_first:
            os.kill(os.getpid(), signal.SIGKILL)

    train(spec, RECIPE, training=loader, testing=loader, checkpoint=folder / "died.pt", workers=workers, progress=kill)


def main() -> int:
    """As one worker of torchrun; without it, all of `NUM_FORKED`."""
    if "RANK" in os.environ:
        return work()
    importlib.import_module("torch._dynamo")  # which DistributedDataParallel needs, and takes as long as PyTorch itself
    store = distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    given = {"WORLD_SIZE": NUM_FORKED, "MASTER_ADDR": "localhost", "MASTER_PORT": store.port,
             "TORCHELASTIC_USE_AGENT_STORE": True}  # fmt: skip
    os.environ |= {name: str(value) for name, value in given.items()}
    forked = []
    for rank in range(NUM_FORKED):
        if not (pid := os.fork()):
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            os._exit(work())  # a copy of the store has no thread that could be ended
        forked.append(pid)
    return max(abs(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])) for pid in forked)


def work() -> int:
    """What was asked for; after the curve a worker dies."""
    torch.set_num_threads(1)
    folder, what = Path(sys.argv[1]), sys.argv[2]
    answer: dict[str, Any]
    try:
        with open_workers("cpu") as workers:
            if what == "curve":
                answer = {"curve": whole_run(folder, workers, checkpoint=folder / "two.pt", seed=3)}
            else:
                answer = compute(folder, workers)
                answer["wrong"] = compute_wrong(folder, workers)
                answer["exact"] = exact_run(folder, workers, checkpoint=folder / "half.pt", resume=False, stop=True)
            if workers.is_first:
                torch.save(answer, folder / f"{what}.pt")
            if what == "curve":
                die(folder, workers)
    except CspDeployError as error:
        sys.stderr.write(f"error: {error.message}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
