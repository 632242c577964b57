from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from cspdeploy.check import shapes
from cspdeploy.check.audit import audit_onnx, declared_precision
from cspdeploy.core.errors import InputError
from cspdeploy.core.results import PrecisionAudit

HEADER = '<ir_version: 8, opset_import: ["" : 18, "com.microsoft": 1]>'
# MACs of one image: 8 * 8 * 4 * (3 * 3 * 3) + 8 * 8 * 6 * (4 * 1 * 1) + 6 * 5
NET = f"""{HEADER} net (float[N, 3, 8, 8] x) => (float[N, 5] y) {{
    c = Conv<pads = [1, 1, 1, 1]>(x, w, b)
    r = Relu(c)
    d = Conv(r, v)
    p = GlobalAveragePool(d)
    f = Flatten(p)
    y = Gemm<transB = 1>(f, g)
}}"""
CONV, POINTWISE, DENSE = 8 * 8 * 4 * 27, 8 * 8 * 6 * 4, 6 * 5
WEIGHTS = {"w": (4, 3, 3, 3), "b": (4,), "v": (6, 4, 1, 1), "g": (5, 6)}


class _Noise(CalibrationDataReader):  # type: ignore[misc]  # of a package without types
    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self._feeds: Iterator[dict[str, np.ndarray]] = iter(  # type: ignore[type-arg]
            [{"x": rng.normal(size=(1, 3, 8, 8)).astype(np.float32)} for _ in range(4)]
        )

    def get_next(self) -> dict[str, np.ndarray] | None:  # type: ignore[type-arg]
        return next(self._feeds, None)


def _model(text: str, weights: dict[str, tuple[int, ...]], *, dtype: str = "float32") -> onnx.ModelProto:
    model = parser.parse_model(text)
    rng = np.random.default_rng(0)
    for name, shape in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(rng.normal(size=shape).astype(dtype), name))
    return model


