"""Rounding weights together, against rounding each to the nearest."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from onnx import parser

from cspdeploy.quant import rounding
from cspdeploy.quant.plan import QuantPlan, fit_weight_grid
from cspdeploy.quant.rounding import round_weights
from cspdeploy.quant.simulate import simulate
from cspdeploy.quant.torch_graph import TorchGraph
from tests.quant.small_graphs import graph_of, images

LAYOUT: Any = SimpleNamespace(followed_by={"c": "a", "d": "r"})
LINES = (
    "c = Conv<pads=[1, 0, 1, 2], strides=[2, 1]>(x, w, b)", "a = LeakyRelu(c)",
    "d = Conv<group=2, dilations=[2, 2]>(a, v, e)", "r = Relu(d)", "p = GlobalAveragePool(r)", "f = Flatten(p)",
    "y = Gemm(f, g, h)",
)  # fmt: skip


def network() -> TorchGraph:
    weights = {
        "w": images(8, 6, 3, 3, seed=1) / 5, "b": images(8, seed=2), "v": images(12, 4, 2, 2, seed=3) / 4,
        "e": images(12, seed=4), "g": images(12, 5, seed=5), "h": images(5, seed=6),
    }  # fmt: skip
    return TorchGraph(graph_of([parser.parse_node(line) for line in LINES], weights, shape=(1, 6, 10, 10)))


def plan_of(graph: TorchGraph, *, limit: int = 5) -> QuantPlan:
    grids = {name: fit_weight_grid(graph.weights[name].numpy(), limit=limit) for name in ("w", "v")}
    return QuantPlan(grids={}, weights={**grids, "g": fit_weight_grid(graph.weights["g"].numpy(), axis=1, limit=limit)})


def pictures(num_images: int, *, seed: int) -> np.ndarray[Any, Any]:
    """Neighbouring values and channels go together, as in images: what rounding can make use of."""
    x = images(num_images, 6, 12, 12, seed=seed)
    smooth = (x[:, :, 1:-1, 1:-1] + x[:, :, :-2, 1:-1] + x[:, :, 1:-1, :-2] + x[:, :, 2:, 1:-1] + x[:, :, 1:-1, 2:]) / 2
    mixed: np.ndarray[Any, Any] = np.einsum("oc,nchw->nohw", images(6, 6, seed=9), smooth).astype(np.float32)
    return mixed


def error(graph: TorchGraph, plan: QuantPlan, x: np.ndarray[Any, Any]) -> float:
    exact = graph.run(torch.from_numpy(x))["y"].numpy()
    return float(np.linalg.norm(simulate(graph, plan, [x])["y"] - exact) / np.linalg.norm(exact))


def test_outputs_come_nearer_than_with_the_nearest_on_other_images() -> None:
    graph = network()
    plan, batches = plan_of(graph), [pictures(48, seed=7), pictures(16, seed=8)]
    found = round_weights(graph, plan, LAYOUT, batches)
    assert set(found.integers) == {"w", "v", "g"}
    others = pictures(64, seed=10)
    nearest = round_weights(graph, plan, LAYOUT, batches, deadline=0)  # biases corrected all the same
    assert error(graph, found, others) < 0.8 * error(graph, nearest, others)


def test_integers_stay_within_the_limit_and_one_step_away() -> None:
    graph = network()
    plan = plan_of(graph)
    found = round_weights(graph, plan, LAYOUT, [pictures(32, seed=7)])
    for name, integers in found.integers.items():
        grid = plan.weights[name]
        nearest = grid.quantise(graph.weights[name].numpy())
        assert integers.dtype == np.int8
        assert integers.shape == nearest.shape
        assert np.abs(integers).max() <= grid.limit
        assert 0 < (integers != nearest).mean() < 0.6


def test_uncorrelated_inputs_of_one_size_are_rounded_to_the_nearest() -> None:
    weight = images(6, 9, seed=1)
    grid = fit_weight_grid(weight)
    found = rounding._round_rows(torch.from_numpy(weight), torch.from_numpy(grid.scales), torch.eye(9), grid)
    np.testing.assert_array_equal(found.numpy(), grid.quantise(weight))


def test_two_inputs_that_are_one_share_their_rounding_error() -> None:
    """Both at 0.4 steps: to the nearest their sum is 0, together 1 is nearer to 0.8."""
    grid = fit_weight_grid(np.array([[127.0]], np.float32))
    found = rounding._round_rows(torch.full((1, 2), 0.4), torch.ones(1), torch.ones(2, 2), grid)
    assert float(found.sum()) == 1


def test_deadline_leaves_the_rest_to_the_nearest() -> None:
    graph = network()
    times = iter([0.0, 1.0, 2.0, 3.0, 4.0])
    seen: list[tuple[int, int]] = []
    found = round_weights(
        graph, plan_of(graph), LAYOUT, [pictures(8, seed=7)], deadline=1.5, clock=lambda: next(times),
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert list(found.integers) == ["w"]
    assert set(found.values) == {"b", "e", "h"}
    assert seen == [(1, 3)]


def test_same_result_every_time() -> None:
    graph = network()
    first, second = (round_weights(graph, plan_of(graph), LAYOUT, [pictures(16, seed=7)]) for _ in range(2))
    for name, integers in first.integers.items():
        np.testing.assert_array_equal(integers, second.integers[name])


def test_dead_inputs_and_images_fewer_than_weights() -> None:
    graph = network()
    x = pictures(1, seed=7)
    x[:, :3] = 0
    found = round_weights(graph, plan_of(graph, limit=127), LAYOUT, [x])
    assert error(graph, found, pictures(8, seed=8)) < 0.05


def test_layers_beyond_the_matrix_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "MAX_INPUTS", 20)
    graph = network()
    assert set(round_weights(graph, plan_of(graph), LAYOUT, [pictures(8, seed=7)]).integers) == {"v", "g"}


def test_covariance_that_float32_has_lost_leaves_the_nearest() -> None:
    """Two inputs that are one, their squares 1e12 times their variance: what is left of it is rounding."""
    graph = network()
    (name, grid) = next(iter(plan_of(graph).weights.items()))
    rows = graph.weights[name].flatten(1)
    scales = torch.from_numpy(grid.scales).expand(len(rows))
    lost = torch.full((rows.shape[1], rows.shape[1]), 1.0)
    lost.fill_diagonal_(0.5)
    found = rounding._round_rows(rows, scales, lost, grid)
    np.testing.assert_array_equal(
        found.reshape(graph.weights[name].shape).numpy(), grid.quantise(graph.weights[name].numpy())
    )
