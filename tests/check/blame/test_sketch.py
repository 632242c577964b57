"""Sketches: they are linear, they find one value among a million, and calls add up to the joined tensor."""

from __future__ import annotations

import numpy as np
import pytest

from cspdeploy.check.blame.sketch import Record, distance


def _record(*calls: np.ndarray) -> Record:
    record = Record(name="x", constant=False, shape=calls[0].shape)
    for values in calls:
        record.add(values)
    return record


def test_estimates_the_distance() -> None:
    rng = np.random.default_rng(0)
    x, off = rng.standard_normal(1_500_000), rng.standard_normal(1_500_000)
    for size in (1e-7, 1e-3, 1.0):
        assert distance(_record(x + size * off), _record(x)) == pytest.approx(size, rel=0.15)


def test_finds_one_value_among_many_exactly() -> None:
    x = np.random.default_rng(0).standard_normal(1_500_000)
    changed = x.copy()
    changed[1_234_567] += 0.5
    assert distance(_record(changed), _record(x)) == pytest.approx(0.5 / np.linalg.norm(x), rel=1e-9)


def test_tells_a_swap_of_channels_and_of_scale() -> None:
    x = np.random.default_rng(0).standard_normal((4, 8, 16))
    assert distance(_record(x[:, ::-1]), _record(x)) > 1
    assert distance(_record(2 * x), _record(x)) == pytest.approx(1, rel=0.1)


def test_calls_add_up_to_the_joined_tensor() -> None:
    x = np.random.default_rng(0).standard_normal((4, 700))
    np.testing.assert_allclose(_record(*(row for row in x)).sketch, _record(x).sketch)


def test_what_is_not_finite_is_infinitely_far() -> None:
    x = np.ones(10)
    bad = x.copy()
    bad[3] = np.nan
    assert distance(_record(bad), _record(x)) == np.inf
    assert (_record(bad).num_bad, _record(bad).absmax) == (1, 1.0)
    assert distance(_record(x[:9]), _record(x)) == np.inf
