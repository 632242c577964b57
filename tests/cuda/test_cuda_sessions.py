"""Sessions on the GPU: where their nodes are, CUDA graphs, inputs in turn, events on the stream."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from cspdeploy.core.catalog import INPUT_NAME
from cspdeploy.core.errors import CspDeployError, RuntimeUnavailableError
from cspdeploy.core.metrics import relative_l2
from cspdeploy.runtimes import require_runtime
from cspdeploy.runtimes.base import CudaOptions, Feeds, Session, SessionRequest

pytestmark = pytest.mark.cuda

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
GRAPH_LIMIT = 1e-6
"""The same kernels in the same order; cuDNN may sum in another one from one session to the next."""


@pytest.mark.parametrize("kind", ["onnx", "onnx-fp16"])
def test_every_node_is_on_the_gpu(kind: str, open_on: Callable[..., Session]) -> None:
    session = open_on("ort-cuda", kind)
    assert set(session.placement) == {CUDA}
    assert session.placement[CUDA] > 50  # CSPDarknet53 has 73 convolutions
    copies = [node for node in session.nodes if node.operator.startswith("Memcpy")]
    assert copies == []


def _write(path: Path, operators: list[tuple[str, list[str], list[str]]], shape: list[int], out: list[int]) -> Path:
    graph = helper.make_graph(
        [helper.make_node(operator, inputs, outputs, name=f"{operator}_0") for operator, inputs, outputs in operators],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, out)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def test_a_node_without_a_cuda_kernel_is_listed_with_its_copies(tmp_path: Path) -> None:
    """Det has a kernel on the CPU alone."""
    path = _write(
        tmp_path / "det.onnx",
        [("Exp", ["x"], ["a"]), ("Det", ["a"], ["b"]), ("Exp", ["b"], ["y"])],
        [2, 3, 3], [2],
    )  # fmt: skip
    session = require_runtime("ort-cuda").open(SessionRequest(path=path, outputs=("y",)))
    assert {node.operator for node in session.nodes if node.provider == CPU} == {"Det"}
    copies = [node.operator for node in session.nodes if node.operator.startswith("Memcpy")]
    assert sorted(copies) == ["MemcpyFromHost", "MemcpyToHost"]
    x = np.random.default_rng(0).standard_normal((2, 3, 3), np.float32)
    assert np.allclose(session.run({"x": x})["y"], np.exp(np.linalg.det(np.exp(x))), rtol=1e-3)


def test_a_graph_of_which_the_gpu_takes_nothing_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "det.onnx", [("Det", ["x"], ["y"])], [2, 3, 3], [2])
    with pytest.raises(RuntimeUnavailableError, match="took no node"):
        require_runtime("ort-cuda").open(SessionRequest(path=path, outputs=("y",)))


@pytest.mark.parametrize(
    ("runtime", "kind"), [("ort-cuda", "onnx"), ("ort-cuda", "onnx-fp16"), ("torch-cuda", "eager")]
)
def test_a_replayed_graph_computes_what_the_session_computes(
    runtime: str, kind: str, open_on: Callable[..., Session], feeds: Feeds
) -> None:
    plain, graph = open_on(runtime, kind), open_on(runtime, kind, cuda_graph=True)
    other = {INPUT_NAME: np.ascontiguousarray(feeds[INPUT_NAME][::-1])}
    limit = GRAPH_LIMIT if kind != "onnx-fp16" else 1e-3
    for one in (feeds, other, feeds):  # what was captured must see each new input
        name, expected = next(iter(plain.run(one).items()))
        assert relative_l2(graph.run(one)[name], expected) < limit
    for batch in (1, 3):  # a graph for each shape
        part = {INPUT_NAME: np.ascontiguousarray(feeds[INPUT_NAME][:batch])}
        assert graph.run(part)[name].shape[0] == batch


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_inputs_in_turn_are_really_taken_in_turn(
    cuda_graph: bool, open_on: Callable[..., Session], feeds: Feeds
) -> None:
    session = open_on("ort-cuda", "onnx", cuda_graph=cuda_graph)
    sets = [{INPUT_NAME: np.ascontiguousarray(feeds[INPUT_NAME][i : i + 1])} for i in range(3)]
    expected = [next(iter(session.run(one).values())) for one in sets]
    assert relative_l2(expected[1], expected[0]) > 1e-2  # three images that can be told apart
    call = session.bind_sets(sets)  # type: ignore[attr-defined]
    for turn in range(5):
        call()
        assert relative_l2(call.outputs()[0], expected[turn % 3]) < 1e-5, turn


@pytest.mark.parametrize(("runtime", "kind"), [("ort-cuda", "onnx-fp16"), ("torch-cuda", "eager")])
def test_a_bound_run_is_timed_by_the_device(
    runtime: str, kind: str, open_on: Callable[..., Session], feeds: Feeds
) -> None:
    call = open_on(runtime, kind).bind(feeds)
    assert call.device_ms is None  # type: ignore[attr-defined]
    for _ in range(3):
        call()
        assert call.device_ms > 0  # type: ignore[attr-defined]


def test_what_a_session_was_opened_with_is_read_back(open_on: Callable[..., Session]) -> None:
    for tf32, search in ((False, "heuristic"), (True, "exhaustive")):
        cuda = CudaOptions(conv_search=search, channels_last=tf32)  # type: ignore[arg-type]
        settings = open_on("ort-cuda", "onnx", tf32=tf32, cuda=cuda).settings  # type: ignore[attr-defined]
        assert settings["use_tf32"] == str(int(tf32))
        assert settings["cudnn_conv_algo_search"] == search.upper()
        assert settings["prefer_nhwc"] == str(int(tf32))


@pytest.mark.parametrize(("runtime", "kind"), [("ort-cuda", "onnx-fp16"), ("torch-cuda", "eager")])
def test_kernels_are_recorded_of_every_engine(
    runtime: str, kind: str, open_on: Callable[..., Session], feeds: Feeds
) -> None:
    from cspdeploy.runtimes.kernels import profile_kernels

    call = open_on(runtime, kind).bind(feeds)
    call()
    found = profile_kernels(call, 3)
    assert len(found.nodes) > 5
    assert 0 < found.busy_ms <= 1.001 * sum(node.ms for node in found.nodes)


def test_operators_of_pytorch_count_each_kernel_once(
    open_on: Callable[..., Session], feeds: Feeds, tmp_path: Path
) -> None:
    from cspdeploy.runtimes.kernels import profile_kernels

    session = open_on("torch-cuda", "eager", profile=tmp_path)
    call = session.bind(feeds)
    for _ in range(20):
        call()
    nodes = session.end_profile()  # type: ignore[attr-defined]
    assert sum(node.ms for node in nodes) <= 1.1 * profile_kernels(call, 20).busy_ms


def test_tensorrt_where_it_is_installed(open_on: Callable[..., Session], feeds: Feeds, expected: np.ndarray) -> None:
    try:
        session = open_on("ort-tensorrt", "onnx-fp16")
    except CspDeployError as error:
        pytest.skip(f"no TensorRT here: {error.message}")
    assert "TensorrtExecutionProvider" in session.placement
    assert relative_l2(next(iter(session.run(feeds).values())), expected) < 1e-2
