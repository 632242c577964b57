from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cspdeploy.core.errors import EXIT_NO_ENGINE, InputError, RuntimeUnavailableError
from cspdeploy.runtimes import all_runtimes
from cspdeploy.runtimes.base import SessionRequest
from cspdeploy.runtimes.openvino import RUNTIMES, OpenVinoSession

openvino = pytest.importorskip("openvino")

(RUNTIME,) = RUNTIMES
X = np.array([[0.0, 1.0], [-1.0, 2.0]], np.float32)

THREE_NODES = """
<ir_version: 8, opset_import: ["" : 17]>
three (float[N, 2] x) => (float[N, 2] small, float[N, 2] big) {
    twice = Add(x, x)
    small = Neg(twice)
    big = Exp(twice)
}
"""

TWO_INPUTS = """
<ir_version: 8, opset_import: ["" : 17]>
two (float[2, 2] x, float[2, 2] u) => (float[2, 2] y) { y = Add(x, u) }
"""


def _write(path: Path, text: str) -> Path:
    path.write_bytes(onnx.parser.parse_model(text).SerializeToString())
    return path


def _write_quantised(path: Path, *, u8: bool = True) -> Path:
    """Q, DQ, Conv (16 channels, 3x3), LeakyRelu, Conv (1x1), then Gemm in float; weights in int8 per channel."""
    rng = np.random.default_rng(0)
    kind = np.uint8 if u8 else np.int8
    first, second = (rng.integers(-127, 128, shape).astype(np.int8) for shape in ((16, 3, 3, 3), (4, 16, 1, 1)))
    tensors = {
        "s": np.array(2.0 / 255, np.float32), "z": np.array(128 if u8 else 0, kind),
        "t": np.array(0.05, np.float32), "first": first, "second": second,
        "first_s": np.full(16, 0.01, np.float32), "first_z": np.zeros(16, np.int8),
        "second_s": np.full(4, 0.01, np.float32), "second_z": np.zeros(4, np.int8),
        "bias": rng.normal(size=16).astype(np.float32), "w": rng.normal(size=(4, 2)).astype(np.float32),
        "b": np.zeros(2, np.float32),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"], name="x/Q"),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"], name="x/DQ"),
        helper.make_node("DequantizeLinear", ["first", "first_s", "first_z"], ["fd"], name="first/DQ", axis=0),
        helper.make_node("Conv", ["xd", "fd", "bias"], ["c"], name="/conv1/Conv", pads=[1, 1, 1, 1]),
        helper.make_node("LeakyRelu", ["c"], ["a"], name="/act1/LeakyRelu", alpha=0.01),
        helper.make_node("QuantizeLinear", ["a", "t", "z"], ["aq"], name="a/Q"),
        helper.make_node("DequantizeLinear", ["aq", "t", "z"], ["ad"], name="a/DQ"),
        helper.make_node("DequantizeLinear", ["second", "second_s", "second_z"], ["sd"], name="second/DQ", axis=0),
        helper.make_node("Conv", ["ad", "sd"], ["d"], name=""),
        helper.make_node("GlobalAveragePool", ["d"], ["p"], name="/pool/GlobalAveragePool"),
        helper.make_node("Flatten", ["p"], ["f"], name="/flatten/Flatten"),
        helper.make_node("Gemm", ["f", "w", "b"], ["y"], name="/fc/Gemm"),
    ]
    graph = helper.make_graph(
        nodes, "quantised", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )  # fmt: skip
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())
    return path


def test_it_is_found_and_its_probe_computes() -> None:
    assert all_runtimes()["openvino"] is RUNTIME
    assert RUNTIME.missing() is None
    RUNTIME.probe()
    assert {precision for precision, note in RUNTIME.notes.items() if "FP32" in note} == RUNTIME.precisions


def test_without_its_package_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert RUNTIME.missing() == ("openvino is not installed", "pip install 'cspdeploy[openvino]'")


def test_outputs_by_name_in_the_order_of_the_graph(tmp_path: Path) -> None:
    session = OpenVinoSession(_write(tmp_path / "three.onnx", THREE_NODES))
    outputs = session.run({"x": X})
    assert list(outputs) == session.outputs == ["small", "big"]
    assert session.inputs == {"x": ("N", 2)}
    assert np.array_equal(outputs["small"], -2 * X)
    assert np.allclose(outputs["big"], np.exp(2 * X), rtol=1e-6)


def test_outputs_of_one_run_are_not_those_of_the_next(tmp_path: Path) -> None:
    session = OpenVinoSession(_write(tmp_path / "three.onnx", THREE_NODES))
    before = session.run({"x": X})["small"]
    kept = before.copy()
    session.run({"x": X + 1})
    assert np.array_equal(before, kept)


def test_names_are_those_of_the_file_where_the_engine_joins_tensors(tmp_path: Path) -> None:
    """Casts that change nothing in FP32 go, and the tensor that stays carries the names of all."""
    text = """<ir_version: 8, opset_import: ["" : 17]>
        g (float[2, 2] x) => (float[2, 2] y) { h = Cast<to = 10>(x) k = Neg(h) y = Cast<to = 1>(k) }"""
    session = OpenVinoSession(_write(tmp_path / "casts.onnx", text))
    assert {"y", "k"} == session._compiled.outputs[0].names
    assert np.array_equal(session.run({"x": X})["y"], -X)