Write = Callable[[onnx.ModelProto], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def save(model: onnx.ModelProto) -> Path:
        onnx.save(model, tmp_path / "net.onnx")
        return tmp_path / "net.onnx"

    return save


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("audit") / "net.onnx"
    onnx.save(_model(NET, WEIGHTS), path)
    return path


@pytest.fixture(scope="module", params=["qdq", "qoperator"])
def int8(request: pytest.FixtureRequest, fp32: Path) -> Path:
    path = fp32.with_name(f"{request.param}.int8.onnx")
    form = QuantFormat.QDQ if request.param == "qdq" else QuantFormat.QOperator
    quantize_static(
        str(fp32), str(path), _Noise(), quant_format=form,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, per_channel=True,
    )  # fmt: skip
    return path


def _fp16(*, keep: bool = False) -> onnx.ModelProto:
    """In float16 but for inputs and outputs; `keep`: with the first convolution in float32."""
    text = NET.replace(
        "c = Conv<pads = [1, 1, 1, 1]>(x, w, b)", "h = Cast<to = 10>(x)\n c = Conv<pads = [1, 1, 1, 1]>(h, w, b)"
    )
    if keep:
        text = NET.replace("r = Relu(c)", "s = Relu(c)\n r = Cast<to = 10>(s)")
    text = text.replace("y = Gemm<transB = 1>(f, g)", "z = Gemm<transB = 1>(f, g)\n y = Cast<to = 1>(z)")
    model = _model(text, WEIGHTS, dtype="float16")
    if keep:
        for tensor in model.graph.initializer:
            if tensor.name in ("w", "b"):
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    return model


def _never_run(*arguments: object, **options: object) -> str:
    raise AssertionError("was run")


# --- counting ---


def test_fp32(fp32: Path) -> None:
    found = audit_onnx(fp32, declared="fp32")
    assert found == PrecisionAudit(
        declared="fp32", found="fp32", macs={"fp32": 1.0}, num_macs=CONV + POINTWISE + DENSE, macs_unknown="",
        weights={"fp32": 1.0}, opsets={"ai.onnx": 18, "com.microsoft": 1}, ir_version=8,
        operators={"Conv": 2, "Relu": 1, "GlobalAveragePool": 1, "Flatten": 1, "Gemm": 1},
        custom_operators=(), external_data=(), problem="",
    )  # fmt: skip


def test_shapes_that_the_file_holds_need_no_run(fp32: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(onnx.shape_inference.infer_shapes(onnx.load(fp32)))
    expected = audit_onnx(fp32, declared="")
    monkeypatch.setattr("cspdeploy.check.audit.run_for_shapes", _never_run)
    assert audit_onnx(path, declared="") == expected


def test_a_batch_in_the_file_is_divided_out(fp32: Path, write: Write) -> None:
    model = onnx.load(fp32)
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 4
    assert audit_onnx(write(model), declared="").num_macs == CONV + POINTWISE + DENSE


@pytest.mark.parametrize(
    ("node", "weight", "macs"),
    [
        ("y = Conv<group = 2>(x, w)", (6, 2, 3, 3), 6 * 6 * 6 * 2 * 9),
        ("y = ConvTranspose<strides = [2, 2]>(x, w)", (4, 5, 2, 2), 4 * 8 * 8 * 5 * 4),
        ("y = ConvTranspose<group = 2>(x, w)", (4, 3, 3, 3), 4 * 8 * 8 * 3 * 9),
        ("y = MatMul(x, w)", (8, 5), 4 * 8 * 5 * 8),
        ("f = Flatten(x) y = Gemm(f, w)", (256, 7), 256 * 7),
        ("f = Flatten(x) t = Transpose(f) y = Gemm<transA = 1>(t, w)", (256, 7), 256 * 7),
        ("y = com.microsoft.FusedConv<activation = \"Relu\">(x, w)", (2, 4, 3, 3), 6 * 6 * 2 * 4 * 9),
        ("y = com.microsoft.FusedMatMul<transA = 1>(x, w)", (8, 5), 4 * 8 * 5 * 8),
    ],
)  # fmt: skip
def test_macs_of_an_operator(write: Write, node: str, weight: tuple[int, ...], macs: int) -> None:
    text = f"{HEADER} net (float[1, 4, 8, 8] x) => (float y) {{ {node} }}"
    model = _model(text, {"w": weight})
    model.graph.output[0].type.tensor_type.ClearField("shape")
    found = audit_onnx(write(model), declared="fp32")
    assert (found.num_macs, found.macs, found.macs_unknown) == (macs, {"fp32": 1.0}, "")


def test_integer_operators(write: Write) -> None:
    text = f"""{HEADER} net (uint8[1, 4, 8, 8] x, uint8[2, 8] a) => (int32[1, 2, 6, 6] y, int32[2, 5] z) {{
        y = ConvInteger(x, w)  z = MatMulInteger(a, m) }}"""
    model = _model(text, {"w": (2, 4, 3, 3), "m": (8, 5)}, dtype="uint8")
    found = audit_onnx(write(model), declared="int8")
    assert found.macs == {"int8": 1.0}
    assert found.num_macs == 6 * 6 * 2 * 36 + 2 * 5 * 8
    assert found.problem == ""


# --- what a file is, and what it is named ---


def test_int8_is_int8(int8: Path) -> None:
    found = audit_onnx(int8, declared="int8")
    assert found.problem == ""
    assert found.found == "int8"
    assert found.macs == {"int8": 1.0}
    assert found.num_macs == CONV + POINTWISE + DENSE
    assert found.weights["int8"] > 0.8  # the rest: biases and scales


def test_int8_named_fp32_or_fp16(int8: Path) -> None:
    assert audit_onnx(int8, declared="fp32").problem == "named FP32, but of its MACs 100 % INT8 are not"
    assert audit_onnx(int8, declared="fp16").problem == "named FP16, but 0 % of its MACs are in FP16 (100 % INT8)"


@pytest.mark.parametrize("declared", ["fp16", "int8"])
def test_fp32_named_otherwise(fp32: Path, declared: str) -> None:
    name = declared.upper()
    assert (
        audit_onnx(fp32, declared=declared).problem == f"named {name}, but 0 % of its MACs are in {name} (100 % FP32)"
    )


def test_nothing_is_promised(fp32: Path) -> None:
    assert audit_onnx(fp32, declared="").problem == ""


def test_half_quantised_is_half_int8(int8: Path, fp32: Path, tmp_path: Path) -> None:
    """Only the two small layers are quantised: named INT8, and mostly FP32."""
    path = tmp_path / "half.onnx"
    model = onnx.load(fp32)
    for node, name in zip(model.graph.node, "abcdef", strict=True):
        node.name = name
    onnx.save(model, tmp_path / "named.onnx")
    quantize_static(
        str(tmp_path / "named.onnx"), str(path), _Noise(), quant_format=QuantFormat.QDQ, nodes_to_exclude=["a"]
    )
    found = audit_onnx(path, declared="int8")
    assert found.macs["int8"] == pytest.approx((POINTWISE + DENSE) / (CONV + POINTWISE + DENSE))
    assert found.problem == "named INT8, but 18.5 % of its MACs are in INT8 (81.5 % FP32, 18.5 % INT8)"


def test_weights_alone_in_int8_are_not_int8(write: Write) -> None:
    text = f"""{HEADER} net (float[1, 3, 8, 8] x) => (float[1, 4, 6, 6] y) {{
        w = DequantizeLinear(q, s)  y = Conv(x, w) }}"""
    model = _model(text, {"s": ()})
    model.graph.initializer.append(numpy_helper.from_array(np.ones((4, 3, 3, 3), np.int8), "q"))
    found = audit_onnx(write(model), declared="int8")
    assert (found.macs, found.found) == ({"fp32": 1.0}, "fp32")
    assert found.problem == "named INT8, but weight-only: 0 % of its MACs are in INT8 (100 % FP32)"
    assert audit_onnx(write(model), declared="int8-weights").problem == ""


def test_float_weights_are_not_int8_weights(tiny_bundle: Path) -> None:
    problem = audit_onnx(tiny_bundle / "tiny.onnx", declared="int8-weights").problem
    assert problem == "named INT8 in its weights, but these are 100 % FP32"


def test_fp16_is_fp16(write: Write, tiny_bundle: Path) -> None:
    found = audit_onnx(write(_fp16()), declared="fp16")
    assert (found.problem, found.macs, found.weights) == ("", {"fp16": 1.0}, {"fp16": 1.0})
    ours = audit_onnx(tiny_bundle / "tiny.fp16.onnx", declared="fp16")
    assert (ours.problem, ours.found) == ("", "fp16")
    assert audit_onnx(tiny_bundle / "tiny.onnx", declared="fp32").problem == ""


def test_fp16_named_fp32(write: Write) -> None:
    assert audit_onnx(write(_fp16()), declared="fp32").problem == "named FP32, but of its MACs 100 % FP16 are not"


def test_mostly_fp32_is_not_fp16(write: Write) -> None:
    found = audit_onnx(write(_fp16(keep=True)), declared="fp16")
    assert found.macs["fp32"] == pytest.approx(CONV / (CONV + POINTWISE + DENSE))
    assert "18.5 % of its MACs are in FP16" in found.problem


def test_fp16_weights_that_are_cast_to_fp32(write: Write) -> None:
    """Half the size, and all the arithmetic in FP32."""
    text = f"""{HEADER} net (float[1, 3, 8, 8] x) => (float[1, 4, 6, 6] y) {{ w = Cast<to = 1>(h)  y = Conv(x, w) }}"""
    found = audit_onnx(write(_model(text, {"h": (4, 3, 3, 3)}, dtype="float16")), declared="fp16")
    assert (found.macs, found.weights) == ({"fp32": 1.0}, {"fp16": 1.0})
    assert "0 % of its MACs are in FP16" in found.problem


def test_fp32_weights_that_are_cast_to_fp16(write: Write) -> None:
    text = f"""{HEADER} net (float16[1, 3, 8, 8] x) => (float16[1, 4, 6, 6] y) {{
        h = Cast<to = 10>(w)  y = Conv(x, h) }}"""
    found = audit_onnx(write(_model(text, {"w": (4, 3, 3, 3)})), declared="fp16")
    assert found.macs == {"fp16": 1.0}
    assert found.problem == "named FP16, but its weights are 100 % FP32: the file is no smaller"


def test_fp32_file_may_hold_a_small_table(write: Write, fp32: Path) -> None:
    model = onnx.load(fp32)
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.uint8), "table"))
    assert audit_onnx(write(model), declared="fp32").problem == ""
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(50, np.uint8), "large"))
    assert "named FP32, but of its weights" in audit_onnx(write(model), declared="fp32").problem


