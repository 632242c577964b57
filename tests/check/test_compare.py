"""Teeth: every fault meets the comparison at the FP32 and at the FP16 tolerance."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from cspdeploy.check.compare import Comparison, compare_outputs
from cspdeploy.check.tolerance import Tolerance, tolerance_for
from cspdeploy.core.catalog import FP32_FLOOR

NAMES = ("logits",)
NUM_IMAGES, NUM_CLASSES = 64, 10
TOLERANCES = {precision: tolerance_for(precision, FP32_FLOOR) for precision in ("fp32", "fp16")}
Array = npt.NDArray[np.generic]

both_precisions = pytest.mark.parametrize("precision", TOLERANCES)


def _reference() -> npt.NDArray[np.float64]:
    """Logits that float32 holds exactly, with clear winners."""
    return np.random.default_rng(0).normal(0, 3, (NUM_IMAGES, NUM_CLASSES)).astype(np.float32).astype(np.float64)


def _compare(
    outputs: Array | dict[str, Array], tolerance: Tolerance, *, reference: npt.NDArray[np.float64] | None = None
) -> Comparison:
    named = outputs if isinstance(outputs, dict) else {"logits": outputs}
    reference_NC = _reference() if reference is None else reference
    return compare_outputs(
        named, names=NAMES, reference={"logits": reference_NC}, tolerances={"logits": tolerance}, decisions=True
    )


def _good() -> npt.NDArray[np.float32]:
    return _reference().astype(np.float32)


def _with(value: float) -> npt.NDArray[np.float32]:
    outputs = _good()
    outputs[17, 3] = value
    return outputs


def _two_rows_swapped() -> npt.NDArray[np.float32]:
    outputs = _good()
    outputs[[4, 9]] = outputs[[9, 4]]
    return outputs


def _row_repeated() -> npt.NDArray[np.float32]:
    outputs = _good()
    outputs[4] = outputs[9]
    return outputs


@both_precisions
def test_same_outputs_pass(precision: str) -> None:
    found = _compare(_good(), TOLERANCES[precision])
    assert found == Comparison(
        verdict="pass", rel_l2=0.0, limit=TOLERANCES[precision].rel_l2, max_abs=0.0, top1_agreement=1.0,
        top5_agreement=1.0,
    )  # fmt: skip


@both_precisions
@pytest.mark.parametrize(
    ("fault", "verdict"),
    [
        ("x0.5", "numeric"), ("x100", "numeric"), ("x1.02", "numeric"), ("negated", "numeric"), ("zeros", "numeric"),
        ("shifted", "numeric"), ("columns rolled", "numeric"), ("row repeated", "numeric"), ("softmax", "numeric"),
        ("NaN", "nan"), ("infinite", "nan"), ("minus infinite", "nan"), ("all NaN", "nan"),
        ("rows reversed", "order"), ("rows rolled", "order"), ("two rows swapped", "order"),
        ("transposed", "shape"), ("truncated batch", "shape"), ("one class fewer", "shape"), ("flat", "shape"),
        ("no image", "shape"), ("float64", "dtype"), ("float16", "dtype"), ("int64", "dtype"),
    ],
)  # fmt: skip
def test_fault_has_its_verdict(precision: str, fault: str, verdict: str) -> None:
    good = _good()
    softmax = np.exp(good) / np.exp(good).sum(axis=1, keepdims=True)
    faulty: dict[str, Array] = {
        "x0.5": good * np.float32(0.5), "x100": good * np.float32(100), "x1.02": good * np.float32(1.02),
        "negated": -good, "zeros": np.zeros_like(good), "shifted": good + np.float32(0.1),
        "columns rolled": np.roll(good, 1, axis=1), "row repeated": _row_repeated(), "softmax": softmax,
        "NaN": _with(np.nan), "infinite": _with(np.inf), "minus infinite": _with(-np.inf),
        "all NaN": np.full_like(good, np.nan), "rows reversed": good[::-1], "rows rolled": np.roll(good, 1, axis=0),
        "two rows swapped": _two_rows_swapped(), "transposed": good.T, "truncated batch": good[:-1],
        "one class fewer": good[:, :-1], "flat": good.ravel(), "no image": good[:0],
        "float64": good.astype(np.float64), "float16": good.astype(np.float16), "int64": good.astype(np.int64),
    }  # fmt: skip
    found = _compare(faulty[fault], TOLERANCES[precision])
    assert found.verdict == verdict
    assert found.reason


@both_precisions
@pytest.mark.parametrize("names", [[], ["logits", "extra"], ["extra", "logits"], ["probabilities"]])
def test_missing_extra_and_renamed_outputs(precision: str, names: list[str]) -> None:
    found = _compare({name: _good() for name in names}, TOLERANCES[precision])
    assert found.verdict == "order"
    assert "logits" in found.reason


@both_precisions
@pytest.mark.parametrize("shape", [(0, 10), (5, 0), (0, 0)])
def test_nothing_compared_is_not_a_pass(precision: str, shape: tuple[int, int]) -> None:
    found = _compare(np.zeros(shape, np.float32), TOLERANCES[precision], reference=np.zeros(shape))
    assert found.verdict == "error"
    assert found.rel_l2 is None


def test_scale_that_a_cosine_and_top1_would_pass() -> None:
    found = _compare(_good() * np.float32(0.5), TOLERANCES["fp16"])
    assert found.top1_agreement == found.top5_agreement == 1.0
    assert found.rel_l2 == pytest.approx(0.5)
    assert found.verdict == "numeric"


def test_numbers_of_a_known_difference() -> None:
    reference = np.array([[3.0, 0.0, 0.0, 0.0, 0.0, 0.0], [0.0, 4.0, 0.0, 0.0, 0.0, 0.0]])
    outputs = np.array([[3.0, 0.0, 0.0, 0.0, 0.0, 1.0], [5.0, 4.0, 0.0, 0.0, 0.0, 0.0]], np.float32)
    found = _compare(outputs, TOLERANCES["fp32"], reference=reference)
    assert found.rel_l2 == pytest.approx(np.sqrt(26) / 5)
    assert found.max_abs == 5.0
    assert found.top1_agreement == 0.5
    assert found.top5_agreement == pytest.approx(0.9)  # the sixth class came in for the fifth in the first row


def _flip(margin: float, tolerance: Tolerance) -> Comparison:
    """Outputs in which one image's two best classes change places; they are `margin` typical errors apart."""
    reference = _reference()
    best, second = np.argsort(-reference[7])[:2]
    typical = tolerance.rel_l2 * np.sqrt(np.mean(reference**2))
    reference[7, second] = reference[7, best] - margin * typical
    outputs = reference.astype(np.float32)
    outputs[7, [best, second]] = outputs[7, [second, best]]
    return _compare(outputs, tolerance, reference=reference)


