"""Ranges chosen tensor by tensor: by what each moves at a detector's outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import pytest

from cspdeploy.quant.assemble import Assembly
from cspdeploy.quant.mixture import choose_mixture, tensor_groups
from cspdeploy.quant.plan import Grid
from cspdeploy.quant.relief import mix_ranges
from cspdeploy.quant.scheme import Scheme
from cspdeploy.quant.select import MIN_GAIN_DB, Selection, Tried
from tests.quant.detector_parts import assembled
from tests.quant.int8_parts import quiet


@pytest.fixture(scope="module")
def assembly() -> Assembly:
    return assembled()


@pytest.fixture(scope="module")
def scheme(assembly: Assembly) -> Scheme:
    return Scheme(method="minmax", exponent=0.0, floats=assembly.float_heads)


def widened(grids: Mapping[str, Grid], names: frozenset[str], factor: float) -> dict[str, Grid]:
    return {
        name: dataclasses.replace(grid, scale=grid.scale * factor) if name in names else grid
        for name, grid in grids.items()
    }


def test_the_better_grid_of_each_group_is_found(assembly: Assembly, scheme: Scheme) -> None:
    """Of two candidates each spoils one group; steps 16 times too wide are worse for any."""
    plan, layout = assembly.plan(scheme), assembly.layout(scheme)
    first, *others = tensor_groups(layout)
    assert others
    spoilt_first = widened(plan.grids, first, 16.0)
    spoilt_others = widened(plan.grids, frozenset().union(*others), 16.0)
    found = choose_mixture(
        assembly.graph, plan, layout, [spoilt_first, spoilt_others], assembly.fit_batches(8), view=assembly.view
    )
    assert found == {name: 1 if name in first else 0 for name in layout.tensors}


def test_first_candidate_stays_where_all_are_alike(assembly: Assembly, scheme: Scheme) -> None:
    plan, layout = assembly.plan(scheme), assembly.layout(scheme)
    found = choose_mixture(
        assembly.graph, plan, layout, [plan.grids] * 3, assembly.fit_batches(4), view=assembly.view
    )  # fmt: skip
    assert set(found.values()) == {0}


def test_selection_takes_the_mixture_where_it_helps(assembly: Assembly, scheme: Scheme) -> None:
    plan = assembly.plan(scheme)
    sqnr = assembly.sqnr_db(plan)
    before = Selection(scheme=scheme, plan=plan, sqnr_db=sqnr, tried=(Tried(scheme=scheme, sqnr_db=sqnr),))
    found = mix_ranges(assembly, before, progress=quiet)
    tried = found.tried[-1]
    assert tried.scheme == dataclasses.replace(scheme, mixed=True)
    assert found.sqnr_db == assembly.sqnr_db(found.plan)
    if tried.sqnr_db >= sqnr + MIN_GAIN_DB:
        assert found.scheme == tried.scheme
        assert found.why().endswith(f"; tensor by tensor: {tried.sqnr_db:.1f} dB")
    else:
        assert found.scheme == scheme
        assert found.why().endswith(f"; tensor by tensor: {tried.sqnr_db:.1f} dB, not kept")


def test_mixture_serves_layouts_with_other_layers_in_float(assembly: Assembly, scheme: Scheme) -> None:
    """A search asks for such plans: what is left of the tensors keeps its range."""
    assembly.mix(scheme, assembly.plan(scheme))
    mixed = dataclasses.replace(scheme, mixed=True)
    whole = assembly.plan(mixed)
    layers = sorted(assembly.layout(scheme).nodes & {node.outputs[0] for node in assembly.graph.nodes})
    smaller = assembly.plan(dataclasses.replace(mixed, floats=scheme.floats | {layers[-1]}))
    assert smaller.grids.keys() < whole.grids.keys()
    assert all(np.isfinite(grid.scale) and grid.scale > 0 for grid in smaller.grids.values())
