from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cspdeploy.core.types import StepRecord
from cspdeploy.export import simplify
from cspdeploy.export.rewrite import count_operators
from cspdeploy.export.simplify import start_simplify
from cspdeploy.runtimes.ort import open_cpu_session

Array = npt.NDArray[np.float32]
CRASH = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
HANG = "import time; time.sleep(600)"
COPY = "import shutil, sys; shutil.copyfile({!r}, sys.argv[2])"


def _simplify(source: Path, target: Path, x_NCHW: Array, *, time_limit_s: float = 60.0) -> StepRecord:
    job = start_simplify(source, target, time_limit_s=time_limit_s)
    try:
        return job.finish(x_NCHW, batch=1)
    finally:
        job.stop()


def _with_child(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Put `code` in the place of onnxsim."""
    monkeypatch.setattr(simplify, "_CHILD", [sys.executable, "-c", code])


# --- onnxsim itself ---


def test_simplified_graph_is_smaller_and_computes_the_same(tiny_raw: Path, tmp_path: Path, tiny_x_NCHW: Array) -> None:
    target = tmp_path / "simplified.onnx"
    record = _simplify(tiny_raw, target, tiny_x_NCHW)
    assert (record.name, record.outcome) == ("simplify", "done")
    before, after = onnx.load(tiny_raw), onnx.load(target)
    assert record.facts["nodes_before"] == len(before.graph.node)
    assert record.facts["nodes_after"] == len(after.graph.node) <= len(before.graph.node)
    assert record.facts["operators_before"] == count_operators(before.graph)
    assert record.facts["operators_after"] == count_operators(after.graph)
    onnx.checker.check_model(target, full_check=True)
    feeds = {"input": tiny_x_NCHW[:1]}
    expected, got = (open_cpu_session(path).run(feeds)["logits"] for path in (tiny_raw, target))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * float(np.abs(expected).max()))
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
    assert not after.metadata_props


def test_constants_are_folded(make_onnx: Callable[..., Path], tmp_path: Path) -> None:
    source = make_onnx(
        "(float[1, 3, 2, 2] input) => (float[1, 12] logits) {"
        "  s = Shape(input)  rows = Gather(s, zero)  rest = Constant<value = int64[1] {-1}>()"
        "  shape = Concat<axis = 0>(rows, rest)  logits = Reshape(input, shape) }",
        zero=np.array([0]),
    )
    record = _simplify(source, tmp_path / "target.onnx", np.ones((1, 3, 2, 2), np.float32))
    assert record.outcome == "done"
    assert [node.op_type for node in onnx.load(tmp_path / "target.onnx").graph.node] == ["Reshape"]


def test_source_that_is_no_model_is_kept_with_the_reason(tmp_path: Path) -> None:
    source, target = tmp_path / "source.onnx", tmp_path / "target.onnx"
    source.write_bytes(b"no model")
    record = _simplify(source, target, np.zeros((1, 3, 8, 8), np.float32))
    assert record.outcome == "kept"
    assert "onnxsim failed" in record.detail
    assert target.read_bytes() == b"no model"


# --- children that go wrong ---


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (CRASH, "crashed (signal 11)"),
        ("import sys; sys.exit('out of luck')", "onnxsim failed: out of luck"),
        ("raise MemoryError", "onnxsim failed: MemoryError"),
        ("raise SystemExit(1)", "onnxsim failed: no message"),
        ("pass", "onnxsim failed: no message"),  # done, it says, and there is no file
        ("import sys; open(sys.argv[2], 'wb').write(b'garbage' * 100)", "does not run"),
        ("import sys; open(sys.argv[2], 'wb')", "does not run"),
        (
            "import sys; data = open(sys.argv[1], 'rb').read(); open(sys.argv[2], 'wb').write(data[:len(data) // 2])",
            "does not run",
        ),
        ("import sys; open(sys.argv[2], 'wb').write(b'half'); " + CRASH, "crashed (signal 11)"),
    ],
    ids=["crash", "failure", "exception", "silent", "no file", "garbage", "empty file", "cut file", "crash after file"],
)
def test_child_that_fails(
    tiny_raw: Path, tmp_path: Path, tiny_x_NCHW: Array, monkeypatch: pytest.MonkeyPatch, code: str, reason: str
) -> None:
    _with_child(monkeypatch, code)
    record = _simplify(tiny_raw, tmp_path / "target.onnx", tiny_x_NCHW)
    assert record.outcome == "kept"
    assert reason in record.detail
    assert (tmp_path / "target.onnx").read_bytes() == tiny_raw.read_bytes()


def test_child_that_hangs_is_ended(
    tiny_raw: Path, tmp_path: Path, tiny_x_NCHW: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_child(monkeypatch, HANG)
    job = start_simplify(tiny_raw, tmp_path / "target.onnx", time_limit_s=0.1)
    record = job.finish(tiny_x_NCHW, batch=1)
    assert record.outcome == "kept"
    assert "did not end within 0.1 s" in record.detail
    assert (tmp_path / "target.onnx").read_bytes() == tiny_raw.read_bytes()
    assert job._process.poll() is not None


def test_stop_ends_a_child_that_nobody_waits_for(
    tiny_raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_child(monkeypatch, HANG)
    job = start_simplify(tiny_raw, tmp_path / "target.onnx")
    job.stop()
    assert job._process.poll() is not None


# --- children that write a wrong model ---


def _change_weight(model: onnx.ModelProto) -> None:
    tensor = next(item for item in model.graph.initializer if len(item.dims) == 4)
    array = numpy_helper.to_array(tensor).copy()
    array.flat[0] += 0.1 * np.abs(array).max()
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def _make_nan(model: onnx.ModelProto) -> None:
    tensor = next(item for item in model.graph.initializer if len(item.dims) == 4)
    array = numpy_helper.to_array(tensor).copy()
    array.flat[0] = np.nan
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def _after_logits(model: onnx.ModelProto, *nodes: onnx.NodeProto, dtype: int, shape: list[int]) -> None:
    """Append `nodes`, which make the new "logits" from "before"."""
    for node in model.graph.node:
        node.output[:] = ["before" if name == "logits" else name for name in node.output]
    model.graph.node.extend(nodes)
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("logits", dtype, shape))


def _scale(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.float32(1.001), "gain"))
    scale = helper.make_node("Mul", ["before", "gain"], ["logits"])
    _after_logits(model, scale, dtype=TensorProto.FLOAT, shape=[1, 10])


def _rename_output(model: onnx.ModelProto) -> None:
    _after_logits(model, dtype=TensorProto.FLOAT, shape=[1, 10])
    model.graph.output[0].name = "before"


def _rename_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].name = "image"
    for node in model.graph.node:
        node.input[:] = ["image" if name == "input" else name for name in node.input]


def _add_output(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Identity", ["logits"], ["second"]))
    model.graph.output.append(helper.make_tensor_value_info("second", TensorProto.FLOAT, [1, 10]))


def _drop_axis(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array([10]), "flat"))
    reshape = helper.make_node("Reshape", ["before", "flat"], ["logits"])
    _after_logits(model, reshape, dtype=TensorProto.FLOAT, shape=[10])


def _other_dtype(model: onnx.ModelProto) -> None:
    cast = helper.make_node("Cast", ["before"], ["logits"], to=TensorProto.DOUBLE)
    _after_logits(model, cast, dtype=TensorProto.DOUBLE, shape=[1, 10])


def _fail_when_run(model: onnx.ModelProto) -> None:
    """Opens, for the engine cannot know the shape before it runs."""
    model.graph.initializer.append(numpy_helper.from_array(np.array([10], np.int64), "far"))
    nodes = [
        helper.make_node("ArgMax", ["before"], ["best"], axis=1),
        helper.make_node("Add", ["best", "far"], ["index"]),
        helper.make_node("GatherElements", ["before", "index"], ["picked"], axis=1),
        helper.make_node("Add", ["before", "picked"], ["logits"]),
    ]
    _after_logits(model, *nodes, dtype=TensorProto.FLOAT, shape=[1, 10])


def _data_outside(model: onnx.ModelProto) -> None:
    tensor = next(item for item in model.graph.initializer if len(item.dims) == 4)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/hostname")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_change_weight, "outputs differ on real inputs"),
        (_make_nan, "outputs differ on real inputs"),
        (_scale, "outputs differ on real inputs"),
        (_rename_output, "other inputs or outputs"),
        (_rename_input, "other inputs or outputs"),
        (_add_output, "other inputs or outputs"),
        (_drop_axis, ""),
        (_other_dtype, ""),
        (_fail_when_run, ""),
        (_data_outside, "does not run"),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_child_that_writes_another_model(
    tiny_raw: Path,
    tmp_path: Path,
    tiny_x_NCHW: Array,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[onnx.ModelProto], None],
    reason: str,
) -> None:
    model = onnx.load(tiny_raw)
    change(model)
    wrong = tmp_path / "wrong.onnx"
    wrong.write_bytes(model.SerializeToString())
    _with_child(monkeypatch, COPY.format(str(wrong)))
    record = _simplify(tiny_raw, tmp_path / "target.onnx", tiny_x_NCHW)
    assert record.outcome == "kept"
    assert record.detail.startswith("unsimplified graph kept: ")
    assert reason in record.detail
    assert (tmp_path / "target.onnx").read_bytes() == tiny_raw.read_bytes()


def test_model_that_differs_on_noise_alone(
    make_onnx: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an image of one colour the mean and the first pixel are the same."""
    head = "(float[1, 3, 8, 8] input) => (float[1, 3, 1, 1] logits)"
    source = make_onnx(head + " { logits = GlobalAveragePool(input) }")
    first = {"starts": np.array([0, 0]), "ends": np.array([1, 1]), "axes": np.array([2, 3])}
    wrong = make_onnx(head + " { logits = Slice(input, starts, ends, axes) }", file="wrong.onnx", **first)
    _with_child(monkeypatch, COPY.format(str(wrong)))
    x_NCHW = np.stack([np.full((3, 8, 8), value, np.float32) for value in (0.5, -0.5)])
    record = _simplify(source, tmp_path / "target.onnx", x_NCHW)
    assert "outputs differ on random inputs" in record.detail
    assert (tmp_path / "target.onnx").read_bytes() == source.read_bytes()
