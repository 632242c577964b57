"""What an ONNX file says of itself, for a reader."""

from __future__ import annotations

from cspdeploy.core.card import ModelCard
from cspdeploy.core.detection.spec import Decode, Detection
from cspdeploy.core.spec import Preprocess, Provenance
from cspdeploy.core.types import Frontend
from cspdeploy.report.tables import UNTRAINED

__all__ = ["card_lines"]

NUM_LABELS = 5
"""Named; the rest are counted, and --json has all."""
_TASKS = {"classify": "classifier", "features": "feature maps", "detect": "detector", "segment": "segmentation"}
_RESIZES = {"crop": "shorter side, then the centre", "stretch": "both sides, ratio not kept", "letterbox": "letterbox"}


def card_lines(card: ModelCard | None) -> list[tuple[str, str]]:
    """Names and texts, a line each; none without a card."""
    if card is None:
        return []
    lines = [("model", f"{card.model}, {card.artifact}: {_TASKS[card.task]}, written by {card.tool}")]
    if card.provenance.untrained:
        lines.append(("weights from", UNTRAINED))
    else:
        lines.append(("weights from", _provenance(card.provenance)))
    if card.detection is not None and card.decode is not None:
        lines.append(("boxes", _boxes(card.detection, card.decode)))
    if card.task in ("classify", "detect"):
        lines.append(("labels", _labels(card.labels)))
    return [
        *lines,
        ("image", _image(card.preprocess)),
        ("preprocessing", _preprocessing(card.preprocess, card.frontend)),
    ]


def _labels(labels: tuple[str, ...]) -> str:
    more = f", ... ({len(labels)} in all)" if len(labels) > NUM_LABELS else ""
    return f"{', '.join(labels[:NUM_LABELS])}{more}"


_CONTRACTS: dict[Decode, str] = {
    "raw": "maps of the heads, which the application decodes",
    "decoded": "boxes and scores of all candidates, which the application suppresses",
    "nms": "boxes that the graph has suppressed",
    "ultralytics": "centre, size and scores of all candidates in one output, which the application suppresses",
    "trt": "boxes that TensorRT's plugin suppresses; ONNX Runtime cannot load the file",
}


def _boxes(detection: Detection, decode: Decode) -> str:
    rule = detection.suppression
    return (
        f"{decode}: {_CONTRACTS[decode]}; score above {rule.score_threshold:g}, IoU up to {rule.iou_threshold:g}, "
        f"at most {rule.max_detections}, in pixels of the network's input"
    )


def _provenance(found: Provenance) -> str:
    parts = [found.source, found.origin, f"on {found.dataset}" if found.dataset else ""]
    if found.accuracy is not None:
        best = found.accuracy
        figure = f"mAP50 {100 * best.map50:.2f} %" if best.map50 is not None else f"top-1 {100 * best.top1:.2f} %"
        parts.append(f"{figure} on {best.num_images} images")
    parts += [f"licence {found.licence}" if found.licence else "", _short(found.weights_sha256)]
    return ", ".join(filter(None, parts))


def _short(sha256: str) -> str:
    return f"SHA-256 {sha256[:12]}..." if sha256 else ""


def _image(contract: Preprocess) -> str:
    cut = f", {contract.crop_pct:g} of it kept" if contract.resize == "crop" and contract.crop_pct < 1 else ""
    return (
        f"{contract.height_px}x{contract.width_px} px {contract.channel_order.upper()}, "
        f"{_RESIZES[contract.resize]}{cut}, {contract.interpolation}"
    )


def _preprocessing(contract: Preprocess, frontend: Frontend | None) -> str:
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (contract.mean, contract.std))
    numbers = f"(pixel / 255 - [{mean}]) / [{std}]"
    if frontend is None:
        return f"{numbers}, by the application"
    parts = [f"{numbers}, in the graph, from {frontend.channel_order.upper()} bytes"]
    if frontend.resize:
        parts.append(f"which it resizes too (up to {frontend.max_difference:g}/255 from Pillow on the golden images)")
    if frontend.top_k:
        parts.append(f"and the {frontend.top_k} likeliest classes at its end")
    return ", ".join(parts)
