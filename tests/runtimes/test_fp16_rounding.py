"""FP16 arithmetic on a machine without it; in places, what ONNX Runtime's CPU provider makes of the same graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cspdeploy.core.errors import InputError
from cspdeploy.runtimes import all_runtimes
from cspdeploy.runtimes.base import Outputs, SessionRequest
from cspdeploy.runtimes.fp16_rounding import round_every_node

HEAD = '<ir_version: 8, opset_import: ["" : 17]>'


def _half(value: float) -> npt.NDArray[np.float16]:
    return np.array([value], np.float16)


def _write(path: Path, text: str, **weights: npt.NDArray[np.generic]) -> Path:
    model = onnx.parser.parse_model(HEAD + text)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    path.write_bytes(model.SerializeToString())
    return path


def _run(path: Path, x: float | npt.NDArray[np.float32], *, runtime: str = "fp16-rounding") -> Outputs:
    session = all_runtimes()[runtime].open(SessionRequest(path=path))
    return session.run({"x": np.atleast_1d(np.asarray(x, np.float32))})


def test_overflow_becomes_infinite(tmp_path: Path) -> None:
    text = "g (float[1] x) => (float[1] y) { h = Cast<to = 10>(x) p = Mul(h, w) y = Cast<to = 1>(p) }"
    path = _write(tmp_path / "a.onnx", text, w=_half(300))
    assert _run(path, 300.0)["y"][0] == np.inf
    assert _run(path, 300.0, runtime="ort-cpu")["y"][0] == 90000.0  # computed in float32: the reason for this runtime
    assert _run(path, 200.0)["y"][0] == 60000.0


def test_underflow_becomes_zero(tmp_path: Path) -> None:
    text = "g (float[1] x) => (float[1] y) { h = Cast<to = 10>(x) p = Mul(h, w) y = Cast<to = 1>(p) }"
    path = _write(tmp_path / "a.onnx", text, w=_half(1e-4))
    assert _run(path, 1e-4)["y"][0] == 0.0
    assert _run(path, 1e-4, runtime="ort-cpu")["y"][0] > 0.0


def test_input_is_rounded(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.onnx", "g (float[1] x) => (float[1] y) { h = Cast<to = 10>(x) y = Cast<to = 1>(h) }")
    assert _run(path, 1.0001)["y"][0] == 1.0
    assert _run(path, 1.001)["y"][0] == np.float16(1.001)


def test_every_node_is_rounded_not_only_the_last(tmp_path: Path) -> None:
    """2048 + 1 is 2048 in FP16, whose step is 2 there."""
    text = """g (float[1] x) => (float[1] y) {
        h = Cast<to = 10>(x) more = Add(h, one) back = Sub(more, much) y = Cast<to = 1>(back)
    }"""
    path = _write(tmp_path / "a.onnx", text, one=_half(1), much=_half(2048))
    assert _run(path, 2048.0)["y"][0] == 0.0
    assert _run(path, 2048.0, runtime="ort-cpu")["y"][0] == 1.0


def test_float32_island_is_not_rounded(tmp_path: Path) -> None:
    text = """g (float[1] x) => (float[1] island, float[1] after) {
        h = Cast<to = 10>(x) wide = Cast<to = 1>(h) island = Mul(wide, w)
        half = Cast<to = 10>(island) after = Cast<to = 1>(half)
    }"""
    path = _write(tmp_path / "a.onnx", text, w=np.array([1.0001], np.float32))
    outputs = _run(path, 1.0)
    assert outputs["island"][0] == np.float32(1.0001)
    assert outputs["after"][0] == 1.0
    assert _run(path, 65504.0)["island"][0] > 65504.0  # a float32 node may pass FP16's largest number


def test_purely_float32_graph_is_left_as_it_is(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.onnx", "g (float[1] x) => (float[1] y) { y = Mul(x, x) }")
    assert _run(path, 1.0001)["y"][0] == np.float32(1.0001) * np.float32(1.0001)


def test_integer_results_are_not_touched(tmp_path: Path) -> None:
    text = """g (float[4] x) => (int64[1] shape, int64[1] best, float[4] y) {
        h = Cast<to = 10>(x) shape = Shape(h) best = ArgMax<axis = 0>(h) y = Cast<to = 1>(h)
    }"""
    outputs = _run(_write(tmp_path / "a.onnx", text), np.array([1, 5, 70000, 2], np.float32))
    assert outputs["shape"].dtype == outputs["best"].dtype == np.int64
    assert outputs["shape"].tolist() == [4]
    assert outputs["best"].tolist() == [2]
    assert outputs["y"].tolist() == [1, 5, np.inf, 2]


def test_constant_nodes(tmp_path: Path) -> None:
    text = "g (float[1] x) => (float[1] y) { h = Cast<to = 10>(x) p = Mul(h, c) y = Cast<to = 1>(p) }"
    model = onnx.parser.parse_model(HEAD + text)
    constant = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(_half(300)))
    model.graph.node.insert(0, constant)
    (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
    assert _run(tmp_path / "a.onnx", 2.0)["y"][0] == 600.0
    assert _run(tmp_path / "a.onnx", 300.0)["y"][0] == np.inf


def test_weights_keep_their_float16_values() -> None:
    text = "g (float[1] x) => (float[1] y) { h = Cast<to = 10>(x) p = Mul(h, w) y = Cast<to = 1>(p) }"
    model = onnx.parser.parse_model(HEAD + text)
    model.graph.initializer.append(numpy_helper.from_array(_half(0.1), "w"))
    rounded = onnx.load_model_from_string(round_every_node(model.SerializeToString()))
    weight = rounded.graph.initializer[0]
    assert weight.data_type == TensorProto.FLOAT
    assert numpy_helper.to_array(weight)[0] == np.float32(np.float16(0.1))
    onnx.checker.check_model(rounded, full_check=True)


@pytest.mark.parametrize("content", [b"", b"not an ONNX file", b"\x08\x08\x3a\x7f"])
def test_garbage_is_an_input_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.onnx").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.onnx") as caught:
        _run(tmp_path / "a.onnx", 1.0)
    assert "\n" not in str(caught.value)


def test_external_data_outside_is_refused(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(HEAD + "g (float[1] x) => (float[1] y) { y = Add(x, w) }")
    tensor = model.graph.initializer.add(
        name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL
    )
    tensor.external_data.add(key="location", value="../w.bin")
    (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match="leaves the folder"):
        _run(tmp_path / "a.onnx", 1.0)


def test_probe_sees_an_overflow() -> None:
    all_runtimes()["fp16-rounding"].probe()


def test_says_what_it_covers() -> None:
    assert "FP16" in all_runtimes()["fp16-rounding"].notes["fp16"]
    assert "FP32" in all_runtimes()["ort-cpu"].notes["fp16"]


def test_half_inputs_and_outputs_keep_their_type(tmp_path: Path) -> None:
    """A file of unknown origin may be FP16 from end to end; its outputs are inputs of further nodes as well."""
    text = """g (float16[1] x) => (float16[1] p, float16[1] y) { p = Mul(x, w) y = Add(p, w) }"""
    path = _write(tmp_path / "a.onnx", text, w=_half(300))
    session = all_runtimes()["fp16-rounding"].open(SessionRequest(path=path, outputs=("p", "y")))
    outputs = session.run({"x": _half(300)})
    assert {name: array.dtype for name, array in outputs.items()} == {"p": np.float16, "y": np.float16}
    assert outputs["y"][0] == np.inf
    assert session.run({"x": _half(2)})["y"][0] == 900.0