@both_precisions
def test_flip_of_a_near_tie_is_no_failure(precision: str) -> None:
    found = _flip(2.0, TOLERANCES[precision])
    assert found.verdict == "pass"
    assert found.top1_agreement == 1 - 1 / NUM_IMAGES


@both_precisions
def test_flip_of_a_clear_image_is_a_failure_even_within_the_limit(precision: str) -> None:
    found = _flip(8.0, TOLERANCES[precision])
    assert found.rel_l2 is not None
    assert found.rel_l2 <= TOLERANCES[precision].rel_l2
    assert found.verdict == "decision"
    assert "first image 7" in found.reason


def test_limit_itself_passes_and_the_reason_names_it() -> None:
    reference = np.full((4, 10), 2.0)
    tolerance = Tolerance(rel_l2=0.25, why="of this test")
    assert _compare(np.full((4, 10), 2.5, np.float32), tolerance, reference=reference).verdict == "pass"
    found = _compare(np.full((4, 10), 2.75, np.float32), tolerance, reference=reference)
    assert found.verdict == "numeric"
    assert "of this test" in found.reason
    assert "2.5e-01" in found.reason


_values = st.floats(-1000, 1000, width=32, allow_subnormal=False)
_outputs = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=8), elements=_values)


@given(_outputs, st.sampled_from(sorted(TOLERANCES)))
def test_reflexive(outputs: npt.NDArray[np.float32], precision: str) -> None:
    found = _compare(outputs, TOLERANCES[precision], reference=outputs.astype(np.float64))
    assert found.verdict == "pass"
    assert (found.rel_l2, found.max_abs, found.top1_agreement, found.top5_agreement) == (0.0, 0.0, 1.0, 1.0)


