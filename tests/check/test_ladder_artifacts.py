"""`verify` on bundles with one changed artifact: its rows break, with the right verdict, and the others stand."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from cspdeploy.check.latency import LatencySettings
from cspdeploy.core.errors import EXIT_CHECK_FAILED, TamperedError
from cspdeploy.core.golden import read_golden

SHORT = LatencySettings(
    min_runs=5, min_seconds=0.0, min_rounds=1, warmup_runs=1, warmup_seconds=0.0, max_warmup_seconds=0.0,
    lead_in_seconds=0.0, burst=1,
)  # fmt: skip
GARBAGE = b"this was never an ONNX file"


def _scale_by_a_thousandth(weights: np.ndarray[Any, Any]) -> None:
    weights *= np.float32(1.001)


@pytest.mark.parametrize("change", [None, _scale_by_a_thousandth])
def test_changed_convolution_breaks_its_rung_alone(
    bundle: Path, change: Callable[[np.ndarray[Any, Any]], None] | None, ladder: Any
) -> None:
    ladder.edit_convolution(bundle / "tiny.onnx", change or ladder.negate_largest)
    ladder.rehash(bundle)
    report = ladder.verify(bundle, "torch-cpu", "torchscript-cpu", "ort-cpu")
    assert ladder.verdicts(report) == {
        ("preprocess", "shared"): "pass", ("eager", "torch-cpu"): "pass", ("torchscript", "torchscript-cpu"): "pass",
        ("onnx", "ort-cpu"): "numeric", ("onnx-fp16", "ort-cpu"): "pass",
    }  # fmt: skip
    assert report.verdict == "fail"
    assert report.first_break.startswith(f"{bundle}: onnx on ort-cpu: relative L2")


def test_fp16_file_that_overflows_breaks_on_the_rounding_runtime(bundle: Path, ladder: Any) -> None:
    """What the CPU's float32 arithmetic hides: features times 60000, twice, and divided again."""
    model = onnx.load(bundle / "tiny.fp16.onnx")
    gemm = next(node for node in model.graph.node if node.op_type in ("Gemm", "MatMul"))
    weight = next(tensor for tensor in model.graph.initializer if tensor.name in gemm.input)
    source = gemm.input[0]
    up = numpy_helper.from_array(np.array(60000.0, np.float16), "up")
    nodes = [
        onnx.helper.make_node("Mul", [source, "up"], ["large"]),
        onnx.helper.make_node("Mul", ["large", "up"], ["larger"]),
        onnx.helper.make_node("Div", ["larger", "up"], ["smaller"]),
        onnx.helper.make_node("Div", ["smaller", "up"], ["back"]),
    ]
    assert weight.data_type == onnx.TensorProto.FLOAT16
    index = list(model.graph.node).index(gemm)
    gemm.input[0] = "back"
    for offset, node in enumerate(nodes):
        model.graph.node.insert(index + offset, node)
    model.graph.initializer.append(up)
    onnx.save(model, bundle / "tiny.fp16.onnx")
    ladder.rehash(bundle)
    report = ladder.verify(bundle, "ort-cpu", "fp16-rounding")
    assert ladder.row(report, "onnx-fp16", "fp16-rounding").verdict == "nan"
    assert ladder.row(report, "onnx-fp16", "ort-cpu").verdict == "pass"
    assert report.verdict == "fail"


def test_garbage_with_the_right_hash_is_an_error_row_and_the_others_go_on(bundle: Path, ladder: Any) -> None:
    (bundle / "tiny.fp16.onnx").write_bytes(GARBAGE)
    ladder.rehash(bundle)
    report = ladder.verify(bundle)
    verdicts = {key: verdict for key, verdict in ladder.verdicts(report).items() if key[1] in (
        "torch-cpu", "torchscript-cpu", "ort-cpu", "fp16-rounding")}  # fmt: skip
    assert verdicts == {
        ("eager", "torch-cpu"): "pass", ("torchscript", "torchscript-cpu"): "pass", ("onnx", "ort-cpu"): "pass",
        ("onnx-fp16", "fp16-rounding"): "error", ("onnx-fp16", "ort-cpu"): "error",
    }  # fmt: skip
    for runtime in ("fp16-rounding", "ort-cpu"):
        reason = ladder.row(report, "onnx-fp16", runtime).reason
        assert "tiny.fp16.onnx" in reason
        assert "\n" not in reason
    assert "onnx-fp16 on fp16-rounding" in report.first_break


_OTHER_INPUT = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[1,3,32,32] image) => (float[1,3] logits) { logits = ReduceMean<axes = [2, 3], keepdims = 0>(image) }
"""
_FAILS_WHEN_RUN = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[1,3,32,32] input) => (float[1,3] logits) {
    index = Constant<value = int64[1] {9}>()
    picked = Gather<axis = 1>(input, index)
    logits = ReduceMean<axes = [2, 3], keepdims = 0>(picked)
}
"""


def test_file_that_opens_but_does_not_run_is_an_error_row(bundle: Path, ladder: Any) -> None:
    model = onnx.parser.parse_model(_FAILS_WHEN_RUN)
    (bundle / "tiny.onnx").write_bytes(model.SerializeToString())
    ladder.rehash(bundle)
    report = ladder.verify(bundle, "ort-cpu", latency=SHORT)
    assert ladder.row(report, "onnx", "ort-cpu").verdict == "error"
    other = ladder.row(report, "onnx-fp16", "ort-cpu")
    assert other.verdict == "pass"
    assert other.p50_ms is not None
    assert report.verdict == "fail"


