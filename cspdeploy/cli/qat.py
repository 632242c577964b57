"""`train --qat`: its options against those of plain training, the call, and what it prints."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cspdeploy.cli.render import print_error, print_json, print_renderable, progress_bar
from cspdeploy.core.errors import EXIT_CHECK_FAILED, EXIT_OK, InputError

if TYPE_CHECKING:
    from cspdeploy.pipeline.qat import QatReport

__all__ = ["fine_tune", "require_own_size", "require_plain"]


def require_own_size(size_px: int | None) -> None:
    """Refuse `--size` with `--qat`.

    Raises:
        InputError: it is given.
    """
    if size_px is not None:
        raise InputError(f"--size {size_px}: --qat keeps the size that it was trained at", fix="leave out --size")


def require_plain(data: str | None, given: Mapping[str, object]) -> str:
    """The data set of plain training.

    Args:
        given: options of `--qat` alone, None where they were not given.

    Raises:
        InputError: one of them is given, or no data.
    """
    for option in (name for name, value in given.items() if value is not None):
        raise InputError(f"{option}: is of fine-tuning for INT8, and none is asked for", fix="add --qat")
    if data is None:
        raise InputError("train: no labelled images to train on", fix="--data fashion-mnist, or --data DIR")
    return data


def fine_tune(
    model: str,
    *,
    models: Path,
    data: str | None,
    calibration: Path | None,
    target: str | None,
    command: str,
    resume: bool,
    overwrite: bool,
    recipe: Mapping[str, Any],
    epoch_steps: int | None,
    json_: bool,
) -> int:
    """Fine-tune, and print what it brought; the exit code is 1 where that is nothing."""
    from cspdeploy.pipeline.qat import QatRequest, train_qat
    from cspdeploy.quant.qat_train import QatRecipe

    steps = {} if epoch_steps is None else {"steps_per_epoch": epoch_steps}
    request = QatRequest(
        model=model, models=models, data=data, calibration=calibration, target=target, command=command,
        resume=resume, overwrite=overwrite, recipe=QatRecipe(**recipe, **steps),
    )  # fmt: skip
    with progress_bar("train") as progress:
        report = train_qat(request, progress=progress)
    return _finish(report, json_=json_)


def _finish(report: QatReport, *, json_: bool) -> int:
    if json_:
        print_json(report)
    for warning in report.warnings:
        sys.stderr.write(f"warning: {warning}\n")
    before, after = report.before, report.after
    text = (
        f"INT8 for {report.placement}: top-1 {100 * before.top1:.2f} -> {100 * after.top1:.2f} %, agreement with FP32 "
        f"{100 * before.agreement:.2f} -> {100 * after.agreement:.2f} %, loss {before.loss:.4f} -> {after.loss:.4f} "
        f"on {after.num_images} test images"
    )
    if not report.kept:
        print_error(
            f"{text}: no better than without training, nothing is written",
            "train longer (--epochs) or with a lower --learning-rate, or export --int8 without training",
        )
        return EXIT_CHECK_FAILED
    if not json_:
        print_renderable(f"{report.file}: {text}")
    return EXIT_OK