@given(
    _outputs, st.sampled_from(sorted(TOLERANCES)), st.floats(1.2, 1000), st.sampled_from([-1, 1]),
)  # fmt: skip
def test_any_uniform_shift_above_the_limit_is_caught(
    outputs: npt.NDArray[np.float32], precision: str, times_limit: float, sign: int
) -> None:
    reference = outputs.astype(np.float64)
    rms = float(np.sqrt(np.mean(reference**2)))
    assume(rms > 1e-3)
    shifted = (reference + sign * times_limit * TOLERANCES[precision].rel_l2 * rms).astype(np.float32)
    assert _compare(shifted, TOLERANCES[precision], reference=reference).verdict == "numeric"


@given(_outputs, st.sampled_from([np.nan, np.inf, -np.inf]), st.data())
def test_one_value_that_is_not_finite_is_caught(
    outputs: npt.NDArray[np.float32], value: float, data: st.DataObject
) -> None:
    reference = outputs.astype(np.float64)
    outputs.flat[data.draw(st.integers(0, outputs.size - 1))] = value
    assert _compare(outputs, TOLERANCES["fp16"], reference=reference).verdict == "nan"


# --- several outputs ---

MAPS = {
    "features_s8": np.random.default_rng(1).normal(0, 1, (3, 4, 5, 6)).astype(np.float32).astype(np.float64),
    "features_s16": np.random.default_rng(2).normal(0, 9, (3, 8, 2, 3)).astype(np.float32).astype(np.float64),
}


def _compare_maps(**changes: Array) -> Comparison:
    outputs = {name: changes.get(name, array.astype(np.float32)) for name, array in MAPS.items()}
    tolerances = {"features_s8": TOLERANCES["fp32"], "features_s16": TOLERANCES["fp16"]}
    return compare_outputs(outputs, names=tuple(MAPS), reference=MAPS, tolerances=tolerances, decisions=False)


def test_feature_maps_are_compared_without_decisions() -> None:
    found = _compare_maps()
    assert (found.verdict, found.rel_l2, found.top1_agreement, found.top5_agreement) == ("pass", 0.0, None, None)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize(
    ("fault", "verdict"), [("scaled", "numeric"), ("NaN", "nan"), ("rolled", "order"), ("cropped", "shape")]
)
def test_fault_in_any_output_is_found_and_named(name: str, fault: str, verdict: str) -> None:
    good = MAPS[name].astype(np.float32)
    nan = good.copy()
    nan[1, 2, 0, 0] = np.nan
    faulty: dict[str, Array] = {
        "scaled": good * np.float32(1.02), "NaN": nan, "rolled": np.roll(good, 1, axis=0), "cropped": good[:, :, :1],
    }  # fmt: skip
    found = _compare_maps(**{name: faulty[fault]})
    assert found.verdict == verdict
    assert found.reason.startswith(f"{name}: ")


def test_numbers_are_those_of_the_output_nearest_to_its_own_limit() -> None:
    """0.1 % is far beyond what FP32 may cost, and far within what FP16 may."""
    found = _compare_maps(features_s16=(MAPS["features_s16"] * 1.001).astype(np.float32))
    assert found.verdict == "pass"
    assert found.rel_l2 == pytest.approx(1e-3, rel=1e-2)
    assert found.limit == TOLERANCES["fp16"].rel_l2
    assert _compare_maps(features_s8=(MAPS["features_s8"] * 1.001).astype(np.float32)).verdict == "numeric"


def test_outputs_of_one_shape_that_changed_places() -> None:
    reference = {"a": MAPS["features_s8"], "b": -MAPS["features_s8"]}
    outputs = {"b": -MAPS["features_s8"].astype(np.float32), "a": MAPS["features_s8"].astype(np.float32)}
    tolerances = dict.fromkeys(reference, TOLERANCES["fp16"])
    found = compare_outputs(outputs, names=("a", "b"), reference=reference, tolerances=tolerances, decisions=False)
    assert found.verdict == "order"
