from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cspdeploy.check import stats
from cspdeploy.check.stats import (
    compare_rounds,
    event_time,
    median_interval,
    percentile,
    spread,
    supported_percentile,
)

_samples = st.lists(st.floats(0.01, 1000), min_size=1, max_size=30)
_shuffled = _samples.flatmap(lambda samples: st.tuples(st.just(samples), st.permutations(samples)))
_rounds = st.lists(st.lists(st.floats(0.01, 1000), min_size=1, max_size=5), min_size=1, max_size=12)
_pairs = st.integers(1, 12).flatmap(
    lambda num: st.tuples(
        *[
            st.lists(st.lists(st.floats(0.01, 1000), min_size=1, max_size=5), min_size=num, max_size=num)
            for _ in range(2)
        ]
    )
)

Pair = tuple[list[float], list[float]]
Rounds = list[list[float]]


def _normal(
    mean_ms: float, *, seed: int, num: int = 40, burst: int = 3, noise: float = 0.01, of_rounds: float = 0.0
) -> Rounds:
    """`num` rounds; each has an error of its own on top of that of its samples."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(mean_ms, of_rounds * mean_ms, num)
    return [rng.normal(centre, noise * mean_ms, burst).tolist() for centre in centres]


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


@given(_rounds)
def test_interval_of_the_median_is_bounded_and_repeatable(rounds: Rounds) -> None:
    pooled = [value for samples in rounds for value in samples]
    low, high = median_interval(rounds)
    assert min(pooled) <= low <= high <= max(pooled)
    assert median_interval(rounds) == (low, high)


@given(_rounds)
def test_rounds_are_indistinguishable_from_themselves(rounds: Rounds) -> None:
    found = compare_rounds(rounds, rounds)
    assert (found.ratio, found.low, found.high, found.verdict) == (1, 1, 1, "indistinguishable")


@given(_pairs)
def test_swapped_sides_give_the_inverse(pair: tuple[Rounds, Rounds]) -> None:
    forward, backward = compare_rounds(*pair), compare_rounds(*reversed(pair))
    assert forward.low <= forward.ratio <= forward.high
    assert forward.ratio == pytest.approx(1 / backward.ratio)
    assert (forward.low, forward.high) == (pytest.approx(1 / backward.high), pytest.approx(1 / backward.low))
    opposite = {"faster": "slower", "slower": "faster", "indistinguishable": "indistinguishable"}
    assert forward.verdict == opposite[backward.verdict]


@given(st.floats(0.01, 1000), st.integers(1, 40))
def test_constant_samples(value: float, num: int) -> None:
    assert median_interval([[value]] * num) == (value, value)
    assert spread([value] * num) == 0


# --- verdicts ---


@pytest.mark.parametrize(
    ("factor", "verdict"),
    [(1.05, "slower"), (0.95, "faster"), (2.0, "slower"), (0.5, "faster"), (1.01, "indistinguishable"),
     (0.99, "indistinguishable")],
)  # fmt: skip
@pytest.mark.parametrize("seed", range(3))
def test_shift_of_a_quiet_machine(factor: float, verdict: str, seed: int) -> None:
    found = compare_rounds(_normal(10.0, seed=seed), _normal(10.0 * factor, seed=seed + 100))
    assert found.verdict == verdict
    assert found.ratio == pytest.approx(1 / factor, rel=0.01)


def test_same_distribution_is_hardly_ever_told_apart() -> None:
    """Also where the samples of a round share an error ten times their own."""
    verdicts = [
        compare_rounds(*[_normal(10.0, seed=seed + add, num=12, of_rounds=0.05, noise=0.005) for add in (0, 1000)])
        for seed in range(60)
    ]
    assert sum(found.verdict != "indistinguishable" for found in verdicts) <= 2


def test_interval_of_the_median_holds_the_true_one_where_samples_of_a_round_are_alike() -> None:
    """By samples, as if they were independent, the interval would be a third as wide and miss most of the time."""
    found = [
        median_interval(_normal(10.0, seed=seed, num=20, burst=10, noise=0.001, of_rounds=0.05)) for seed in range(60)
    ]
    held = sum(low <= 10.0 <= high for low, high in found)
    assert held >= 52  # 57 of 60 are expected; fewer than 52 come by chance in 1 of 100


def test_drift_that_both_sides_share_cancels() -> None:
    """The machine slows down by half on the way: one side's samples spread widely, their ratio does not."""
    slower = [1 + 0.5 * i / 30 for i in range(30)]
    reference = [[10 * factor] * 3 for factor in slower]
    found = compare_rounds(reference, [[10.5 * factor] * 3 for factor in slower])
    assert found.verdict == "slower"
    assert found.high - found.low < 1e-9
    low, high = median_interval(reference)
    assert high - low > 1


