"""Teeth: every fault meets the comparison at the FP32 and at the FP16 tolerance."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from cspdeploy.core.catalog import FP32_FLOOR
from cspdeploy.core.compare import Comparison, compare_outputs
from cspdeploy.core.metrics import softmax
from cspdeploy.core.results import ImageDecision, Limit
from cspdeploy.core.tolerance import tolerance_for

NAMES = ("logits",)
NUM_IMAGES, NUM_CLASSES = 64, 10
LIMITS = {precision: tolerance_for(precision, FP32_FLOOR) for precision in ("fp32", "fp16")}
Array = npt.NDArray[np.generic]

both_precisions = pytest.mark.parametrize("precision", LIMITS)


def _reference() -> npt.NDArray[np.float64]:
    """Logits that float32 holds exactly, with clear winners."""
    return np.random.default_rng(0).normal(0, 3, (NUM_IMAGES, NUM_CLASSES)).astype(np.float32).astype(np.float64)


def _compare(
    outputs: Array | dict[str, Array], limit: Limit, *, reference: npt.NDArray[np.float64] | None = None
) -> Comparison:
    named = outputs if isinstance(outputs, dict) else {"logits": outputs}
    reference_NC = _reference() if reference is None else reference
    return compare_outputs(
        named, names=NAMES, reference={"logits": reference_NC}, limits={"logits": limit}, decisions=True
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
    found = _compare(_good(), LIMITS[precision])
    assert (found.verdict, found.reason) == ("pass", "")
    assert (found.rel_l2, found.max_abs, found.limit) == (0.0, 0.0, LIMITS[precision].rel_l2)
    assert (found.top1_agreement, found.top5_agreement) == (1.0, 1.0)
    assert found.sqnr_db == float("inf")
    assert found.error_histogram == (NUM_IMAGES * NUM_CLASSES,) + (0,) * 10
    probabilities = softmax(_good())
    assert found.decisions == tuple(
        ImageDecision(index=int(row.argmax()), probability=float(row.max())) for row in probabilities
    )


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
    found = _compare(faulty[fault], LIMITS[precision])
    assert found.verdict == verdict
    assert found.reason


@both_precisions
@pytest.mark.parametrize("names", [[], ["logits", "extra"], ["extra", "logits"], ["probabilities"]])
def test_missing_extra_and_renamed_outputs(precision: str, names: list[str]) -> None:
    found = _compare({name: _good() for name in names}, LIMITS[precision])
    assert found.verdict == "order"
    assert "logits" in found.reason


@both_precisions
@pytest.mark.parametrize("shape", [(0, 10), (5, 0), (0, 0)])
def test_nothing_compared_is_not_a_pass(precision: str, shape: tuple[int, int]) -> None:
    found = _compare(np.zeros(shape, np.float32), LIMITS[precision], reference=np.zeros(shape))
    assert found.verdict == "error"
    assert found.rel_l2 is None


def test_scale_that_a_cosine_and_top1_would_pass() -> None:
    found = _compare(_good() * np.float32(0.5), LIMITS["fp16"])
    assert found.top1_agreement == found.top5_agreement == 1.0
    assert found.rel_l2 == pytest.approx(0.5)
    assert found.verdict == "numeric"


def test_numbers_of_a_known_difference() -> None:
    reference = np.array([[3.0, 0.0, 0.0, 0.0, 0.0, 0.0], [0.0, 4.0, 0.0, 0.0, 0.0, 0.0]])
    outputs = np.array([[3.0, 0.0, 0.0, 0.0, 0.0, 1.0], [5.0, 4.0, 0.0, 0.0, 0.0, 0.0]], np.float32)
    found = _compare(outputs, LIMITS["fp32"], reference=reference)
    assert found.rel_l2 == pytest.approx(np.sqrt(26) / 5)
    assert found.max_abs == 5.0
    assert found.top1_agreement == 0.5
    assert found.top5_agreement == pytest.approx(0.9)  # the sixth class came in for the fifth in the first row


def _flip(margin: float, limit: Limit) -> Comparison:
    """Outputs in which one image's two best classes change places; they are `margin` typical errors apart."""
    reference = _reference()
    best, second = np.argsort(-reference[7])[:2]
    typical = limit.rel_l2 * np.sqrt(np.mean(reference**2))
    reference[7, second] = reference[7, best] - margin * typical
    outputs = reference.astype(np.float32)
    outputs[7, [best, second]] = outputs[7, [second, best]]
    return _compare(outputs, limit, reference=reference)


