"""`cspdeploy train`: a classifier or a detector from its start, or a trained model for INT8."""

from __future__ import annotations

import enum
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cspdeploy.cli.build import Json, Models
from cspdeploy.cli.qat import fine_tune, require_own_size, require_plain
from cspdeploy.cli.render import print_json, print_renderable
from cspdeploy.cli.train_workers import (
    WorkerExit,
    end_silently,
    must_launch,
    recorded_command,
    require_one,
    run_workers,
    training_workers,
)
from cspdeploy.core.errors import EXIT_OK, InterruptedRunError

if TYPE_CHECKING:
    from cspdeploy.cli.render import Progress
    from cspdeploy.train.workers import Workers

__all__ = ["register"]


class Device(enum.StrEnum):
    """Where training computes."""

    CPU = "cpu"
    CUDA = "cuda"


def register(app: typer.Typer) -> None:
    """Add the command to the root."""
    app.command()(train)


def train(
    *,
    model: Annotated[str, typer.Argument(help="A network of 'cspdeploy list'; with --qat, a trained model.")],
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="fashion-mnist, or a folder with one folder per class; for a detector labelled boxes (YOLO, COCO). "
            "With --qat, by default what it was trained on.",
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            "--epochs", min=1, help="Passes over the training images. [default: 14; a detector: 60; --qat: 4]"
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", min=2, help="Images a step. [default: 128; a detector: 16; --qat: 64]")
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate", min=1e-6,
            help="Peak of the one-cycle schedule; with --qat in steps of a weight. [default: 0.1; a detector and "
            "--qat: 0.002]",
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option("--size", min=16, max=1024, help="Side of the input in pixels; the data set's own by default."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of weights, order and augmentation.")] = 0,
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, help="Processes that train together, each on a slice of every batch."),
    ] = None,
    device: Annotated[
        Device | None, typer.Option("--device", help="A GPU for each worker where there is any, by default.")
    ] = None,
    qat: Annotated[
        bool, typer.Option("--qat", help="Fine-tune a trained model for INT8; its float weights stay as they are.")
    ] = False,
    epoch_steps: Annotated[
        int | None, typer.Option("--epoch-steps", min=1, help="With --qat: steps of an epoch, at most. [default: 250]")
    ] = None,
    target: Annotated[
        str | None, typer.Option("--target", help="With --qat: as of export; this machine's ONNX Runtime by default.")
    ] = None,
    calib: Annotated[
        Path | None,
        typer.Option("--calib", help="With --qat: images to choose ranges on; the model's own by default."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last finished epoch.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model folder of that name; with --qat, its fine-tuned plan.")
    ] = False,
    models: Models = Path("models"),
    json_: Json = False,
) -> int:  # fmt: skip
    """Train a network and write models/<name>/: weights, description, labels, calibration images, curve."""
    command = shlex.join(["cspdeploy", *(word for word in sys.argv[1:] if word not in ("--resume", "--overwrite"))])
    given = {"epochs": epochs, "batch": batch, "max_learning_rate": learning_rate}
    recipe: dict[str, Any] = {name: value for name, value in given.items() if value is not None} | {"seed": seed}
    command = recorded_command(command)
    tuning = {"--epoch-steps": epoch_steps, "--target": target, "--calib": calib}
    try:
        if qat:
            require_own_size(size)
            require_one(workers, device)
            return fine_tune(
                model, models=models, data=data, calibration=calib, target=target, command=command, resume=resume,
                overwrite=overwrite, recipe=recipe, epoch_steps=epoch_steps, json_=json_,
            )  # fmt: skip
        data = require_plain(data, tuning)
        if workers is not None and must_launch(workers):
            return run_workers(workers)
        with training_workers(device) as (joined, progress):
            return _train(
                model, data=data, models=models, recipe=recipe, size_px=size, command=command, resume=resume,
                overwrite=overwrite, workers=joined, progress=progress, json_=json_,
            )  # fmt: skip
    except WorkerExit as error:
        return end_silently(error.code)
    except KeyboardInterrupt as error:
        kept = any(models.glob(".*.run/checkpoint.pt"))
        message = "interrupted; finished epochs are kept" if kept else "interrupted before the first epoch was finished"
        raise InterruptedRunError(message, fix=f"{command} --resume" if kept else command) from error


def _train(
    model: str, *, data: str, models: Path, recipe: dict[str, Any], size_px: int | None, command: str, resume: bool,
    overwrite: bool, workers: Workers, progress: Progress, json_: bool,
) -> int:  # fmt: skip
    """A detector or a classifier; of several workers the first one prints what came of it."""
    from cspdeploy.cli.train_detector import is_detector, train_boxes

    if is_detector(model):
        return train_boxes(
            model, data=data, models=models, recipe=recipe, size_px=size_px, command=command, resume=resume,
            overwrite=overwrite, workers=workers, progress=progress, json_=json_,
        )  # fmt: skip
    from cspdeploy.train.job import train_model
    from cspdeploy.train.loop import Recipe

    report = train_model(
        model, data=data, models=models, recipe=Recipe(**recipe), size_px=size_px, command=command, resume=resume,
        overwrite=overwrite, workers=workers, progress=progress,
    )  # fmt: skip
    if not workers.is_first:
        return EXIT_OK
    if json_:
        print_json(report)
        return EXIT_OK
    accuracy = report.accuracy
    print_renderable(
        f"{report.folder}: top-1 {100 * accuracy.top1:.2f} %, top-5 {100 * accuracy.top5:.2f} % "
        f"on {accuracy.num_images} images of {accuracy.dataset}"
    )
    return EXIT_OK