def test_types_other_than_float_come_as_they_are(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
        g (float[2, 2] x, int64[2] i) => (bool[2, 2] b, int64[2] j, float16[2, 2] h) {
            b = Greater(x, x) j = Add(i, i) h = Cast<to = 10>(x) }"""
    outputs = OpenVinoSession(_write(tmp_path / "types.onnx", text)).run({"x": X, "i": np.array([3, -4])})
    assert [array.dtype.name for array in outputs.values()] == ["bool", "int64", "float16"]
    assert outputs["j"].tolist() == [6, -8]


def test_input_that_no_node_reads_is_taken_and_left(tmp_path: Path) -> None:
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[2, 2] x, float[3] u) => (float[2, 2] y) { y = Neg(x) }'
    session = OpenVinoSession(_write(tmp_path / "unused.onnx", text))
    assert np.array_equal(session.run({"x": X, "u": np.ones(3, np.float32)})["y"], -X)


@pytest.mark.parametrize(
    ("feeds", "told"),
    [
        ({"x": X}, "inputs: got x, expected x, u"),
        ({}, "inputs: got none, expected x, u"),
        ({"x": X, "u": X, "z": X}, "inputs: got x, u, z, expected x, u"),
        ({"x": X, "u": X.astype(np.float64)}, "input u: got float64, expected float32"),
        ({"x": X, "u": X[:1]}, "cannot run it"),
    ],
)
@pytest.mark.parametrize("bound", [False, True])
def test_feeds_that_do_not_fit_are_refused(tmp_path: Path, feeds: dict[str, Any], told: str, bound: bool) -> None:
    """The engine would add what the memory of `u` held before, and round float64 without a word."""
    session = OpenVinoSession(_write(tmp_path / "two.onnx", TWO_INPUTS))
    with pytest.raises(InputError, match=told) as caught:
        session.bind(feeds) if bound else session.run(feeds)
    assert "\n" not in str(caught.value)


def test_bound_call_computes_each_time_on_the_array_that_it_was_given(tmp_path: Path) -> None:
    session = OpenVinoSession(_write(tmp_path / "three.onnx", THREE_NODES))
    x = X.copy()
    call = session.bind({"x": x})
    for factor in (1, 3):
        x[:] = factor * X
        call()
        assert session._last is not None
        assert np.array_equal(session._last.get_output_tensor(0).data, -2 * factor * X)


def test_array_that_is_not_contiguous_is_bound_as_it_reads(tmp_path: Path) -> None:
    session = OpenVinoSession(_write(tmp_path / "three.onnx", THREE_NODES))
    session.bind({"x": X.T})()
    assert session._last is not None
    assert np.array_equal(session._last.get_output_tensor(0).data, -2 * X.T)


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/hostname", "absent.bin"])
def test_external_data_outside_or_missing_is_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / "weights.bin").write_bytes(bytes(8))
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[2] x) => (float[2] y) { y = Add(x, w) }'
    )
    tensor = model.graph.initializer.add(
        name="w", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL
    )
    tensor.external_data.add(key="location", value=location)
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match=r"leaves the folder|missing"):
        RUNTIME.open(SessionRequest(path=folder / "model.onnx"))


@pytest.mark.parametrize("damage", ["empty", "noise", "cut", "none", "unknown operator"])
def test_garbage_is_an_input_error(tmp_path: Path, damage: str) -> None:
    path = _write(tmp_path / "model.onnx", THREE_NODES)
    whole = path.read_bytes()
    content = {
        "empty": b"", "noise": b"not an ONNX file at all", "cut": whole[: len(whole) // 2],
        "unknown operator": whole.replace(b"Neg", b"Gen"),
    }  # fmt: skip
    if damage in content:
        path.write_bytes(content[damage])
    else:
        path.unlink()
    with pytest.raises(InputError, match=r"model\.onnx") as caught:
        RUNTIME.open(SessionRequest(path=path))
    assert "\n" not in str(caught.value)
    if damage == "unknown operator":
        assert "No conversion rule found for operations: Gen-17" in caught.value.message
        assert "src/" not in caught.value.message


def _without_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an engine that does not take the hint."""
    compile_model: Callable[..., Any] = openvino.Core.compile_model

    def compile_freely(core: Any, model: str, device: str, settings: dict[str, Any]) -> Any:
        freely = settings.keys() - {"INFERENCE_PRECISION_HINT", "EXECUTION_MODE_HINT"}
        return compile_model(core, model, device, {key: settings[key] for key in freely})

    monkeypatch.setattr(openvino.Core, "compile_model", compile_freely)


def test_engine_that_computes_in_less_than_float32_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write(tmp_path / "three.onnx", THREE_NODES)
    default = openvino.Core().get_property("CPU", "INFERENCE_PRECISION_HINT").get_type_name()
    if default == "f32":
        pytest.skip("this CPU has nothing below FP32")
    _without_hint(monkeypatch)
    with pytest.raises(RuntimeUnavailableError, match=f"asked for f32, OpenVINO computes in {default}") as caught:
        RUNTIME.open(SessionRequest(path=path))
    assert caught.value.exit_code == EXIT_NO_ENGINE


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("INFERENCE_PRECISION_HINT", openvino.Type.bf16, "asked for f32, OpenVINO computes in bf16"),
        ("INFERENCE_PRECISION_HINT", openvino.Type.dynamic, "asked for f32, OpenVINO computes in dynamic"),
        ("EXECUTION_DEVICES", ["GPU.0"], "asked for CPU, the session runs on GPU.0"),
    ],
)
def test_what_the_engine_says_that_it_does_is_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: Any, told: str
) -> None:
    real: Callable[..., Any] = openvino.CompiledModel.get_property
    monkeypatch.setattr(
        openvino.CompiledModel, "get_property", lambda self, asked: value if asked == name else real(self, asked)
    )
    with pytest.raises(RuntimeUnavailableError, match=told):
        OpenVinoSession(_write(tmp_path / "three.onnx", THREE_NODES))


