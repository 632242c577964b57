"""The search on networks that are numbers: layers with noise and time of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cspdeploy.check.worker import EngineError
from cspdeploy.core.errors import InputError
from cspdeploy.quant.budget import Budget, Judgement
from cspdeploy.quant.islands import Forecast, Island, float_cost, list_islands, rank_islands
from cspdeploy.quant.outcome import SearchResult
from cspdeploy.quant.scheme import Scheme
from cspdeploy.quant.search import search
from cspdeploy.quant.sensitivity import LayerDamage

BASE = Scheme(method="through", exponent=0.75)


@dataclass
class Network:
    """`noise` and `ms` of each layer in INT8; in float it takes three times as long. `clock` goes on by evaluating."""

    noise: dict[str, float]
    ms: dict[str, float]
    seconds: float = 1.0
    fails: Callable[[int, Scheme], BaseException | None] = lambda count, scheme: None
    count: int = 0
    now: float = 0.0
    tried: list[Scheme] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def evaluate(self, scheme: Scheme) -> Judgement:
        self.count += 1
        self.now += self.seconds
        self.tried.append(scheme)
        if error := self.fails(self.count, scheme):
            raise error
        noise = self.forecast_noise(scheme.floats) + (0.5 if scheme.method == "minmax" else 0.0)
        time = self.cost(scheme.floats)
        slowest = self.cost(frozenset(self.ms))
        speed = slowest / time
        return Judgement(
            runtime="toy", sqnr_db=60.0 - 20.0 * noise, num_images=1, latency_ms=time, fp32_latency_ms=slowest,
            speed=speed, speed_low=speed, speed_high=speed,
            verdict="faster" if speed > 1.02 else "slower" if speed < 0.98 else "indistinguishable",
        )  # fmt: skip

    def forecast_noise(self, floats: frozenset[str]) -> float:
        return sum(noise for name, noise in self.noise.items() if name not in floats)

    def cost(self, floats: frozenset[str]) -> float:
        return sum(3 * ms if name in floats else ms for name, ms in self.ms.items())

    @property
    def islands(self) -> tuple[Island, ...]:
        names = list(self.noise)
        pairs = [frozenset(names[i : i + 2]) for i in range(len(names) - 1)]
        return tuple(
            Island(name="+".join(sorted(nodes)), nodes=nodes) for nodes in (*map(frozenset, zip(names)), *pairs)
        )

    def search(self, budget: Budget, *, deadline_s: float = 1e6, schemes: tuple[Scheme, ...] = (BASE,)) -> SearchResult:
        return search(
            schemes, self.islands, evaluate=self.evaluate, budget=budget, deadline_s=deadline_s, clock=lambda: self.now,
            forecast=Forecast(noise=self.forecast_noise, cost=self.cost),
            progress=lambda what, done, total: self.said.append(what),
        )  # fmt: skip


def network(**noise: float) -> Network:
    return Network(noise=noise, ms=dict.fromkeys(noise, 1.0))


def test_wholly_int8_network_within_the_budget_ends_the_search() -> None:
    toy = network(a=0.1, b=0.1)
    found = toy.search(Budget(min_sqnr_db=50.0))
    assert found.stopped == "found"
    assert found.chosen is not None
    assert found.chosen.scheme == BASE
    assert found.num_evaluations == toy.count == 1
    assert found.reason.startswith("all INT8: 56.0 dB")


def test_second_scheme_is_tried_before_any_float_layer() -> None:
    toy = network(a=0.1, b=0.1)
    other = Scheme(method="minmax", exponent=0.0)
    found = toy.search(Budget(min_sqnr_db=50.0), schemes=(other, BASE))
    assert found.chosen is not None
    assert found.chosen.scheme == BASE
    assert toy.tried == [other, BASE]


def test_layer_that_does_the_damage_is_found_and_the_others_stay_int8() -> None:
    toy = network(a=0.1, b=0.1, c=5.0, d=0.1, e=0.1, f=0.1, g=0.1, h=0.1)
    found = toy.search(Budget(min_sqnr_db=40.0))
    assert found.stopped == "found"
    assert found.chosen is not None
    assert found.chosen.scheme.floats == {"c"}
    assert "1 of 8 layers in float (c)" in found.reason
    assert toy.count <= 4


def test_fewest_layers_are_kept_although_the_ranking_is_wrong() -> None:
    toy = network(a=0.5, b=0.5, c=0.5, d=3.0, e=0.5, f=0.5, g=0.5, h=0.5)
    believed = {"a": 5.0, "b": 4.0, "c": 3.0, "d": 2.0, "e": 0.1, "f": 0.1, "g": 0.1, "h": 0.1}

    def forecast(floats: frozenset[str]) -> float:
        return sum(noise for name, noise in believed.items() if name not in floats)

    found = search(
        (BASE,), toy.islands, evaluate=toy.evaluate, budget=Budget(min_sqnr_db=-10.0), deadline_s=1e6,
        clock=lambda: toy.now, forecast=Forecast(noise=forecast, cost=toy.cost),
    )  # fmt: skip
    assert toy.forecast_noise(frozenset()) > 3.5  # that is -10 dB
    assert found.chosen is not None
    assert found.chosen.scheme.floats == {"d"}


def test_nothing_within_the_budget_is_said_in_one_sentence() -> None:
    toy = network(a=1.0, b=1.0, c=1.0)
    found = toy.search(Budget(min_sqnr_db=59.0))
    assert found.chosen is None
    assert found.stopped == "exhausted"
    assert found.reason.startswith("no INT8 file with at least 59 dB: the best, with 2 of 3 layers in float")
    assert "40.0 dB" in found.reason


def test_network_slower_than_fp32_is_refused() -> None:
    toy = network(a=0.1, b=0.1)
    honest = toy.evaluate
    slow = Judgement(runtime="toy", sqnr_db=50.0, num_images=1, speed=0.7, verdict="slower")
    toy.evaluate = lambda scheme: honest(scheme) and slow  # type: ignore[method-assign]
    found = toy.search(Budget())
    assert found.chosen is None
    assert "slower than FP32 on toy" in found.reason
    assert len(toy.tried) > 1  # islands were tried


def test_small_layer_whose_conversions_cost_more_than_it_saves_is_left_in_float() -> None:
    toy = network(a=0.1, b=0.1, c=0.1)
    honest = toy.evaluate

    def evaluate(scheme: Scheme) -> Judgement:
        honest(scheme)
        speed = 1.5 if "b" in scheme.floats else 0.9
        return Judgement(
            runtime="toy", sqnr_db=50.0, num_images=1, speed=speed, verdict="faster" if speed > 1 else "slower"
        )

    toy.evaluate = evaluate  # type: ignore[method-assign]
    found = toy.search(Budget())
    assert found.chosen is not None
    assert "b" in found.chosen.scheme.floats


def test_more_float_is_not_tried_where_the_network_is_too_slow_already() -> None:
    toy = network(a=1.0, b=1.0, c=1.0, d=1.0, e=1.0, f=1.0, g=1.0, h=1.0)
    found = toy.search(Budget(max_drop_points=None, min_sqnr_db=59.9, max_latency_ratio=0.34))
    assert found.chosen is None
    assert toy.count == 2  # all INT8, and the one that the forecast held to be needed


def test_time_limit_ends_the_search_before_it_is_passed() -> None:
    toy = network(**{f"n{i:02}": 1.0 for i in range(20)})
    found = toy.search(Budget(min_sqnr_db=30.0), deadline_s=3.5)
    assert found.stopped == "time"
    assert toy.count == 3
    assert "time limit" in found.reason


def test_first_scheme_is_evaluated_whatever_the_time_limit() -> None:
    toy = network(a=0.1)
    assert toy.search(Budget(), deadline_s=0.0).chosen is not None


@pytest.mark.parametrize(("at", "chosen"), [(2, False), (3, True)])
def test_interruption_keeps_the_best_so_far(at: int, chosen: bool) -> None:
    toy = network(**{f"n{i:02}": 1.0 for i in range(8)})
    toy.fails = lambda count, scheme: KeyboardInterrupt() if count == at else None
    found = toy.search(Budget(min_sqnr_db=0.0))
    assert found.stopped == "interrupted"
    assert (found.chosen is not None) == chosen
    assert "interrupted" in found.reason


def test_interruption_before_anything_is_known_goes_on_up() -> None:
    toy = network(a=1.0)
    toy.fails = lambda count, scheme: KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        toy.search(Budget())


def test_file_that_the_engine_fails_on_is_passed_over() -> None:
    toy = network(a=0.1, b=5.0, c=0.1, d=0.1)
    toy.fails = lambda count, scheme: EngineError("it fell over") if scheme.floats == {"b"} else None
    found = toy.search(Budget(min_sqnr_db=50.0))
    assert found.chosen is not None
    assert "b" in found.chosen.scheme.floats
    assert found.failures[0][1] == "it fell over"
    assert found.num_evaluations == toy.count


def test_engine_that_fails_on_everything_is_an_error() -> None:
    toy = network(a=0.1)
    toy.fails = lambda count, scheme: InputError("no such kernel")
    with pytest.raises(InputError, match="no such kernel"):
        toy.search(Budget())


def test_only_a_latency_is_asked_for_so_the_most_accurate_within_it_is_chosen() -> None:
    toy = network(a=0.1, b=0.1)
    better = Scheme(method="through", exponent=0.5)
    found = toy.search(Budget(max_latency_ratio=0.5), schemes=(BASE, better))
    assert found.chosen is not None
    assert found.chosen.judgement.sqnr_db == max(point.judgement.sqnr_db for point in found.points)


def test_progress_tells_what_was_tried() -> None:
    toy = network(a=0.1, b=5.0)
    toy.search(Budget(min_sqnr_db=50.0))
    assert len(toy.said) == toy.count
    assert toy.said[0].startswith("no layers in float: -42.0 dB")


sizes = st.lists(st.tuples(st.floats(0.0, 5.0), st.floats(0.1, 5.0)), min_size=1, max_size=9)


@given(sizes, st.floats(0.0, 60.0), st.sampled_from([None, 0.4, 0.6, 0.9]))
def test_what_is_chosen_meets_the_budget_if_anything_tried_does(
    layers: list[tuple[float, float]], min_sqnr_db: float, ratio: float | None
) -> None:
    names = [f"n{i}" for i in range(len(layers))]
    noise, ms = ({name: pair[k] for name, pair in zip(names, layers, strict=True)} for k in (0, 1))
    budget = Budget(min_sqnr_db=min_sqnr_db, max_latency_ratio=ratio)
    toy = Network(noise=noise, ms=ms)
    found = toy.search(budget)
    assert (found.chosen is not None) == any(point.judgement.meets(budget) for point in found.points)
    assert (found.stopped == "found") == (found.chosen is not None)
    if found.chosen is not None:
        assert found.chosen.judgement.meets(budget)
    assert len(set(toy.tried)) == len(toy.tried)  # nothing is evaluated twice
    assert all(point.scheme.floats != frozenset(names) for point in found.points)
    for one in found.front:
        assert not any(
            other.judgement.sqnr_db > one.judgement.sqnr_db
            and (other.judgement.speed or 0) >= (one.judgement.speed or 0)
            for other in found.points
        )
    again = Network(noise=noise, ms=ms)
    assert again.search(budget) == found


def layer(node: str, module: str = "", *, macs: int = 100, takes_from: tuple[str, ...] = ()) -> LayerDamage:
    return LayerDamage(
        node=node, name=node, module=module, operator="Conv", damage=0.1, sqnr_db=50.0, weights_share=0.5,
        activations_share=0.5, macs=macs, num_values=10, takes_from=takes_from,
    )  # fmt: skip


def test_islands_are_layers_modules_and_both_ends() -> None:
    layers = [layer("a", "stem.conv"), layer("b", "stages.0.x"), layer("c", "stages.0.y"), layer("d", "stages.1.x"),
              layer("e", "stages.1.y"), layer("f", "head")]  # fmt: skip
    found = {island.name: island.nodes for island in list_islands(layers)}
    assert found["stages.0"] == {"b", "c"}
    assert found["stages"] == {"b", "c", "d", "e"}
    assert found["stem.conv"] == {"a"}
    assert found["stem.conv to stages.0.x"] == {"a", "b"}
    assert len({frozenset(nodes) for nodes in found.values()}) == len(found)
    assert all(len(nodes) < len(layers) for nodes in found.values())


def test_without_modules_islands_are_windows() -> None:
    found = [island.nodes for island in list_islands([layer(name) for name in "abcdefgh"])]
    assert {"c", "d"} in found
    assert {"e", "f", "g", "h"} in found


def test_one_layer_alone_has_no_island() -> None:
    assert list_islands([layer("a")]) == ()


def test_cost_is_macs_and_conversions_at_borders() -> None:
    chain = [layer("a"), layer("b", takes_from=("a",)), layer("c", takes_from=("b",)), layer("d", takes_from=("c",))]
    assert float_cost(chain, frozenset()) == 0
    together, apart = float_cost(chain, frozenset("bc")), float_cost(chain, frozenset("bd"))
    assert 200 < together < apart


def test_ranking_prefers_what_helps_most_for_its_price() -> None:
    noise, cost = {"a": 8.0, "b": 6.0, "c": 0.1}, {"a": 100.0, "b": 10.0, "c": 1.0}
    forecast = Forecast(
        noise=lambda floats: sum(value for name, value in noise.items() if name not in floats),
        cost=lambda floats: sum(cost[name] for name in floats),
    )
    islands = [Island(name=name, nodes=frozenset(name)) for name in noise]
    steps = rank_islands(islands, forecast, start=frozenset())
    assert [set(step.added) for step in steps] == [{"b"}, {"a"}]  # never all three
