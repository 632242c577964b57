"""`cspdeploy train` of a detector: from the options to the run, and its report."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cspdeploy.cli.render import print_json, print_renderable
from cspdeploy.core.errors import EXIT_OK, InputError

if TYPE_CHECKING:
    from cspdeploy.cli.render import Progress
    from cspdeploy.train.workers import Workers

__all__ = ["is_detector", "train_boxes"]


def is_detector(model: str) -> bool:
    """Whether the registry has a detector of that name, and not a classifier.

    Raises:
        InputError: it has nothing of that name, or a segmenter.
    """
    from cspdeploy.nets.registry import find_network, spec_of

    task = spec_of(find_network(model)).task
    if task not in ("classify", "detect"):
        raise InputError(
            f"model '{model}': a segmenter, expected a classifier or a detector",
            fix="train it as tests/benchmarks/train_segmenter.py does",
        )
    return task == "detect"


def train_boxes(
    model: str, *, data: str, models: Path, recipe: dict[str, Any], size_px: int | None, command: str, resume: bool,
    overwrite: bool, workers: Workers, progress: Progress, json_: bool,
) -> int:  # fmt: skip
    """Train a detector and, as the first of the workers, print what came of it; the exit code.

    Args:
        recipe: fields of `cspdeploy.train.detect_loop.DetectionRecipe` that are not as they are by default.

    Raises:
        InputError: as `cspdeploy.train.detect_job`.
    """
    from cspdeploy.train.detect_job import detector_spec, train_detection_model
    from cspdeploy.train.detect_loop import DetectionRecipe

    spec = detector_spec(model, size_px=size_px)
    report = train_detection_model(
        spec, data=Path(data), models=models, recipe=dataclasses.replace(DetectionRecipe(), **recipe),
        command=command, resume=resume, overwrite=overwrite, workers=workers, progress=progress,
    )  # fmt: skip
    if not workers.is_first:
        return EXIT_OK
    if json_:
        print_json(report)
        return EXIT_OK
    found = report.accuracy
    print_renderable(
        f"{report.folder}: mAP@0.5 {100 * (found.map50 or 0.0):.2f} %, mAP@0.5:0.95 {100 * (found.map or 0.0):.2f} % "
        f"on {found.num_images} images of {found.dataset}; anchors overlap their boxes by "
        f"{100 * report.anchor_overlap:.0f} %"
    )
    return EXIT_OK
