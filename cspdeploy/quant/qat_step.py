"""The INT8 file of a model that was fine-tuned for it: no calibration, no search, the plan as it was trained."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

from cspdeploy.core.bundle import file_sha256
from cspdeploy.core.datasets import LabelledImages
from cspdeploy.core.types import StepRecord
from cspdeploy.export.rewrite import write_model
from cspdeploy.quant.assemble import batch_size
from cspdeploy.quant.budget import Judgement, earns_its_place, parse_budget
from cspdeploy.quant.calibration import CalibrationSet
from cspdeploy.quant.decide import require_measurable, runs_here
from cspdeploy.quant.describe import describe_accuracy, rounded_db
from cspdeploy.quant.judge import Judge, Labelled
from cspdeploy.quant.place import Layout, lay_out
from cspdeploy.quant.placements import Placement
from cspdeploy.quant.prepare import prepare_float
from cspdeploy.quant.prove import PlacementProof, prove_placement
from cspdeploy.quant.qat_file import QatOrigin, TrainedPlan, graph_fingerprint
from cspdeploy.quant.torch_graph import TorchGraph
from cspdeploy.quant.write import write_qdq

__all__ = ["quantise_trained"]

Progress = Callable[[str, int, int], None]

FALLBACK_RUNTIME = "ort-cpu"
"""Judges accuracy for a target whose engine is not here: it reads any Q/DQ file."""


def quantise_trained(
    source: Path,
    target: Path,
    images: CalibrationSet,
    trained: TrainedPlan,
    *,
    placement: Placement,
    weights_sha256: str,
    max_drop: str | None = None,
    max_latency: str | None = None,
    labelled: LabelledImages | None = None,
    progress: Progress = lambda what, done, total: None,
) -> StepRecord:
    """Write the file of a trained plan, if it earns its place on the placement's engine.

    Args:
        source: the float32 file of the weights that training started from.
        images: to compare the outputs on with those of `source`; nothing is fitted to them.
        weights_sha256: of the model that `source` is made from.

    Returns:
        The outcome is "kept", without a `target`, where the file is slower than FP32 or outside the budget.

    Raises:
        InputError: the plan was trained for another network, size, graph or placement, or the budget cannot be
            measured here.
    """
    budget, here = parse_budget(max_drop=max_drop, max_latency=max_latency), runs_here(placement)
    require_measurable(budget, placement)
    model = prepare_float(onnx.load(source), placement=placement)
    layout = lay_out(TorchGraph(model), placement)
    origin = QatOrigin(
        weights_sha256=weights_sha256, placement=placement.name, fingerprint=graph_fingerprint(model),
        height_px=images.contract.height_px, width_px=images.contract.width_px,
    )  # fmt: skip
    trained.require_fit(origin, layout)
    marked = None if labelled is None else Labelled(images=labelled, contract=images.contract)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".int8-") as folder:
        path = Path(folder) / "trained.onnx"
        write_model(write_qdq(model, trained.plan), path)
        options: dict[str, Any] = {} if here else {"latency": None}
        with Judge(
            source, lambda: images.batches(batch_size(images)),
            runtime=(placement.runtime if here else None) or FALLBACK_RUNTIME, labelled=marked, progress=progress,
            exact_latency=budget.limits_latency, **options,
        ) as judge:  # fmt: skip
            judgement = judge.judge(path)
        proof = prove_placement(path, layout, placement)
        earned, why = earns_its_place(judgement, budget)
        facts = _facts(trained, layout, proof) | {
            "placement": placement.name, "runtime": judgement.runtime, "sqnr_db": rounded_db(judgement.sqnr_db),
            "agreement": judgement.agreement, "num_judged": judgement.num_images, "top1": judgement.top1,
            "top1_fp32": judgement.top1_fp32, "num_labelled": judgement.num_labelled,
        }  # fmt: skip
        if not earned:
            return StepRecord(name="int8", outcome="kept", detail=f"no INT8 file: {why}", facts=facts)
        shutil.move(path, target)
    return StepRecord(name="int8", outcome="done", detail=_detail(trained, judgement), facts=facts)


def _facts(trained: TrainedPlan, layout: Layout, proof: PlacementProof) -> dict[str, Any]:
    return {
        "mode": "static", "scheme": "quantisation-aware training", "qat": trained.record,
        "qat_file": trained.path.name, "qat_sha256": file_sha256(trained.path),
        "float_layers": [{"node": name, "reason": why} for name, why in sorted(layout.float_nodes.items())],
        "operators_on_engine": dict(proof.operators), "unproven": proof.unproven,
        "fell_back": list(proof.float_nodes),
    }  # fmt: skip


def _detail(trained: TrainedPlan, judgement: Judgement) -> str:
    """Without timings: the same files give the same manifest."""
    before, after = trained.record.get("before", {}), trained.record.get("after", {})
    text = (
        f"{describe_accuracy(judgement)} on {judgement.runtime} ({judgement.num_images} images); fine-tuned with "
        f"quantisation ({trained.path.name}"
    )
    if before and after:
        text += (
            f": top-1 {100 * before['top1']:.2f} -> {100 * after['top1']:.2f} % of {after['num_images']} test images"
        )
    return f"{text}); the float files keep the weights that it started from"
