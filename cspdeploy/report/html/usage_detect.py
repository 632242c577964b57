"""A detector's part of the snippets: from the outputs of a contract to boxes in pixels of the picture.

The suppression is that of `cspdeploy.core.detection.boxes`, as short as it can be written.
"""

from __future__ import annotations

from collections.abc import Sequence

from cspdeploy.core.detection.spec import Decode, Suppression
from cspdeploy.core.model_folder import LABELS_FILE
from cspdeploy.core.spec import Preprocess
from cspdeploy.core.types import Artifact, Manifest
from cspdeploy.report.html.snippet import Snippet

__all__ = ["EDGE", "TENSORRT", "decode_of", "python_boxes", "python_place"]


def decode_of(manifest: Manifest, artifact: Artifact) -> Decode | None:
    """The contract of its outputs; None of what is no detector."""
    detection = manifest.spec.detection
    if manifest.spec.task != "detect" or detection is None:
        return None
    return artifact.decode or detection.network_decode


def _edge_snippet(manifest: Manifest, artifact: Artifact) -> str:
    """The runtime package of the bundle: whatever the contract, boxes in pixels of the picture."""
    return "\n".join([
        "from cspdeploy.edge import Predictor",
        f'with Predictor.open(".", artifact="{artifact.kind}") as predictor:',
        '    for box in predictor("../photo.jpg"):  # the folder of the bundle takes no other file',
        '        print(box.label, f"{box.score:.2f}", box.left, box.top, box.right, box.bottom)',
    ])  # fmt: skip


def _trt_snippet(manifest: Manifest, artifact: Artifact) -> str:
    """TensorRT alone has the plugin."""
    first = artifact.inputs[0]
    sides = "x".join(str(size) for size in first.shape[1:])
    shapes = "" if isinstance(first.shape[0], int) else f" --shapes={first.name}:1x{sides}"
    return f"trtexec --onnx={artifact.file} --saveEngine={artifact.file.removesuffix('.onnx')}.plan{shapes}"


def python_place(contract: Preprocess) -> list[str]:
    """After the resize: how a point of the network's input lies in the picture of `width` x `height`."""
    if contract.resize == "letterbox":
        place = f"(({contract.width_px} - w) // 2, ({contract.height_px} - h) // 2)"
        return [f"back = lambda xy: (np.reshape(xy, (2, 2)) - {place}) * (width / w, height / h)"]
    if contract.resize == "stretch":
        size = f"(width / {contract.width_px}, height / {contract.height_px})"
        return [f"back = lambda xy: np.reshape(xy, (2, 2)) * {size}"]
    return ["back = lambda xy: (np.reshape(xy, (2, 2)) + (left, top)) * (width / w, height / h)"]


def python_boxes(decode: Decode, *, run: str, rule: Suppression) -> list[str]:
    """Of "nms", "decoded" and "ultralytics": print each box. `run`: the call that gives a list of outputs."""
    labels = f'labels = open("{LABELS_FILE}", encoding="utf-8").read().splitlines()'
    if decode == "nms":
        return [
            labels,
            f"rows, counts = {run}",
            "for *box, score, index in rows[0][:counts[0]]:",
            *_printed("score", "index", "box"),
        ]
    return [
        labels,
        *_candidates(decode, run),
        "def overlap(a, b):",
        "    inner = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0).prod()",
        "    return inner / max((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - inner, 1e-9)",
        f"found, kept = np.argwhere(scores > {rule.score_threshold:g}), []",
        "for i, c in sorted(found, key=lambda at: -scores[tuple(at)]):  # class by class, the best box stays",
        f"    if all(c != k or overlap(boxes[i], boxes[j]) <= {rule.iou_threshold:g} for j, k in kept):",
        "        kept.append((i, c))",
        f"for i, c in kept[:{rule.max_detections}]:",
        *_printed("scores[i, c]", "c", "boxes[i]"),
    ]


def _printed(score: str, index: str, box: str) -> Sequence[str]:
    return [f'    print(labels[int({index})], f"{{{score}:.2f}}", *back({box}).ravel().round().astype(int))']


def _candidates(decode: Decode, run: str) -> list[str]:
    if decode == "ultralytics":
        return [
            f"rows = {run}[0][0].T  # centre, size, then the scores of all classes",
            "boxes = np.hstack([rows[:, :2] - rows[:, 2:4] / 2, rows[:, :2] + rows[:, 2:4] / 2])",
            "scores = rows[:, 4:]",
        ]
    return [f"boxes, scores = (y[0] for y in {run})"]


EDGE = Snippet(
    name="edge", title="Python, the same boxes as the proof", install='pip install "cspdeploy"',
    note="Prepares the picture, decodes, suppresses, and gives pixels of the picture.", write=_edge_snippet,
)  # fmt: skip
TENSORRT = Snippet(
    name="tensorrt", title="TensorRT", install="trtexec, which comes with TensorRT 8.5 or later", write=_trt_snippet,
    note="No other engine has the plugin EfficientNMS_TRT. Boxes are in pixels of the network's input.",
)  # fmt: skip
