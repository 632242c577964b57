from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from cspdeploy.core.detection.spec import Detection, DetectionHead
from cspdeploy.nets.detection import DecodedDetector
from cspdeploy.train.detect_loss import ANCHOR_IOU, IGNORED, DetectionLoss, assign, ciou, decode_maps

HEADS = (
    DetectionHead(output="head_s32", stride_px=32, anchors=((40.0, 40.0), (60.0, 30.0)), scale_x_y=1.05),
    DetectionHead(output="head_s16", stride_px=16, anchors=((10.0, 10.0), (20.0, 20.0))),
)
GRIDS = ((2, 2), (4, 4))
CLASSES = 3


def _raw(seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(2, 2 * (5 + CLASSES), *grid) for grid in GRIDS]


def _target(image: int, index: int, *box: float) -> list[float]:
    return [float(image), float(index), *box]


@pytest.mark.parametrize(("found", "expected"), [
    ((10, 10, 20, 20), 1.0),
    # Side by side: no overlap; centres 10 apart in a box of 20 x 10.
    ((20, 10, 30, 20), -100 / 500),
    # Moved by 5: a third in common; centres 5 apart in a box of 15 x 10.
    ((15, 10, 25, 20), 1 / 3 - 25 / 325),
    # Twice as wide about the same centre: half in common, v = 4 / pi^2 (atan 1 - atan 2)^2, alpha = v / (1/2 + v).
    ((5, 10, 25, 20), 0.5 - (v := 4 / math.pi**2 * (math.atan(1) - math.atan(2)) ** 2) * v / (0.5 + v)),
])  # fmt: skip
def test_ciou_against_values_by_hand(found: tuple[float, ...], expected: float) -> None:
    true = torch.tensor([[10.0, 10.0, 20.0, 20.0]])
    assert ciou(torch.tensor([found], dtype=torch.float32), true).item() == pytest.approx(expected, abs=1e-6)


