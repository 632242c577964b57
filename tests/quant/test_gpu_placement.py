"""Files for TensorRT and for ONNX Runtime's CUDA provider, held against the rules of those engines. None is here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from cspdeploy.check.lint import lint_file
from cspdeploy.core.errors import RuntimeUnavailableError
from cspdeploy.core.targets import TARGETS
from cspdeploy.pipeline.int8_step import Int8Request
from cspdeploy.pipeline.recipe import ExportRequest, export_bundle
from cspdeploy.quant.int8 import Int8Settings, quantise
from cspdeploy.quant.observations_cache import ObservationsCache
from cspdeploy.quant.place import lay_out
from cspdeploy.quant.placements import PLACEMENTS, find_placement
from cspdeploy.quant.prepare import prepare_float
from cspdeploy.quant.prove import prove_placement
from cspdeploy.quant.torch_graph import TorchGraph
from cspdeploy.quant.write import write_qdq
from tests.quant import detector_parts, int8_parts
from tests.quant.placed_graphs import CHAIN, CHAIN_WEIGHTS, ROWS, images, make, plan_by_extremes

GPU_ROWS = ["tensorrt", "ort-cuda"]
TENSORRT = ["tensorrt-8.6", "tensorrt-10"]
RELU = CHAIN.replace("LeakyRelu <alpha = 0.1>", "Relu")
BOTTLENECK = """
    c1 = Conv (x, w1, b1)
    a1 = Relu (c1)
    m = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (a1)
    c2 = Conv (m, w2, b2)
    s = Conv (m, w3, b3)
    t = Add (c2, s)
    a2 = Relu (t)
    u = Resize <mode = "nearest"> (a2, , twice)
    j = Concat <axis = 1> (u, a1)
    c4 = Conv (j, w4, b4)
    h, i = Split <axis = 1> (c4)
    a4 = Sigmoid (h)
    y = Conv (a4, w5, b5)
