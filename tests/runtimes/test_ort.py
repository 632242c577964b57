from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto

from cspdeploy.core.errors import EXIT_NO_ENGINE, DeviceMemoryError, InputError, RuntimeUnavailableError
from cspdeploy.runtimes.base import SessionRequest
from cspdeploy.runtimes.ort import CPU, CUDA, RUNTIMES, OrtSession, open_cpu_session
from cspdeploy.runtimes.ort_gpu_calls import output_places
from cspdeploy.runtimes.ort_open import Closed
from cspdeploy.runtimes.ort_placement import find_copies

THREE_NODES = """
<ir_version: 8, opset_import: ["" : 17]>
three (float[N, 2] x) => (float[N, 2] small, float[N, 2] big) {
    twice = Add(x, x)
    small = Neg(twice)
    big = Exp(twice)
}
"""

PICK = """
<ir_version: 8, opset_import: ["" : 17]>
pick (float[3] table, int64[1] index) => (float[1] picked) { picked = Gather(table, index) }
"""


def _write(path: Path, text: str) -> Path:
    path.write_bytes(onnx.parser.parse_model(text).SerializeToString())
    return path


def _absent_provider() -> str:
    """CUDA where this engine has none, else one that belongs to another operating system."""
    present = onnxruntime.get_available_providers()
    return next(name for name in (CUDA, "DmlExecutionProvider", "CoreMLExecutionProvider") if name not in present)


def test_outputs_by_name_in_the_order_of_the_graph(tmp_path: Path) -> None:
    session = open_cpu_session(_write(tmp_path / "three.onnx", THREE_NODES))
    x = np.array([[0.0, 1.0], [-1.0, 2.0]], np.float32)
    outputs = session.run({"x": x})
    assert list(outputs) == session.outputs == ["small", "big"]
    assert session.inputs == {"x": ("N", 2)}
    assert np.array_equal(outputs["small"], -2 * x)
    assert np.allclose(outputs["big"], np.exp(2 * x), rtol=1e-6)


def test_placement_counts_the_nodes_of_each_provider(tmp_path: Path) -> None:
    model = _write(tmp_path / "three.onnx", THREE_NODES)
    assert OrtSession(model, provider=CPU, optimise=False).placement == {CPU: 3}
    assert open_cpu_session(model).placement[CPU] >= 1


def test_bound_call_computes_each_time_it_is_called(tmp_path: Path) -> None:
    """The outputs of a bound call stay in the engine; that it computes shows where the computation must fail."""
    session = open_cpu_session(_write(tmp_path / "pick.onnx", PICK))
    table = np.array([1.0, 2.0, 3.0], np.float32)
    inside = session.bind({"table": table, "index": np.array([2])})
    outside = session.bind({"table": table, "index": np.array([3])})
    inside()
    inside()
    with pytest.raises(Exception, match="out of data bounds"):
        outside()


@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
def test_provider_that_does_not_take_the_session_is_an_error(tmp_path: Path) -> None:
    """ONNX Runtime itself only warns and computes on the CPU."""
    model = _write(tmp_path / "three.onnx", THREE_NODES)
    provider = _absent_provider()
    with pytest.raises(RuntimeUnavailableError, match=f"asked for {provider}, the session runs on {CPU}") as caught:
        OrtSession(model, provider=provider)
    assert caught.value.exit_code == EXIT_NO_ENGINE


@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
def test_provider_that_takes_no_node_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine lists CUDA for the session, yet its own record has every node on the CPU."""
    monkeypatch.setattr(onnxruntime.InferenceSession, "get_providers", lambda self: [CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    with pytest.raises(
        RuntimeUnavailableError,
        match=f"asked for {CUDA}, which took no node: it has no kernel for any of Add, Exp, Neg",
    ):
        OrtSession(_write(tmp_path / "three.onnx", THREE_NODES), provider=CUDA)


@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
def test_engine_that_tells_no_placement_is_believed_on_its_providers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before 1.23 ONNX Runtime has no record of its assignment: then nothing is known, which is not "no node"."""
    monkeypatch.setattr(onnxruntime.InferenceSession, "get_providers", lambda self: [CUDA, CPU])
    name = "get_provider_graph_assignment_info"
    owner = next(base for base in onnxruntime.InferenceSession.__mro__ if name in vars(base))
    monkeypatch.delattr(owner, name)
    session = OrtSession(_write(tmp_path / "three.onnx", THREE_NODES), provider=CUDA)
    assert session.placement == {}


