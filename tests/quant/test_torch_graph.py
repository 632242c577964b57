"""The executor: any number of images, a hand on every tensor, and errors that name the node."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import helper, numpy_helper

from cspdeploy.core.errors import InputError
from cspdeploy.quant.torch_graph import TorchGraph
from tests.quant.small_graphs import by_onnxruntime, by_torch, graph_of, images

WEIGHTS = {"w": images(4, 3, 3, 3, seed=1), "b": images(4, seed=2), "f": images(5, 64, seed=3), "s": np.array([1, -1])}


def fixed_batch(*nodes: str) -> TorchGraph:
    """Conv, those nodes, from [1, 4, 4, 4] on."""
    made = [helper.make_node("Conv", ["x", "w", "b"], ["c"], name="first", pads=[1, 1, 1, 1])]
    made += [onnx_node(text) for text in nodes]
    return TorchGraph(graph_of(made, WEIGHTS, shape=(1, 3, 4, 4)))


def onnx_node(text: str) -> object:
    from onnx import parser

    return parser.parse_node(text)


@pytest.mark.parametrize(
    "nodes",
    [
        ("r = Reshape(c, s)", "y = Gemm<transB=1>(r, f)"),
        ("q = Constant<value_ints=[1, 2, 2, 4, 4]>()", "r = Reshape(c, q)", "t = Transpose<perm=[0, 2, 1, 3, 4]>(r)",
         "p = Constant<value_ints=[1, 4, 4, 4]>()", "y = Reshape(t, p)"),
        ("n = Shape(c)", "y = Reshape(c, n)"),
        ("y = Softmax<axis=0>(c)",),
        ("t = Transpose<perm=[1, 0, 2, 3]>(c)", "q = Constant<value_ints=[4, -1]>()", "y = Reshape(t, q)"),
    ],
    ids=["flatten", "channel shuffle", "own shape", "across images", "channels first"],
)  # fmt: skip
def test_images_together_give_what_each_gives(nodes: tuple[str, ...]) -> None:
    x = torch.from_numpy(images(5, 3, 4, 4))
    (together,) = fixed_batch(*nodes).run(x).values()
    singly = [next(iter(fixed_batch(*nodes).run(one[None]).values())) for one in x]
    np.testing.assert_allclose(together.numpy(), torch.cat(singly).numpy(), rtol=1e-5, atol=1e-6)


def test_whether_images_go_singly() -> None:
    assert not fixed_batch("y = Relu(c)").one_by_one
    assert not fixed_batch("r = Reshape(c, s)", "y = Gemm<transB=1>(r, f)").one_by_one
    assert fixed_batch("y = Softmax<axis=0>(c)").one_by_one
    assert fixed_batch("t = Transpose<perm=[1, 0, 2, 3]>(c)", "y = Reshape(t, s)").one_by_one


def test_probe_of_a_file_that_leaves_its_size_free() -> None:
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"])
    graph = TorchGraph(graph_of([node], {k: WEIGHTS[k] for k in "wb"}, shape=("N", 3, "H", "W")))
    graph.run(torch.zeros(2, 3, 10, 12))
    assert graph.probe.shapes == {"x": (1, 3, 10, 12), "y": (1, 4, 8, 10)}


def test_another_image_size_than_the_probed_one() -> None:
    nodes = [helper.make_node("Reshape", ["x", "s"], ["y"])]
    graph = TorchGraph(graph_of(nodes, {"s": np.array([1, -1])}, shape=(1, 3, "H", "W")))
    assert graph.run(torch.zeros(1, 3, 2, 2))["y"].shape == (1, 12)
    assert graph.run(torch.zeros(1, 3, 4, 4))["y"].shape == (1, 48)


def test_visits_come_before_changes_and_in_order() -> None:
    seen: dict[str, torch.Tensor] = {}
    graph = fixed_batch("n = Shape(c)", "r = Relu(c)", "y = Reshape(r, n)")
    graph.run(torch.ones(1, 3, 4, 4), changes={"c": lambda y: y * 0 - 1}, visit=seen.__setitem__)
    assert list(seen) == ["x", "c", "r", "y"]  # the shape is no float
    assert float(seen["c"].abs().max()) > 0
    assert float(seen["r"].abs().max()) == 0


def test_weights_in_place_of_initializers() -> None:
    graph = fixed_batch("y = Relu(c)")
    x = torch.from_numpy(images(2, 3, 4, 4))
    plain, zero = graph.run(x)["y"], graph.run(x, weights={"w": torch.zeros(4, 3, 3, 3), "b": torch.ones(4)})["y"]
    assert torch.equal(zero, torch.ones_like(plain))
    assert torch.equal(graph.run(x)["y"], plain)


def test_constants_are_weights_and_computed_ones_work() -> None:
    nodes = [
        helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(np.array([2.0], np.float32))),
        helper.make_node("Mul", ["k", "k"], ["kk"]),
        helper.make_node("Mul", ["x", "kk"], ["y"]),
    ]
    model, x = graph_of(nodes, {}, shape=(1, 2, 2, 2)), images(1, 2, 2, 2)
    assert "k" in TorchGraph(model).weights
    np.testing.assert_array_equal(by_torch(model, x), by_onnxruntime(model, x))


def test_node_that_cannot_be_computed_is_named() -> None:
    with pytest.raises(InputError, match=r"node first \(Conv\): inputs of shapes .*\(2, 7, 4, 4\)"):
        fixed_batch("y = Relu(c)").run(torch.zeros(2, 7, 4, 4))


def test_unknown_operator_is_named() -> None:
    model = graph_of([helper.make_node("Relu", ["x"], ["y"])], {}, shape=(1, 2, 2, 2))
    model.graph.node[0].domain, model.graph.node[0].op_type = "made.up", "Frobnicate"
    with pytest.raises(InputError, match=r"node y \(Frobnicate\)"):
        TorchGraph(model).run(torch.zeros(1, 2, 2, 2))


def test_two_inputs_are_refused() -> None:
    model = graph_of([helper.make_node("Relu", ["x"], ["y"])], {}, shape=(1, 2, 2, 2))
    model.graph.input.append(helper.make_tensor_value_info("size", 1, (1, 2)))
    with pytest.raises(InputError, match="expected one, the image"):
        TorchGraph(model)
