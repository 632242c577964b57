"""INT8 for those who have no images: integer weights, judged like every other file."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

from cspdeploy.core.datasets import LabelledImages
from cspdeploy.core.detection.spec import Detection
from cspdeploy.core.types import StepRecord
from cspdeploy.export.rewrite import count_operators_of, write_model
from cspdeploy.quant.assemble import batch_size
from cspdeploy.quant.budget import Budget, Judgement, earns_its_place
from cspdeploy.quant.calibration import CalibrationSet
from cspdeploy.quant.decide import runs_here
from cspdeploy.quant.describe import box_facts, describe_accuracy, rounded_db
from cspdeploy.quant.integer_weights import WeightMode, quantise_weights
from cspdeploy.quant.judge import JUDGE_LATENCY, Judge, Labelled
from cspdeploy.quant.placements import Placement

__all__ = ["quantise_without_images"]

RUNTIME = "ort-cpu"
"""That these files are judged on, untimed, where the placement's engine is not here: it has all of their operators."""


def quantise_without_images(
    model: onnx.ModelProto, source: Path, target: Path, *, mode: WeightMode, placement: Placement, budget: Budget,
    images: CalibrationSet, labelled: LabelledImages | None, progress: Callable[[str, int, int], None],
    detection: Detection | None = None,
) -> StepRecord:  # fmt: skip
    """Write and judge it.

    "dynamic" must not be slower than FP32. "weights" is made for its size alone, so that only a budget refuses it. The
    record of a file that ships holds no timing.

    Args:
        model: `source` as `prepare_float` leaves it.
        images: to judge on; nothing is fitted to them.
        detection: of a detector, whose `source` gives its raw maps.
    """
    here = runs_here(placement)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".int8-") as folder:
        path = Path(folder) / "candidate.onnx"
        write_model(quantise_weights(model, mode, weight_limit=placement.weight_limit), path)
        with Judge(
            source, lambda: images.batches(batch_size(images)), progress=progress,
            runtime=placement.runtime if here and placement.runtime else RUNTIME,
            labelled=None if labelled is None else Labelled(images=labelled, contract=images.contract),
            detection=detection, latency=JUDGE_LATENCY if here else None, exact_latency=budget.limits_latency,
        ) as judge:  # fmt: skip
            judgement = judge.judge(path)
        facts = {"mode": mode, "placement": placement.name, "operators": count_operators_of(path)} | _facts(judgement)
        earned, why = earns_its_place(_by_its_purpose(judgement, mode, budget), budget)
        if not earned:
            return StepRecord(name="int8", outcome="kept", detail=f"no INT8 file: {why}", facts=facts)
        share = path.stat().st_size / source.stat().st_size
        shutil.move(path, target)
    remarks = "; made for its size, not for speed" if mode == "weights" else ""
    remarks += "" if here else f"; not timed: {placement.name} is not on this machine"
    detail = (
        f"{mode}: {describe_accuracy(judgement)} on {judgement.runtime} ({judgement.num_images} images); "
        f"{share:.2f} of the size{remarks}"
    )
    return StepRecord(name="int8", outcome="done", detail=detail, facts=facts)


def _facts(judgement: Judgement) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "runtime": judgement.runtime, "sqnr_db": rounded_db(judgement.sqnr_db), "agreement": judgement.agreement,
        "num_images": judgement.num_images,
    } | box_facts(judgement)  # fmt: skip
    if judgement.top1 is None:
        return facts
    return facts | {"top1": judgement.top1, "top1_fp32": judgement.top1_fp32, "num_labelled": judgement.num_labelled}


def _by_its_purpose(judgement: Judgement, mode: WeightMode, budget: Budget) -> Judgement:
    """Of a file that is made for its size, a slower run is no reason against it unless a latency was asked for."""
    if mode == "weights" and not budget.limits_latency and judgement.verdict == "slower":
        return dataclasses.replace(judgement, verdict="")
    return judgement
