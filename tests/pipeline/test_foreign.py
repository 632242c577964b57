"""A bundle from an ONNX file of somebody else, and what of such a file is refused in one line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from cspdeploy.check.ladder import VerifySettings, verify_bundles
from cspdeploy.check.subject import bundle_subject
from cspdeploy.core.bundle import file_sha256, read_manifest
from cspdeploy.core.errors import InputError
from cspdeploy.core.golden import read_golden
from cspdeploy.core.metrics import relative_l2
from cspdeploy.core.types import TensorInfo
from cspdeploy.edge import Predictor
from cspdeploy.export import adopt, simplify
from cspdeploy.pipeline.recipe import ExportRequest, export_bundle

RNG = np.random.default_rng(0)
W = RNG.normal(0, 0.3, size=(8, 3, 3, 3)).astype(np.float32)
M = RNG.normal(size=(8, 5)).astype(np.float32)
NODES = """c = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(data, w)  m = HardSwish(c)  g = GlobalAveragePool(m)
    f = Flatten(g)  scores = MatMul(f, m5)"""
HEAD = "(float[N, 3, h, v] data) => (float[N, 5] scores)"


def _save(
    path: Path, text: str = f"{HEAD} {{ {NODES} }}", *, opset: int = 18, domains: str = "", **options: Any
) -> Path:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}{domains}]> graph {text}')
    for name, array in {"w": W, "m5": M}.items():
        if any(name in node.input for node in model.graph.node):
            model.graph.initializer.append(numpy_helper.from_array(array, name))
    onnx.save(model, path, **options)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(6):
        Image.fromarray(RNG.integers(0, 256, (40, 30, 3), np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(autouse=True)
def without_simplifier(monkeypatch: pytest.MonkeyPatch) -> None:
    """The unsimplified graph is kept, in no time; one test runs onnxsim."""
    monkeypatch.setattr(simplify, "_CHILD", ["false"])


@pytest.fixture
def export(photos: Path, tmp_path: Path, references_here: None) -> Callable[..., Path]:
    def call(path: Path, **options: Any) -> Path:
        given = {"calibration": photos, "preprocess": "unit", "size_px": (16, 16), **options}
        return Path(export_bundle(ExportRequest(model=str(path), output=tmp_path / "out", **given)).folder)

    return call


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    """Shared and so read-only. With onnxsim, class names and FP16."""
    folder = tmp_path_factory.mktemp("foreign")
    (folder / "names.txt").write_text("".join(f"name {i}\n" for i in range(5)))
    request = ExportRequest(
        model=str(_save(folder / "theirs.onnx")), output=folder / "out", calibration=photos, preprocess="unit",
        size_px=(16, 16), names=folder / "names.txt", fp16=True,
    )  # fmt: skip
    return Path(export_bundle(request).folder)


# --- what is made of one ---


def test_bundle_tells_where_it_comes_from(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    source = bundle.parent.parent / "theirs.onnx"
    assert {path.name for path in bundle.iterdir()} == {
        "theirs.onnx", "theirs.fp16.onnx", "golden.npz", "labels.txt", "manifest.json",
    }  # fmt: skip
    assert (manifest.spec.name, manifest.spec.network.family, manifest.spec.task) == ("theirs", "onnx", "classify")
    assert (manifest.spec.provenance.source, manifest.spec.provenance.origin) == ("user", "theirs.onnx")
    assert manifest.spec.provenance.weights_sha256 == file_sha256(source)
    assert manifest.labels == tuple(f"name {i}" for i in range(5))
    assert manifest.options["preprocess"] == "unit"
    assert (manifest.options["model"], manifest.options["weights"], manifest.options["opset"]) == (str(source), "", 18)
    assert [step.name for step in manifest.artifacts[1].steps] == ["onnx", "simplify", "fp16"]
    for artifact in manifest.artifacts:
        assert artifact.inputs == (TensorInfo(name="data", dtype="float32", shape=(1, 3, 16, 16)),)
        assert artifact.outputs == (TensorInfo(name="scores", dtype="float32", shape=(1, 5)),)


def test_reference_is_the_file_itself_in_fp64(bundle: Path) -> None:
    golden = read_golden(bundle / "golden.npz")
    x = np.pad(golden.x_NCHW.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    patches = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(2, 3))[:, :, ::2, ::2]
    c = np.einsum("nchwij,ocij->nohw", patches, W.astype(np.float64))
    m = c * np.clip(c / 6 + 0.5, 0, 1)
    expected = m.mean(axis=(2, 3)) @ M.astype(np.float64)
    assert relative_l2(golden.outputs_fp64["scores"], expected) < 1e-6  # 1 / 6 is a float32 in the operator
    floor = relative_l2(golden.outputs_fp32["scores"], golden.outputs_fp64["scores"])
    assert 0 < floor < 1e-6


def test_every_rung_holds_and_the_first_is_the_original(bundle: Path) -> None:
    report = verify_bundles([bundle], VerifySettings(isolate=False, latency=None))
    rows = {(row.artifact, row.runtime): row.verdict for row in report.rows if row.runtime != "shared"}
    assert next(iter(rows)) == ("original", "ort-cpu")
    assert set(rows.values()) == {"pass"}, report.first_break
    assert {("onnx", "ort-cpu"), ("onnx-fp16", "ort-cpu"), ("onnx-fp16", "fp16-rounding")} <= set(rows)


def test_original_is_found_by_its_hash_alone(bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "out" / "theirs"))
    assert bundle_subject(folder).candidates[0].path == bundle.parent.parent / "theirs.onnx"
    data = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(data.replace(str(bundle.parent.parent / "theirs.onnx"), "/gone/theirs.onnx"))
    first = bundle_subject(folder).candidates[0]
    assert (first.artifact, first.absent) == ("original", "the ONNX file that the bundle was made from is not here")
    _save(tmp_path / "out" / "theirs.onnx", opset=17)  # of that name, but another file
    assert bundle_subject(folder).candidates[0].absent
    shutil.copy(bundle.parent.parent / "theirs.onnx", tmp_path / "out" / "theirs.onnx")
    found = bundle_subject(folder).candidates[0]
    assert (found.absent, found.path) == ("", tmp_path / "out" / "theirs.onnx")


def test_predictor_feeds_the_files_own_input(bundle: Path) -> None:
    golden = read_golden(bundle / "golden.npz")
    logits = Predictor.open(bundle).logits(*golden.images)
    assert relative_l2(logits, golden.outputs_fp64["scores"]) < 1e-5
    assert Predictor.open(bundle)(golden.images[0])[0].label.startswith("name ")


def test_same_file_gives_the_same_bytes(
    bundle: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # onnxsim runs, as it did for the bundle
    assert read_manifest(bundle).artifacts[0].steps[1].outcome == "done"
    source = bundle.parent.parent / "theirs.onnx"
    request = ExportRequest(
        model=str(source), output=tmp_path, fp16=True, calibration=photos, preprocess="unit", size_px=(16, 16),
        names=source.parent / "names.txt",
    )  # fmt: skip
    folder = Path(export_bundle(request).folder)
    for path in bundle.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes(), path.name


def test_free_batch_and_names_with_signs(export: Callable[..., Path], tmp_path: Path) -> None:
    model = onnx.load(_save(tmp_path / "their net, v2.onnx"))
    for node in model.graph.node:
        node.input[:] = ["a/b:0" if name == "data" else name for name in node.input]
        node.output[:] = ["p/q:1" if name == "scores" else name for name in node.output]
    model.graph.input[0].name, model.graph.output[0].name = "a/b:0", "p/q:1"
    onnx.save(model, tmp_path / "their net, v2.onnx")
    folder = export(tmp_path / "their net, v2.onnx", dynamic_batch=True, fp16=True)
    manifest = read_manifest(folder)
    assert (folder.name, manifest.spec.task, manifest.labels) == ("their-net--v2", "features", ("class 0",))
    assert {artifact.inputs[0].shape for artifact in manifest.artifacts} == {("N", 3, 16, 16)}
    assert verify_bundles([folder], VerifySettings(isolate=False, latency=None)).verdict == "pass"


def test_several_outputs_and_a_subgraph(export: Callable[..., Path], tmp_path: Path) -> None:
    text = f"""(float[1, 3, 16, 16] data) => (float[1, 8, 8, 8] c, float[1, 5] scores) <bool on = {{1}}> {{
        {
        NODES.replace(
            "m = HardSwish(c)",
            '''m = If(on) <then_branch = a () => (float[1, 8, 8, 8] t) { t = Relu(c) },
        else_branch = b () => (float[1, 8, 8, 8] e) { e = Neg(c) }>''',
        )
    } }}"""
    folder = export(_save(tmp_path / "branches.onnx", text), size_px=None, fp16=True)
    manifest = read_manifest(folder)
    assert manifest.spec.outputs == ("c", "scores")
    # The convolution feeds the branches and stays float32, and with it nearly all of the work.
    assert [artifact.kind for artifact in manifest.artifacts] == ["onnx"]
    assert "of its MACs are in FP16" in manifest.artifacts[0].steps[-1].detail
    report = verify_bundles([folder], VerifySettings(isolate=False, latency=None, runtimes=("ort-cpu",)))
    assert report.verdict == "pass", report.first_break


def test_weights_of_other_files_come_in(export: Callable[..., Path], tmp_path: Path) -> None:
    source = _save(tmp_path / "two.onnx", save_as_external_data=True, location="two.data", size_threshold=0)
    folder = export(source)
    assert (folder / "two.onnx").stat().st_size > source.stat().st_size
    assert bundle_subject(folder).candidates[0].path == source
    assert verify_bundles([folder], VerifySettings(isolate=False, latency=None)).verdict == "pass"


def test_fp16_that_cannot_be_is_told_and_left_out(export: Callable[..., Path], tmp_path: Path) -> None:
    loud = "k = Constant<value_float = 1e6>()  big = Mul(data, k)"
    text = f"{HEAD} {{ {loud} {NODES.replace('(data, w)', '(big, w)')} }}"
    folder = export(_save(tmp_path / "loud.onnx", text), fp16=True)
    manifest = read_manifest(folder)
    assert [artifact.kind for artifact in manifest.artifacts] == ["onnx"]
    step = manifest.artifacts[0].steps[-1]
    assert (step.name, step.outcome) == ("fp16", "kept")
    assert "no FP16 file" in step.detail


# --- what a target asks ---


def test_target_caps_opset_and_writes_older_operators(export: Callable[..., Path], tmp_path: Path) -> None:
    folder = export(_save(tmp_path / "theirs.onnx"), target="opencv-4", fp16=True)
    manifest = read_manifest(folder)
    assert (manifest.options["target"], manifest.options["opset"]) == ("opencv-4", 12)
    for artifact in manifest.artifacts:
        model = onnx.load(folder / artifact.file)
        assert model.opset_import[0].version == artifact.opset == 12
        assert "HardSwish" not in {node.op_type for node in model.graph.node}
    assert manifest.artifacts[0].steps[0].facts["decomposed"] == {"HardSwish": 1}
    assert verify_bundles([folder], VerifySettings(isolate=False, latency=None)).verdict == "pass"


def test_target_caps_the_ir_version(export: Callable[..., Path], tmp_path: Path) -> None:
    path = _save(tmp_path / "theirs.onnx")
    model = onnx.load(path)
    model.ir_version = 10
    onnx.save(model, path)
    folder = export(path, target="ort-web")
    assert onnx.load(folder / "theirs.onnx").ir_version == 9


def test_target_that_would_not_take_the_file(export: Callable[..., Path], tmp_path: Path) -> None:
    """Found when the files are written, and nothing is left of them."""
    path = _save(tmp_path / "theirs.onnx", f"{HEAD} {{ {NODES} }}".replace("HardSwish", "Softplus"))
    with pytest.raises(InputError, match=r"--target ort-mobile: would not take theirs\.onnx: Softplus"):
        export(path, target="ort-mobile")
    assert [item.name for item in (tmp_path / "out").iterdir() if item.suffix != ".lock"] == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"target": "nnapi", "dynamic_batch": True}, "--dynamic-batch: nnapi-via-ort takes fixed shapes alone"),
        ({"target": "opencv-4", "opset": 18}, "--opset 18: opencv-4 takes 1 to 12"),
        ({"target": "toaster"}, "target 'toaster': unknown"),
    ],
)
def test_options_that_the_target_does_not_take(
    export: Callable[..., Path], tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        export(_save(tmp_path / "theirs.onnx"), **options)
    assert caught.value.fix


def test_network_of_ours_for_a_target(tiny_models: Path, tmp_path: Path) -> None:
    request = ExportRequest(model="tiny", models=tiny_models, output=tmp_path, target="opencv-4", fp16=True)
    folder = Path(export_bundle(request).folder)
    manifest = read_manifest(folder)
    assert {artifact.opset for artifact in manifest.artifacts} == {None, 12}
    assert [step.name for step in manifest.artifacts[1].steps][:2] == ["onnx", "decompose"]
    assert verify_bundles([folder], VerifySettings(isolate=False, latency=None)).verdict == "pass"


# --- what is refused ---


def _with(change: str, to: str) -> str:
    text = f"{HEAD} {{ {NODES} }}"
    assert change in text
    return text.replace(change, to)


@pytest.mark.parametrize(
    ("text", "options", "reason"),
    [
        (_with("", ""), {"preprocess": None}, "how its images are prepared is never guessed"),
        (_with("", ""), {"preprocess": "imagnet"}, "--preprocess imagnet: neither a file nor one of"),
        (_with("", ""), {"size_px": None}, "the input's height and width are free, expected a size"),
        (_with("", ""), {"calibration": None}, "no real images"),
        (_with("3, h, v", "3, 8, 8"), {}, "--size 16x16: input 'data' float32 .* has its size built in"),
        (_with("float[N, 3, h, v]", "float[2, 3, h, v]"), {}, "takes 2 images a call, expected 1 or any number"),
        (_with("float[N, 3, h, v]", "float[1, 3, h, v]"), {"dynamic_batch": True}, "has a batch of 1 built in"),
        (_with("float[N, 3, h, v]", "float[N, 1, h, v]"), {}, "expected float32"),
        (_with("data) =>", "data, float[1] b) =>"), {}, "has 2 inputs"),
        ("() => (float[1, 5] scores) { scores = Constant<value_float = 1>() }", {}, "has 0 inputs"),
        (_with("float[N, 5] scores", "int64[N] scores").replace("MatMul(f, m5)", "ArgMax<axis = 1, keepdims = 0>(f)"),
         {}, "outputs that are not float32: 'scores' int64"),
        (_with("scores = MatMul(f, m5)", "s = MatMul(f, m5)  scores = Squeeze(s)"), {}, "'scores' is float32 .5. for"),
        (_with("HardSwish(c)", "mine.Twist(c)"), {}, "Twist"),
        (_with("", ""), {"opset": 7}, "--opset 7: expected 13 to 20"),
        (_with("", ""), {"weights": "x.pth"}, "--weights: is of networks that are built here"),
        (_with("", ""), {"features": True}, "--features: is of networks that are built here"),
    ],
)  # fmt: skip
def test_file_or_option_that_is_refused(
    export: Callable[..., Path], tmp_path: Path, text: str, options: dict[str, Any], reason: str
) -> None:
    path = _save(tmp_path / "theirs.onnx", text, domains=', "mine": 1' if "mine" in text else "")
    with pytest.raises(InputError, match=reason) as caught:
        export(path, **options)
    assert "\n" not in caught.value.message
    assert caught.value.fix
    assert not (tmp_path / "out" / "theirs").exists()


def test_opset_beyond_our_range_can_be_converted(export: Callable[..., Path], tmp_path: Path) -> None:
    path = _save(tmp_path / "theirs.onnx", opset=21)
    with pytest.raises(InputError, match="opset 21, expected at most 20") as caught:
        export(path)
    assert caught.value.fix == "--opset 20"
    assert read_manifest(export(path, opset=20)).options["opset"] == 20


def test_names_that_do_not_fit(export: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("a\nb\n")
    with pytest.raises(InputError, match="got 2 labels, expected 5"):
        export(_save(tmp_path / "theirs.onnx"), names=tmp_path / "names.txt")
    maps = _save(tmp_path / "maps.onnx", "(float[1, 3, h, v] data) => (float[1, 8, a, b] c) { c = Conv(data, w) }")
    with pytest.raises(InputError, match="are not one list of class scores"):
        export(maps, names=tmp_path / "names.txt")


def test_file_that_is_fp16_already(export: Callable[..., Path], bundle: Path, tmp_path: Path) -> None:
    half = shutil.copy(bundle / "theirs.fp16.onnx", tmp_path / "half.onnx")
    with pytest.raises(InputError, match="computes in FP16, expected float32 to begin with"):
        export(Path(half), size_px=None)


@pytest.mark.parametrize(("name", "stem"), [("net.int8.onnx", "net"), ("net-FP32.onnx", "net"), ("int8.onnx", "int8")])
def test_precision_in_the_name_is_that_of_each_artifact(
    export: Callable[..., Path], tmp_path: Path, name: str, stem: str
) -> None:
    folder = export(_save(tmp_path / name))
    assert {path.name for path in folder.glob("*.onnx")} == {f"{stem}.onnx"}


def test_newer_ir_than_can_be_read(export: Callable[..., Path], tmp_path: Path) -> None:
    path = _save(tmp_path / "theirs.onnx")
    model = onnx.load(path)
    model.ir_version = onnx.IR_VERSION + 1
    path.write_bytes(model.SerializeToString())
    with pytest.raises(
        InputError, match=f"IR version {onnx.IR_VERSION + 1}, this onnx reads {onnx.IR_VERSION} at most"
    ):
        export(path)


def test_weights_that_are_not_finite(export: Callable[..., Path], tmp_path: Path) -> None:
    path = _save(tmp_path / "theirs.onnx")
    model = onnx.load(path)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.full_like(W, np.nan), "w"))
    onnx.save(model, path)
    with pytest.raises(InputError, match="output 'scores' is NaN or infinite on an empty picture"):
        export(path)


@pytest.mark.parametrize("fault", ["truncated", "cyclic", "missing", "weights missing"])
def test_broken_file(export: Callable[..., Path], tmp_path: Path, fault: str) -> None:
    outside = {"save_as_external_data": True, "location": "theirs.data", "size_threshold": 0}
    path = _save(tmp_path / "theirs.onnx", **(outside if fault == "weights missing" else {}))
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif fault == "cyclic":
        model = onnx.load(path)
        model.graph.node[0].input[0] = "f"
        path.write_bytes(model.SerializeToString())
    elif fault == "weights missing":
        (tmp_path / "theirs.data").unlink()
    else:
        path.unlink()
    with pytest.raises(InputError) as caught:
        export(path)
    assert "theirs" in caught.value.message
    assert "\n" not in caught.value.message


def test_copy_that_computes_something_else_is_not_taken(
    export: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a converter would that gets an operator wrong."""
    convert = adopt._convert

    def spoil(model: onnx.ModelProto, source: Path, opset: int) -> onnx.ModelProto:
        model = convert(model, source, opset)
        tensor = next(item for item in model.graph.initializer if item.name == "w")
        tensor.CopyFrom(numpy_helper.from_array(W * np.float32(1.001), "w"))
        return model

    monkeypatch.setattr(adopt, "_convert", spoil)
    with pytest.raises(InputError, match=r"output 'scores' of its copy .* is another one: relative L2"):
        export(_save(tmp_path / "theirs.onnx"), opset=17)


def test_contract_is_of_onnx_files_alone(tiny_models: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--preprocess unit: is for ONNX files; 'tiny' has its own contract"):
        ExportRequest(model="tiny", models=tiny_models, output=tmp_path, preprocess="unit")
