"""How a detector's outputs become boxes: the part of a model's description that says it. JSON through the codec."""

from __future__ import annotations

import math
import numbers
from dataclasses import asdict, dataclass, replace
from typing import Literal, get_args

__all__ = ["BOXES_OUTPUT", "COUNT_OUTPUT", "DECODES", "DETECTIONS_OUTPUT", "SCORES_OUTPUT", "TRT_OUTPUTS",
           "ULTRALYTICS_OUTPUT", "Decode", "Detection", "DetectionHead", "Suppression",
           "SuppressionOptions"]  # fmt: skip

Decode = Literal["raw", "decoded", "nms", "ultralytics", "trt"]
"""What an artifact of a detector gives. Boxes are in pixels of the network's input, all of them float32.

raw: the map of each head, `[N, anchors * (5 + C), H / stride, W / stride]`, which the application decodes.
decoded: "boxes" `[N, A, 4]` left, top, right, bottom, and "scores" `[N, A, C]`, objectness times class, in [0, 1].
nms: "detections" `[N, max_detections, 6]` left, top, right, bottom, score, class, best first, zeros after the last; and
"num_detections" `[N]` int64.
ultralytics: "output0" `[N, 4 + C, A]`, centre x, centre y, width, height, then the scores of all classes.
trt: "num_dets" `[N, 1]` int32, "det_boxes" `[N, max_detections, 4]`, "det_scores" `[N, max_detections]`, "det_classes"
`[N, max_detections]` int32, by TensorRT's plugin EfficientNMS_TRT. ONNX Runtime cannot load it.
"""
DECODES: tuple[Decode, ...] = get_args(Decode)

BOXES_OUTPUT, SCORES_OUTPUT = "boxes", "scores"
DETECTIONS_OUTPUT, COUNT_OUTPUT = "detections", "num_detections"
ULTRALYTICS_OUTPUT = "output0"
TRT_OUTPUTS = ("num_dets", "det_boxes", "det_scores", "det_classes")

MAX_DETECTIONS = 4096
"""Each box that stays is compared with each candidate, so that time grows with both: 65,536 of an untrained network's
take a minute an image, 4096 eight seconds. The densest labelled pictures (aerial ones, shelves) hold some thousand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectionHead:
    """How the raw map of one head is decoded: Darknet's [yolo].

    Attributes:
        output: name of the raw map, such as "head_s8".
        stride_px: of its cells, in pixels of the network's input.
        anchors: width and height in pixels of the network's input, in the order of the map's channels.
        scale_x_y: by which centres may leave their cell.
        new_coords: the convolution has applied the sigmoid already, and sizes are squares instead of exponentials.
    """

    output: str
    stride_px: int
    anchors: tuple[tuple[float, float], ...]
    scale_x_y: float = 1.0
    new_coords: bool = False

    def __post_init__(self) -> None:
        if self.stride_px < 1 or not self.anchors or not all(side > 0 for pair in self.anchors for side in pair):
            raise ValueError(f"{self.output}: got stride {self.stride_px} and anchors {self.anchors}, expected above 0")
        if not (math.isfinite(self.scale_x_y) and self.scale_x_y > 0):
            raise ValueError(f"{self.output}: got scale_x_y {self.scale_x_y}, expected a number above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Suppression:
    """Non-maximum suppression, class by class; a candidate counts for every class whose score is high enough.

    Attributes:
        score_threshold: of objectness times class; a score must be above it.
        iou_threshold: a box goes where a better one of its class overlaps it by more than that.
        max_detections: of one image, all classes together, the best.
    """

    score_threshold: float = 0.25
    iou_threshold: float = 0.45
    max_detections: int = 300

    def __post_init__(self) -> None:
        for name, kind, words in (
            ("score_threshold", numbers.Real, "a number"), ("iou_threshold", numbers.Real, "a number"),
            ("max_detections", numbers.Integral, "a whole number"),
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ValueError(f"{name}: got {value!r}, expected {words}")
        if not 0.0 <= self.score_threshold < 1.0:
            raise ValueError(f"score_threshold: got {self.score_threshold}, expected 0 to below 1")
        if not 0.0 < self.iou_threshold <= 1.0:
            raise ValueError(f"iou_threshold: got {self.iou_threshold}, expected above 0 to 1")
        if not 1 <= self.max_detections <= MAX_DETECTIONS:
            raise ValueError(f"max_detections: got {self.max_detections}, expected 1 to {MAX_DETECTIONS}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SuppressionOptions:
    """What of a `Suppression` somebody asked for; None: as it is."""

    score_threshold: float | None = None
    iou_threshold: float | None = None
    max_detections: int | None = None

    @property
    def asked(self) -> dict[str, float | int]:
        """What is given, by its name."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def first_option(self) -> str:
        """The command-line option of the first that is given, such as "--iou-threshold"."""
        return next((f"--{name.replace('_', '-')}" for name in self.asked), "")

    def applied(self, rule: Suppression) -> Suppression:
        """The rule with what was asked for.

        Raises:
            ValueError: a number out of its range.
        """
        return replace(rule, **self.asked)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class Detection:
    """What a detector's outputs are, and how an application makes boxes of them.

    Attributes:
        heads: in the order of the network's outputs, which is the order of the candidates.
        decode: of the ONNX files. What PyTorch reads is "raw" where that is asked for, and "decoded" otherwise.
        suppression: as the graph does it with "nms" and "trt", and as an application should elsewhere.
    """

    heads: tuple[DetectionHead, ...]
    decode: Decode = "decoded"
    suppression: Suppression = Suppression()

    def __post_init__(self) -> None:
        if not self.heads or len({head.output for head in self.heads}) != len(self.heads):
            raise ValueError(f"heads: got {[head.output for head in self.heads]}, expected different names")

    @property
    def network_outputs(self) -> tuple[str, ...]:
        """Names of what the network itself gives as it is exported, before any tail of the ONNX files."""
        return self.raw_outputs if self.decode == "raw" else (BOXES_OUTPUT, SCORES_OUTPUT)

    @property
    def raw_outputs(self) -> tuple[str, ...]:
        """Names of the heads' maps."""
        return tuple(head.output for head in self.heads)

    @property
    def network_decode(self) -> Decode:
        """The contract of the network itself, and of what PyTorch reads."""
        return "raw" if self.decode == "raw" else "decoded"

    def num_candidates(self, height_px: int, width_px: int) -> int:
        """A, for an input of that size."""
        return sum(
            len(head.anchors) * (height_px // head.stride_px) * (width_px // head.stride_px) for head in self.heads
        )
