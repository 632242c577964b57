from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper, shape_inference

from cspdeploy.core.errors import InputError
from cspdeploy.quant.place import Layout, lay_out
from cspdeploy.quant.placements import PLACEMENTS, Placement
from cspdeploy.quant.plan import Grid, QuantPlan, WeightGrid
from cspdeploy.quant.prepare import prepare_float
from cspdeploy.quant.simulate import run_batches, simulate
from cspdeploy.quant.torch_graph import TorchGraph
from cspdeploy.quant.write import write_qdq
from tests.quant.placed_graphs import ROWS, chain, images, make, plan_by_extremes, run_ort

ORT = ROWS["ort-cpu"]


def planned(model: onnx.ModelProto, row: Placement = ORT) -> tuple[onnx.ModelProto, TorchGraph, Layout, QuantPlan]:
    ready = prepare_float(model)
    graph = TorchGraph(ready)
    layout = lay_out(graph, row)
    return ready, graph, layout, plan_by_extremes(graph, layout, row, images())


@pytest.mark.parametrize("name", PLACEMENTS)
def test_file_computes_what_the_simulation_does(name: str) -> None:
    ready, graph, _, plan = planned(chain(), ROWS[name])
    x = images()
    model = write_qdq(ready, plan)
    onnx.checker.check_model(model, full_check=True)
    expected, exact, found = simulate(graph, plan, [x])["y"], run_batches(graph, [x])["y"], run_ort(model, x)["y"]
    # A value at the middle of two steps may be rounded to either: a tenth of what quantising itself costs.
    assert np.linalg.norm(found - expected) <= 0.1 * np.linalg.norm(expected - exact)
    assert np.linalg.norm(expected - exact) <= 0.05 * np.linalg.norm(exact)


def test_wrong_step_in_the_file_would_be_seen() -> None:
    ready, graph, _, plan = planned(chain())
    model = write_qdq(ready, plan)
    steps = next(tensor for tensor in model.graph.initializer if tensor.name == "w2/scale")
    steps.CopyFrom(numpy_helper.from_array(1.1 * numpy_helper.to_array(steps), "w2/scale"))
    x = images()
    expected, exact = simulate(graph, plan, [x])["y"], run_batches(graph, [x])["y"]
    assert np.linalg.norm(run_ort(model, x)["y"] - expected) > 0.1 * np.linalg.norm(expected - exact)


def test_types_and_shapes_are_known_throughout() -> None:
    ready, _, _, plan = planned(chain())
    model = write_qdq(ready, plan)
    inferred = shape_inference.infer_shapes(model, strict_mode=True)
    values = {value.name: value.type.tensor_type for value in model.graph.value_info}
    outputs = {value.name for value in model.graph.output}
    made = {name for node in model.graph.node for name in node.output} - outputs
    assert set(values) == made
    assert values["a1/q"].elem_type == TensorProto.UINT8
    assert [dim.dim_value for dim in values["a1/dq"].shape.dim] == [2, 8, 8, 8]
    for value in inferred.graph.value_info:
        assert value.type.tensor_type.elem_type == values[value.name].elem_type


def test_weights_are_int8_for_each_channel_and_biases_int32() -> None:
    ready, _, _, plan = planned(chain())
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in write_qdq(ready, plan).graph.initializer}
    assert (stored["w1/q"].dtype, stored["b1/q"].dtype) == (np.int8, np.int32)
    assert stored["w1/scale"].shape == (8,)
    assert not {"w1", "b1"} & set(stored)  # what the file does not need it does not hold
    assert {"w4", "b4"} <= set(stored)
    np.testing.assert_array_equal(stored["b1/scale"], np.float32(plan.grids["x"].scale) * stored["w1/scale"])
    assert int(np.abs(stored["w1/q"]).max()) == 127


def test_names_and_metadata_are_kept() -> None:
    ready, _, _, plan = planned(chain())
    ready.metadata_props.add(key="made_by", value="hand")
    ready.graph.node[0].metadata_props.add(key="module", value="stem")
    model = write_qdq(ready, plan)
    kept = [node.name for node in model.graph.node if not node.op_type.endswith("Linear")]
    assert kept == [node.name for node in ready.graph.node]
    assert [entry.value for entry in model.metadata_props] == ["hand"]
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    assert conv.metadata_props[0].value == "stem"
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["x", "y"]


