"""Equalisation changes the weights, the ranges, and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, parser

from cspdeploy.quant.channels import find_channel_classes
from cspdeploy.quant.equalise import LARGEST_FACTOR, equalise
from cspdeploy.quant.prepare import prepare_float
from cspdeploy.quant.torch_graph import TorchGraph
from tests.quant.small_graphs import graph_of, images

SIZE = 4


class Drawing:
    """Draws a graph: every tensor has C channels of SIZE x SIZE pixels unless a list says otherwise."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, np.ndarray[Any, Any]] = {}
        self.maps = [("x", 3)]

    def add(self, operator: str, inputs: list[str], channels: int, **attributes: Any) -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], **attributes))
        self.maps.append((name, channels))
        return name

    def weight(self, *shape: int) -> str:
        """Channels of very different size."""
        name = f"w{len(self.weights)}"
        spread = np.exp(self.random.normal(0, 1.5, (shape[0], *[1] * (len(shape) - 1))))
        self.weights[name] = (spread * self.random.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype("f4")
        return name

    def any(self) -> tuple[str, int]:
        return self.maps[self.random.integers(len(self.maps))]

    def conv(self) -> None:
        name, channels = self.any()
        groups = int(self.random.choice([1, *[g for g in (2, 4) if channels % g == 0]]))
        out = 4 * int(self.random.integers(1, 3))
        taken = [name, self.weight(out, channels // groups, 3, 3), self.weight(out)]
        self.add("Conv", taken, out, pads=[1] * 4, group=groups)

    def depthwise(self) -> None:
        name, channels = self.any()
        self.add("Conv", [name, self.weight(channels, 1, 3, 3)], channels, pads=[1] * 4, group=channels)

    def transposed(self) -> None:
        name, channels = self.any()
        groups = 2 if channels % 2 == 0 else 1
        taken = [name, self.weight(channels, 4 // groups, 3, 3), self.weight(4)]
        self.add("ConvTranspose", taken, 4, pads=[1] * 4, group=groups)

    def activation(self) -> None:
        name, channels = self.any()
        kind = str(self.random.choice(["LeakyRelu", "Relu", "PRelu", "Sigmoid", "Clip", "HardSwish", "Mish"]))
        more = [self.weight(channels, 1, 1)] if kind == "PRelu" else []
        if kind == "Clip":
            self.weights |= {"low": np.float32(0).reshape(()), "high": np.float32(1).reshape(())}
            more = ["low", "high"][: int(self.random.integers(1, 3))]
        self.add(kind, [name, *more], channels)

    def pool(self) -> None:
        name, channels = self.any()
        kind = str(self.random.choice(["MaxPool", "AveragePool"]))
        self.add(kind, [name], channels, kernel_shape=[3, 3], pads=[1] * 4)

    def join(self) -> None:
        name, channels = self.any()
        alike = [other for other, count in self.maps if count == channels]
        other = str(self.random.choice(alike))
        self.add(str(self.random.choice(["Add", "Sub", "Mul", "Max"])), [name, other], channels)

    def concat(self) -> None:
        some = [self.any() for _ in range(int(self.random.integers(2, 4)))]
        self.add("Concat", [name for name, _ in some], sum(count for _, count in some), axis=1)

    def halves(self) -> None:
        name, channels = self.any()
        if channels % 2:
            return
        first, second = f"t{len(self.nodes)}", f"s{len(self.nodes)}"
        self.nodes.append(helper.make_node("Split", [name], [first, second], axis=1, num_outputs=2))
        self.maps += [(first, channels // 2), (second, channels // 2)]

    def shuffle(self) -> None:
        name, channels = self.any()
        if channels % 2:
            return
        to = f"s{len(self.nodes)}"
        self.weights |= {
            f"{to}5": np.array([1, 2, channels // 2, SIZE, SIZE]), f"{to}4": np.array([1, channels, SIZE, SIZE]),
        }  # fmt: skip
        wide = [f"r{len(self.nodes)}", f"p{len(self.nodes)}"]
        self.nodes += [
            helper.make_node("Reshape", [name, f"{to}5"], wide[:1]),
            helper.make_node("Transpose", wide[:1], wide[1:], perm=[0, 2, 1, 3, 4]),
        ]
        self.add("Reshape", [wide[1], f"{to}4"], channels)

    def scaled(self) -> None:
        name, channels = self.any()
        self.add(str(self.random.choice(["Mul", "Div", "Add"])), [name, self.weight(1)], channels)

    def resized(self) -> None:
        name, channels = self.any()
        self.weights |= {"roi": np.empty(0, "f4"), "scales": np.array([1, 1, 1, 1], "f4")}
        self.add("Resize", [name, "roi", "scales"], channels, mode="linear")

    def finish(self) -> onnx.ModelProto:
        name, channels = self.maps[-1]
        last = self.add("Concat", [name, *[other for other, _ in self.maps[-4:-1]]], 0, axis=1)
        channels += sum(count for _, count in self.maps[-5:-2])
        if self.random.random() < 0.5:
            last = self.add("GlobalAveragePool", [last], channels)
            features = channels
        else:
            features = channels * SIZE * SIZE
        last = self.add("Flatten", [last], features)
        hidden = self.add("Gemm", [last, self.weight(7, features), self.weight(7)], 7, transB=1)
        self.add("Gemm", [self.add("Relu", [hidden], 7), self.weight(7, 5), self.weight(5)], 5)
        return graph_of(self.nodes, self.weights, shape=(1, 3, SIZE, SIZE))


def magnitudes_of(graph: TorchGraph, x: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    found: dict[str, np.ndarray[Any, Any]] = {}

    def visit(name: str, value: torch.Tensor) -> None:
        if value.dim() > 1:
            found[name] = value.abs().transpose(0, 1).flatten(1).amax(dim=1).numpy()

    graph.run(torch.from_numpy(x), visit=visit)
    return found


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.sampled_from([0.5, 0.75, 1.0]))
def test_outputs_stay_on_random_graphs(seed: int, exponent: float) -> None:
    drawing = Drawing(seed)
    parts = [
        drawing.conv, drawing.conv, drawing.activation, drawing.depthwise, drawing.transposed, drawing.pool,
        drawing.join, drawing.join, drawing.concat, drawing.halves, drawing.shuffle, drawing.scaled, drawing.resized,
    ]  # fmt: skip
    drawing.conv()
    for _ in range(12):
        drawing.random.choice(parts)()  # type: ignore[arg-type]
    graph, x = TorchGraph(drawing.finish()), images(3, 3, SIZE, SIZE, seed=seed)
    ranges = magnitudes_of(graph, x)
    made = equalise(graph, ranges, exponent=exponent)
    assert made.largest_factor <= LARGEST_FACTOR
    seen: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    changed = graph.run(
        torch.from_numpy(x), weights={k: torch.from_numpy(v) for k, v in made.values.items()}, visit=seen.__setitem__
    )
    for name, expected in graph.run(torch.from_numpy(x), visit=plain.__setitem__).items():
        assert float((changed[name] - expected).norm()) <= 1e-5 * float(expected.norm()) + 1e-30
    for name, factor in made.factors.items():
        along = torch.from_numpy(factor).reshape(1, -1, *[1] * (seen[name].dim() - 2))
        assert float((seen[name] - plain[name] * along).norm()) <= 1e-5 * float(seen[name].norm()) + 1e-30, name


def text_graph(*lines: str, **weights: np.ndarray[Any, Any]) -> TorchGraph:
    return TorchGraph(graph_of([parser.parse_node(line) for line in lines], weights, shape=(1, 3, 4, 4)))


def conv_weights(*names: str, taken: int = 4) -> dict[str, np.ndarray[Any, Any]]:
    found: dict[str, np.ndarray[Any, Any]] = {"w": images(4, 3, 1, 1, seed=1), "b": images(4, seed=2)}
    return found | {name: images(4, taken, 1, 1, seed=3 + i) for i, name in enumerate(names)}


def test_small_channels_are_lifted_and_the_largest_stays() -> None:
    graph = text_graph("c = Conv(x, w, b)", "a = LeakyRelu(c)", "y = Conv(a, v)", **conv_weights("v"))
    magnitudes = {"c": np.array([8, 4, 1, 0.008], np.float32), "a": np.array([8, 4, 1, 0.008], np.float32)}
    made = equalise(graph, magnitudes, exponent=0.75)
    np.testing.assert_allclose(made.factors["a"], [1, 2**0.75, 8**0.75, LARGEST_FACTOR], rtol=1e-6)
    np.testing.assert_array_equal(made.factors["c"], made.factors["a"])
    assert set(made.values) == {"w", "b", "v"}
    assert made.num_classes == 3
    assert equalise(graph, magnitudes, exponent=0.0).values == {}


@pytest.mark.parametrize("nothing", [0.0, np.nan, np.inf])
def test_channel_that_nothing_is_known_of_stays(nothing: float) -> None:
    graph = text_graph("c = Conv(x, w, b)", "y = Conv(c, v)", **conv_weights("v"))
    made = equalise(graph, {"c": np.array([nothing, 2, 1, 2], np.float32)})
    assert made.factors["c"][0] == 1
    assert made.factors["c"][2] > 1


def test_both_sides_of_an_add_share_their_factors() -> None:
    graph = text_graph(
        "c = Conv(x, w, b)", "d = Conv(c, v)", "e = Add(c, d)", "y = Conv(e, u)", **conv_weights("v", "u")
    )
    made = equalise(graph, {"c": np.array([8, 1, 1, 1], np.float32), "d": np.array([1, 8, 1, 1], np.float32)})
    np.testing.assert_array_equal(made.factors["c"], made.factors["e"])
    np.testing.assert_array_equal(made.factors["d"], made.factors["e"])
    assert list(made.factors["e"] == 1) == [True, True, False, False]


@pytest.mark.parametrize(
    "line", ["a = Sigmoid(c)", "a = Mish(c)", "a = Mul(c, c)", "a = Softmax<axis=1>(c)", "a = Add(c, b4)",
             "a = InstanceNormalization(c, b, b)", "a = Clip(c, zero, one)", "a = MatMul(c, m)"],
)  # fmt: skip
def test_what_is_not_homogeneous_holds_its_channels(line: str) -> None:
    more = {"b4": images(1, 4, 1, 1), "m": images(4, 4), "zero": np.array(0, "f4"), "one": np.array(1, "f4")}
    graph = text_graph("c = Conv(x, w, b)", line, "y = Conv(a, v)", **conv_weights("v"), **more)
    classes = find_channel_classes(graph)
    assert classes.pinned[classes.of["c"]].all()
    assert classes.pinned[classes.of["a"]].all()


def test_shared_weights_hold_their_channels() -> None:
    graph = text_graph("c = Conv(x, w, b)", "d = Conv(c, v)", "y = Conv(d, v)", **conv_weights("v"))
    classes = find_channel_classes(graph)
    assert classes.pinned[classes.of["c"]].all()


def test_a_gate_passes_the_factors_of_what_it_gates() -> None:
    graph = text_graph(
        "c = Conv(x, w, b)", "p = GlobalAveragePool(c)", "q = Conv(p, v)", "s = Sigmoid(q)", "g = Mul(s, c)",
        "y = Conv(g, u)", **conv_weights("v", "u"),
    )  # fmt: skip
    classes = find_channel_classes(graph)
    np.testing.assert_array_equal(classes.of["g"], classes.of["c"])
    assert not classes.pinned[classes.of["g"]].any()
    assert classes.pinned[classes.of["q"]].all()


def test_tiny_network_stays_the_same(tiny_bundle: Any) -> None:
    graph = TorchGraph(prepare_float(onnx.load(tiny_bundle / "tiny.onnx")))  # its zero biases are one initializer
    x = images(8, 3, 32, 32)
    made = equalise(graph, magnitudes_of(graph, x))
    weights = {name: torch.from_numpy(value) for name, value in made.values.items()}
    (expected,) = graph.run(torch.from_numpy(x)).values()
    (found,) = graph.run(torch.from_numpy(x), weights=weights).values()
    assert made.num_classes > 100
    assert float((found - expected).norm()) <= 1e-5 * float(expected.norm())
    assert not torch.equal(found, expected)
