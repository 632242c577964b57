"""Ranges: zero on the grid, one step for those that share it, and the error where the tensor is used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cspdeploy.core.errors import InputError
from cspdeploy.quant.importance import measure_importance
from cspdeploy.quant.observations import Observations
from cspdeploy.quant.observe import observe
from cspdeploy.quant.plan import MIN_SCALE, ActivationType, Floats, Grid
from cspdeploy.quant.range_weights import joined_tensors
from cspdeploy.quant.ranges import METHODS, choose_grids, describe_grids
from cspdeploy.quant.simulate import fake_quantise
from cspdeploy.quant.torch_graph import TorchGraph

SLOPE = 0.01
GRAPH = f"""
<ir_version: 8, opset_import: ["" : 17]>
block (float[N, 4, H, W] before) => (float[N, 4] means)
{{
    after = LeakyRelu<alpha = {SLOPE}>(before)
    twice = Add(after, after)
    pooled = GlobalAveragePool(twice)
    means = Flatten(pooled)
}}
"""


@dataclass(frozen=True)
class Sharing:
    tensors: tuple[str, ...]
    groups: tuple[frozenset[str], ...] = ()
    followed_by: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Integers:
    activation: ActivationType = "uint8"
    symmetric: bool = False


PAIR = Sharing(("before", "after"), (frozenset({"before", "after"}),), {"before": "after"})
ALONE = Sharing(("before",))
WHOLE = Sharing(("before", "after", "twice"), (frozenset({"before", "after", "twice"}),), {"before": "after"})
SIGNED, U8 = Integers("int8", symmetric=True), Integers()


@pytest.fixture(scope="module")
def graph() -> TorchGraph:
    return TorchGraph(onnx.parser.parse_model(GRAPH))


def _values(num: int = 8, seed: int = 0) -> Floats:
    """Heavy tails, one channel far larger than the others."""
    generator = np.random.default_rng(seed)
    scales = np.array([1.0, 2.0, 0.5, 8.0], dtype=np.float32).reshape(1, 4, 1, 1)
    return (generator.standard_t(4, (num, 4, 32, 32)) * scales).astype(np.float32)


@pytest.fixture(scope="module")
def seen(graph: TorchGraph) -> Observations:
    return observe(graph, [_values()])


def _error(x_NCHW: Floats, before: Grid, after: Grid, slope: float = SLOPE) -> float:
    """Mean square after the activation, as the file computes it."""
    x = torch.from_numpy(x_NCHW)
    activate = torch.nn.functional.leaky_relu
    got = fake_quantise(activate(fake_quantise(x, before), slope), after)
    return float((got - activate(x, slope)).square().mean())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("placement", [U8, Integers("int8"), SIGNED])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_groups_share_one_step_and_zero_is_a_code(
    seen: Observations, method: str, placement: Integers, power_of_two: bool
) -> None:
    grids = choose_grids(
        seen, WHOLE, placement, method=method, slopes={"before": SLOPE}, power_of_two=power_of_two
    )  # fmt: skip
    assert list(grids) == list(WHOLE.tensors)
    assert len({grid.scale for grid in grids.values()}) == 1
    for grid in grids.values():
        low, high = grid.bounds
        assert low <= grid.zero_point <= high
        assert grid.dtype == placement.activation
        assert grid.scale == float(np.float32(grid.scale))
        assert grid.zero_point == 0 or not placement.symmetric
        assert not power_of_two or np.log2(grid.scale).is_integer()


def test_minmax_holds_every_value(seen: Observations) -> None:
    grid = choose_grids(seen, ALONE, U8, method="minmax")["before"]
    values = _values()
    assert grid.range[0] <= values.min() + grid.scale / 2
    assert grid.range[1] >= values.max() - grid.scale / 2
    assert grid.scale == pytest.approx((values.max() - values.min()) / 255)


def test_percentile_leaves_out_the_outermost(seen: Observations) -> None:
    grid = choose_grids(seen, ALONE, U8, method="percentile")["before"]
    values = _values()
    outside = np.mean((values < grid.range[0] - grid.scale / 2) | (values > grid.range[1] + grid.scale / 2))
    assert 2e-5 < outside < 2e-4


def test_mse_beats_every_other_range_of_that_tensor(seen: Observations) -> None:
    values = torch.from_numpy(_values())

    def error(grid: Grid) -> float:
        return float((fake_quantise(values, grid) - values).square().mean())

    best = choose_grids(seen, ALONE, U8, method="mse")["before"]
    others = [choose_grids(seen, ALONE, U8, method=method)["before"] for method in ("minmax", "percentile", "entropy")]
    assert error(best) < min(error(grid) for grid in others)
    for ratio in (0.8, 0.9, 1.1, 1.25):
        zero = round(np.clip(best.zero_point, 0, 255))
        assert error(best) < 1.01 * error(Grid(scale=best.scale * ratio, zero_point=zero, dtype="uint8"))


@pytest.mark.parametrize("slope", [0.0, 0.01, 0.1, 0.25])
def test_through_is_the_best_of_all_pairs_after_the_activation(slope: float) -> None:
    """Against a search over the real thing, rounded and activated value by value."""
    graph = TorchGraph(onnx.parser.parse_model(GRAPH.replace(f"alpha = {SLOPE}", f"alpha = {slope}")))
    values = _values(2)
    found = choose_grids(observe(graph, [values]), PAIR, U8, method="through", slopes={"before": slope})
    ours = _error(values, found["before"], found["after"], slope)
    searched = []
    for ratio in (0.8, 0.9, 1.0, 1.1, 1.25):
        scale = found["before"].scale * ratio
        for zero_point in (0, 10, 51, 64, 100, 128):
            pair = [Grid(scale=scale, zero_point=round(z), dtype="uint8") for z in (zero_point, slope * zero_point)]
            searched.append(_error(values, pair[0], pair[1], slope))
    assert ours < 1.02 * min(searched)


def test_through_spends_few_codes_on_what_the_activation_shrinks(seen: Observations) -> None:
    through = choose_grids(seen, PAIR, U8, method="through", slopes={"before": SLOPE})
    mse = choose_grids(seen, PAIR, U8, method="mse")
    assert through["before"].zero_point < 60 < mse["before"].zero_point
    assert _error(_values(), through["before"], through["after"]) < 0.5 * _error(_values(), mse["before"], mse["after"])


def test_channels_gives_room_to_the_largest_channel_and_a_quarter_before_the_activation(seen: Observations) -> None:
    grids = choose_grids(seen, PAIR, U8, method="channels", slopes={"before": SLOPE})
    top = seen.tensors["before"].magnitudes(0.9999, negative_share=0.0).max()
    assert grids["before"].scale == pytest.approx(1.25 * top / 255, rel=0.03)
    assert grids["before"].zero_point >= 51  # the first code that is not zero after slope 0.01
    alone = choose_grids(seen, ALONE, U8, method="channels")["before"]
    assert alone.scale == pytest.approx((top - _values().min()) / 255, rel=0.03)


def test_sums_on_the_grid_are_not_charged_for_rounding(graph: TorchGraph, seen: Observations) -> None:
    joined = joined_tensors(graph, WHOLE)
    assert joined == {"twice"}
    assert joined_tensors(graph, ALONE) == frozenset()
    charged, free = (
        choose_grids(seen, WHOLE, U8, method="through", slopes={"before": SLOPE}, joined=names)["twice"]
        for names in (frozenset[str](), joined)
    )
    assert free.scale > charged.scale  # what is left of its error is what is clipped


def test_equalised_channels_count_in_their_own_units(graph: TorchGraph) -> None:
    """A factor that lifts a channel does not make its errors weigh more."""
    values = _values()
    values[:, 0] = -np.abs(values[:, 0])  # never positive: lifted, it holds large negative values
    observations = observe(graph, [values])
    factors = np.array([10.0, 1.0, 1.0, 1.0], dtype=np.float32)
    ranges = {
        name: choose_grids(
            observations, PAIR, U8, method="through", slopes={"before": SLOPE}, importance=importance,
            factors={"before": factors, "after": factors},
        )["before"].scale
        for name, importance in (
            ("own", None), ("equalised", {"after": factors**2}), ("rest", {"after": np.array([0, 1, 1, 1])}),
        )
    }  # fmt: skip
    assert ranges["own"] <= ranges["equalised"]
    assert ranges["own"] == pytest.approx(ranges["rest"], rel=0.05)


def test_importance_draws_the_range_to_the_channels_that_matter(seen: Observations) -> None:
    def scale(weights: list[float]) -> float:
        importance = {"before": np.array(weights, dtype=np.float32)}
        return choose_grids(seen, ALONE, U8, method="through", importance=importance)["before"].scale

    assert scale([1, 1, 1, 0]) < 0.7 * scale([0, 0, 0, 1])
    widest = choose_grids(seen, ALONE, U8, method="minmax")["before"].scale
    assert scale([0, 0, 0, 0]) == pytest.approx(widest)  # nothing matters: nothing is clipped


def test_importance_is_the_mean_squared_gradient(graph: TorchGraph) -> None:
    values = _values(4)
    found = measure_importance(graph, [values[:3], values[3:]], tensors=("before", "twice"))
    assert set(found) == {"before", "twice"}
    power = np.mean(np.square(2 * np.where(values > 0, values, SLOPE * values).mean((2, 3)), dtype=np.float64))
    expected = np.square(1 / (32 * 32)) / power
    # Images are combined in chunks of their own power: within a factor, and alike in all channels.
    np.testing.assert_allclose(found["twice"], found["twice"][0], rtol=1e-5)
    assert 0.3 * expected < found["twice"][0] < 3 * expected
    slopes = np.where(values > 0, 1.0, SLOPE)
    shares = found["before"] / found["twice"] / 4
    np.testing.assert_allclose(shares, np.square(slopes).mean((0, 2, 3)), rtol=0.2)
    assert measure_importance(graph, [values], tensors=("before",), seed=1).keys() == {"before"}


def test_no_gradient_no_importance() -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    lost (float[N, 4, H, W] before) => (int64[N, 1, H, W] places) { places = ArgMax<axis = 1>(before) }
    """
    graph = TorchGraph(onnx.parser.parse_model(text))
    assert measure_importance(graph, [_values(1)], tensors=("before",)) == {}


