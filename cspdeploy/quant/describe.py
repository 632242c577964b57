"""What is said of an INT8 file: one sentence, which holds no timing, and the facts that a manifest keeps."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from cspdeploy.core.detection.match import MATCH_IOU
from cspdeploy.quant.assemble import EXACT_SQNR_DB, Assembly
from cspdeploy.quant.box_agreement import JUDGED_SCORE
from cspdeploy.quant.budget import Budget, Judgement, describe_boxes
from cspdeploy.quant.outcome import Point, SearchResult
from cspdeploy.quant.placements import Placement
from cspdeploy.quant.prove import PlacementProof
from cspdeploy.quant.scheme import Scheme
from cspdeploy.quant.select import Selection

__all__ = ["box_facts", "describe", "describe_accuracy", "list_facts", "rounded_db"]


def describe(
    assembly: Assembly, selection: Selection, *, scheme: Scheme, judgement: Judgement, proof: PlacementProof
) -> str:
    """How accurate, how much of it is in INT8, for which engine, and why these ranges."""
    where = f"on {judgement.runtime}" if judgement.runtime else "simulated"
    layout = assembly.layout(scheme)
    num_layers = len(layout.weights) + len(layout.float_nodes)
    layers = f"{len(layout.weights)} of {num_layers} layers in INT8"
    if proof.runtime is None:
        layers += f" (not proven: {proof.unproven})"
    elif proof.float_nodes:
        layers += f", but {proof.runtime} computes {len(proof.float_nodes)} of them in float"
    images = "images, the same that ranges were fitted to: too few to hold any out" if assembly.shared else (
        "held-out images"
    )  # fmt: skip
    searched = "" if scheme == selection.scheme else f"; chosen by the search: {scheme}"
    return (
        f"{describe_accuracy(judgement)} {where} ({judgement.num_images} {images}); {layers}; "
        f"placed for {assembly.placement.name}{_caution(assembly.placement)}; {selection.why()}{searched}"
    )


def _caution(placement: Placement) -> str:
    return f" ({placement.caution})" if placement.caution else ""


def rounded_db(sqnr_db: float) -> float | None:
    """As JSON has it, which knows no infinity: None for outputs that are not finite; equal ones have the most."""
    return round(min(sqnr_db, EXACT_SQNR_DB), 1) if sqnr_db > -math.inf else None


def describe_accuracy(judgement: Judgement) -> str:
    """Such as 41.2 dB, 100.0 % agreement."""
    parts = [f"{judgement.sqnr_db:.1f} dB"]
    if judgement.boxes is not None:
        parts.append(describe_boxes(judgement.boxes))
    if judgement.agreement is not None:
        parts.append(f"{100 * judgement.agreement:.1f} % agreement")
    if judgement.top1_drop_points is not None:
        parts.append(f"top-1 {-judgement.top1_drop_points:+.2f} points of {judgement.num_labelled} images")
    return ", ".join(parts)


def box_facts(judgement: Judgement) -> dict[str, Any]:
    """Of a detector, how many boxes FP32 found, how many this file, and how many are the same; else empty."""
    boxes = judgement.boxes
    if boxes is None:
        return {}
    return {
        "boxes": {
            "score": JUDGED_SCORE, "iou": MATCH_IOU, "expected": boxes.expected, "found": boxes.found,
            "matched": boxes.matched, "recall": round(boxes.recall, 4), "precision": round(boxes.precision, 4),
        }
    }  # fmt: skip


def list_facts(
    assembly: Assembly, selection: Selection, *, scheme: Scheme, judgement: Judgement, proof: PlacementProof,
    found: SearchResult | None, budget: Budget,
) -> dict[str, Any]:  # fmt: skip
    """JSON values. Latencies, relative to FP32, are among them only where one was asked for, or nothing is shipped."""
    layout = assembly.layout(scheme)
    names = {node.outputs[0]: node.name or node.outputs[0] for node in assembly.graph.nodes}
    facts: dict[str, Any] = {
        "mode": "static", "placement": assembly.placement.name, "scheme": str(scheme), "runtime": judgement.runtime,
        "sqnr_db": rounded_db(judgement.sqnr_db), "agreement": judgement.agreement,
        "num_images": assembly.observations.num_images, "num_held_out": 0 if assembly.shared else judgement.num_images,
        "images_sha256": assembly.images.content_hash,
        "tried": [{"scheme": str(one.scheme), "sqnr_db": rounded_db(one.sqnr_db)} for one in selection.tried],
        "float_layers": [
            {"node": names[output], "reason": reason} for output, reason in sorted(layout.float_nodes.items())
        ],
        "operators_on_engine": dict(proof.operators), "fell_back": list(proof.float_nodes), "unproven": proof.unproven,
    }  # fmt: skip
    facts |= box_facts(judgement)
    if judgement.top1 is not None:
        facts |= {"top1": judgement.top1, "top1_fp32": judgement.top1_fp32, "num_labelled": judgement.num_labelled}
    if found is not None:
        timed = budget.limits_latency or found.chosen is None
        facts["search"] = {
            "stopped": found.stopped, "evaluations": found.num_evaluations,
            "reason": found.reason if timed else f"{scheme}: {describe_accuracy(judgement)}",
            "front": [_point(point, timed=timed) for point in found.front],
            "failures": dict(Counter(message for _, message in found.failures)),
        }  # fmt: skip
    return facts


def _point(point: Point, *, timed: bool) -> dict[str, Any]:
    judged = point.judgement
    facts: dict[str, Any] = {
        "scheme": str(point.scheme), "sqnr_db": rounded_db(judged.sqnr_db), "top1": judged.top1, "meets": point.meets,
    }  # fmt: skip
    ratio = judged.ratio_to_fp32
    return facts | {"latency_of_fp32": None if ratio is None else round(ratio, 3)} if timed else facts
