"""Predicted damage against that of real fake quantisation, on networks small enough to leave every layer out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from cspdeploy.core.errors import InputError
from cspdeploy.quant.plan import Floats, Grid, QuantPlan, fit_weight_grid
from cspdeploy.quant.sensitivity import LayerDamage, Sensitivity, measure_sensitivity
from cspdeploy.quant.simulate import run_batches, simulate
from cspdeploy.quant.torch_graph import TorchGraph

NUM_CONVS = 6
CHAIN = "\n".join(
    f"c{i} = Conv<pads=[1,1,1,1]>({'x' if i == 0 else f'a{i - 1}'}, w{i}, b{i})\n a{i} = LeakyRelu<alpha=0.1>(c{i})"
    for i in range(NUM_CONVS)
)
SIZE = "float[1, 3, 8, 8] x"


def make_graph(nodes: str, output: str, **weights: Floats) -> TorchGraph:
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 18]> agraph ({SIZE}) => ({output}) {{ {nodes} }}'
    )
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    for node in model.graph.node:
        node.name = f"/stem/{node.output[0]}/Conv"
    return TorchGraph(model)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors of some kilobytes: threads would wait for each other longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def x_NCHW() -> Floats:
    return np.random.default_rng(1).normal(size=(32, 3, 8, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def chain() -> TorchGraph:
    """Six convolutions, then pooling and a matrix product that stays in float."""
    rng = np.random.default_rng(0)
    weights = {}
    for i in range(NUM_CONVS):
        ins = 3 if i == 0 else 8
        weights[f"w{i}"] = (rng.normal(size=(8, ins, 3, 3)) / math.sqrt(4.5 * ins)).astype(np.float32)
        weights[f"b{i}"] = rng.normal(size=8).astype(np.float32) / 4
    weights["wh"] = rng.normal(size=(5, 8)).astype(np.float32)
    weights["bh"] = np.zeros(5, np.float32)
    last = NUM_CONVS - 1
    head = f"p = GlobalAveragePool(a{last}) f = Flatten(p) y = Gemm<transB=1>(f, wh, bh)"
    return make_graph(CHAIN + head, "float[1, 5] y", **weights)


def make_plan(graph: TorchGraph, x_NCHW: Floats, *, limits: dict[str, int] | None = None) -> QuantPlan:
    """Grids at the inputs of the convolutions. `limits`: of weights that get coarser steps."""
    seen: dict[str, tuple[float, float]] = {}
    with torch.inference_mode():
        graph.run(torch.from_numpy(x_NCHW), visit=lambda name, x: seen.update({name: (float(x.min()), float(x.max()))}))
    grids = {}
    for node in graph.nodes:
        if node.operator == "Conv":
            low, high = seen[node.inputs[0]]
            scale = (high - low) / 255
            grids[node.inputs[0]] = Grid(scale=scale, zero_point=round(-low / scale), dtype="uint8")
    names = [node.inputs[1] for node in graph.nodes if node.operator == "Conv"]
    weights = {
        name: fit_weight_grid(graph.weights[name].numpy(), limit=(limits or {}).get(name, 127)) for name in names
    }
    return QuantPlan(grids=grids, weights=weights)


def measured_sqnr_db(graph: TorchGraph, plan: QuantPlan, x_NCHW: Floats) -> float:
    with torch.inference_mode():
        exact, got = run_batches(graph, [x_NCHW])["y"], simulate(graph, plan, [x_NCHW])["y"]
    noise = np.sum(np.square(got - exact, dtype=np.float64))
    return float(10 * np.log10(np.sum(np.square(exact, dtype=np.float64)) / noise))


def layer(found: Sensitivity, node: str) -> LayerDamage:
    return next(one for one in found.layers if one.node == node)


def ranks(values: list[float]) -> np.ndarray:
    return np.argsort(np.argsort(values))


def test_whole_network_is_predicted_to_a_decibel(chain: TorchGraph, x_NCHW: Floats) -> None:
    plan = make_plan(chain, x_NCHW)
    found = measure_sensitivity(chain, plan, [x_NCHW], num_directions=8)
    assert found.sqnr_db() == pytest.approx(measured_sqnr_db(chain, plan, x_NCHW), abs=1.0)


def test_every_source_alone_is_predicted_and_ranked_as_by_leaving_all_others_out(
    chain: TorchGraph, x_NCHW: Floats
) -> None:
    plan = make_plan(chain, x_NCHW, limits={"w1": 30, "w4": 10})
    found = measure_sensitivity(chain, plan, [x_NCHW[:16], x_NCHW[16:]], num_directions=8)
    predicted, measured = [], []
    for name in plan.grids:
        predicted.append(found.sqnr_db(tensors=[name], nodes=[]))
        alone = dataclasses.replace(plan, grids={name: plan.grids[name]}, weights={})
        measured.append(measured_sqnr_db(chain, alone, x_NCHW))
    for i in range(NUM_CONVS):
        predicted.append(found.sqnr_db(tensors=[], nodes=[f"c{i}"]))
        alone = dataclasses.replace(plan, grids={}, weights={f"w{i}": plan.weights[f"w{i}"]})
        measured.append(measured_sqnr_db(chain, alone, x_NCHW))
    # 256 samples: 0.4 dB; what the other roundings change about the tensor on its way adds to it.
    assert np.max(np.abs(np.array(predicted) - measured)) < 2.0
    assert np.corrcoef(ranks(predicted), ranks(measured))[0, 1] > 0.9


def test_planted_layer_does_the_damage(chain: TorchGraph, x_NCHW: Floats) -> None:
    found = measure_sensitivity(chain, make_plan(chain, x_NCHW, limits={"w3": 3}), [x_NCHW])
    worst = max(found.layers, key=lambda one: one.damage)
    assert worst.node == "c3"
    assert worst.damage > 0.9
    assert worst.weights_share > 0.9
    assert sum(one.damage for one in found.layers) == pytest.approx(1.0)
    without = found.sqnr_db(nodes={f"c{i}" for i in range(NUM_CONVS)} - {"c3"})
    assert without > found.sqnr_db() + 10


def test_layers_are_described(chain: TorchGraph, x_NCHW: Floats) -> None:
    found = measure_sensitivity(chain, make_plan(chain, x_NCHW), [x_NCHW[:4]])
    assert [one.node for one in found.layers] == [f"c{i}" for i in range(NUM_CONVS)]
    second = layer(found, "c1")
    assert (second.operator, second.module, second.takes_from) == ("Conv", "stem.c1", ("c0",))
    assert second.macs == 8 * 8 * 8 * 8 * 9
    assert second.num_values == 8 * 8 * 8
    assert layer(found, "c0").takes_from == ()


def test_rounding_of_a_value_on_the_grid_already_is_charged_once(x_NCHW: Floats) -> None:
    w0 = np.random.default_rng(3).normal(size=(4, 3, 3, 3)).astype(np.float32)
    nodes = "c = Conv(x, w0) a = Relu(c) z = Conv(a, w1) y = Identity(z)"
    graph = make_graph(nodes, "float[1, 1, 6, 6] y", w0=w0, w1=np.ones((1, 4, 1, 1), np.float32))
    grid = Grid(scale=0.2, zero_point=128, dtype="uint8")
    plan = QuantPlan(grids={"c": grid, "a": grid}, weights={"w0": fit_weight_grid(w0)})
    found = measure_sensitivity(graph, plan, [x_NCHW], groups=[frozenset({"c", "a"})])
    assert np.all(found.tensors["a"] == 0)
    assert np.any(found.tensors["c"] != 0)
    # Without the first grid the second one does the rounding.
    assert found.noise(tensors=["a"], nodes=[]) == found.noise(tensors=["c"], nodes=[]) > 0
    assert found.noise(tensors=[], nodes=[]) == 0
    assert found.sqnr_db(tensors=[], nodes=[]) == math.inf


def test_bias_correction_is_credited_to_its_layer(chain: TorchGraph, x_NCHW: Floats) -> None:
    plan = make_plan(chain, x_NCHW)
    spoilt = dataclasses.replace(plan, values={"b2": chain.weights["b2"].numpy() + np.float32(0.2)})
    exact = {"b2": chain.weights["b2"].numpy()}
    charged = layer(measure_sensitivity(chain, spoilt, [x_NCHW], float_values=exact), "c2")
    spared = layer(measure_sensitivity(chain, spoilt, [x_NCHW]), "c2")
    assert charged.sqnr_db < spared.sqnr_db - 10
    assert charged.weights_share > 0.9


def test_same_seed_gives_the_same_and_batches_may_be_cut_anywhere(chain: TorchGraph, x_NCHW: Floats) -> None:
    plan = make_plan(chain, x_NCHW)
    told: list[int] = []
    whole = measure_sensitivity(chain, plan, [x_NCHW], progress=lambda what, done, total: told.append(done))
    again = measure_sensitivity(chain, plan, [x_NCHW])
    assert whole.layers == again.layers
    parts = measure_sensitivity(chain, plan, [x_NCHW[:20], x_NCHW[20:]])
    assert parts.num_images == whole.num_images == told[-1] == 32
    assert parts.sqnr_db() == pytest.approx(whole.sqnr_db(), abs=1.5)


def test_images_are_taken_in_parts_that_fit_into_memory(
    chain: TorchGraph, x_NCHW: Floats, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cspdeploy.quant.perturbation._CHUNK_BYTES", 1)
    told: list[int] = []
    measure_sensitivity(
        chain, make_plan(chain, x_NCHW), [x_NCHW[:3]], progress=lambda what, done, total: told.append(done)
    )
    assert told == [1, 2, 3]


def test_outputs_of_other_units_count_alike(x_NCHW: Floats) -> None:
    w = np.random.default_rng(4).normal(size=(4, 3, 3, 3)).astype(np.float32)
    nodes = "y = Conv(x, w0) b = Conv(x, w1) z = Mul(b, k)"
    graph = make_graph(
        nodes, "float[1, 4, 6, 6] y, float[1, 4, 6, 6] z", w0=w, w1=w, k=np.array(1000, np.float32)
    )  # fmt: skip
    plan = QuantPlan(grids={}, weights={"w0": fit_weight_grid(w), "w1": fit_weight_grid(w)})
    found = measure_sensitivity(graph, plan, [x_NCHW], num_directions=8)
    assert layer(found, "y").damage == pytest.approx(0.5, abs=0.1)


def test_what_comes_before_an_operator_without_a_gradient_is_judged_there(x_NCHW: Floats) -> None:
    w = np.random.default_rng(5).normal(size=(4, 3, 3, 3)).astype(np.float32)
    graph = make_graph("c = Conv(x, w0) y = ArgMax<axis=1>(c)", "int64[1, 1, 6, 6] y", w0=w)
    found = measure_sensitivity(graph, QuantPlan(grids={}, weights={"w0": fit_weight_grid(w)}), [x_NCHW])
    assert 20 < layer(found, "c").sqnr_db < 60


def test_outputs_that_do_not_depend_on_the_image_are_refused(x_NCHW: Floats) -> None:
    graph = make_graph("s = Shape(x) y = Identity(s)", "int64[4] y")
    with pytest.raises(InputError, match="none depends on the image"):
        measure_sensitivity(graph, QuantPlan(grids={}, weights={}), [x_NCHW])


def test_no_images_are_an_error(chain: TorchGraph, x_NCHW: Floats) -> None:
    with pytest.raises(ValueError, match="no images"):
        measure_sensitivity(chain, make_plan(chain, x_NCHW), [])
