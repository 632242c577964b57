"""What an error of a detector's maps counts for."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import pytest
import torch

from cspdeploy.core.detection.decode import decode_heads
from cspdeploy.core.detection.spec import Detection, DetectionHead, Suppression
from cspdeploy.quant.assemble import output_sqnr_db
from cspdeploy.quant.view import DetectorView, plain_view, view_arrays, view_of

Floats = npt.NDArray[np.float32]
HEADS = (
    DetectionHead(output="a", stride_px=16, anchors=((30.0, 20.0), (50.0, 60.0)), scale_x_y=1.1),
    DetectionHead(output="b", stride_px=8, anchors=((10.0, 12.0),)),
)
DETECTION = Detection(heads=HEADS)
VIEW = view_of(DETECTION)


def maps(*, objectness: float = -9.0) -> dict[str, Floats]:
    """Two classes; empty cells everywhere but at two places that hold an object."""
    rng = np.random.default_rng(0)
    found = {
        "a": rng.normal(size=(1, 14, 4, 4)).astype(np.float32),
        "b": rng.normal(size=(1, 7, 8, 8)).astype(np.float32),
    }
    found["a"][:, [4, 11]] = found["b"][:, 4:5] = objectness
    found["a"][0, 4, 1, 2] = found["b"][0, 4, 5, 5] = 3.0
    return found


def noise_db(changed: dict[str, Floats], exact: dict[str, Floats], view: DetectorView | None = None) -> float:
    seen = view or VIEW
    return output_sqnr_db(view_arrays(seen, exact, exact), view_arrays(seen, changed, exact))


def moved(name: str, place: tuple[int, ...], by: float) -> dict[str, Floats]:
    found = {key: array.copy() for key, array in maps().items()}
    found[name][place] += np.float32(by)
    return found


def test_scores_are_those_of_the_decoder() -> None:
    exact = maps()
    boxes, scores = decode_heads(exact, DETECTION)
    seen = view_arrays(VIEW, exact, exact)
    np.testing.assert_allclose(seen["scores"], scores, rtol=1e-5, atol=1e-7)
    assert seen["boxes"].shape == boxes.shape
    # A candidate that counts in full has its own sides half its size away from its own centre.
    best = int(scores[0].max(1).argmax())
    np.testing.assert_allclose(seen["boxes"][0, best], [-0.5, -0.5, 0.5, 0.5], atol=1e-5)


def test_same_maps_are_equal() -> None:
    assert noise_db(maps(), maps()) == 150.0


def test_what_holds_nothing_may_move() -> None:
    """The box of an empty cell, and its logit, are free; the same in the cell of an object are not."""
    empty, full = (0, 2, 0, 0), (0, 2, 1, 2)
    assert noise_db(moved("a", empty, 0.5), maps()) > 60
    assert noise_db(moved("a", full, 0.5), maps()) < 15
    assert noise_db(moved("a", (0, 4, 0, 0), -2.0), maps()) > 50
    assert noise_db(moved("a", (0, 4, 1, 2), -2.0), maps()) < 20


def test_raw_maps_would_say_the_opposite() -> None:
    """Twice as many logits of empty cells pull the raw distance down; what is found stays."""
    exact = maps()
    pulled = {name: array.copy() for name, array in exact.items()}
    pulled["a"][:, [4, 11]] *= np.float32(1.3)
    pulled["a"][0, 4, 1, 2] = exact["a"][0, 4, 1, 2]
    assert output_sqnr_db(exact, pulled) < 15
    assert noise_db(pulled, exact) > 50


def test_sides_count_in_parts_of_the_box() -> None:
    """The same share of a large and of a small box is the same error."""
    large, small = moved("a", (0, 2, 1, 2), 0.1), moved("b", (0, 2, 5, 5), 0.1)
    exact = maps()
    seen = {
        key: view_arrays(VIEW, got, exact)["boxes"] - view_arrays(VIEW, exact, exact)["boxes"]
        for key, got in (("large", large), ("small", small))
    }
    assert np.abs(seen["large"]).max() == pytest.approx(np.abs(seen["small"]).max(), rel=1e-4)
    assert np.abs(seen["large"]).max() == pytest.approx(0.5 * np.expm1(0.1), rel=1e-4)


def test_lower_threshold_counts_more_candidates() -> None:
    lower = dataclasses.replace(DETECTION, suppression=Suppression(score_threshold=0.06))
    exact, faint = maps(objectness=-2.2), maps(objectness=-2.2)
    faint["a"][0, 2, 0, 0] += np.float32(0.5)
    assert noise_db(faint, exact, DetectorView(lower)) < noise_db(faint, exact) - 1


def test_outputs_that_are_not_finite_are_never_good() -> None:
    assert noise_db(moved("a", (0, 4, 1, 2), np.nan), maps()) == float("-inf")


def test_reference_without_a_size_is_left_out() -> None:
    """An infinite box of FP32 has no relative error; the others still count."""
    exact = maps()
    exact["b"][0, 2, 0, 0] = 200.0
    seen = view_arrays(VIEW, exact, exact)
    assert np.isfinite(seen["boxes"]).all()
    assert noise_db(exact, exact) == 150.0


def test_gradients_reach_boxes_and_scores() -> None:
    raw = {name: torch.from_numpy(array).requires_grad_() for name, array in maps().items()}
    seen = VIEW(raw, {name: value.detach() for name, value in raw.items()})
    sum(value.square().sum() for value in seen.values()).backward()  # type: ignore[union-attr]
    gradient = raw["a"].grad
    assert gradient is not None
    assert gradient.isfinite().all()
    assert gradient[0, 2, 1, 2].abs() > 100 * gradient[0, 2, 0, 0].abs()


def test_gradient_of_an_infinite_size_is_finite() -> None:
    """In the output, in the reference, and in both: in a cell that counts, and in an empty one."""
    for changed in ({"both"}, {"output"}, {"reference"}):
        arrays = maps(), maps()
        for name, side in zip(("output", "reference"), arrays, strict=True):
            if changed & {name, "both"}:
                side["a"][0, [2, 9], 1, 2] = side["b"][0, 3, 0, 0] = 100.0
        raw, exact = ({name: torch.from_numpy(array) for name, array in side.items()} for side in arrays)
        for value in raw.values():
            value.requires_grad_()
        sum(value.square().sum() for value in VIEW(raw, exact).values()).backward()  # type: ignore[union-attr]
        assert all(value.grad is not None and value.grad.isfinite().all() for value in raw.values()), changed


def test_others_are_compared_as_they_are() -> None:
    x = {"y": torch.ones(2, 3)}
    assert view_of(None) is plain_view
    assert plain_view(x, x) == x
