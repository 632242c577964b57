"""Layers of a detector that are left in float unasked: few, cheap, and only where that helps."""

from __future__ import annotations

import pytest

from cspdeploy.quant import relief
from cspdeploy.quant.assemble import RELIEF, Assembly
from cspdeploy.quant.islands import float_cost
from cspdeploy.quant.relief import MIN_RELIEF_DB, find_relief, relieve
from cspdeploy.quant.select import Selection, select
from cspdeploy.quant.sensitivity import measure_sensitivity
from tests.quant.detector_parts import assembled
from tests.quant.int8_parts import quiet

SHARE = 0.6
"""Of the work: two layers of the tiny detector are INT8, and the cheaper one is a third of it."""


@pytest.fixture(scope="module")
def assembly() -> Assembly:
    return assembled()


@pytest.fixture(scope="module")
def selection(assembly: Assembly) -> Selection:
    return select(assembly, method="minmax", progress=quiet)


def test_nothing_is_left_in_float_that_costs_too_much(assembly: Assembly, selection: Selection) -> None:
    """Of three layers each is far more than a 12th of the work."""
    assert relieve(assembly, selection, progress=quiet) is selection


def test_layer_that_helps_is_left_in_float(
    assembly: Assembly, selection: Selection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relief, "MOST_FLOAT", SHARE)
    monkeypatch.setattr(relief, "MIN_RELIEF_DB", 0.0)
    found = relieve(assembly, selection, progress=quiet)
    added = found.scheme.floats - selection.scheme.floats
    assert added
    assert found.sqnr_db > selection.sqnr_db
    assert found.sqnr_db == assembly.sqnr_db(found.plan)
    assert found.why() == f"{selection.why()}; {len(added)} more in float: {found.sqnr_db:.1f} dB"
    reasons = assembly.layout(found.scheme).float_nodes
    assert {reasons[name] for name in added} == {RELIEF}


def test_gain_that_is_not_worth_its_time_is_not_kept(
    assembly: Assembly, selection: Selection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relief, "MOST_FLOAT", SHARE)
    monkeypatch.setattr(relief, "MIN_RELIEF_DB", 100.0)
    found = relieve(assembly, selection, progress=quiet)
    assert (found.scheme, found.sqnr_db) == (selection.scheme, selection.sqnr_db)
    assert found.plan is selection.plan
    assert len(found.tried) == len(selection.tried) + 1
    assert found.why().startswith(selection.why())
    assert found.why().endswith(" dB, not kept")
    assert MIN_RELIEF_DB < 100.0


def test_what_is_proposed_is_within_the_share(
    assembly: Assembly, selection: Selection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relief, "MOST_FLOAT", SHARE)
    added = find_relief(assembly, selection.scheme, selection.plan)
    layers = measure_sensitivity(
        assembly.graph, selection.plan, assembly.fit_batches(4), groups=assembly.layout(selection.scheme).groups,
        view=assembly.view,
    ).layers  # fmt: skip
    assert {layer.node for layer in layers} > added
    assert 0 < float_cost(layers, added) <= SHARE * sum(layer.macs for layer in layers)