def test_same_plan_gives_the_same_bytes_and_the_source_is_left_alone() -> None:
    ready, _, _, plan = planned(chain())
    before = ready.SerializeToString(deterministic=True)
    first, second = (write_qdq(ready, plan).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second
    assert ready.SerializeToString(deterministic=True) == before


def test_mover_is_written_on_the_grid_before_it() -> None:
    body = "c = Conv (x, w, b) r = Relu (c) m = MaxPool <kernel_shape = [2, 2]> (r) d = Conv (m, v, b) " \
        "z = Relu (d) y = GlobalAveragePool (z) k = Conv (y, v, b)"  # fmt: skip
    source = make(body, {"w": (4, 3, 1, 1), "v": (4, 4, 1, 1), "b": (4,)}, outputs=("k",))
    ready, graph, _, plan = planned(source)
    assert "m" not in plan.grids
    model = write_qdq(ready, plan)
    pair = {node.output[0]: list(node.input[1:]) for node in model.graph.node if node.op_type == "QuantizeLinear"}
    assert pair["m/q"] == ["r/scale", "r/zero_point"]
    np.testing.assert_allclose(run_ort(model, images())["k"], simulate(graph, plan, [images()])["k"], atol=0.05)


def test_output_that_others_take_keeps_its_name() -> None:
    body = "c = Conv (x, w, b) a = LeakyRelu (c) d = Conv (a, v, b) e = LeakyRelu (d) g = Conv (e, v, b)"
    source = make(body, {"w": (4, 3, 1, 1), "v": (4, 4, 1, 1), "b": (4,)}, outputs=("a", "g"))
    ready, graph, _, plan = planned(source)
    model = write_qdq(ready, plan)
    onnx.checker.check_model(model, full_check=True)
    found, expected = run_ort(model, images()), simulate(graph, plan, [images()])
    assert list(found) == ["a", "g"]
    np.testing.assert_allclose(found["a"], expected["a"], atol=1.01 * plan.grids["a"].scale)


def test_rounded_weights_and_corrected_biases_are_those_written() -> None:
    ready, _, _, plan = planned(chain())
    ones = np.ones((8, 3, 3, 3), np.int8)
    bias = np.full(8, 2.0, np.float32)
    model = write_qdq(ready, dataclasses.replace(plan, integers={"w1": ones}, values={"b1": bias, "b4": np.ones(5)}))
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    np.testing.assert_array_equal(stored["w1/q"], ones)
    np.testing.assert_allclose(stored["b1/q"] * stored["b1/scale"], bias, atol=float(stored["b1/scale"].max()))
    np.testing.assert_array_equal(stored["b4"], np.ones(5, np.float32))


def test_names_of_the_file_itself_are_not_taken() -> None:
    ready = prepare_float(chain())
    for node in ready.graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name == "c1":
                    names[i] = "x/q"
    graph = TorchGraph(ready)
    layout = lay_out(graph, ORT)
    model = write_qdq(ready, plan_by_extremes(graph, layout, ORT, images()))
    onnx.checker.check_model(model, full_check=True)
    made = Counter(name for node in model.graph.node for name in node.output)
    assert max(made.values()) == 1


@pytest.mark.parametrize("scale", [0.0, float("nan"), float("inf"), 1e-60])
def test_step_that_is_no_number_is_refused(scale: float) -> None:
    ready, _, _, plan = planned(chain())
    grids = {**plan.grids, "a1": Grid(scale=scale, zero_point=0, dtype="uint8")}
    with pytest.raises(InputError, match="tensor a1: step"):
        write_qdq(ready, dataclasses.replace(plan, grids=grids))


def test_bias_beyond_32_bits_is_refused() -> None:
    ready, _, _, plan = planned(chain())
    tiny = WeightGrid(scales=np.full(8, 2.0**-60, np.float32))
    with pytest.raises(InputError, match="bias b1"):
        write_qdq(ready, dataclasses.replace(plan, weights={**plan.weights, "w1": tiny}))


def test_nodes_of_a_bundle_still_name_their_modules(tiny_bundle: Path) -> None:
    from cspdeploy.core.onnx_graph import node_module, read_onnx

    ready = prepare_float(onnx.load(tiny_bundle / "tiny.onnx"))
    graph = TorchGraph(ready)
    layout = lay_out(graph, ORT)
    x = images(8, shape=(3, 32, 32))
    model = write_qdq(ready, plan_by_extremes(graph, layout, ORT, x))
    path = tiny_bundle.parent / "tiny-placed.onnx"
    path.write_bytes(model.SerializeToString())
    modules = {node.operator: node_module(node) for node in read_onnx(path).graph.nodes}
    assert modules["Conv"].startswith("stages.")
    assert modules["QuantizeLinear"].startswith(("stages.", "stem"))
