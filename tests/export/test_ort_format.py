from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from cspdeploy.export.ort_format import OPERATORS_FILE, write_operators_config, write_optimised, write_ort_format

X = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Convolution to 16 channels and LeakyRelu, which ONNX Runtime fuses, and blocks where it may."""
    weight = np.random.default_rng(1).standard_normal((16, 3, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("LeakyRelu", ["c"], ["y"], alpha=0.1),
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 16, 8, 8])], [numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def _run(path: Path) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": X})[0])


def test_ort_format_computes_the_same_and_is_no_onnx_file(source: Path) -> None:
    target = source.with_suffix(".ort")
    record = write_ort_format(source, target)
    np.testing.assert_allclose(_run(target), _run(source), rtol=1e-5, atol=1e-6)
    assert target.read_bytes()[4:8] == b"ORTM"
    assert (record.outcome, record.facts["onnxruntime"]) == ("done", onnxruntime.__version__)


def test_ort_format_is_for_any_processor_and_the_optimised_graph_for_this_one(source: Path) -> None:
    target, optimised = source.with_suffix(".ort"), source.with_name("net.opt.onnx")
    write_ort_format(source, target)
    record = write_optimised(source, optimised, machine="this processor")
    assert "this processor" in record.detail
    write_operators_config([target], source.with_name(OPERATORS_FILE))
    assert "com.microsoft.nchwc;" not in source.with_name(OPERATORS_FILE).read_text()
    operators = {(node.domain, node.op_type) for node in onnx.load(optimised).graph.node}
    assert operators != {("", "Conv"), ("", "LeakyRelu")}, "nothing was optimised"
    np.testing.assert_allclose(_run(optimised), _run(source), rtol=1e-5, atol=1e-6)


def test_operators_config_names_what_the_file_needs_and_no_path_of_this_machine(source: Path) -> None:
    target, config = source.with_suffix(".ort"), source.with_name(OPERATORS_FILE)
    write_ort_format(source, target)
    write_operators_config([target], config)
    text = config.read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert any("FusedConv" in line or "Conv" in line for line in lines)
    assert all(len(line.split(";", 2)) == 3 for line in lines), "domain;opset;operators"
    assert "# - net.ort" in text
    assert str(source.parent) not in text