def test_a_tensor_of_zeros_gets_the_smallest_step(graph: TorchGraph) -> None:
    zeros = observe(graph, [np.zeros((2, 4, 4, 4), dtype=np.float32)])
    for method in METHODS:
        grids = choose_grids(zeros, PAIR, U8, method=method, slopes={"before": SLOPE})
        assert {grid.scale for grid in grids.values()} == {MIN_SCALE}
        assert torch.equal(fake_quantise(torch.zeros(3), grids["before"]), torch.zeros(3))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("method", METHODS)
def test_values_that_are_no_numbers_are_refused_by_name(graph: TorchGraph, method: str, bad: float) -> None:
    values = _values(1)
    values[0, 2, 3, 3] = bad
    with pytest.raises(InputError, match="tensor 'before': 1 of 4096 values are NaN or infinite"):
        choose_grids(observe(graph, [values]), PAIR, U8, method=method, slopes={"before": SLOPE})


def test_tensors_that_nobody_saw_and_unknown_methods_are_refused(seen: Observations) -> None:
    with pytest.raises(InputError, match="'other': no values seen"):
        choose_grids(seen, Sharing(("other",)), U8, method="through")
    with pytest.raises(
        InputError, match="'maximum': expected one of minmax, percentile, entropy, mse, channels, through"
    ):
        choose_grids(seen, ALONE, U8, method="maximum")


