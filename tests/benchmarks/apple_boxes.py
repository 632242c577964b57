"""Boxes of a detector whose ONNX gives `boxes` [1, A, 4] and `scores` [1, A, C], and how many two files share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

FloatArray = npt.NDArray[np.float32]
Outputs = dict[str, FloatArray]

SCORE, NMS_IOU, MATCH_IOU = 0.25, 0.45, 0.9  # the apple plugin's own first two; the third: what "the same box" means


def open_engine(path: Path, engine: str) -> Callable[[FloatArray], Outputs]:
    """A function from `x_NCHW` to the outputs by name."""
    if engine == "ort":
        import onnxruntime as ort

        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        feed = session.get_inputs()[0].name
        return lambda x_NCHW: dict(zip(names, session.run(names, {feed: x_NCHW}), strict=True))
    import openvino as ov

    compiled = ov.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    names = [output.get_any_name() for output in compiled.outputs]
    return lambda x_NCHW: {name: np.array(compiled(x_NCHW)[index]) for index, name in enumerate(names)}


def read_image(path: Path, size_px: int) -> FloatArray:
    """`[1, 3, size, size]`, RGB in [0, 1], stretched."""
    image = Image.open(path).convert("RGB").resize((size_px, size_px), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 255)


def iou(box: FloatArray, others_N4: FloatArray) -> FloatArray:
    """`[N]`: intersection over union of one box with others."""
    low, high = np.maximum(box[:2], others_N4[:, :2]), np.minimum(box[2:], others_N4[:, 2:])
    inside = np.prod(np.clip(high - low, 0, None), axis=1)
    total = np.prod(box[2:] - box[:2]) + np.prod(others_N4[:, 2:] - others_N4[:, :2], axis=1) - inside
    return np.asarray(inside / np.maximum(total, 1e-12), np.float32)


def detections(outputs: Outputs) -> tuple[FloatArray, FloatArray]:
    """Boxes `[M, 4]` and scores `[M]` above SCORE after non-maximum suppression, best first."""
    boxes, scores = outputs["boxes"][0], outputs["scores"][0].max(1)
    order = np.argsort(-scores, kind="stable")
    order = order[scores[order] >= SCORE]
    kept: list[int] = []
    while len(order):
        best, order = int(order[0]), order[1:]
        kept.append(best)
        order = order[iou(boxes[best], boxes[order]) <= NMS_IOU]
    return boxes[kept], scores[kept]


def count_matches(reference_N4: FloatArray, other_N4: FloatArray) -> int:
    """Boxes of the reference, best first, that have a box of their own with IoU >= MATCH_IOU in the other."""
    free = np.ones(len(other_N4), bool)
    for box in reference_N4:
        overlap = iou(box, other_N4) * free if len(other_N4) else np.zeros(0, np.float32)
        if len(overlap) and overlap.max() >= MATCH_IOU:
            free[int(overlap.argmax())] = False
    return int((~free).sum())


def input_size(path: Path) -> int:
    """Side of the input in pixels."""
    import onnxruntime as ort

    return int(ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).get_inputs()[0].shape[-1])


def images_of(folder: Path) -> list[Path]:
    """Image files of a folder, by name."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg"))


def match(reference: Path, other: Path, folder: Path, *, engine: str) -> dict[str, float]:
    """Matched boxes of `other` on `engine` against `reference` on ONNX Runtime, over the images of a folder.

    `matched` is the share of the reference's boxes found again; `extra` the share of the other's that match none.
    The SQNR in dB is over all boxes and all scores, above the threshold or not.
    """
    first, second, size_px = open_engine(reference, "ort"), open_engine(other, engine), input_size(reference)
    counts = np.zeros(3, np.int64)
    power, noise = {"boxes": 0.0, "scores": 0.0}, {"boxes": 0.0, "scores": 0.0}
    for path in images_of(folder):
        x_NCHW = read_image(path, size_px)
        expected, got = first(x_NCHW), second(x_NCHW)
        for name in power:
            power[name] += float(np.square(expected[name], dtype=np.float64).sum())
            noise[name] += float(np.square(got[name].astype(np.float64) - expected[name]).sum())
        (reference_N4, _), (other_N4, _) = detections(expected), detections(got)
        counts += (len(reference_N4), len(other_N4), count_matches(reference_N4, other_N4))
    if not counts[0]:
        raise SystemExit(f"{reference}: no box above {SCORE} in {folder}: nothing to compare")
    result = {"boxes": int(counts[0]), "found": int(counts[1]), "matched": counts[2] / counts[0]}
    result["extra"] = 1 - counts[2] / max(int(counts[1]), 1)
    return result | {f"{name}_db": 10 * np.log10(power[name] / max(noise[name], 1e-30)) for name in power}
