from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import numpy_helper

from cspdeploy.core.metrics import relative_l2
from cspdeploy.core.targets import COMPOSITES
from cspdeploy.export.decompose import DECOMPOSITIONS, decompose
from cspdeploy.runtimes.ort import OrtSession

Array = npt.NDArray[np.float32]
RNG = np.random.default_rng(0)
X_NCHW = (4 * RNG.normal(size=(2, 6, 5, 5))).astype(np.float32)
SCALES = {size: RNG.normal(size=size).astype(np.float32) for size in (2, 5, 6)}

CASES = {
    "Mish": (18, "y = Mish(x)", {}),
    "HardSwish": (18, "y = HardSwish(x)", {}),
    "Gelu": (20, "y = Gelu(x)", {}),
    "Gelu, tanh": (20, 'y = Gelu<approximate = "tanh">(x)', {}),
    "LayerNormalization": (17, "y = LayerNormalization(x, s, b)", {"s": SCALES[5], "b": SCALES[5][::-1].copy()}),
    "LayerNormalization, axes an input": (18, "y = LayerNormalization(x, s)", {"s": SCALES[5]}),
    "LayerNormalization, axis from the front": (
        18, "y = LayerNormalization<axis = 2, epsilon = 0.1>(x, s)", {"s": np.outer(SCALES[5], SCALES[5])},
    ),
    "GroupNormalization, 18": (
        18, "y = GroupNormalization<num_groups = 2, epsilon = 0.1>(x, s, b)",
        {"s": SCALES[2], "b": SCALES[2][::-1].copy()},
    ),
    "GroupNormalization, 21": (
        21, "y = GroupNormalization<num_groups = 2>(x, s, b)", {"s": SCALES[6], "b": SCALES[6][::-1].copy()},
    ),
}  # fmt: skip


def _model(opset: int, node: str, **weights: Array) -> onnx.ModelProto:
    text = f"""<ir_version: 9, opset_import: ["": {opset}]> graph
        (float[2, 6, 5, 5] x) => (float[2, 6, 5, 5] y) {{ {node} }}"""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return model


def _run(model: onnx.ModelProto) -> Array:
    if "GroupNormalization" not in [node.op_type for node in model.graph.node]:  # that of opset 18 was withdrawn since
        onnx.checker.check_model(model, full_check=True)
    outputs = OrtSession(model.SerializeToString(), provider="CPUExecutionProvider").run({"x": X_NCHW})
    return outputs["y"]  # type: ignore[return-value]


@pytest.mark.parametrize("case", CASES)
def test_older_operators_compute_the_same(case: str) -> None:
    opset, node, weights = CASES[case]
    model = _model(opset, node, **weights)
    expected = _run(model)
    operator = case.partition(",")[0]
    assert decompose(model, frozenset({operator})) == {operator: 1}
    assert operator not in {item.op_type for item in model.graph.node}
    assert relative_l2(_run(model), expected) < 1e-6


def test_every_operator_that_a_target_wants_in_older_form_has_one() -> None:
    assert set(DECOMPOSITIONS) == set(COMPOSITES)


def test_others_stay_as_they_are() -> None:
    model = _model(18, "h = Mish(x)  y = HardSwish(h)")
    assert decompose(model, frozenset({"HardSwish", "Relu"})) == {"HardSwish": 1}
    assert [node.op_type for node in model.graph.node] == ["Mish", "HardSigmoid", "Mul"]


def test_two_of_a_kind_do_not_meet() -> None:
    model = _model(20, "h = Gelu(x)  y = Gelu(h)")
    expected = _run(model)
    assert decompose(model, frozenset({"Gelu"})) == {"Gelu": 2}
    assert relative_l2(_run(model), expected) < 1e-6


@pytest.mark.parametrize(
    "node",
    [
        "y, mean = LayerNormalization(x, s)",  # an output that the older form does not give
        "t = Identity(s)  y = LayerNormalization<axis = 3>(x, t)",  # how many axes there are is not in the file
    ],
)
def test_node_that_cannot_be_written_so_stays(node: str) -> None:
    model = _model(18, node, s=SCALES[5])
    assert decompose(model, frozenset({"LayerNormalization"})) == {}
    assert "LayerNormalization" in [item.op_type for item in model.graph.node]


def test_nodes_of_subgraphs_too(make_onnx: Callable[..., Path]) -> None:
    text = """<ir_version: 9, opset_import: ["": 18]> graph (float[2, 6, 5, 5] x) => (float[2, 6, 5, 5] y)
        <bool on = {1}> {
            y = If(on) <then_branch = a () => (float[2, 6, 5, 5] t) { t = Mish(x) },
                        else_branch = b () => (float[2, 6, 5, 5] e) { e = Neg(x) }> }"""
    model = onnx.parser.parse_model(text)
    expected = _run(model)
    assert decompose(model, frozenset({"Mish"})) == {"Mish": 1}
    assert relative_l2(_run(model), expected) < 1e-6
