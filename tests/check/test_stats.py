from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cspdeploy.check.stats import bootstrap_median, compare_medians, percentile, ratio_interval, spread

_samples = st.lists(st.floats(0.01, 1000), min_size=1, max_size=30)
_shuffled = _samples.flatmap(lambda samples: st.tuples(st.just(samples), st.permutations(samples)))

Pair = tuple[list[float], list[float]]


def _normal(mean_ms: float, *, seed: int, num: int = 60, noise: float = 0.01) -> list[float]:
    return list(np.random.default_rng(seed).normal(mean_ms, noise * mean_ms, num))


# --- properties ---


@given(_shuffled, st.floats(0, 100))
def test_percentile_is_order_free_and_bounded(pair: Pair, percent: float) -> None:
    samples, shuffled = pair
    found = percentile(samples, percent)
    assert percentile(shuffled, percent) == found
    assert min(samples) <= found <= max(samples)


@given(_shuffled)
def test_spread_is_order_free_and_never_negative(pair: Pair) -> None:
    samples, shuffled = pair
    assert spread(samples) == spread(shuffled) >= 0


@given(_samples)
def test_interval_contains_the_median_and_is_bounded(samples: list[float]) -> None:
    low, high = bootstrap_median(samples)
    assert min(samples) <= low <= percentile(samples, 50) <= high <= max(samples)


@given(_shuffled)
def test_interval_is_order_free(pair: Pair) -> None:
    samples, shuffled = pair
    assert bootstrap_median(shuffled) == bootstrap_median(samples)


@given(_samples)
def test_samples_are_indistinguishable_from_themselves(samples: list[float]) -> None:
    assert compare_medians(samples, samples) == ("indistinguishable", 1.0)


@given(_samples, _samples)
def test_same_samples_give_the_same_verdict(reference: list[float], samples: list[float]) -> None:
    assert compare_medians(reference, samples) == compare_medians(reference, samples)
    assert bootstrap_median(samples) == bootstrap_median(samples)


@given(st.floats(0.01, 1000), st.integers(1, 40))
def test_constant_samples(value: float, num: int) -> None:
    assert bootstrap_median([value] * num) == (value, value)
    assert spread([value] * num) == 0


# --- verdicts ---


@pytest.mark.parametrize(
    ("factor", "verdict"),
    [(1.05, "slower"), (0.95, "faster"), (2.0, "slower"), (0.5, "faster"), (1.01, "indistinguishable"),
     (0.99, "indistinguishable")],
)  # fmt: skip
@pytest.mark.parametrize("seed", range(3))
def test_shift_of_a_quiet_machine(factor: float, verdict: str, seed: int) -> None:
    reference, samples = _normal(10.0, seed=seed), _normal(10.0 * factor, seed=seed + 100)
    found, ratio = compare_medians(reference, samples)
    assert found == verdict
    assert ratio == pytest.approx(1 / factor, rel=0.01)


@pytest.mark.parametrize("seed", range(5))
def test_same_distribution_is_indistinguishable(seed: int) -> None:
    reference, samples = _normal(10.0, seed=seed, noise=0.03), _normal(10.0, seed=seed + 100, noise=0.03)
    assert compare_medians(reference, samples)[0] == "indistinguishable"


def test_shift_that_drowns_in_noise_is_not_claimed() -> None:
    reference = _normal(10.0, seed=0, num=12, noise=0.3)
    samples = [1.05 * value for value in _normal(10.0, seed=1, num=12, noise=0.3)]
    assert compare_medians(reference, samples)[0] == "indistinguishable"


def test_ratio_is_of_medians_not_means() -> None:
    assert compare_medians([2.0, 2.0, 2.0, 2.0, 500.0], [1.0] * 5) == ("faster", 2.0)


# --- values ---


def test_percentiles_lie_between_neighbours() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert percentile([1.0, 2.0, 3.0, 4.0, 5.0], 95) == pytest.approx(4.8)
    assert percentile([7.0], 95) == 7.0


def test_spread_is_the_distance_of_the_quartiles_over_the_median() -> None:
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 3)
    assert spread([10.0] * 9 + [1000.0]) == 0  # one outlier is no spread


def test_interval_narrows_with_more_samples() -> None:
    few, many = bootstrap_median(_normal(10.0, seed=0, num=10)), bootstrap_median(_normal(10.0, seed=0, num=1000))
    assert many[1] - many[0] < few[1] - few[0]


def test_nothing_has_no_statistics() -> None:
    with pytest.raises(ValueError, match="no samples"):
        percentile([], 50)
    with pytest.raises(ValueError, match="no samples"):
        bootstrap_median([])
    with pytest.raises(ValueError, match="no samples"):
        spread([])
    for pair in (([], [1.0]), ([1.0], [])):
        with pytest.raises(ValueError):  # noqa: PT011
            compare_medians(*pair)


def test_ratio_interval_holds_the_ratio_and_turns_over_with_its_arguments() -> None:
    reference = [10.0 + 0.1 * (i % 7) for i in range(60)]
    samples = [8.0 + 0.1 * (i % 5) for i in range(60)]
    low, high = ratio_interval(reference, samples)
    assert low < percentile(reference, 50) / percentile(samples, 50) < high
    assert low > 1.1
    turned = ratio_interval(samples, reference)
    assert turned == (pytest.approx(1 / high, rel=0.02), pytest.approx(1 / low, rel=0.02))
    with pytest.raises(ValueError, match="no samples"):
        ratio_interval([], samples)