def test_shape_constants_are_no_weights(write: Write, fp32: Path) -> None:
    model = onnx.load(fp32)
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(5000, np.int64), "indices"))
    assert audit_onnx(write(model), declared="fp32").weights == {"fp32": 1.0}


def test_weights_in_constants_count(write: Write) -> None:
    model = parser.parse_model(
        f"{HEADER} net (float[1, 3, 8, 8] x) => (float[1, 4, 6, 6] y) {{ w = Constant()  y = Conv(x, w) }}"
    )
    weight = numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32))
    model.graph.node[0].attribute.append(helper.make_attribute("value", weight))
    found = audit_onnx(write(model), declared="int8")
    assert (found.weights, found.macs) == ({"fp32": 1.0}, {"fp32": 1.0})


def test_nothing_to_judge(write: Write) -> None:
    model = parser.parse_model(f"{HEADER} net (float[2] x) => (float[2] y) {{ y = Relu(x) }}")
    found = audit_onnx(write(model), declared="")
    assert (found.macs, found.weights, found.num_macs, found.found) == ({}, {}, 0, "fp32")
    assert "it has none" in audit_onnx(write(model), declared="int8").problem


# --- what cannot be known ---


def test_unknown_operators_leave_weights_to_judge(write: Write) -> None:
    text = f"""{HEADER[:-2]}, "com.example": 1]> net (float[1, 3, 8, 8] x) => (float[1, 4, 6, 6] y) {{
        o = com.example.Own(x)  y = Conv(o, w) }}"""
    model = _model(text, {"w": (4, 3, 3, 3)})
    found = audit_onnx(write(model), declared="int8")
    assert found.custom_operators == ("com.example.Own",)
    assert (found.macs, found.num_macs) == ({"fp32": 1.0}, None)  # by its output's shape, which the file holds
    assert found.macs_unknown == "not counted: 1 Own"
    model.graph.output[0].type.tensor_type.ClearField("shape")
    found = audit_onnx(write(model), declared="int8")
    assert (found.macs, found.num_macs) == ({}, None)
    assert "ONNX Runtime does not run it (" in found.macs_unknown
    assert found.problem == "named INT8, but 0 % of its weights are in INT8 (100 % FP32)"


