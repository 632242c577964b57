"""What of a network is computed in integers, from records of real sessions."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime
import pytest

from cspdeploy.core.onnx_graph import read_onnx
from cspdeploy.core.placed import IntegerWork, count_integer_work
from cspdeploy.core.types import PlacedNode
from cspdeploy.runtimes.ort import OrtSession

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
TEXT = """<ir_version: 8, opset_import: ["" : 17]>
g (float[1,1,4,4] x) => (float[1,1,4,4] y)
<float s = {0.05}, uint8 z = {128}, float v = {0.01}, int8 c = {0}, int8[1,1,1,1] w = {100}> {
    xq = QuantizeLinear(x, s, z)
    xd = DequantizeLinear(xq, s, z)
    wd = DequantizeLinear(w, v, c)
    a = Conv(xd, wd)
    aq = QuantizeLinear(a, s, z)
    y = DequantizeLinear(aq, s, z)
}"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.onnx"
    onnx.save(onnx.parser.parse_model(TEXT), path)
    return path


def finished(path: Path, *, fused: bool) -> tuple[PlacedNode, ...]:
    """The graph that ONNX Runtime runs on this CPU."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "0" if fused else "1")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path.with_suffix(".optimised.onnx"))
    onnxruntime.InferenceSession(str(path), options, providers=[CPU])
    nodes = read_onnx(path.with_suffix(".optimised.onnx")).graph.nodes
    return tuple(PlacedNode(provider=CPU, node=node.name, operator=node.operator) for node in nodes)


def test_pairs_that_the_engine_puts_together_are_integer_work(path: Path) -> None:
    work = count_integer_work(finished(path, fused=True), finished=True)
    assert work == IntegerWork(num_integer=1, num_float=0, num_pairs=2)


def test_pairs_that_it_leaves_alone_stand_around_a_float_convolution(path: Path) -> None:
    work = count_integer_work(finished(path, fused=False), finished=True)
    assert work is not None
    assert (work.num_integer, work.num_float) == (0, 1)
    assert work.num_pairs >= 4


def test_a_session_on_the_cpu_is_recorded_before_it_puts_them_together(path: Path) -> None:
    nodes = OrtSession(path, provider=CPU).nodes
    assert "Conv" in {node.operator for node in nodes}
    assert count_integer_work(nodes) is None


def test_a_record_of_cuda_is_final(path: Path) -> None:
    """The nodes are those that a CPU session records before its own rewrites, which no other provider has."""
    recorded = OrtSession(path, provider=CPU).nodes
    on_cuda = [PlacedNode(provider=CUDA, node=node.node, operator=node.operator) for node in recorded]
    work = count_integer_work(on_cuda)
    assert work is not None
    assert (work.num_integer, work.num_float) == (0, 1)
    # A bias in INT32 that is left to the CPU changes nothing of that.
    left = PlacedNode(provider=CPU, node="bias", operator="DequantizeLinear")
    assert count_integer_work([*on_cuda, left]) == IntegerWork(num_integer=0, num_float=1, num_pairs=work.num_pairs + 1)


def test_a_float_network_has_none() -> None:
    nodes = [PlacedNode(provider=CPU, node=name, operator=name) for name in ("Conv", "Relu", "Gemm")]
    assert count_integer_work(nodes) == IntegerWork(num_integer=0, num_float=2, num_pairs=0)
    assert count_integer_work([]) == IntegerWork(num_integer=0, num_float=0, num_pairs=0)
