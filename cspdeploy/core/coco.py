"""The 80 classes of COCO's detection task, in the order that every detector of them gives its scores in."""

from __future__ import annotations

__all__ = ["COCO_LABELS", "NUM_COCO_CLASSES", "label_key"]

COCO_LABELS: tuple[str, ...] = (
    "person", "bicycle", "car", "motorbike", "aeroplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich",
    "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "sofa", "pottedplant", "bed",
    "diningtable", "toilet", "tvmonitor", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven",
    "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
"""As Darknet's coco.names spells them."""
NUM_COCO_CLASSES = len(COCO_LABELS)

_OFFICIAL = {
    "motorcycle": "motorbike", "airplane": "aeroplane", "couch": "sofa", "potted plant": "pottedplant",
    "dining table": "diningtable", "tv": "tvmonitor",
}  # fmt: skip
"""From the names in COCO's own annotations to those above; the other 74 are the same."""


def label_key(label: str) -> str:
    """What two spellings of a class have in common: no case, single spaces, Darknet's name of a class of COCO."""
    plain = " ".join(label.casefold().replace("_", " ").split())
    return _OFFICIAL.get(plain, plain)