def test_entropy_cuts_outliers_and_keeps_what_has_none(graph: TorchGraph) -> None:
    generator = np.random.default_rng(1)
    smooth = generator.uniform(-1, 1, (8, 4, 32, 32)).astype(np.float32)
    spiked = smooth.copy()
    spiked[0, 0, 0, 0] = 40.0
    whole, cut = (choose_grids(observe(graph, [x]), ALONE, U8, method="entropy")["before"] for x in (smooth, spiked))
    assert whole.range[1] == pytest.approx(1.0, abs=0.03)
    assert cut.range[1] < 10.0


def test_records_say_what_is_left_out(seen: Observations) -> None:
    for method in ("minmax", "mse"):
        grids = choose_grids(seen, ALONE, U8, method=method)
        (record,) = describe_grids(seen, grids, method=method)
        values = _values()
        outside = np.mean((values < record.grid_low) | (values > record.grid_high))
        assert record.clipped_share == pytest.approx(outside, rel=0.1, abs=1e-5)
        assert (record.tensor, record.method) == ("before", method)
        assert record.low == pytest.approx(values.min())
        assert record.high == pytest.approx(values.max())


@given(st.floats(-100, 0), st.floats(0, 100), st.sampled_from(METHODS), st.booleans())
@settings(max_examples=25)
def test_any_range_gives_a_grid_that_holds_zero(low: float, high: float, method: str, symmetric: bool) -> None:
    graph = TorchGraph(
        onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        one (float[N, 4, H, W] before) => (float[N, 4, H, W] after) { after = LeakyRelu<alpha = 0.01>(before) }
    """)
    )
    values = np.linspace(low, high, 64, dtype=np.float32).reshape(1, 4, 4, 4)
    placement = SIGNED if symmetric else U8
    grids = choose_grids(observe(graph, [values]), PAIR, placement, method=method, slopes={"before": SLOPE})
    for grid in grids.values():
        assert grid.range[0] <= 0 <= grid.range[1]
        assert grid.scale >= MIN_SCALE