def test_inputs_of_other_names_than_the_manifests_have_a_line_of_their_own(bundle: Path, ladder: Any) -> None:
    (bundle / "tiny.onnx").write_bytes(onnx.parser.parse_model(_OTHER_INPUT).SerializeToString())
    ladder.rehash(bundle)
    row = ladder.row(ladder.verify(bundle, "ort-cpu"), "onnx", "ort-cpu")
    assert (row.verdict, row.reason) == ("inputs", "inputs are ['image'], expected ['input']")


# --- a file that is not what it is listed as ---


def _list_as(ladder: Any, bundle: Path, kind: str, precision: str) -> None:
    def change(data: dict[str, Any]) -> None:
        next(entry for entry in data["artifacts"] if entry["kind"] == kind).update(precision=precision)

    ladder.edit(bundle, change)


def test_fp32_file_that_is_listed_as_fp16_fails_however_near_it_is(bundle: Path, ladder: Any) -> None:
    shutil.copy(bundle / "tiny.onnx", bundle / "tiny.fp16.onnx")
    ladder.rehash(bundle)
    report = ladder.verify(bundle, "ort-cpu", audit=True)
    row = ladder.row(report, "onnx-fp16", "ort-cpu")
    assert row.verdict == "precision"
    assert row.rel_l2 < row.limit
    assert "FP16" in row.reason
    assert report.verdict == "fail"
    assert ladder.row(report, "onnx", "ort-cpu").audit.problem == ""


def test_fp32_file_that_is_listed_as_int8_fails(bundle: Path, ladder: Any) -> None:
    _list_as(ladder, bundle, "onnx", "int8")
    row = ladder.row(ladder.verify(bundle, "ort-cpu", audit=True), "onnx", "ort-cpu")
    assert row.verdict == "precision"
    assert "INT8" in row.reason


def test_what_a_file_is_goes_into_its_rows(tiny_bundle: Path, ladder: Any) -> None:
    report = ladder.verify(tiny_bundle, audit=True)
    for row in report.rows:
        assert (row.audit is not None) == row.artifact.startswith("onnx")
    assert ladder.row(report, "onnx", "ort-cpu").audit.found == "fp32"
    assert ladder.row(report, "onnx-fp16", "ort-cpu").audit.found == "fp16"
    assert ladder.row(report, "onnx-fp16", "ort-cpu").audit == ladder.row(report, "onnx-fp16", "fp16-rounding").audit


def _quantise(bundle: Path) -> None:
    """The bundle's ONNX file in INT8, as onnxruntime's own tool makes it, in place of its FP16 one."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            x_NCHW = read_golden(bundle / "golden.npz").x_NCHW
            self._feeds = iter([{"input": x_NCHW[i : i + 1]} for i in range(len(x_NCHW))])

        def get_next(self) -> dict[str, Any] | None:
            return next(self._feeds, None)

    quantize_static(
        bundle / "tiny.onnx", bundle / "tiny.fp16.onnx", Reader(), quant_format=QuantFormat.QDQ, per_channel=True
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_int8_file_is_judged_by_the_model_of_its_own_tensors(bundle: Path, ladder: Any) -> None:
    _quantise(bundle)
    _list_as(ladder, bundle, "onnx-fp16", "int8")
    ladder.rehash(bundle)
    report = ladder.verify(bundle, "ort-cpu", audit=True)
    row = ladder.row(report, "onnx-fp16", "ort-cpu")
    (limit,) = row.limits
    graph = onnx.load(bundle / "tiny.fp16.onnx").graph
    num_activations = sum(node.op_type == "QuantizeLinear" for node in graph.node)
    num_weights = sum(
        tensor.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8) and len(tensor.dims) > 1
        for tensor in graph.initializer
    )
    assert limit.terms["num_quantised"] == num_activations + num_weights > 20
    assert row.audit.found == "int8"
    assert row.verdict == "pass", row.reason
    # The model is neither vacuous nor short of the truth: within a factor of 8 of it, above.
    assert limit.rel_l2 / 8 < row.rel_l2 < limit.rel_l2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wrong_scale_in_int8_is_found(bundle: Path, ladder: Any) -> None:
    _quantise(bundle)
    model = onnx.load(bundle / "tiny.fp16.onnx")
    node = next(node for node in model.graph.node if node.op_type == "DequantizeLinear" and "conv" in node.input[0])
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == node.input[1])
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(3), tensor.name))
    onnx.save(model, bundle / "tiny.fp16.onnx")
    _list_as(ladder, bundle, "onnx-fp16", "int8")
    ladder.rehash(bundle)
    row = ladder.row(ladder.verify(bundle, "ort-cpu"), "onnx-fp16", "ort-cpu")
    assert row.verdict in ("numeric", "decision")


@pytest.mark.parametrize("file", ["tiny.torchscript.pt", "tiny.onnx", "tiny.fp16.onnx", "golden.npz", "labels.txt"])
def test_one_changed_byte_stops_before_anything_is_opened(bundle: Path, file: str, ladder: Any) -> None:
    content = bytearray((bundle / file).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / file).write_bytes(content)
    with pytest.raises(TamperedError, match=file.replace(".", r"\.")) as caught:
        ladder.verify(bundle)
    assert caught.value.exit_code == EXIT_CHECK_FAILED == 1