@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
@pytest.mark.skipif(CUDA in onnxruntime.get_available_providers(), reason="this engine has CUDA")
def test_cuda_without_preload_is_still_the_right_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`onnxruntime.preload_dlls` came with 1.21; the extra allows 1.18."""
    monkeypatch.delattr(onnxruntime, "preload_dlls")
    runtime = next(runtime for runtime in RUNTIMES if runtime.name == "ort-cuda")
    with pytest.raises(RuntimeUnavailableError, match="asked for CUDAExecutionProvider"):
        runtime.open(SessionRequest(path=_write(tmp_path / "three.onnx", THREE_NODES)))


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
        open_cpu_session(folder / "model.onnx")


@pytest.mark.parametrize("damage", ["empty", "noise", "cut", "unknown operator"])
def test_garbage_is_an_input_error(tmp_path: Path, damage: str) -> None:
    path = _write(tmp_path / "model.onnx", THREE_NODES)
    whole = path.read_bytes()
    content = {
        "empty": b"", "noise": b"not an ONNX file at all", "cut": whole[: len(whole) // 2],
        "unknown operator": whole.replace(b"Neg", b"Gen"),
    }  # fmt: skip
    path.write_bytes(content[damage])
    with pytest.raises(InputError, match=r"model\.onnx") as caught:
        open_cpu_session(path)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.onnx"):
        open_cpu_session(tmp_path / "none.onnx")


def test_probe_computes_on_the_cpu() -> None:
    next(runtime for runtime in RUNTIMES if runtime.name == "ort-cpu").probe()


@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
@pytest.mark.skipif(CUDA in onnxruntime.get_available_providers(), reason="this engine has CUDA")
def test_probe_of_an_absent_device_says_so() -> None:
    with pytest.raises(RuntimeUnavailableError, match="CUDAExecutionProvider"):
        next(runtime for runtime in RUNTIMES if runtime.name == "ort-cuda").probe()


def _session(text: str, **options: Any) -> OrtSession:
    return OrtSession(onnx.parser.parse_model(text).SerializeToString(), provider=CPU, **options)


def test_nodes_are_listed_one_by_one_and_need_no_copies() -> None:
    session = _session(THREE_NODES, optimise=False)
    assert sorted((node.operator, node.provider) for node in session.nodes) == [
        ("Add", CPU), ("Exp", CPU), ("Neg", CPU)
    ]  # fmt: skip
    assert session.num_copies == 0


def test_copies_are_read_from_the_graph_that_the_engine_wrote(tmp_path: Path) -> None:
    """As ONNX Runtime writes it for CUDA, where a node has no kernel there."""
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[2] x) => (float[2] y) {
        there = MemcpyFromHost(x)
        back = MemcpyToHost(there)
        y = Neg(back)
    }"""
    found = find_copies(_write(tmp_path / "optimised.onnx", text), provider=CUDA)
    assert [(node.operator, node.provider) for node in found] == [("MemcpyFromHost", CUDA), ("MemcpyToHost", CUDA)]
    assert find_copies(_write(tmp_path / "three.onnx", THREE_NODES), provider=CUDA) == ()


def test_engine_that_cannot_write_its_graph_tells_no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    session = _session(THREE_NODES)
    session._provider = CUDA
    session._source = b"gone"
    assert session.num_copies is None
    assert session.nodes == session._assigned


def test_finished_graph_of_a_real_session_is_written_and_read() -> None:
    session = _session(THREE_NODES)
    session._provider = CUDA  # the rest is the CPU's, which copies nothing
    assert session.num_copies == 0


def test_threads_and_optimisation_are_those_of_the_request(tmp_path: Path) -> None:
    path = _write(tmp_path / "three.onnx", THREE_NODES)
    runtime = next(runtime for runtime in RUNTIMES if runtime.name == "ort-cpu")
    session = runtime.open(SessionRequest(path=path, num_threads=1, optimise=False))
    options = session.engine.get_session_options()  # type: ignore[attr-defined]
    assert options.intra_op_num_threads == 1
    assert options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL


def test_cuda_graph_on_the_cpu_is_refused() -> None:
    with pytest.raises(InputError, match=f"asked for on {CPU}"):
        _session(THREE_NODES, cuda_graph=True)


def test_output_places_without_a_run() -> None:
    session = _session(THREE_NODES)
    feeds = {"x": np.ones((7, 2), np.float32)}
    places = output_places(session.engine, session.inputs, feeds)
    assert places == {"small": ((7, 2), np.float32), "big": ((7, 2), np.float32)}
    unknown = _session('<ir_version: 8, opset_import: ["" : 17]> g (float[N] x) => (int64[M, K] y) { y = NonZero(x) }')
    with pytest.raises(InputError, match="a shape that is known"):
        output_places(unknown.engine, unknown.inputs, {"x": np.ones(7, np.float32)})


def test_inputs_in_turn_are_of_a_gpu() -> None:
    with pytest.raises(InputError, match=f"bound on a GPU, this session is on {CPU}"):
        _session(THREE_NODES).bind_sets([{"x": np.ones((7, 2), np.float32)}])


def test_session_that_is_closed_says_so_of_whatever_is_asked() -> None:
    closed = Closed(DeviceMemoryError("running m.onnx: out of GPU memory", fix="--batch 1"))
    with pytest.raises(DeviceMemoryError, match="out of GPU memory; the session was closed") as caught:
        closed.run(None, {})
    assert caught.value.fix == "--batch 1"


def test_copies_are_not_known_where_nothing_may_be_written(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise FileNotFoundError(2, "No usable temporary directory found")

    session = open_cpu_session(tiny_bundle / "tiny.onnx")
    monkeypatch.setattr(session, "_provider", CUDA)
    monkeypatch.setattr(tempfile, "TemporaryDirectory", refuse)
    assert session.num_copies is None
    assert len(session.nodes) == sum(session.placement.values())
