from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from cspdeploy.core.metrics import (
    ERROR_DECADES,
    error_histogram,
    max_abs_difference,
    relative_l2,
    softmax,
    sqnr_db,
    top_k,
)

Array = npt.NDArray[np.float32]
Metric = Callable[[npt.NDArray[np.float64], npt.NDArray[np.float64]], float]

finite = arrays(
    np.float32,
    array_shapes(max_dims=3, max_side=6),
    elements=st.floats(-(2.0**20), 2.0**20, width=32, allow_subnormal=False),
)
logits = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=7), elements=st.floats(-100, 100, width=32))


@given(finite)
def test_an_array_equals_itself(x: Array) -> None:
    assert relative_l2(x, x) == 0
    assert max_abs_difference(x, x) == 0


@given(finite, st.sampled_from([0.5, 100.0, 0.0, -1.0]))
def test_a_change_of_scale_is_seen_in_full(x: Array, scale: float) -> None:
    """A cosine would call these equal."""
    assume(x.any())
    scaled = x.astype(np.float64) * scale
    assert relative_l2(scaled, x) == pytest.approx(abs(scale - 1))
    assert max_abs_difference(scaled, x) == pytest.approx(abs(scale - 1) * float(np.abs(x).max()))


@given(finite, st.data())
def test_a_change_of_one_element_is_seen_by_its_size(x: Array, data: st.DataObject) -> None:
    assume(x.any())
    at = data.draw(st.integers(0, x.size - 1))
    moved = x.astype(np.float64)
    moved.flat[at] += 1.0
    assert max_abs_difference(moved, x) == pytest.approx(1.0)
    assert relative_l2(moved, x) == pytest.approx(1 / float(np.linalg.norm(x.astype(np.float64).ravel())))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["actual", "reference", "both"])
def test_what_is_not_finite_is_never_equal(value: float, where: str) -> None:
    clean = np.ones((2, 3), np.float32)
    broken = clean.copy()
    broken[1, 2] = value
    actual = clean if where == "reference" else broken
    reference = clean if where == "actual" else broken
    assert relative_l2(actual, reference) == np.inf
    assert max_abs_difference(actual, reference) == np.inf


def test_zero_reference() -> None:
    zeros = np.zeros(3, np.float32)
    assert relative_l2(zeros, zeros) == 0
    assert relative_l2(np.full(3, 1e-20), zeros) == np.inf


@pytest.mark.parametrize("metric", [relative_l2, max_abs_difference])
def test_nothing_to_compare_is_an_error(metric: Metric) -> None:
    with pytest.raises(ValueError, match="empty"):
        metric(np.zeros((0, 10)), np.zeros((0, 10)))


@pytest.mark.parametrize("metric", [relative_l2, max_abs_difference])
@pytest.mark.parametrize("shape", [(3, 2), (6,), (1, 2, 3), (1, 3), (2, 1)])
def test_other_shapes_are_an_error_not_a_broadcast(metric: Metric, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="shapes"):
        metric(np.ones(shape), np.ones((2, 3)))


@given(logits, st.integers(1, 9))
def test_top_k_is_a_descending_selection(x_NC: Array, k: int) -> None:
    best = top_k(x_NC, k)
    assert best.shape == (len(x_NC), min(k, x_NC.shape[1]))
    values = np.take_along_axis(x_NC, best, axis=1)
    assert (np.diff(values, axis=1) <= 0).all()
    assert (values[:, 0] == x_NC.max(axis=1)).all()


def test_equal_values_go_by_lower_index() -> None:
    assert top_k(np.array([[1.0, 3.0, 3.0, 2.0, 3.0]]), 4).tolist() == [[1, 2, 4, 3]]


@given(logits)
def test_softmax_is_a_distribution_in_the_order_of_the_logits(x_NC: Array) -> None:
    shares = softmax(x_NC)
    assert np.allclose(shares.sum(axis=1), 1)
    assert (shares >= 0).all()
    assert np.allclose(shares, softmax(x_NC.astype(np.float64) + 1000.0))


def test_softmax_of_huge_logits_does_not_overflow() -> None:
    assert softmax(np.array([[1e30, 0.0]], np.float32)).tolist() == [[1.0, 0.0]]


def test_signal_to_noise_in_decibels() -> None:
    assert sqnr_db(1.0) == 0
    assert sqnr_db(1e-3) == pytest.approx(60)
    assert sqnr_db(0.0) == np.inf


def test_errors_are_counted_by_decade_of_the_reference() -> None:
    reference = np.full(11, 2.0)
    errors = np.array([0, 1e-10, 1e-9, 5e-9, 1e-8, 1e-4, 0.099, 0.1, 0.999, 1.0, 1e6])
    counts = error_histogram(reference + 2.0 * errors, reference)
    assert len(counts) == len(ERROR_DECADES) + 1 == 11
    assert sum(counts) == 11
    # 2 + 2e-9 and the like are not exact, so that only the neighbours of a border are told.
    assert counts[0] + counts[1] + counts[2] == 5
    assert counts[5] + counts[6] == 1
    assert counts[8] + counts[9] == 3
    assert counts[10] == 2


def test_errors_against_silence_count_as_the_largest() -> None:
    assert error_histogram(np.array([0.0, 1e-30]), np.zeros(2)) == (1,) + (0,) * 9 + (1,)


@given(finite)
def test_histogram_counts_every_value_once(x: Array) -> None:
    assert sum(error_histogram(x, x)) == x.size
    assert error_histogram(x, x)[0] == x.size