"""
BOTTLENECK_WEIGHTS = {
    "w1": (8, 3, 1, 1), "b1": (8,), "w2": (8, 8, 1, 1), "b2": (8,), "w3": (8, 8, 1, 1), "b3": (8,),
    "w4": (8, 16, 1, 1), "b4": (8,), "w5": (6, 4, 1, 1), "b5": (6,),
}  # fmt: skip
NETWORKS = {
    "csp": lambda: make(CHAIN, CHAIN_WEIGHTS), "relu": lambda: make(RELU, CHAIN_WEIGHTS),
    "bottleneck": lambda: make(
        BOTTLENECK, BOTTLENECK_WEIGHTS, values={"twice": np.array([1, 1, 2, 2], np.float32)}
    ),
}  # fmt: skip


def write(folder: Path, model: onnx.ModelProto, row: str) -> Path:
    ready = prepare_float(model)
    graph = TorchGraph(ready)
    layout = lay_out(graph, ROWS[row])
    path = folder / "net.int8.onnx"
    onnx.save(write_qdq(ready, plan_by_extremes(graph, layout, ROWS[row], images())), path)
    return path


@pytest.mark.parametrize("row", GPU_ROWS)
@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_written_keeps_the_rules_of_tensorrt(tmp_path: Path, row: str, name: str) -> None:
    path = write(tmp_path, NETWORKS[name](), row)
    for report in lint_file(path, [TARGETS[target] for target in TENSORRT]).targets:
        assert (report.verdict, report.findings) == ("pass", ())


@pytest.mark.parametrize("row", GPU_ROWS)
def test_on_cuda_every_node_of_it_has_a_kernel(tmp_path: Path, row: str) -> None:
    report = lint_file(write(tmp_path, NETWORKS["csp"](), row), [TARGETS["ort-cuda"]]).targets[0]
    assert (report.num_elsewhere, [found.rule for found in report.findings]) == (0, ["quantised-product"])


def test_what_is_written_for_the_cpu_does_not(tmp_path: Path) -> None:
    """The rules bite: zero points, biases in INT32, pairs before activations."""
    report = lint_file(write(tmp_path, NETWORKS["csp"](), "ort-cpu"), [TARGETS["tensorrt-10"]]).targets[0]
    assert report.verdict == "fail"
    assert {"zero-point", "zero-point-dtype", "activation"} <= {found.rule for found in report.findings}


def test_the_files_of_a_detector_pass(tmp_path: Path) -> None:
    target = tmp_path / "net.int8.onnx"
    record = quantise(
        int8_parts.write_source(tmp_path, detector_parts.detector()), target, detector_parts.calibration(),
        placement=PLACEMENTS["tensorrt"], settings=Int8Settings(method="minmax"), detection=detector_parts.DETECTION,
        cache=ObservationsCache(None), progress=int8_parts.quiet,
    )  # fmt: skip
    assert record.outcome == "done"
    for report in lint_file(target, [TARGETS[name] for name in TENSORRT]).targets:
        assert report.verdict == "pass", report.findings
    assert "cspdeploy verify BUNDLE --runtime ort-tensorrt" in record.detail
    assert "not proven: nothing here runs tensorrt" in record.detail
    assert "FP16" in record.detail


@pytest.mark.slow
@pytest.mark.parametrize("target", [*TENSORRT, "ort-cuda"])
def test_what_an_export_writes_passes(photo_models: Path, tmp_path: Path, target: str) -> None:
    request = ExportRequest(
        model="tiny", models=photo_models, output=tmp_path / "out", int8=Int8Request(calibration="minmax"),
        target=target,
    )  # fmt: skip
    folder = Path(export_bundle(request).folder)
    path = next(folder.glob("*.int8.onnx"))
    names = ["tensorrt-10"] if target == "ort-cuda" else [target]  # 8.6 takes older opsets alone
    for report in lint_file(path, [TARGETS[name] for name in names]).targets:
        assert report.verdict == "pass", report.findings


def test_the_rows_say_what_the_cuda_provider_does() -> None:
    row = find_placement("ort-cuda")
    assert "no INT8 convolution" in row.why
    assert "OperatorKernels.md" in row.source
    assert "not measured" in row.caution
    assert (row.symmetric, row.integer_bias, row.before_activation) == (True, False, False)


@pytest.mark.parametrize(("row", "runtime"), [("tensorrt", "ort-tensorrt"), ("ort-cuda", "ort-cuda")])
def test_what_is_not_proven_comes_with_the_command_that_proves_it(
    tmp_path: Path, row: str, runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> None:
        raise RuntimeUnavailableError(f"{name}: not here")

    monkeypatch.setattr("cspdeploy.quant.prove.require_runtime", absent)
    ready = prepare_float(NETWORKS["csp"]())
    path = write(tmp_path, NETWORKS["csp"](), row)
    proof = prove_placement(path, lay_out(TorchGraph(ready), ROWS[row]), ROWS[row])
    assert proof.runtime is None
    assert proof.unproven == f"nothing here runs {row}; where it is: cspdeploy verify BUNDLE --runtime {runtime}"


@pytest.mark.parametrize("fused", [True, False])
def test_onnx_runtime_makes_an_int32_bias_by_itself(tmp_path: Path, fused: bool) -> None:
    """On every provider, before nodes are placed: CUDA has no kernel for it. Without the pairs' rewrites it does not,
    and weights are constants again."""
    path = write(tmp_path, NETWORKS["relu"](), "ort-cuda")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.disable_quant_qdq", "0" if fused else "1")
    options.optimized_model_filepath = str(tmp_path / "basic.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "basic.onnx").graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    dequantised = [types.get(node.input[0]) for node in graph.node if node.op_type == "DequantizeLinear"]
    assert (onnx.TensorProto.INT32 in dequantised) == fused
    assert (onnx.TensorProto.INT8 in dequantised) == fused
    report = lint_file(tmp_path / "basic.onnx", [TARGETS["ort-cuda"]]).targets[0]
    assert (report.num_elsewhere > 0) == fused


@pytest.mark.cuda
def test_the_cuda_provider_computes_no_convolution_in_integers(tmp_path: Path) -> None:
    ready = prepare_float(NETWORKS["csp"]())
    path = write(tmp_path, NETWORKS["csp"](), "ort-cuda")
    proof = prove_placement(path, lay_out(TorchGraph(ready), ROWS["ort-cuda"]), ROWS["ort-cuda"])
    assert (proof.runtime, proof.num_integer, len(proof.float_nodes)) == ("ort-cuda", 0, 3)
    assert proof.num_pairs > 0