def test_operators_that_nobody_knows_are_not_counted_as_nothing(tmp_path: Path) -> None:
    model = parser.parse_model("""<ir_version: 8, opset_import: ["" : 18, "com.example": 2]>
        strange (float[1, 4] x) => (float[1, 4] y) { a = com.example.Magic(x)  y = Relu(a) }""")
    onnx.save(model, tmp_path / "strange.onnx")
    found = audit_onnx(tmp_path / "strange.onnx", declared="")
    assert (found.num_macs, found.macs_unknown) == (None, "not counted: 1 Magic")


def test_shapes_of_both_artifacts_are_in_the_files(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "MAX_RUN_BYTES", 0)  # nothing may be run
    counted = [audit_onnx(tiny_bundle / name, declared="").num_macs for name in ("tiny.onnx", "tiny.fp16.onnx")]
    assert counted[0]
    assert counted[0] == counted[1]


def test_own_functions_are_no_custom_operators(write: Write) -> None:
    text = f"""{HEADER[:-2]}, "own": 1]> g (float[2] x) => (float[2] y) {{ y = own.twice(x) }}
    <domain: "own", opset_import: ["" : 18]> twice (a) => (b) {{ b = Add(a, a) }}"""
    found = audit_onnx(write(parser.parse_model(text)), declared="")
    assert found.custom_operators == ()
    assert found.macs_unknown == "not counted: 1 twice"


