"""Which ranges and repairs are kept: those that help on held-out images, and no others."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

import numpy as np
import pytest

from cspdeploy.quant.assemble import EXACT_SQNR_DB, Assembly, output_sqnr_db
from cspdeploy.quant.budget import Budget, Judgement
from cspdeploy.quant.describe import list_facts, rounded_db
from cspdeploy.quant.int8 import Int8Settings, assemble
from cspdeploy.quant.observations_cache import ObservationsCache
from cspdeploy.quant.outcome import Point, conclude
from cspdeploy.quant.place import Layout
from cspdeploy.quant.plan import QuantPlan
from cspdeploy.quant.prepare import prepare_float
from cspdeploy.quant.prove import PlacementProof
from cspdeploy.quant.ranges import METHODS
from cspdeploy.quant.scheme import Scheme
from cspdeploy.quant.select import MIN_GAIN_DB, Selection, Tried, select, with_rounding
from tests.quant.int8_parts import calibration, quiet
from tests.quant.placed_graphs import ROWS, chain


@pytest.fixture(scope="module")
def assembly() -> Assembly:
    model = prepare_float(chain(), placement=ROWS["ort-cpu"])
    return assemble(
        model, calibration(), placement=ROWS["ort-cpu"], settings=Int8Settings(), cache=ObservationsCache(None),
        progress=quiet,
    )  # fmt: skip


class Scores:
    """Stands for an assembly whose plans are their schemes, of which the SQNR is known."""

    float_heads: frozenset[str] = frozenset()

    def __init__(self, scores: Mapping[Scheme, float], default: float = 10.0) -> None:
        self.scores, self.default = scores, default

    def plan(self, scheme: Scheme) -> Scheme:
        return scheme

    def layout(self, scheme: Scheme) -> None: ...

    def with_biases(self, plan: Scheme, layout: None) -> Scheme:
        return dataclasses.replace(plan, bias=True)

    def sqnr_db(self, plan: Scheme) -> float:
        return self.scores.get(plan, self.default)


class AlwaysThat:
    """Stands for an assembly that finds the same SQNR whatever it is given."""

    def __init__(self, sqnr_db: float) -> None:
        self._sqnr_db = sqnr_db

    def sqnr_db(self, plan: QuantPlan) -> float:
        return self._sqnr_db


def choose(scores: Mapping[Scheme, float], *, method: str = "auto") -> Selection:
    return select(Scores(scores), method=method, progress=quiet)  # type: ignore[arg-type]


# --- on a network ---


def test_auto_keeps_the_best_of_all_methods(assembly: Assembly) -> None:
    found = select(assembly, method="auto", progress=quiet)
    assert {one.scheme.method for one in found.tried} == set(METHODS)
    assert {one.scheme.exponent for one in found.tried} == {0.0, 0.5, 0.75, 1.0}
    assert found.sqnr_db >= max(one.sqnr_db for one in found.tried) - MIN_GAIN_DB
    assert found.sqnr_db == assembly.sqnr_db(found.plan)
    told = {one.scheme: one.sqnr_db for one in found.tried}
    assert told[found.scheme] == found.sqnr_db


def test_method_that_is_asked_for_is_the_only_one(assembly: Assembly) -> None:
    found = select(assembly, method="minmax", progress=quiet)
    assert {one.scheme.method for one in found.tried} == {"minmax"}


def test_progress_names_each_scheme(assembly: Assembly) -> None:
    said: list[str] = []
    select(assembly, method="minmax", progress=lambda what, done, total: said.append(what))
    assert said[0] == "trying minmax, equalised 0.75"
    assert "correcting biases" in said


# --- by known scores ---

BARE = Scheme(method="through", exponent=0.75)
OTHER = Scheme(method="minmax", exponent=0.75)


def corrected(scheme: Scheme) -> Scheme:
    return dataclasses.replace(scheme, bias=True)


def test_correction_that_helps_is_kept() -> None:
    found = choose({BARE: 38.0, corrected(BARE): 41.0})
    assert (found.scheme, found.sqnr_db) == (corrected(BARE), 41.0)
    assert str(found.plan) == str(corrected(BARE))
    assert found.why().startswith("ranges by through, equalised 0.75: 38.0 dB (")
    assert found.why().endswith("; biases corrected: 41.0 dB")


@pytest.mark.parametrize("gain", [-3.0, 0.0, MIN_GAIN_DB / 2])
def test_correction_that_does_not_help_is_not_kept(gain: float) -> None:
    found = choose({BARE: 38.0, corrected(BARE): 38.0 + gain})
    assert found.scheme == BARE
    assert found.why().endswith(f"; biases corrected: {38 + gain:.1f} dB, not kept")


def test_runner_up_wins_by_its_correction() -> None:
    found = choose({BARE: 38.0, OTHER: 37.0, corrected(BARE): 39.0, corrected(OTHER): 42.0})
    assert found.scheme == corrected(OTHER)
    assert found.why().startswith("ranges by minmax, equalised 0.75: 37.0 dB (")
    assert "through: 38.0" in found.why()


def test_all_that_are_near_are_corrected_and_no_others() -> None:
    third = Scheme(method="channels", exponent=0.75)
    found = choose({
        BARE: 38.0, third: 37.2, OTHER: 36.5, corrected(BARE): 39.0, corrected(third): 41.0, corrected(OTHER): 45.0,
    })  # fmt: skip
    assert found.scheme == corrected(third)
    assert corrected(OTHER) not in {one.scheme for one in found.tried}


def test_of_two_that_are_alike_the_one_that_looks_further_is_taken_and_corrected() -> None:
    close = {Scheme(method=name, exponent=0.75): 38.0 + MIN_GAIN_DB / 2 for name in ("mse", "minmax", "entropy")}
    found = choose({BARE: 38.0, **close, corrected(BARE): 40.0})
    assert found.scheme == corrected(BARE)


def test_figure_of_the_correction_is_that_of_what_is_kept() -> None:
    """Not that of the runner-up's, which gained too little more to be preferred."""
    found = choose({BARE: 38.0, OTHER: 37.0, corrected(BARE): 41.0, corrected(OTHER): 41.08})
    assert found.scheme == corrected(BARE)
    assert found.why().endswith("; biases corrected: 41.0 dB")


