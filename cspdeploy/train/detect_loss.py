"""What a detector is trained on: CIoU of its boxes, cross entropy of objectness and classes, Darknet's assignment.

Shapes: N images, M labelled boxes of all of them together, h x w cells of a head, P assigned places.
Targets are `[M, 6]` float32: index of the image, class, left, top, right, bottom in pixels of the network's input.
They may lie on the CPU while the maps are on a GPU: what finds what is decided where the targets are, since the number
of places that it gives is needed there.
Those of class `IGNORED` (difficult, crowds) are asked of no place, and a place that finds one is not told off.
Sources: AlexeyAB/darknet, src/yolo_layer.c (forward_yolo_layer); CIoU: arXiv 1911.08287.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from cspdeploy.core.detection.spec import Detection, DetectionHead
from cspdeploy.train.workers import NO_WORKERS, Workers

__all__ = ["IGNORED", "Assignment", "DetectionLoss", "LossParts", "assign", "ciou", "decode_maps"]

IGNORED = -1

ANCHOR_IOU = 0.213
"""iou_thresh of yolov4.cfg: beside the best one, every anchor whose shape overlaps a box by more is to find it."""
IGNORE_IOU = 0.7
"""ignore_thresh of yolov4.cfg: a place that was not asked but overlaps a labelled box by more is not told off."""
IGNORED_SHARE = 0.5
"""The same of a box of which more lies inside an ignored one: a crowd is larger than what is found in it."""
TINY = 1e-6  # probabilities are kept so far from 0 and 1, where a logit is infinite
BOX_WEIGHT, OBJECT_WEIGHT, CLASS_WEIGHT = 2.0, 1.0, 1.0
"""All three are per assigned place. Of 1 - CIoU the gradients are about half as large as those of a cross entropy, by
which the boxes would settle long after the classes."""
MAX_LOG_SIZE = 8.0  # exp of it is 3000 times the anchor: no box is, and a first wild step does not overflow


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """The places of one head that are to find a labelled box; all `[P]` int64.

    Attributes:
        image: index in the batch.
        anchor: of the head.
        row: of the cell.
        column: of the cell.
        target: row of the targets.
    """

    image: Tensor
    anchor: Tensor
    row: Tensor
    column: Tensor
    target: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LossParts:
    """Of a batch, each a scalar; their sum is what is minimised."""

    box: Tensor
    objectness: Tensor
    classes: Tensor

    @property
    def total(self) -> Tensor:
        """The sum."""
        return self.box + self.objectness + self.classes


def assign(
    targets_M6: Tensor, heads: Sequence[DetectionHead], grids: Sequence[tuple[int, int]]
) -> tuple[Assignment, ...]:
    """Which places find which boxes, for each head.

    A box belongs to the cell of its centre, and there to the anchor of all heads whose shape overlaps it most, and to
    every other whose shape overlaps it by more than `ANCHOR_IOU`.

    Args:
        grids: rows and columns of each head's map.
    """
    anchors_K2 = torch.tensor([pair for head in heads for pair in head.anchors], dtype=torch.float32)
    sizes_M2 = targets_M6[:, 4:6] - targets_M6[:, 2:4]
    inside = torch.minimum(sizes_M2[:, None], anchors_K2[None]).prod(-1)
    overlaps_MK = inside / (sizes_M2.prod(-1)[:, None] + anchors_K2.prod(-1)[None] - inside)
    chosen_MK = overlaps_MK > ANCHOR_IOU
    if len(targets_M6):
        chosen_MK[torch.arange(len(targets_M6)), overlaps_MK.argmax(1)] = True
    centres_M2 = (targets_M6[:, 2:4] + targets_M6[:, 4:6]) / 2
    made, start = [], 0
    for head, (rows, columns) in zip(heads, grids, strict=True):
        target, anchor = chosen_MK[:, start : start + len(head.anchors)].nonzero(as_tuple=True)
        start += len(head.anchors)
        cells = (centres_M2[target] / head.stride_px).long()
        made.append(
            Assignment(
                image=targets_M6[target, 0].long(),
                anchor=anchor,
                row=cells[:, 1].clamp(0, rows - 1),
                column=cells[:, 0].clamp(0, columns - 1),
                target=target,
            )
        )
    return tuple(made)


def decode_maps(t: Tensor, head: DetectionHead, row: Tensor, column: Tensor, anchors: Tensor) -> Tensor:
    """Left, top, right, bottom `[..., 4]` in pixels of the input.

    Args:
        t: `[..., 5 + C]`, raw.
        row: of the cells, broadcastable to `t`'s leading shape; `column` likewise.
        anchors: width and height `[..., 2]`, broadcastable likewise.
    """
    if head.new_coords:
        xy, wh = t[..., :2], (2 * t[..., 2:4]) ** 2
    else:
        xy, wh = torch.sigmoid(t[..., :2]), torch.exp(t[..., 2:4].clamp(max=MAX_LOG_SIZE))
    cells = torch.stack(torch.broadcast_tensors(column, row), -1).to(t.dtype)
    centre = (xy * head.scale_x_y + cells - 0.5 * (head.scale_x_y - 1.0)) * head.stride_px
    half = wh * anchors / 2
    return torch.cat([centre - half, centre + half], -1)


def ciou(found_P4: Tensor, true_P4: Tensor) -> Tensor:
    """`[P]`: overlap less the distance of the centres and the difference of the shapes, in [-2, 1].

    The weight of the shapes' difference is taken as a constant, as its authors do.
    """
    tiny = 1e-7
    low, high = torch.maximum(found_P4[:, :2], true_P4[:, :2]), torch.minimum(found_P4[:, 2:], true_P4[:, 2:])
    inside = (high - low).clamp(min=0).prod(-1)
    found_size, true_size = ((boxes[:, 2:] - boxes[:, :2]).clamp(min=tiny) for boxes in (found_P4, true_P4))
    overlap = inside / (found_size.prod(-1) + true_size.prod(-1) - inside + tiny)
    around = torch.maximum(found_P4[:, 2:], true_P4[:, 2:]) - torch.minimum(found_P4[:, :2], true_P4[:, :2])
    between = (found_P4[:, :2] + found_P4[:, 2:] - true_P4[:, :2] - true_P4[:, 2:]) / 2
    distance = between.square().sum(-1) / (around.square().sum(-1) + tiny)
    angles = (torch.atan(size[:, 0] / size[:, 1]) for size in (true_size, found_size))
    shape = 4 / math.pi**2 * (next(angles) - next(angles)).square()
    with torch.no_grad():
        weight = shape / (1 - overlap + shape + tiny)
    return overlap - distance - weight * shape


class DetectionLoss:
    """Of the raw maps of a detector's heads against labelled boxes.

    Args:
        detection: the heads, in the order of the maps.
        logits: the maps of heads with new_coords come without their sigmoid. In bfloat16 that is 1 from a logit of 6
            on, and the gradient of a place that is wrong and sure of it would be gone.
        workers: that have a slice of the batch each. The loss is per place that is to find a box, and slices have
            different numbers of those: each worker divides by their mean, so that the mean of the workers' losses, and
            of their gradients, is that of the whole batch.
    """

    def __init__(self, detection: Detection, *, logits: bool = False, workers: Workers = NO_WORKERS) -> None:
        self.heads, self.logits, self._workers = detection.heads, logits, workers

    def __call__(self, raw: Sequence[Tensor], targets_M6: Tensor) -> LossParts:
        """The loss of a batch; without any labelled box, that of the objectness alone.

        Args:
            raw: of each head `[N, anchors * (5 + C), h, w]`.
            targets_M6: see the top of the file.
        """
        maps = [
            _by_anchor(self._unsquashed(x_NCHW.float(), head), head)
            for x_NCHW, head in zip(raw, self.heads, strict=True)
        ]
        everything_M6, targets_M6 = targets_M6, targets_M6[targets_M6[:, 1] != IGNORED]
        assigned = assign(targets_M6, self.heads, [(t.shape[2], t.shape[3]) for t in maps])
        box = objectness = classes = maps[0].new_zeros(())
        for t, head, places in zip(maps, self.heads, assigned, strict=True):
            parts = _head_loss(t, head, places, targets_M6, everything_M6)
            box, objectness, classes = box + parts.box, objectness + parts.objectness, classes + parts.classes
        (total,) = self._workers.sums(sum(len(places.target) for places in assigned))
        num = max(1, total) / self._workers.num
        return LossParts(
            box=BOX_WEIGHT * box / num,
            objectness=OBJECT_WEIGHT * objectness / num,
            classes=CLASS_WEIGHT * classes / num,
        )

    def _unsquashed(self, x_NCHW: Tensor, head: DetectionHead) -> Tensor:
        """Before the sigmoid, whatever the network gives."""
        return torch.logit(x_NCHW.clamp(TINY, 1 - TINY)) if head.new_coords and not self.logits else x_NCHW


def _by_anchor(x_NCHW: Tensor, head: DetectionHead) -> Tensor:
    """`[N, anchors, h, w, 5 + C]`."""
    num, chs, height, width = x_NCHW.shape
    anchors = len(head.anchors)
    return x_NCHW.reshape(num, anchors, chs // anchors, height, width).permute(0, 1, 3, 4, 2)


def _squashed(t: Tensor, head: DetectionHead) -> Tensor:
    """As `decode_maps` and the deployed network have it."""
    return torch.sigmoid(t) if head.new_coords else t


def _head_loss(
    t: Tensor, head: DetectionHead, places: Assignment, targets_M6: Tensor, everything_M6: Tensor
) -> LossParts:
    """`t` before any sigmoid; the targets that count, and those that are ignored as well."""
    wanted_P6 = _beside(t, targets_M6[places.target])
    anchors_A2 = _beside(t, torch.tensor(head.anchors))
    image, anchor, row, column = asked = tuple(
        _beside(t, index) for index in (places.image, places.anchor, places.row, places.column)
    )
    picked_PK = t[image, anchor, row, column]
    boxes_P4 = decode_maps(_squashed(picked_PK, head), head, row, column, anchors_A2[anchor])
    box = (1 - ciou(boxes_P4, wanted_P6[:, 2:])).sum()
    one_hot = _beside(t, functional.one_hot(targets_M6[places.target, 1].long(), t.shape[-1] - 5).float())
    classes = _cross_entropy(picked_PK[:, 5:], one_hot).sum()
    wanted_NAhw = torch.zeros(t.shape[:4], device=t.device)
    wanted_NAhw[asked] = 1.0
    counts = _far_from_all(_squashed(t.detach(), head), head, anchors_A2, everything_M6) | (wanted_NAhw > 0)
    objectness = torch.where(counts, _cross_entropy(t[..., 4], wanted_NAhw), 0.0).sum()
    return LossParts(box=box, objectness=objectness, classes=classes)


def _beside(t: Tensor, host: Tensor) -> Tensor:
    """Where `t` lies. From the CPU without waiting for the device: CUDA takes the values before the call returns."""
    return host.to(t.device, non_blocking=True)


def _cross_entropy(raw: Tensor, wanted: Tensor) -> Tensor:
    """Element by element, of logits."""
    return functional.binary_cross_entropy_with_logits(raw, wanted, reduction="none")


@torch.no_grad()
def _far_from_all(t: Tensor, head: DetectionHead, anchors_A2: Tensor, targets_M6: Tensor) -> Tensor:
    """`[N, anchors, h, w]` bool: places whose box overlaps no labelled box of their image by more than `IGNORE_IOU`.

    Of an ignored box by no more than `IGNORED_SHARE` of their own area.
    """
    rows = torch.arange(t.shape[2], device=t.device)[:, None]
    columns = torch.arange(t.shape[3], device=t.device)[None]
    boxes = decode_maps(t, head, rows, columns, anchors_A2[:, None, None])
    far = torch.ones(t.shape[:4], dtype=torch.bool, device=t.device)
    for index in torch.unique(targets_M6[:, 0].long()).tolist():
        true_M6 = _beside(t, targets_M6[targets_M6[:, 0].long() == index])
        ignored_M = true_M6[:, 1] == IGNORED
        overlaps_PM = _overlaps(boxes[index].reshape(-1, 4), true_M6[:, 2:], own_M=ignored_M)
        limits_M = torch.where(ignored_M, IGNORED_SHARE, IGNORE_IOU)
        far[index] = (overlaps_PM <= limits_M).all(1).reshape(far[index].shape)
    return far


def _overlaps(a_N4: Tensor, b_M4: Tensor, *, own_M: Tensor) -> Tensor:
    """`[N, M]`: intersection over union, or over the area of `a` alone."""
    low, high = torch.maximum(a_N4[:, None, :2], b_M4[None, :, :2]), torch.minimum(a_N4[:, None, 2:], b_M4[None, :, 2:])
    inside = (high - low).clamp(min=0).prod(-1)
    a_N, b_M = ((boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(-1) for boxes in (a_N4, b_M4))
    union_NM = a_N[:, None] + b_M[None] - inside
    return inside / torch.where(own_M[None], a_N[:, None], union_NM).clamp(min=1e-12)