def test_free_height_and_width_are_said(fp32: Path, write: Write) -> None:
    model = onnx.load(fp32)
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = f"size{axis}"
    path = write(model)
    found = audit_onnx(path, declared="")
    assert found.macs == {"fp32": 1.0}
    assert (found.num_macs, found.macs_unknown) == (
        None,
        "sizes that the file leaves free were taken as x [1, 3, 256, 256]",
    )
    given = audit_onnx(path, declared="", feeds={"x": np.zeros((10, 3, 8, 8), np.float32)})
    assert (given.num_macs, given.macs_unknown) == (CONV + POINTWISE + DENSE, "")


def test_multiplications_inside_of_a_subgraph_are_not_counted(write: Write) -> None:
    text = f"""{HEADER} net (float[1, 8] x, bool flag) => (float[1, 5] y) {{
        y = If(flag) <then_branch = a () => (float[1, 5] t) {{ t = MatMul(x, m) }},
                      else_branch = b () => (float[1, 5] e) {{ n = Neg(x)  e = MatMul(n, m) }}> }}"""
    found = audit_onnx(write(_model(text, {"m": (8, 5)})), declared="")
    assert found.operators == {"MatMul": 2, "If": 1, "Neg": 1}
    assert (found.macs, found.macs_unknown) == ({}, "not counted: 2 operators inside of If, Loop or Scan")
    assert found.num_macs is None


def test_large_file_is_not_run(fp32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "MAX_RUN_BYTES", 100)
    found = audit_onnx(fp32, declared="int8")
    assert "too large to be run" in found.macs_unknown
    assert "0 % of its weights are in INT8" in found.problem


def test_run_that_does_not_end(fp32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "TIME_LIMIT_S", 0.001)
    assert "did not run the file within" in audit_onnx(fp32, declared="").macs_unknown


def test_run_that_crashes(fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "onnxruntime.py").write_text("import os\nos.abort()\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert audit_onnx(fp32, declared="").macs_unknown.endswith("does not run it (crashes its process (SIGABRT))")


def test_external_data_is_found_by_the_run(fp32: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(onnx.load(fp32), path, save_as_external_data=True, size_threshold=0, location="weights.bin")
    found = audit_onnx(path, declared="fp32")
    assert found.external_data == ("weights.bin",)
    assert found.num_macs == CONV + POINTWISE + DENSE


def test_what_is_no_onnx_file(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(b"garbage")
    with pytest.raises(InputError, match="not an ONNX file"):
        audit_onnx(tmp_path / "net.onnx", declared="")


@pytest.mark.parametrize(
    ("name", "precision"),
    [("net.int8.onnx", "int8"), ("net-FP16.onnx", "fp16"), ("net_fp32.onnx", "fp32"), ("net.onnx", ""),
     ("int8.onnx", ""), ("nint8.onnx", ""), ("int8.net.onnx", "")],
)  # fmt: skip
def test_precision_that_a_name_promises(name: str, precision: str) -> None:
    assert declared_precision(Path("folder.int8.onnx") / name) == precision


def test_graph_made_of_every_float(write: Write) -> None:
    text = f"{HEADER} net (bfloat16[1, 8] x) => (bfloat16[1, 5] y) {{ y = MatMul(x, w) }}"
    model = parser.parse_model(text)
    model.graph.initializer.append(
        TensorProto(name="w", data_type=TensorProto.BFLOAT16, dims=[8, 5], raw_data=bytes(80))
    )
    found = audit_onnx(write(model), declared="fp32")
    assert (found.macs, found.found) == ({"bf16": 1.0}, "bf16")
    assert found.problem == "named FP32, but of its MACs 100 % BF16 are not"