def test_exponent_that_helps_is_kept() -> None:
    without = Scheme(method="mse", exponent=0.0)
    found = choose({Scheme(method="mse", exponent=0.75): 30.0, without: 33.0}, method="mse")
    assert found.scheme == without
    assert found.why().startswith("ranges by mse, not equalised: 33.0 dB (equalised 0.75: 30.0; ")


# --- rounding ---


@pytest.mark.parametrize(("sqnr_db", "kept"), [(42.0, True), (41.05, False), (20.0, False), (float("-inf"), False)])
def test_rounding_is_kept_where_it_helps(sqnr_db: float, kept: bool) -> None:
    before = Selection(
        scheme=corrected(BARE), plan=QuantPlan(grids={}, weights={}), sqnr_db=41.0,
        tried=(Tried(scheme=BARE, sqnr_db=38.0), Tried(scheme=corrected(BARE), sqnr_db=41.0)),
    )  # fmt: skip
    plan = QuantPlan(grids={}, weights={})
    found = with_rounding(AlwaysThat(sqnr_db), before, plan)  # type: ignore[arg-type]
    assert found.scheme.rounded is kept
    assert (found.plan is plan) is kept
    assert found.sqnr_db == (sqnr_db if kept else 41.0)
    assert found.why().endswith(f"; weights rounded for the outputs: {sqnr_db:.1f} dB" + ("" if kept else ", not kept"))
    assert [one.scheme.rounded for one in found.tried] == [False, False, True]


# --- what is said ---


