"""What of a network's outputs an error is measured in: the outputs themselves, or what a detector's maps mean.

Most cells of a detector's maps hold nothing. How far their logits are from FP32's says little: a score of 0.001 that
becomes 0.002 changes no box, and the size of a box that nobody keeps changes nothing at all. Measured on a trained
YOLOv4-tiny, the raw maps' distance chose ranges that lost boxes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from cspdeploy.core.detection.spec import BOXES_OUTPUT, SCORES_OUTPUT, Detection
from cspdeploy.nets.detection import DecodedDetector
from cspdeploy.quant.plan import Floats

__all__ = ["DetectorView", "View", "plain_view", "view_arrays", "view_of"]

Array = npt.NDArray[np.generic]
Tensors = Mapping[str, torch.Tensor]
View = Callable[[Tensors, Tensors], dict[str, torch.Tensor]]
"""From outputs and those of the reference, on the same images, to what is compared, by name. `view(reference,
reference)` is what it is compared with. Differentiable with respect to the outputs."""


def plain_view(outputs: Tensors, reference: Tensors) -> dict[str, torch.Tensor]:
    """The outputs as they are."""
    return dict(outputs)


def view_of(detection: Detection | None) -> View:
    """That of a detector's raw maps; of anything else the outputs as they are."""
    return plain_view if detection is None else DetectorView(detection)


class DetectorView:
    """Scores, and the sides of boxes.

    "scores" `[N, A, C]`, objectness times class: what lies far from any threshold hardly moves.
    "boxes" `[N, A, 4]`: sides from the centre of the reference's box, in parts of its width and height, times a weight.
    A side that is off by a part of 0.025 costs a box of four such sides 5 to 10 % of its overlap, whatever its size.
    The weight is 1 for candidates that the reference keeps, and below the score threshold the score over it: its
    square, which counts, leaves nothing of thousands of empty cells.
    """

    def __init__(self, detection: Detection) -> None:
        self._heads = detection.heads
        self._threshold = max(detection.suppression.score_threshold, LEAST_THRESHOLD)
        self._decoder = DecodedDetector(nn.Identity(), detection)

    def __call__(self, outputs: Tensors, reference: Tensors) -> dict[str, torch.Tensor]:
        """As `View` says."""
        with torch.no_grad():
            exact_NA4, exact_scores_NAC = self._decode(reference)
            low, high = exact_NA4[..., :2], exact_NA4[..., 2:]
            size, centre = high - low, (high + low) / 2
            known = (torch.isfinite(size) & torch.isfinite(centre) & (size > 0)).all(-1, keepdim=True)
            weight = (exact_scores_NAC.amax(-1, keepdim=True) / self._threshold).clamp(max=1)
            scale = torch.where(known, weight / torch.where(known, size, 1), 0)
            centre = torch.where(known, centre, 0)
        boxes_NA4, scores_NAC = self._decode(self._bounded(outputs))
        sides_NA4 = (boxes_NA4 - torch.cat([centre, centre], -1)) * torch.cat([scale, scale], -1)
        known_NA4 = known.expand_as(sides_NA4)
        return {BOXES_OUTPUT: torch.where(known_NA4, sides_NA4, 0), SCORES_OUTPUT: scores_NAC}

    def _decode(self, raw: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        boxes, scores = self._decoder(tuple(raw[head.output] for head in self._heads))
        return boxes, scores

    def _bounded(self, raw: Tensors) -> Tensors:
        """With sizes whose exponential is finite: the gradient of an infinite one is NaN, whatever its weight."""
        found = dict(raw)
        for head in self._heads:
            if not head.new_coords:  # those have squares of what is in [0, 1]
                map_NCHW = raw[head.output]
                t = map_NCHW.reshape(map_NCHW.shape[0], len(head.anchors), -1, *map_NCHW.shape[2:])
                sizes = t[:, :, 2:4].clamp(max=MOST_LOG_SIZE)
                found[head.output] = torch.cat([t[:, :, :2], sizes, t[:, :, 4:]], 2).reshape(map_NCHW.shape)
        return found


MOST_LOG_SIZE = 20.0
"""A box of half a billion times its anchor is wrong enough, and the square of its error still a float32."""
LEAST_THRESHOLD = 0.05
"""Of a file that keeps every candidate (0.001, for a mean average precision over all recalls) the boxes that somebody
will look at are still those that score."""


def view_arrays(view: View, outputs: Mapping[str, Array], reference: Mapping[str, Array]) -> dict[str, Floats]:
    """The same of arrays, `[N, ...]` float32 each."""
    with torch.inference_mode():
        made = view(_tensors(outputs), _tensors(reference))
        return {name: value.numpy() for name, value in made.items()}


def _tensors(arrays: Mapping[str, Array]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
