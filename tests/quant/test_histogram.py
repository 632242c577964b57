"""Histograms and the errors of grids, against values that were counted one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cspdeploy.quant.histogram import Doubles, Histogram, Side, pool_sides

FINE = 20_000


def _side(values: Doubles, *, num_bins: int = FINE) -> Side:
    return Side(top=float(values.max()), counts=np.histogram(values, num_bins, (0, values.max()))[0].astype(float))


def _rounding_error(values: Doubles, step: float, codes: int, slope: float) -> float:
    """What `Side.errors` stands for, one value after the other."""
    reached = np.rint(slope * np.minimum(np.rint(values / step), codes)) * step
    return float(np.sum((slope * values - reached) ** 2))


@pytest.mark.parametrize("slope", [1.0, 0.1, 0.01, 0.0])
@pytest.mark.parametrize("codes", [0, 1, 51, 200, 255])
def test_errors_are_those_of_rounding_every_value(slope: float, codes: int) -> None:
    values = np.random.default_rng(0).gamma(1.5, 1.0, 50_000)
    steps = np.array([values.max() / 255, values.max() / 900])
    found = _side(values).errors(steps, slope=slope)
    assert found.shape == (2, 256)
    for step, errors in zip(steps, found, strict=True):
        assert errors[codes] == pytest.approx(_rounding_error(values, step, codes, slope), rel=2e-3)


def test_values_in_wide_bins_still_cost_a_twelfth_of_a_squared_step() -> None:
    """Whatever way bins and steps meet: there is no comb of bin centres that falls onto grid points."""
    side = Side(top=64.0, counts=np.full(64, 100.0))
    for step in (0.26, 0.3, 0.5):
        assert side.errors(np.array([step]))[0, 255] == pytest.approx(6400 * step**2 / 12, rel=1e-2)


def test_values_on_the_grid_cost_only_what_is_clipped() -> None:
    values = np.random.default_rng(3).gamma(1.5, 1.0, 50_000)
    side, step = _side(values), values.max() / 300
    found = side.errors(np.array([step]), rounded=False)[0]
    beyond = values[values > 200.5 * step]
    assert found[200] == pytest.approx(np.sum((beyond - 200 * step) ** 2), rel=1e-3)
    assert _side(values).errors(np.array([values.max() / 255]), rounded=False)[0, 255] == 0.0


def test_a_negative_side_needs_half_a_step_after_the_activation() -> None:
    """Slope 0.01: below 50 codes all comes out as zero, the 51st is worth having, the next hundred are not."""
    values = np.abs(np.random.default_rng(1).normal(0, 1, 50_000))
    errors = _side(values).errors(np.array([4 / 254]), slope=0.01)[0]
    np.testing.assert_allclose(errors[:50], errors[0])
    assert errors[51] < 0.8 * errors[50]


@given(
    st.lists(st.floats(0.01, 100.0), min_size=1, max_size=6),
    st.integers(1, 16),
    st.integers(0, 2**31),
)
@settings(max_examples=15)
def test_pooling_keeps_the_number_and_the_sum_of_values(factors: list[float], num_bins: int, seed: int) -> None:
    counts = np.random.default_rng(seed).integers(0, 50, (len(factors), num_bins))
    widths = np.array(factors) / num_bins
    side = pool_sides(counts, widths, np.array(factors))
    assert side.total == pytest.approx(counts.sum(), rel=1e-9)
    centres = (np.arange(num_bins) + 0.5) * widths[:, None]
    width = side.top / len(side.counts)
    assert side.moments_beyond(np.zeros(1))[1][0] == pytest.approx(
        (counts * centres).sum(), rel=1e-6, abs=width * max(counts.sum(), 1)
    )  # fmt: skip


def test_pooling_is_the_histogram_of_all_channels_together() -> None:
    generator = np.random.default_rng(2)
    tops, factors = np.array([1.0, 8.0, 0.5]), np.array([3.0, 0.5, 1.0])
    values = [generator.uniform(0, top, 40_000) for top in tops]
    counts = np.stack([np.histogram(v, 128, (0, top))[0] for v, top in zip(values, tops, strict=True)])
    side = pool_sides(counts, tops / 128, np.array([v.max() for v in values]) * 1.0)
    scaled = pool_sides(counts, tops / 128 * factors, np.array([v.max() for v in values]) * factors, num_bins=64)
    np.testing.assert_allclose(side.beyond(0.75), sum((v > 0.75).sum() for v in values), rtol=0.01)
    exact = np.histogram(np.concatenate([v * f for v, f in zip(values, factors, strict=True)]), 64, (0, scaled.top))[0]
    assert np.abs(scaled.counts - exact).sum() < 0.02 * exact.sum()


def test_values_at_the_edge_of_the_last_bin_stay_there() -> None:
    """What Clip(0, 6) makes: a heap at 6, not spread over the bin that ends far above it."""
    counts = np.zeros((1, 128), dtype=np.int64)
    counts[0, 95] = 1000  # (5.9375, 6]
    side = pool_sides(counts, np.array([8 / 128]), np.array([6.0]))
    assert side.top == 6.0
    assert side.beyond(5.9) == pytest.approx(1000)
    assert side.beyond(5.999) < 50


def test_a_side_without_values_costs_nothing() -> None:
    side = pool_sides(np.zeros((3, 128), dtype=np.int64), np.ones(3), np.zeros(3))
    assert side.top == 0.0
    assert not side.errors(np.array([0.1, 1.0])).any()
    assert side.limit_of(0.0) == 0.0


def test_ranges_and_shares() -> None:
    uniform = Side(top=1.0, counts=np.full(100, 10.0))
    histogram = Histogram(num_zeros=0.0, positive=uniform, negative=Side(top=2.0, counts=np.full(100, 10.0)))
    assert (histogram.low, histogram.high, histogram.total) == (-2.0, 1.0, 2000.0)
    low, high = histogram.central_range(0.9)
    assert low == pytest.approx(-1.8)
    assert high == pytest.approx(0.9)
    assert histogram.clipped_share(low, high) == pytest.approx(0.1)
    assert histogram.clipped_share(-2.0, 1.0) == 0.0