@pytest.mark.parametrize(("budget", "told"), [(Budget(min_sqnr_db=1.0), False), (Budget(max_latency_ratio=0.9), True)])
def test_facts_of_a_file_that_ships_hold_no_timing_unless_one_was_asked_for(
    assembly: Assembly, budget: Budget, told: bool
) -> None:
    selection = select(assembly, method="minmax", progress=quiet)
    judgement = Judgement(
        runtime="ort-cpu", sqnr_db=float("inf"), num_images=12, speed=1.2345, latency_ms=1.0, fp32_latency_ms=1.2345,
        verdict="faster",
    )  # fmt: skip
    point = Point(
        scheme=selection.scheme, judgement=judgement, cost=0.0, accurate=True, meets=True, shortfall=""
    )  # fmt: skip
    found = conclude([point], budget=budget, stopped="found", num_layers=3, islands=())
    facts = list_facts(
        assembly, selection, scheme=selection.scheme, judgement=judgement, found=found, budget=budget,
        proof=PlacementProof(runtime=None, unproven="not here", operators={}),
    )  # fmt: skip
    text = json.dumps(facts, allow_nan=False)
    assert ("1.23x FP32's speed" in text, "latency_of_fp32" in text) == (told, told)
    assert facts["sqnr_db"] == EXACT_SQNR_DB


@pytest.mark.parametrize(("sqnr_db", "told"), [(float("-inf"), None), (float("nan"), None), (41.26, 41.3)])
def test_decibels_that_json_can_hold(sqnr_db: float, told: float | None) -> None:
    assert rounded_db(sqnr_db) == told


# --- the measure ---


def test_sqnr_is_that_of_the_worst_output() -> None:
    exact = np.array([[3.0, 4.0]], np.float32)
    near = exact + np.array([[0.3, 0.4]], np.float32)
    far = exact + np.array([[3.0, 4.0]], np.float32)
    assert output_sqnr_db({"a": exact, "b": exact}, {"a": near, "b": far}) == pytest.approx(0.0, abs=1e-5)
    assert output_sqnr_db({"a": exact}, {"a": near}) == pytest.approx(20.0, abs=1e-4)
    assert output_sqnr_db({"a": exact}, {"a": exact}) == EXACT_SQNR_DB


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_outputs_that_are_not_finite_have_no_signal(value: float) -> None:
    exact = np.ones((1, 2), np.float32)
    assert output_sqnr_db({"a": exact}, {"a": np.array([[1.0, value]], np.float32)}) == float("-inf")


def test_noise_where_there_is_no_signal_is_not_exact() -> None:
    nothing = np.zeros((1, 2), np.float32)
    assert output_sqnr_db({"a": nothing}, {"a": nothing + 1}) == float("-inf")
    assert output_sqnr_db({"a": nothing}, {"a": nothing}) == EXACT_SQNR_DB


def test_few_images_are_told_to_be_judged_on_themselves() -> None:
    model = prepare_float(chain(), placement=ROWS["ort-cpu"])
    made = {
        num: assemble(
            model, calibration(num), placement=ROWS["ort-cpu"], settings=Int8Settings(),
            cache=ObservationsCache(None), progress=quiet,
        ).shared for num in (4, 16)
    }  # fmt: skip
    assert made == {4: True, 16: False}


def test_images_that_judge_are_not_those_that_fit(assembly: Assembly) -> None:
    fit = {x.tobytes() for batch in assembly.fit_batches() for x in batch}
    held_out = {x.tobytes() for batch in assembly.held_out_batches() for x in batch}
    assert len(held_out) == assembly.num_held_out
    assert fit
    assert fit.isdisjoint(held_out)


# --- the heads of a detector ---


class Heads(Scores):
    """Two layers, of which the last one could be INT8 as well."""

    float_heads = frozenset({"head"})

    def layout(self, scheme: Scheme) -> Layout:
        return Layout(
            tensors=(), groups=(), followed_by={}, nodes=frozenset(), float_nodes=dict.fromkeys(scheme.floats, "asked"),
            weights={}, biases={},
        )  # fmt: skip


@pytest.mark.parametrize(("whole_db", "kept"), [(20.0, True), (19.95, True), (19.8, False), (12.0, False)])
def test_heads_stay_in_float_unless_that_is_harmless(whole_db: float, kept: bool) -> None:
    whole = Scheme(method="through", exponent=0.75)
    floats = dataclasses.replace(whole, floats=Heads.float_heads)
    found = select(Heads({floats: 20.0, whole: whole_db}), method="through", progress=lambda *_: None)  # type: ignore[arg-type]
    assert found.scheme == (whole if kept else floats)
    assert found.why().endswith(f"heads in INT8: {whole_db:.1f} dB{'' if kept else ', not kept'}")
