from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from cspdeploy.check.audit import audit_onnx
from cspdeploy.core.errors import InputError
from cspdeploy.quant.integer_weights import WeightMode, quantise_weights
from cspdeploy.quant.prepare import prepare_float
from tests.quant.placed_graphs import chain, images, make, run_ort


@pytest.mark.parametrize("mode", ["weights", "dynamic"])
def test_outputs_stay_near(mode: WeightMode) -> None:
    model = chain()
    quantised = quantise_weights(prepare_float(model), mode)
    onnx.checker.check_model(quantised, full_check=True)
    expected, found = run_ort(model, images())["y"], run_ort(quantised, images())["y"]
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 1e-5 < error < 0.03  # 8 bits of weights are a relative 0.4 % at worst, and there are four layers


@pytest.mark.parametrize("mode", ["weights", "dynamic"])
def test_float_weights_are_gone(mode: WeightMode) -> None:
    stored = {tensor.name: tensor for tensor in quantise_weights(prepare_float(chain()), mode).graph.initializer}
    assert not {"w1", "w2", "w3", "w4"} & set(stored)
    integers = numpy_helper.to_array(stored["w1/q"])
    assert integers.dtype == (np.int8 if mode == "weights" else np.uint8)
    assert int(np.abs(integers.astype(int) - (0 if mode == "weights" else 128)).max()) == 127


def test_dynamic_multiplies_integers_and_weights_alone_do_not(tmp_path: Path) -> None:
    for mode, share in (("dynamic", 1.0), ("weights", 0.0)):
        path = tmp_path / f"{mode}.int8.onnx"
        onnx.save(quantise_weights(prepare_float(chain()), mode), path)
        audit = audit_onnx(path, declared="int8")
        assert audit.macs.get("int8", 0.0) == share
        assert ("weight-only" in audit.problem) == (mode == "weights")


def test_range_is_found_once_for_all_that_take_a_tensor() -> None:
    body = "c = Conv (x, w, b) d = Conv (x, v, b) y = Add (c, d)"
    model = make(body, {"w": (4, 3, 1, 1), "v": (4, 3, 1, 1), "b": (4,)})
    operators = [node.op_type for node in quantise_weights(prepare_float(model), "dynamic").graph.node]
    assert operators.count("DynamicQuantizeLinear") == 1
    assert operators.count("ConvInteger") == 2


def test_grouped_strided_and_transposed_forms() -> None:
    body = "c = Conv <group = 2, strides = [2, 2], pads = [1, 1, 1, 1]> (x, w) t = ConvTranspose (c, v) " \
        "f = Flatten (t) h = Gemm <transB = 1> (f, m, n) y = MatMul (h, q)"  # fmt: skip
    shapes = {"w": (6, 2, 3, 3), "v": (6, 2, 2, 2), "m": (5, 50), "n": (5,), "q": (5, 3)}
    model = make(body, shapes, x="float[2, 4, 8, 8]")
    x = images(4, shape=(4, 8, 8))
    for mode in ("weights", "dynamic"):
        found = run_ort(quantise_weights(prepare_float(model), mode), x)["y"]
        expected = run_ort(model, x)["y"]
        assert np.linalg.norm(found - expected) < 0.03 * np.linalg.norm(expected)


def test_unknown_mode_is_refused() -> None:
    with pytest.raises(InputError, match="expected one of weights, dynamic"):
        quantise_weights(chain(), "static")  # type: ignore[arg-type]


def test_graph_whose_weights_are_computed_is_refused() -> None:
    model = make("w2 = Mul (w, w) y = Conv (x, w2)", {"w": (4, 3, 1, 1)})
    with pytest.raises(InputError, match="nothing to store"):
        quantise_weights(prepare_float(model), "weights")
