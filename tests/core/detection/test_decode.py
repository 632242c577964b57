"""Decoding against cells worked out by hand, against the network in torch, and in what order candidates come."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from cspdeploy.core.detection.decode import decode_heads
from cspdeploy.core.detection.spec import Detection, DetectionHead, Suppression
from cspdeploy.nets.detection import DecodedDetector

TINY = ((10.0, 14.0), (23.0, 27.0), (37.0, 58.0), (81.0, 82.0), (135.0, 169.0), (344.0, 319.0))


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def raw_map(head: DetectionHead, *, classes: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    shape = (2, len(head.anchors) * (5 + classes), height, width)
    values = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return np.asarray(1 / (1 + np.exp(-values)) if head.new_coords else values, np.float32)


def test_a_cell_by_hand() -> None:
    """yolov4-tiny's second head: anchors 1, 2 and 3, in pixels of the input."""
    head = DetectionHead(output="head_s16", stride_px=16, anchors=TINY[1:4], scale_x_y=1.05)
    raw = np.full((1, 3 * 7, 26, 26), -20.0, np.float32)
    anchor, row, column = 2, 5, 7
    raw[0, anchor * 7 : (anchor + 1) * 7, row, column] = (0.3, -0.4, 0.2, -0.1, 1.5, 2.0, -1.0)
    boxes, scores = decode_heads({"head_s16": raw}, Detection(heads=(head,)))
    assert boxes.shape == (1, 3 * 26 * 26, 4)
    assert scores.shape == (1, 3 * 26 * 26, 2)
    assert boxes.dtype == scores.dtype == np.float32
    at = anchor * 26 * 26 + row * 26 + column
    x, y = (column + 1.05 * sigmoid(0.3) - 0.025) * 16, (row + 1.05 * sigmoid(-0.4) - 0.025) * 16
    w, h = 81 * math.exp(0.2), 82 * math.exp(-0.1)
    np.testing.assert_allclose(boxes[0, at], [x - w / 2, y - h / 2, x + w / 2, y + h / 2], rtol=1e-5)
    np.testing.assert_allclose(scores[0, at], [sigmoid(1.5) * sigmoid(2.0), sigmoid(1.5) * sigmoid(-1.0)], rtol=1e-5)
    assert scores[0].argmax() == at * 2


def test_a_cell_of_new_coords_by_hand() -> None:
    """The convolution has applied the sigmoid: 2x - 0.5, and the square of twice the size."""
    head = DetectionHead(output="head_s8", stride_px=8, anchors=((12.0, 16.0),), scale_x_y=2.0, new_coords=True)
    raw = np.zeros((1, 6, 4, 6), np.float32)
    raw[0, :, 3, 1] = (0.75, 0.25, 0.5, 0.8, 0.9, 0.5)
    boxes, scores = decode_heads({"head_s8": raw}, Detection(heads=(head,)))
    x, y, w, h = (1 + 1.0) * 8, (3 + 0.0) * 8, 12.0, (2 * 0.8) ** 2 * 16
    np.testing.assert_allclose(boxes[0, 3 * 6 + 1], [x - w / 2, y - h / 2, x + w / 2, y + h / 2], rtol=1e-6)
    np.testing.assert_allclose(scores[0, 3 * 6 + 1], [0.45], rtol=1e-6)


@pytest.mark.parametrize(("new_coords", "scale"), [(False, 1.0), (False, 1.2), (True, 2.0)])
def test_numpy_is_torch(new_coords: bool, scale: float) -> None:
    """Heads in the order of the network's outputs, the coarse one first as in yolov4-tiny."""
    heads = (
        DetectionHead(output="b", stride_px=32, anchors=TINY[3:], scale_x_y=scale, new_coords=new_coords),
        DetectionHead(output="a", stride_px=16, anchors=TINY[1:4], scale_x_y=scale, new_coords=new_coords),
    )
    raw = {
        "b": raw_map(heads[0], classes=3, height=2, width=3),
        "a": raw_map(heads[1], classes=3, height=4, width=6, seed=1),
    }

    class Maps(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return torch.from_numpy(raw["b"]), torch.from_numpy(raw["a"])

    detection = Detection(heads=heads)
    expected = DecodedDetector(Maps(), detection)(torch.zeros(1))
    assert expected[0].shape[1] == detection.num_candidates(64, 96) == 3 * (2 * 3 + 4 * 6)
    for found, value in zip(decode_heads(raw, detection), expected, strict=True):
        np.testing.assert_allclose(found, value.numpy(), rtol=2e-5, atol=1e-5, strict=True)


def test_extreme_maps_warn_of_nothing() -> None:
    head = DetectionHead(output="a", stride_px=8, anchors=((10.0, 10.0),))
    raw = np.full((1, 6, 1, 3), 1e4, np.float32)
    raw[..., 1], raw[..., 2] = -1e4, np.nan
    boxes, scores = decode_heads({"a": raw}, Detection(heads=(head,)))
    assert scores[0, :2, 0].tolist() == [1, 0]
    assert np.isnan(scores[0, 2, 0])
    assert np.isinf(boxes[0, 0]).all()
    assert np.isfinite(boxes[0, 1]).all()


def test_channels_that_do_not_fit() -> None:
    head = DetectionHead(output="a", stride_px=8, anchors=((10.0, 10.0), (20.0, 20.0)))
    with pytest.raises(ValueError, match=r"a: 15 channels, expected 2 anchors x \(5 \+ classes\)"):
        decode_heads({"a": np.zeros((1, 15, 2, 2), np.float32)}, Detection(heads=(head,)))
    with pytest.raises(KeyError):
        decode_heads({"b": np.zeros((1, 14, 2, 2), np.float32)}, Detection(heads=(head,)))


@pytest.mark.parametrize(
    "wrong",
    [{"score_threshold": 1.0}, {"score_threshold": float("nan")}, {"iou_threshold": 0.0}, {"max_detections": 0}],
)
def test_a_rule_out_of_its_range(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Suppression(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"stride_px": 0}, {"anchors": ()}, {"anchors": ((0.0, 3.0),)}, {"scale_x_y": 0.0}])
def test_a_head_that_is_none(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="head: got"):
        DetectionHead(**{"output": "head", "stride_px": 8, "anchors": ((1.0, 2.0),), **wrong})  # type: ignore[arg-type]