@both_precisions
def test_flip_of_a_near_tie_is_no_failure(precision: str) -> None:
    found = _flip(2.0, LIMITS[precision])
    assert found.verdict == "pass"
    assert found.top1_agreement == 1 - 1 / NUM_IMAGES


@both_precisions
def test_flip_of_a_clear_image_is_a_failure_even_within_the_limit(precision: str) -> None:
    found = _flip(8.0, LIMITS[precision])
    assert found.rel_l2 is not None
    assert found.rel_l2 <= LIMITS[precision].rel_l2
    assert found.verdict == "decision"
    assert "first image 7" in found.reason


def test_limit_itself_passes_and_the_reason_names_it() -> None:
    reference = np.full((4, 10), 2.0)
    limit = Limit(output="logits", rel_l2=0.25, why="of this test")
    assert _compare(np.full((4, 10), 2.5, np.float32), limit, reference=reference).verdict == "pass"
    found = _compare(np.full((4, 10), 2.75, np.float32), limit, reference=reference)
    assert found.verdict == "numeric"
    assert "of this test" in found.reason
    assert "2.5e-01" in found.reason


_values = st.floats(-1000, 1000, width=32, allow_subnormal=False)
_outputs = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=8), elements=_values)


@given(_outputs, st.sampled_from(sorted(LIMITS)))
def test_reflexive(outputs: npt.NDArray[np.float32], precision: str) -> None:
    found = _compare(outputs, LIMITS[precision], reference=outputs.astype(np.float64))
    assert found.verdict == "pass"
    assert (found.rel_l2, found.max_abs, found.top1_agreement, found.top5_agreement) == (0.0, 0.0, 1.0, 1.0)


@given(
    _outputs, st.sampled_from(sorted(LIMITS)), st.floats(1.2, 1000), st.sampled_from([-1, 1]),
)  # fmt: skip
def test_any_uniform_shift_above_the_limit_is_caught(
    outputs: npt.NDArray[np.float32], precision: str, times_limit: float, sign: int
) -> None:
    reference = outputs.astype(np.float64)
    rms = float(np.sqrt(np.mean(reference**2)))
    assume(rms > 1e-3)
    shifted = (reference + sign * times_limit * LIMITS[precision].rel_l2 * rms).astype(np.float32)
    assert _compare(shifted, LIMITS[precision], reference=reference).verdict == "numeric"


@given(_outputs, st.sampled_from([np.nan, np.inf, -np.inf]), st.data())
def test_one_value_that_is_not_finite_is_caught(
    outputs: npt.NDArray[np.float32], value: float, data: st.DataObject
) -> None:
    reference = outputs.astype(np.float64)
    outputs.flat[data.draw(st.integers(0, outputs.size - 1))] = value
    assert _compare(outputs, LIMITS["fp16"], reference=reference).verdict == "nan"


# --- several outputs ---

MAPS = {
    "features_s8": np.random.default_rng(1).normal(0, 1, (3, 4, 5, 6)).astype(np.float32).astype(np.float64),
    "features_s16": np.random.default_rng(2).normal(0, 9, (3, 8, 2, 3)).astype(np.float32).astype(np.float64),
}


def _compare_maps(**changes: Array) -> Comparison:
    outputs = {name: changes.get(name, array.astype(np.float32)) for name, array in MAPS.items()}
    limits = {"features_s8": LIMITS["fp32"], "features_s16": LIMITS["fp16"]}
    return compare_outputs(outputs, names=tuple(MAPS), reference=MAPS, limits=limits, decisions=False)


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
    assert found.limit == LIMITS["fp16"].rel_l2
    assert _compare_maps(features_s8=(MAPS["features_s8"] * 1.001).astype(np.float32)).verdict == "numeric"