def test_shift_that_drowns_in_noise_is_not_claimed() -> None:
    reference = _normal(10.0, seed=0, num=12, noise=0.3, burst=1)
    samples = [[1.05 * value for value in values] for values in _normal(10.0, seed=1, num=12, noise=0.3, burst=1)]
    assert compare_rounds(reference, samples).verdict == "indistinguishable"


def test_ratio_is_of_medians_not_means() -> None:
    found = compare_rounds([[2.0], [2.0, 2.0, 500.0], [2.0], [2.0], [500.0], [2.0], [2.0], [2.0]], [[1.0]] * 8)
    assert (found.verdict, found.ratio) == ("faster", pytest.approx(2.0))


# --- values ---


def test_percentiles_lie_between_neighbours() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert percentile([1.0, 2.0, 3.0, 4.0, 5.0], 95) == pytest.approx(4.8)
    assert percentile([7.0], 95) == 7.0


@pytest.mark.parametrize(("percent", "needed"), [(90, 29), (95, 59), (99, 299)])
def test_percentile_is_given_only_where_samples_are_likely_to_lie_beyond_it(percent: float, needed: int) -> None:
    samples = [float(i) for i in range(needed)]
    assert supported_percentile(samples, percent) == percentile(samples, percent)
    assert supported_percentile(samples[:-1], percent) is None
    assert math.pow(percent / 100, needed) <= 0.05 < math.pow(percent / 100, needed - 1)


def test_spread_is_the_distance_of_the_quartiles_over_the_median() -> None:
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 3)
    assert spread([10.0] * 9 + [1000.0]) == 0  # one outlier is no spread


def test_interval_narrows_with_more_rounds() -> None:
    few, many = (median_interval(_normal(10.0, seed=0, num=num, of_rounds=0.02)) for num in (10, 1000))
    assert many[1] - many[0] < few[1] - few[0]


def test_nothing_has_no_statistics() -> None:
    with pytest.raises(ValueError, match="no samples"):
        percentile([], 50)
    with pytest.raises(ValueError, match="no samples"):
        median_interval([])
    with pytest.raises(ValueError, match="no samples"):
        spread([])
    for pair in (([], [[1.0]]), ([[1.0]], [])):
        with pytest.raises(ValueError, match="no samples"):
            compare_rounds(*pair)
    with pytest.raises(ValueError):  # noqa: PT011
        compare_rounds([[1.0]], [[1.0], [1.0]])  # not measured in the same rounds


def test_interval_of_many_samples_needs_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of all resamples of 20,000 samples takes 320 MB, and three of them are needed."""
    values = np.random.default_rng(0).lognormal(size=20_000)
    rounds = [tuple(part) for part in np.split(values, 20)]
    tracemalloc.start()
    interval = median_interval(rounds)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6
    monkeypatch.setattr(stats, "_TABLE_VALUES", 3 * len(values))  # other parts, the same numbers
    assert median_interval(rounds) == interval


def test_time_between_events_and_what_the_host_adds() -> None:
    host, device = [[10.0, 12.0, 11.0], [10.0, 11.0, 12.0]], [[4.0, 4.5, 5.0], [4.5, 4.0, 5.0]]
    found = event_time(host, device)
    assert found is not None
    assert (found.p50_ms, found.ci_low_ms, found.ci_high_ms) == (4.5, 4.5, 4.5)
    assert found.wait_ms == pytest.approx(11 - 4.5)


def test_time_between_events_is_never_more_than_the_hosts() -> None:
    """Events are read with half a microsecond of their own."""
    found = event_time([[1.0, 1.0]], [[1.0001, 1.0001]])
    assert found is not None
    assert found.wait_ms == 0.0


@pytest.mark.parametrize("device", [[], [[1.0]], [[1.0, 1.0], [1.0]]])
def test_time_between_events_of_other_runs_is_none(device: list[list[float]]) -> None:
    assert event_time([[2.0, 2.0]], device) is None
    assert event_time([], []) is None