def test_threads_latency_and_one_stream_reach_the_engine(tmp_path: Path) -> None:
    path = _write(tmp_path / "three.onnx", THREE_NODES)
    session = RUNTIME.open(SessionRequest(path=path, num_threads=1))
    assert isinstance(session, OpenVinoSession)
    found = {
        name: str(session._compiled.get_property(name))
        for name in ("INFERENCE_NUM_THREADS", "PERFORMANCE_HINT", "NUM_STREAMS")
    }
    assert found == {"INFERENCE_NUM_THREADS": "1", "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1"}


def test_cuda_graph_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="asked for on CPU"):
        RUNTIME.open(SessionRequest(path=_write(tmp_path / "three.onnx", THREE_NODES), cuda_graph=True))


def test_nodes_are_those_of_each_run_by_the_names_of_the_file(tmp_path: Path) -> None:
    session = OpenVinoSession(_write_quantised(tmp_path / "q.onnx"))
    assert session.placement == {"CPU": len(session.nodes)}
    assert {node.provider for node in session.nodes} == {"CPU"}
    found = {node.node: node.operator for node in session.nodes}
    assert {name: found[name] for name in ("/conv1/Conv", "d", "/fc/Gemm")} == {
        "/conv1/Conv": "Convolution", "d": "Convolution", "/fc/Gemm": "FullyConnected",
    }  # fmt: skip
    # Joined with the convolution before it, and computed from constants at opening.
    assert not {"/act1/LeakyRelu", "first", "w"} & set(found)
    assert session.num_copies == 0


@pytest.mark.parametrize("u8", [True, False])
def test_precision_of_every_product(tmp_path: Path, u8: bool) -> None:
    path = _write_quantised(tmp_path / "q.onnx", u8=u8)
    kind = "u8" if u8 else "i8"
    assert OpenVinoSession(path).executed_precisions == {"/conv1/Conv": kind, "d": kind, "/fc/Gemm": "f32"}
    # The guard on it: a file whose convolutions the engine computes in float says so.
    as_written = OpenVinoSession(path, optimise=False).executed_precisions
    assert as_written == {"/conv1/Conv": "f32", "d": "f32", "/fc/Gemm": "f32"}


def test_integers_and_the_graph_as_written_give_nearly_the_same(tmp_path: Path) -> None:
    path = _write_quantised(tmp_path / "q.onnx")
    x_NCHW = np.random.default_rng(1).uniform(-1, 1, (1, 3, 8, 8)).astype(np.float32)
    in_integers, in_float = (
        OpenVinoSession(path, optimise=on).run({"x": x_NCHW})["y"].astype(np.float64) for on in (True, False)
    )
    # A value at the middle between two codes may round either way: that moves one of 1,024 by 0.05.
    assert np.linalg.norm(in_integers - in_float) < 1e-3 * np.linalg.norm(in_float)


def test_profile_is_of_the_nodes_that_run(tmp_path: Path) -> None:
    request = SessionRequest(path=_write_quantised(tmp_path / "q.onnx"), profile=tmp_path)
    session = RUNTIME.open(request)
    assert isinstance(session, OpenVinoSession)
    with pytest.raises(InputError, match="has not run"):
        session.end_profile()
    call = session.bind({"x": np.ones((1, 3, 8, 8), np.float32)})
    for _ in range(3):
        call()
    found = {node.node: node for node in session.end_profile()}
    assert set(found) == {node.node for node in session.nodes}
    assert (found["/conv1/Conv"].operator, found["/conv1/Conv"].provider) == ("Convolution", "CPU")
    assert sum(node.ms for node in found.values()) > 0


def test_session_without_a_profile_has_none(tmp_path: Path) -> None:
    session = OpenVinoSession(_write(tmp_path / "three.onnx", THREE_NODES))
    session.run({"x": X})
    with pytest.raises(InputError, match="without a profile"):
        session.end_profile()