def test_outputs_of_one_shape_that_changed_places() -> None:
    reference = {"a": MAPS["features_s8"], "b": -MAPS["features_s8"]}
    outputs = {"b": -MAPS["features_s8"].astype(np.float32), "a": MAPS["features_s8"].astype(np.float32)}
    limits = dict.fromkeys(reference, LIMITS["fp16"])
    found = compare_outputs(outputs, names=("a", "b"), reference=reference, limits=limits, decisions=False)
    assert found.verdict == "order"


def test_errors_of_all_outputs_are_told_together() -> None:
    """1 % of one map, whose values are nine times as large, and nothing of the other."""
    found = _compare_maps(features_s16=(MAPS["features_s16"] * 1.0099).astype(np.float32))
    signal = sum(float(np.sum(array**2)) for array in MAPS.values())
    noise = float(np.sum((0.0099 * MAPS["features_s16"]) ** 2))
    assert found.sqnr_db == pytest.approx(10 * np.log10(signal / noise), abs=0.01)
    assert sum(found.error_histogram) == sum(array.size for array in MAPS.values())
    assert found.error_histogram[0] == MAPS["features_s8"].size
    assert found.decisions == ()


def test_nothing_is_told_of_errors_where_one_output_has_none() -> None:
    nan = np.full_like(MAPS["features_s8"], np.nan, np.float32)
    found = _compare_maps(features_s8=nan)
    assert (found.verdict, found.sqnr_db, found.error_histogram) == ("nan", None, ())


# --- what a file that cspdeploy did not make may do ---


def test_promised_dtype_is_asked_for_in_place_of_float32() -> None:
    limits = {"logits": Limit(output="logits", rel_l2=1e-2, why="")}
    half = _good().astype(np.float16)
    for dtypes, verdict in (({"logits": "float16"}, "pass"), ({"logits": "float64"}, "dtype"), ({}, "dtype")):
        found = compare_outputs(
            {"logits": half}, names=NAMES, reference={"logits": _reference()}, limits=limits, decisions=True,
            dtypes=dtypes,
        )  # fmt: skip
        assert found.verdict == verdict


# --- decisions that INT8 is asked for ---


@pytest.mark.parametrize(("num_changed", "verdict"), [(2, "pass"), (3, "decision")])
def test_near_ties_of_int8_may_change_up_to_a_number(num_changed: int, verdict: str) -> None:
    """Images without any lead: none of them is clear, whatever their winner."""
    limit = Limit(output="logits", rel_l2=0.2, why="")
    reference = _reference()
    outputs = reference.astype(np.float32)
    for row in range(5):
        best, second = np.argsort(-reference[row])[:2]
        reference[row, second] = reference[row, best] - 1e-3
        outputs[row] = reference[row]
        if row < num_changed:
            outputs[row, [best, second]] = outputs[row, [second, best]]
    found = compare_outputs(
        {"logits": outputs}, names=NAMES, reference={"logits": reference}, limits={"logits": limit}, decisions=True,
        num_flips=2,
    )  # fmt: skip
    assert found.verdict == verdict
    assert found.top1_agreement == 1 - num_changed / NUM_IMAGES


def test_rows_that_are_no_images_are_never_called_permuted() -> None:
    """Boxes of one call, or a single number, which has no rows at all."""
    limit = LIMITS["fp32"]
    for reference, outputs in ((_reference(), _good()[::-1]), (np.array(2.0), np.array(3.0, np.float32))):
        found = compare_outputs(
            {"y": outputs}, names=("y",), reference={"y": reference}, limits={"y": limit}, decisions=False, images=False
        )
        assert found.verdict == "numeric"
    permuted = compare_outputs(
        {"y": _good()[::-1]}, names=("y",), reference={"y": _reference()}, limits={"y": limit}, decisions=False
    )
    assert permuted.verdict == "order"