def test_ciou_leads_to_the_box() -> None:
    found, true = torch.tensor([[2.0, 3.0, 9.0, 40.0]]), torch.tensor([[30.0, 10.0, 50.0, 25.0]])
    found.requires_grad_()
    optimizer = torch.optim.Adam([found], lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        (1 - ciou(found, true)).sum().backward()
        optimizer.step()
    assert found.detach().numpy() == pytest.approx(true.numpy(), abs=1.0)


def test_gradient_of_the_loss_is_that_of_its_value() -> None:
    """By small steps in float64. CIoU holds its weight constant, so that equal shapes are asked of it: v is 0."""
    true = torch.tensor([[10.0, 10.0, 20.0, 20.0]], dtype=torch.float64)
    found = torch.tensor([[12.0, 9.0, 22.0, 19.0]], dtype=torch.float64, requires_grad=True)
    value = ciou(found, true)
    (gradient,) = torch.autograd.grad(value.sum(), found)
    for index in range(4):
        step = torch.zeros_like(found)
        step[0, index] = 1e-5
        slope = (ciou(found + step, true) - ciou(found - step, true)) / 2e-5
        assert gradient[0, index].item() == pytest.approx(slope.item(), abs=1e-4)


def test_a_box_without_an_extent_gives_a_finite_gradient() -> None:
    found = torch.tensor([[5.0, 5.0, 5.0, 5.0]], requires_grad=True)
    ciou(found, torch.tensor([[10.0, 10.0, 20.0, 20.0]])).sum().backward()
    assert found.grad is not None
    assert found.grad.isfinite().all()


def test_boxes_are_decoded_as_the_export_decodes_them() -> None:
    raw = _raw()

    class Network(torch.nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return tuple(raw)

    for new_coords in (False, True):
        heads = tuple(DetectionHead(output=h.output, stride_px=h.stride_px, anchors=h.anchors,
                                    scale_x_y=h.scale_x_y, new_coords=new_coords) for h in HEADS)  # fmt: skip
        expected, _ = DecodedDetector(Network(), Detection(heads=heads))(torch.zeros(2, 3, 64, 64))
        made = []
        for head, x, (rows, columns) in zip(heads, raw, GRIDS, strict=True):
            t = x.reshape(2, 2, 5 + CLASSES, rows, columns).permute(0, 1, 3, 4, 2)
            anchors = torch.tensor(head.anchors)[:, None, None]
            boxes = decode_maps(t, head, torch.arange(rows)[:, None], torch.arange(columns)[None], anchors)
            made.append(boxes.reshape(2, -1, 4))
        torch.testing.assert_close(torch.cat(made, 1), expected)


def test_a_box_goes_to_its_cell_and_to_every_anchor_of_like_shape() -> None:
    # 20 x 20 about (40, 24): the fourth anchor exactly; the third by 1/4, the first by 1/4, the second by 400/1800.
    places = assign(torch.tensor([_target(1, 2, 30, 14, 50, 34)]), HEADS, GRIDS)
    assert all(overlap > ANCHOR_IOU for overlap in (1 / 4, 400 / 1800))
    assert [(p.image.tolist(), p.anchor.tolist(), p.row.tolist(), p.column.tolist()) for p in places] == [
        ([1, 1], [0, 1], [0, 0], [1, 1]), ([1, 1], [0, 1], [1, 1], [2, 2]),
    ]  # fmt: skip
    assert all(p.target.tolist() == [0, 0] for p in places)


def test_a_box_like_no_anchor_still_goes_to_the_best_one() -> None:
    places = assign(torch.tensor([_target(0, 0, 0, 0, 64, 2)]), HEADS, GRIDS)
    assert [len(p.target) for p in places] == [0, 1]
    assert places[1].anchor.tolist() == [0]  # 20 / 208, before 40 / 488


def test_a_centre_on_the_last_edge_stays_in_the_last_cell() -> None:
    coarse, fine = assign(torch.tensor([_target(0, 0, 44, 44, 84, 84)]), HEADS, GRIDS)
    assert (coarse.row.tolist(), coarse.column.tolist()) == ([1, 1], [1, 1])
    assert (fine.row.tolist(), fine.column.tolist()) == ([3], [3])


def test_without_a_labelled_box_only_objectness_counts() -> None:
    parts = DetectionLoss(Detection(heads=HEADS))(_raw(), torch.zeros(0, 6))
    assert (parts.box.item(), parts.classes.item()) == (0.0, 0.0)
    assert parts.objectness.item() > 0


def _perfect(target: list[float]) -> list[Tensor]:
    """Raw maps that say this one box, as sure as can be, wherever it is asked for."""
    raw = [torch.full((2, 2 * (5 + CLASSES), *grid), -12.0) for grid in GRIDS]
    places = assign(torch.tensor([target]), HEADS, GRIDS)
    for x, head, p in zip(raw, HEADS, places, strict=True):
        for anchor, row, column in zip(p.anchor.tolist(), p.row.tolist(), p.column.tolist(), strict=True):
            centre = ((target[2] + target[4]) / 2 / head.stride_px, (target[3] + target[5]) / 2 / head.stride_px)
            inside = [(c - cell + 0.5 * (head.scale_x_y - 1)) / head.scale_x_y
                      for c, cell in zip(centre, (column, row), strict=True)]  # fmt: skip
            sides = (target[4] - target[2], target[5] - target[3])
            values = [math.log(part / (1 - part)) for part in inside]
            values += [math.log(side / a) for side, a in zip(sides, head.anchors[anchor], strict=True)]
            values += [12.0] + [12.0 if i == int(target[1]) else -12.0 for i in range(CLASSES)]
            x[int(target[0]), anchor * (5 + CLASSES) : (anchor + 1) * (5 + CLASSES), row, column] = torch.tensor(values)
    return raw


def test_right_maps_cost_nothing_and_each_fault_does() -> None:
    target = _target(1, 2, 30, 14, 50, 34)
    loss, targets = DetectionLoss(Detection(heads=HEADS)), torch.tensor([target])
    right = loss(_perfect(target), targets)
    assert right.total.item() == pytest.approx(0.0, abs=1e-3)
    moved = loss(_perfect(target), torch.tensor([_target(1, 2, 34, 14, 54, 34)]))
    assert moved.box.item() > 0.3
    other = loss(_perfect(target), torch.tensor([_target(1, 1, 30, 14, 50, 34)]))
    assert other.classes.item() > 10
    absent = loss(_perfect(target), torch.zeros(0, 6))
    assert absent.objectness.item() > 40  # four sure places, of which there is nothing
    missed = loss([torch.full_like(x, -12.0) for x in _perfect(target)], targets)
    assert missed.objectness.item() > 10


def test_a_good_box_that_was_not_asked_for_is_not_told_off() -> None:
    """Twice the same box: the neighbour cell says it too, which counts nothing above an overlap of 0.7."""
    head = DetectionHead(output="head_s16", stride_px=16, anchors=((20.0, 20.0),), scale_x_y=2.0)
    loss = DetectionLoss(Detection(heads=(head,)))
    target = torch.tensor([_target(0, 0, 20, 20, 40, 40)])  # the centre, 30, is of cell 1 and near cell 2

    def objectness(size: float) -> float:
        raw = torch.full((1, 8, 4, 4), -12.0)
        raw[0, :5, 1, 1] = torch.tensor([0.788, 0.788, 0.0, 0.0, 12.0])
        raw[0, :5, 2, 2] = torch.tensor([-1.466, -1.466, size, size, 12.0])
        return loss([raw], target).objectness.item()

    assert objectness(0.0) < 0.01
    assert objectness(2.0) > 10  # e^2 times as large: another box, and a wrong one


def test_probabilities_of_the_later_networks_are_taken_as_they_are() -> None:
    """With new_coords the maps are sigmoids already; a second sigmoid would let 1 cost 0.31."""
    head = DetectionHead(output="head_s16", stride_px=16, anchors=((20.0, 20.0),), scale_x_y=2.0, new_coords=True)
    raw = torch.zeros(1, 8, 4, 4)
    raw[0, :, 1, 1] = torch.tensor([0.6875, 0.6875, 0.5, 0.5, 1.0, 1.0, 0.0, 0.0])
    parts = DetectionLoss(Detection(heads=(head,)))([raw], torch.tensor([_target(0, 0, 20, 20, 40, 40)]))
    assert parts.total.item() == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("logit", [8.0, 16.0])
def test_a_sure_mistake_of_the_later_networks_is_still_corrected(logit: float) -> None:
    """Their sigmoid is 1 in bfloat16 by then, and its gradient 0: the loss takes what is before it."""
    head = DetectionHead(output="head_s16", stride_px=16, anchors=((20.0, 20.0),), scale_x_y=2.0, new_coords=True)
    raw = torch.full((1, 8, 4, 4), -8.0)
    raw[0, 4, 3, 0] = logit  # an object where there is none
    raw[0, 6, 1, 1] = logit  # and a class that is another one
    raw.requires_grad_()
    loss = DetectionLoss(Detection(heads=(head,)), logits=True)
    loss([raw.bfloat16()], torch.tensor([_target(0, 0, 20, 20, 40, 40)])).total.backward()
    assert raw.grad is not None
    assert raw.grad[0, 4, 3, 0].item() == pytest.approx(1.0, abs=0.01)
    assert raw.grad[0, 6, 1, 1].item() == pytest.approx(1.0, abs=0.01)


def test_logits_cost_what_their_probabilities_do() -> None:
    heads = tuple(dataclasses.replace(head, new_coords=True) for head in HEADS)
    targets, raw = torch.tensor([_target(1, 2, 30, 14, 50, 34)]), _raw()
    of_logits = DetectionLoss(Detection(heads=heads), logits=True)(raw, targets)
    of_maps = DetectionLoss(Detection(heads=heads))([x.sigmoid() for x in raw], targets)
    assert of_logits.total.item() == pytest.approx(of_maps.total.item(), rel=1e-4)


def test_what_need_not_be_found_is_neither_asked_nor_told_off() -> None:
    """A difficult box, or a crowd of which the found box is a small part; a box beside it is told off."""
    target = _target(1, 2, 30, 14, 50, 34)
    loss = DetectionLoss(Detection(heads=HEADS))
    ignored = torch.tensor([_target(1, IGNORED, 0, 0, 64, 64)])
    told = loss(_perfect(target), ignored)
    assert (told.box.item(), told.classes.item()) == (0.0, 0.0)
    assert told.objectness.item() < 1e-3
    assert loss(_perfect(target), torch.tensor([_target(0, IGNORED, 0, 0, 64, 64)])).objectness.item() > 40
    assert loss(_perfect(target), torch.tensor([_target(1, IGNORED, 0, 40, 64, 64)])).objectness.item() > 40
