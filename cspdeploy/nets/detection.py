"""Detection heads decoded in torch: the reference of what numpy and the ONNX files compute.

Shapes: as in `cspdeploy.core.detection`.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from cspdeploy.core.detection.spec import Detection, DetectionHead

__all__ = ["DecodedDetector"]


class DecodedDetector(nn.Module):
    """`[N, 3, H, W]` to boxes `[N, A, 4]` in pixels of the input and scores `[N, A, C]`, from a network of raw heads.

    Args:
        network: gives one map `[N, anchors * (5 + C), H / stride, W / stride]` for each head, in their order.
    """

    def __init__(self, network: nn.Module, detection: Detection) -> None:
        super().__init__()
        self.network = network
        self._heads = detection.heads
        for index, head in enumerate(detection.heads):
            halves = torch.tensor(head.anchors).reshape(1, -1, 1, 1, 2) / 2
            self.register_buffer(f"halves{index}", halves, persistent=False)

    def forward(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        boxes, scores = [], []
        for index, (head, raw_NCHW) in enumerate(zip(self._heads, self.network(x_NCHW), strict=True)):
            found, scored = _decode(raw_NCHW, head, self.get_buffer(f"halves{index}"))
            boxes.append(found)
            scores.append(scored)
        return torch.cat(boxes, 1), torch.cat(scores, 1)


def _decode(raw_NCHW: Tensor, head: DetectionHead, halves: Tensor) -> tuple[Tensor, Tensor]:
    """One head. Source: AlexeyAB/darknet, src/yolo_layer.c (get_yolo_box)."""
    num = raw_NCHW.shape[0]
    with warnings.catch_warnings():  # a trace holds for one size of the input, and may depend on it
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        chs, height, width = (int(size) for size in raw_NCHW.shape[1:])
    anchors = len(head.anchors)
    t = raw_NCHW.reshape(num, anchors, chs // anchors, height, width).permute(0, 1, 3, 4, 2)
    if head.new_coords:
        xy, wh, rest = t[..., :2], (2 * t[..., 2:4]) ** 2, t[..., 4:]
    else:
        xy, wh, rest = torch.sigmoid(t[..., :2]), torch.exp(t[..., 2:4]), torch.sigmoid(t[..., 4:])
    ys, xs = (torch.arange(side, dtype=t.dtype, device=t.device) for side in (height, width))
    cells = torch.stack([xs.expand(height, width), ys[:, None].expand(height, width)], -1)
    centre = (xy * head.scale_x_y + (cells - 0.5 * (head.scale_x_y - 1.0))) * head.stride_px
    half = wh * halves
    boxes = torch.cat([centre - half, centre + half], -1).reshape(num, anchors * height * width, 4)
    scores = (rest[..., :1] * rest[..., 1:]).reshape(num, anchors * height * width, chs // anchors - 5)
    return boxes, scores
