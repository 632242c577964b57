"""Bias correction on a network whose weights are rounded coarsely."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from onnx import parser

from cspdeploy.quant import lockstep
from cspdeploy.quant.bias import biased_nodes, correct_biases
from cspdeploy.quant.lockstep import images_that_fit
from cspdeploy.quant.plan import Grid, QuantPlan, fit_weight_grid
from cspdeploy.quant.simulate import planned_weights, simulate
from cspdeploy.quant.torch_graph import TorchGraph
from tests.quant.small_graphs import graph_of, images

SHAPE = (1, 3, 8, 8)
LINES = (
    "c = Conv<pads=[1, 1, 1, 1]>(x, w, b)", "a = LeakyRelu(c)", "d = Conv(a, v, e)", "r = Relu(d)", "s = Add(a, r)",
    "p = GlobalAveragePool(s)", "f = Flatten(p)", "y = Gemm<transB=1>(f, g, h)",
)  # fmt: skip
LAYOUT: Any = SimpleNamespace(followed_by={"c": "a", "d": "r"})


def network() -> TorchGraph:
    weights = {
        "w": images(6, 3, 3, 3, seed=1) / 3, "b": images(6, seed=2) / 3, "v": images(6, 6, 1, 1, seed=3) / 2,
        "e": images(6, seed=4) / 3, "g": images(5, 6, seed=5), "h": images(5, seed=6),
    }  # fmt: skip
    return TorchGraph(graph_of([parser.parse_node(line) for line in LINES], weights, shape=SHAPE))


def coarse_plan(graph: TorchGraph) -> QuantPlan:
    """15 steps for a weight, 12 for the activations in use."""
    steps = {"c": (0.3, 64), "a": (0.3, 2), "d": (0.3, 64), "r": (0.3, 0), "s": (0.3, 2)}
    weights = {name: fit_weight_grid(graph.weights[name].numpy(), limit=7) for name in ("w", "v")}
    return QuantPlan(
        grids={name: Grid(scale=scale, zero_point=zero, dtype="uint8") for name, (scale, zero) in steps.items()},
        weights=weights, biases={"e": ("a", "v")},
    )  # fmt: skip


def calibration(num_images: int) -> list[Any]:
    return np.split(images(num_images, *SHAPE[1:], seed=7) + 0.5, num_images // 16)


def means(graph: TorchGraph, plan: QuantPlan | None, batches: list[Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Of every channel of every tensor on its grid."""
    total: dict[str, np.ndarray[Any, Any]] = {}
    for x in batches:
        seen: dict[str, torch.Tensor] = {}
        weights = None if plan is None else planned_weights(graph, plan)
        changes = {} if plan is None else {name: lockstep.rounding(grid) for name, grid in plan.grids.items()}
        graph.run(torch.from_numpy(x), weights=weights, changes=changes, visit=seen.__setitem__)
        for name, value in seen.items():
            on_grid = changes[name](value) if name in changes else value
            mean = on_grid.transpose(0, 1).flatten(1).mean(dim=1).numpy() / len(batches)
            total[name] = total[name] + mean if name in total else mean
    return total


def corrected(plan: QuantPlan, values: dict[str, Any]) -> QuantPlan:
    return dataclasses.replace(plan, values={**plan.values, **values})


def test_means_behind_activations_are_those_of_float() -> None:
    graph, batches = network(), calibration(64)
    plan = dataclasses.replace(coarse_plan(graph), biases={})  # 15 steps for a weight are too few to store a bias in
    found = correct_biases(graph, plan, LAYOUT, batches)
    assert set(found) == {"b", "e", "h"}
    exact, before = means(graph, None, batches), means(graph, plan, batches)
    after = means(graph, corrected(plan, found), batches)
    for name in ("a", "r", "y"):
        off_before, off_after = (np.abs(one[name] - exact[name]).max() for one in (before, after))
        assert off_after < 0.02
        assert off_after < 0.6 * off_before


def test_outputs_come_nearer_on_other_images() -> None:
    graph, batches = network(), calibration(64)
    plan = coarse_plan(graph)
    others = [images(64, *SHAPE[1:], seed=8) + 0.5]
    exact = graph.run(torch.from_numpy(others[0]))["y"].numpy()
    better = corrected(plan, correct_biases(graph, plan, LAYOUT, batches))
    errors = [np.linalg.norm(simulate(graph, one, others)["y"] - exact) for one in (plan, better)]
    assert errors[1] < 0.8 * errors[0]


