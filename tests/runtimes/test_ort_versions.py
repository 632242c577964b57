from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from cspdeploy.core.errors import EXIT_NO_ENGINE, InputError
from cspdeploy.runtimes import require_runtime
from cspdeploy.runtimes.base import SessionRequest
from cspdeploy.runtimes.ort_versions import EngineTooOldError


def _model(*, opset: int, ir: int) -> bytes:
    text = f'<ir_version: {ir}, opset_import: ["" : {opset}]> g (float[2] x) => (float[2] y) {{ y = Neg(x) }}'
    return bytes(onnx.parser.parse_model(text).SerializeToString())


@pytest.fixture(params=["file", "memory"])
def request_for(request: pytest.FixtureRequest, tmp_path: Path) -> object:
    def make(data: bytes) -> SessionRequest:
        path = tmp_path / "net.onnx"
        if request.param == "memory":
            return SessionRequest(path=path, data=data)
        path.write_bytes(data)
        return SessionRequest(path=path)

    return make


@pytest.mark.parametrize(
    ("engine", "opset", "ir", "has", "reads", "needs"),
    [
        ("1.17.3", 18, 10, "IR version 10", "IR version 9 at most", "onnxruntime>=1.18"),
        ("1.16.0", 20, 9, "opset 20", "opset 19 at most", "onnxruntime>=1.17"),
        ("1.14.1", 20, 10, "opset 20 and IR version 10", "opset 18 and IR version 8 at most", "onnxruntime>=1.18"),
    ],
)
def test_release_that_is_known_to_be_too_old(
    request_for: object, monkeypatch: pytest.MonkeyPatch, engine: str, opset: int, ir: int, has: str, reads: str,
    needs: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(onnxruntime, "__version__", engine)
    with pytest.raises(EngineTooOldError) as caught:
        require_runtime("ort-cpu").open(request_for(_model(opset=opset, ir=ir)))  # type: ignore[operator]
    assert f"net.onnx: {has}, onnxruntime {engine} reads {reads}" in caught.value.message
    assert needs in caught.value.fix
    assert caught.value.exit_code == EXIT_NO_ENGINE
    assert isinstance(caught.value, InputError)  # of an artifact that is verified, a failure


@pytest.mark.parametrize(("opset", "ir", "has"), [(18, 99, "IR version 99"), (999, 10, "opset 999")])
def test_engine_says_by_itself_that_it_is_too_old(request_for: object, opset: int, ir: int, has: str) -> None:
    with pytest.raises(EngineTooOldError) as caught:
        require_runtime("ort-cpu").open(request_for(_model(opset=opset, ir=ir)))  # type: ignore[operator]
    assert f"{has}, onnxruntime {onnxruntime.__version__} reads " in caught.value.message
    assert "--upgrade onnxruntime" in caught.value.fix


@pytest.mark.parametrize("engine", ["1.18.0", "1.23.2", "7.0.0", "unknown"])
def test_what_can_be_read_is(request_for: object, monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", engine)
    session = require_runtime("ort-cpu").open(request_for(_model(opset=18, ir=10)))  # type: ignore[operator]
    assert np.array_equal(session.run({"x": np.float32([1, 2])})["y"], [-1, -2])


def test_other_faults_are_not_taken_for_an_old_engine(request_for: object) -> None:
    with pytest.raises(InputError) as caught:
        require_runtime("ort-cpu").open(request_for(b"words"))  # type: ignore[operator]
    assert not isinstance(caught.value, EngineTooOldError)
    assert "not an ONNX file" in caught.value.message


def test_weights_beside_a_model_in_memory(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[2] x) => (float[2] y) { y = Add(x, w) }'
    )
    tensor = model.graph.initializer.add(
        name="w", data_type=onnx.TensorProto.FLOAT, dims=[2], data_location=onnx.TensorProto.EXTERNAL
    )
    tensor.external_data.add(key="location", value="weights.bin")
    with pytest.raises(InputError, match="keeps weights in other files"):
        require_runtime("ort-cpu").open(SessionRequest(path=tmp_path / "a.onnx", data=model.SerializeToString()))


def test_onnx_runtimes_own_format(tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "net.ort")
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(_model(opset=18, ir=10), options, providers=["CPUExecutionProvider"])
    engine = require_runtime("ort-cpu")
    assert engine.reads(format_="ort", precision="fp32")
    for data in (None, (tmp_path / "net.ort").read_bytes()):
        session = engine.open(SessionRequest(path=tmp_path / "net.ort", data=data))
        assert np.array_equal(session.run({"x": np.float32([1, 2])})["y"], [-1, -2])
