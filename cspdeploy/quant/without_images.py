"""INT8 for those who have no images: integer weights, judged like every other file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import onnx

from cspdeploy.core.datasets import LabelledImages
from cspdeploy.core.types import StepRecord
from cspdeploy.export.rewrite import count_operators_of, write_model
from cspdeploy.quant.assemble import batch_size
from cspdeploy.quant.budget import Budget, Judgement, earns_its_place
from cspdeploy.quant.calibration import CalibrationSet
from cspdeploy.quant.describe import describe_accuracy
from cspdeploy.quant.integer_weights import WeightMode, quantise_weights
from cspdeploy.quant.judge import Judge, Labelled
from cspdeploy.quant.placements import Placement

__all__ = ["quantise_without_images"]

RUNTIME = "ort-cpu"
"""That these files are judged on where the placement has no engine of ours: the operators are ONNX Runtime's."""


def quantise_without_images(
    model: onnx.ModelProto, source: Path, target: Path, *, mode: WeightMode, placement: Placement, budget: Budget,
    images: CalibrationSet, labelled: LabelledImages | None, progress: Callable[[str, int, int], None],
) -> StepRecord:  # fmt: skip
    """Write and judge it.

    "dynamic" must not be slower than FP32. "weights" is made for its size alone, so that only a budget refuses it; the
    record says where it is slower.

    Args:
        model: `source` as `prepare_float` leaves it.
        images: to judge on; nothing is fitted to them.
    """
    write_model(quantise_weights(model, mode, weight_limit=placement.weight_limit), target)
    marked = None if labelled is None else Labelled(images=labelled, contract=images.contract)
    with Judge(
        source, lambda: images.batches(batch_size(images)), runtime=placement.runtime or RUNTIME, labelled=marked,
        progress=progress,
    ) as judge:  # fmt: skip
        judgement = judge.judge(target)
    facts = {
        "mode": mode, "runtime": judgement.runtime, "sqnr_db": round(judgement.sqnr_db, 1),
        "agreement": judgement.agreement, "num_images": judgement.num_images, "operators": count_operators_of(target),
    }  # fmt: skip
    earned, why = earns_its_place(_by_its_purpose(judgement, mode, budget), budget)
    if not earned:
        target.unlink()
        return StepRecord(name="int8", outcome="kept", detail=f"no INT8 file: {why}", facts=facts)
    share = target.stat().st_size / source.stat().st_size
    slower = f"; slower than FP32 on {judgement.runtime}" if judgement.verdict == "slower" else ""
    detail = (
        f"{mode}: {describe_accuracy(judgement)} on {judgement.runtime} ({judgement.num_images} images); "
        f"{share:.2f} of the size{slower}"
    )
    return StepRecord(name="int8", outcome="done", detail=detail, facts=facts)


def _by_its_purpose(judgement: Judgement, mode: WeightMode, budget: Budget) -> Judgement:
    """Of a file that is made for its size, a slower run is no reason against it unless a latency was asked for."""
    if mode == "weights" and not budget.limits_latency and judgement.verdict == "slower":
        return dataclasses.replace(judgement, verdict="")
    return judgement