def test_nothing_to_correct_is_left_alone() -> None:
    graph = network()
    found = correct_biases(graph, QuantPlan(grids={}, weights={}), LAYOUT, calibration(16))
    for name, value in found.items():
        np.testing.assert_allclose(value, graph.weights[name].numpy(), atol=1e-6)


def test_planned_values_count_for_both_sides() -> None:
    """Doubled channels behind the first convolution, halved again by the second."""
    graph, batches = network(), calibration(32)
    values = {"w": 2 * graph.weights["w"].numpy(), "b": 2 * graph.weights["b"].numpy()}
    found = correct_biases(graph, QuantPlan(grids={}, weights={}, values=values), LAYOUT, batches)
    np.testing.assert_allclose(found["b"], values["b"], atol=1e-6)


def test_channel_that_the_activation_holds_at_zero_gets_no_endless_bias() -> None:
    graph = network()
    graph.weights["e"] = torch.full((6,), -50.0)
    plan = coarse_plan(graph)
    found = correct_biases(graph, plan, LAYOUT, calibration(32))
    np.testing.assert_allclose(found["e"], -50, atol=0.2)


def test_memory_bounds_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = network()
    one = (
        2 * 4 * 8 * 8 * (3 + 6 + 6 + 6)
    )  # both sides, float32: the most at a node is x and c, or a, d and r, and a copy
    assert images_that_fit(graph, memory_bytes=10 * one) in (8, 9, 10, 11)
    assert images_that_fit(graph, memory_bytes=1) == 1
    seen: list[int] = []
    compute = TorchGraph.compute
    monkeypatch.setattr(lockstep, "MEMORY_BYTES", 10 * one)
    monkeypatch.setattr(
        TorchGraph, "compute", lambda self, node, taken: (seen.append(len(taken[0])), compute(self, node, taken))[1]
    )
    correct_biases(graph, coarse_plan(graph), LAYOUT, calibration(64))
    assert max(seen) <= 11


def test_several_batches_are_as_good_as_one() -> None:
    graph, batches = network(), calibration(64)
    plan = coarse_plan(graph)
    split, joined = (correct_biases(graph, plan, LAYOUT, some) for some in (batches, [np.concatenate(batches)]))
    for name, value in split.items():
        np.testing.assert_allclose(value, joined[name], atol=0.05)


def test_shared_biases_are_left_alone() -> None:
    lines = ("c = Conv(x, w, b)", "d = Conv(c, v, b)", "y = Relu(d)")
    weights = {"w": images(6, 3, 1, 1), "v": images(6, 6, 1, 1), "b": images(6)}
    graph = TorchGraph(graph_of([parser.parse_node(line) for line in lines], weights, shape=SHAPE))
    assert biased_nodes(graph) == {}


def test_file_whose_images_go_singly() -> None:
    """Softmax across the images: together they would not give what each gives."""
    graph = TorchGraph(
        graph_of(
            [parser.parse_node(line) for line in ("c = Conv(x, w, b)", "y = Softmax<axis=0>(c)")],
            {"w": images(6, 3, 1, 1), "b": images(6)}, shape=SHAPE,
        )
    )  # fmt: skip
    assert graph.one_by_one
    plan = QuantPlan(grids={}, weights={"w": fit_weight_grid(graph.weights["w"].numpy(), limit=7)})
    assert set(correct_biases(graph, plan, LAYOUT, calibration(32))) == {"b"}


def test_activation_without_a_grid_before_it_is_looked_through() -> None:
    """As where an engine computes both in one: the layout then has no pair of tensors to tell of it."""
    graph, batches = network(), calibration(64)
    plan = coarse_plan(graph)
    fused = dataclasses.replace(
        plan, biases={}, grids={name: grid for name, grid in plan.grids.items() if name not in ("c", "d")}
    )
    found = correct_biases(graph, fused, SimpleNamespace(followed_by={}), batches)  # type: ignore[arg-type]
    told = correct_biases(graph, fused, LAYOUT, batches)
    for name, bias in told.items():
        np.testing.assert_array_equal(found[name], bias)
