"""An ONNX file by itself: which inputs it gets, what judges it, and what is refused in one line."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from cspdeploy.check.ladder import VerifySettings, verify_subjects
from cspdeploy.check.loose_file import file_subject
from cspdeploy.check.reference import reference_of
from cspdeploy.core.errors import InputError
from cspdeploy.core.metrics import relative_l2

RNG = np.random.default_rng(0)
W = RNG.normal(size=(4, 3, 3, 3)).astype(np.float32)
IMAGE = "(float[1, 3, 8, 8] image) => (float[1, 4, 6, 6] y) { c = Conv(image, w)  y = Relu(c) }"


def _save(path: Path, text: str, *, opset: int = 18, domains: str = "", **weights: object) -> Path:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}{domains}]> graph {text}')
    for name, array in {"w": W, **weights}.items():
        if any(name in node.input for node in model.graph.node):
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    onnx.save(model, path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(RNG.integers(0, 256, (20, 30, 3), np.uint8)).save(folder / f"{i}.png")
    return folder


# --- what judges it ---


def test_file_is_judged_by_itself_in_fp64(tmp_path: Path) -> None:
    path = _save(tmp_path / "net.onnx", IMAGE)
    subject = file_subject(path)
    assert subject.notes == ("reference: net.onnx in FP64",)
    assert (subject.synthetic, subject.one_call, subject.task, subject.labels) == (True, True, "features", ())
    ((candidate),) = subject.candidates
    assert (candidate.artifact, candidate.format, candidate.precision) == ("net.onnx", "onnx", "fp32")
    assert candidate.num_bytes == path.stat().st_size
    x = subject.feeds["image"]
    assert (x.dtype, x.shape) == (np.float32, (1, 3, 8, 8))
    patches = np.lib.stride_tricks.sliding_window_view(x.astype(np.float64), (3, 3), axis=(2, 3))
    expected = np.maximum(np.einsum("nchwij,ocij->nohw", patches, W.astype(np.float64)), 0)
    assert relative_l2(subject.outputs_fp64["y"], expected) < 1e-12
    assert 2.0**-24 < subject.floors["y"] < 1e-5


def test_only_latency_needs_no_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cspdeploy.check.loose_file.reference_of", None)
    subject = file_subject(_save(tmp_path / "net.onnx", IMAGE), reference=False)
    assert (dict(subject.outputs_fp64), dict(subject.floors)) == ({}, {})
    assert subject.feeds["image"].shape == (1, 3, 8, 8)


@pytest.mark.usefixtures("references_here")
def test_against_another_file(tmp_path: Path) -> None:
    path, other = _save(tmp_path / "net.onnx", IMAGE), _save(tmp_path / "other.onnx", IMAGE, w=2 * W)
    subject = file_subject(path, against=other)
    assert [item.artifact for item in subject.candidates] == ["other.onnx", "net.onnx"]
    assert subject.notes == ("reference: other.onnx in FP64",)
    assert relative_l2(subject.outputs_fp64["y"], 2 * file_subject(path).outputs_fp64["y"]) < 1e-12


@pytest.mark.usefixtures("references_here")
def test_inputs_may_be_called_otherwise_but_not_be_others(tmp_path: Path) -> None:
    path = _save(tmp_path / "net.onnx", IMAGE)
    renamed = _save(tmp_path / "renamed.onnx", IMAGE.replace("image", "picture"))
    subject = file_subject(renamed, against=path)
    assert list(subject.candidates[1].named(subject.feeds)) == ["picture"]
    larger = _save(tmp_path / "larger.onnx", IMAGE.replace("8, 8", "9, 9").replace("6, 6", "7, 7"))
    with pytest.raises(InputError, match=r"its inputs are 'image' float32 \[1, 3, 9, 9\], those of .*net.onnx are"):
        file_subject(larger, against=path)
    other = _save(tmp_path / "outputs.onnx", IMAGE.replace("y", "z"))
    with pytest.raises(InputError, match=r"its outputs are z, those of .* are y"):
        file_subject(other, against=path)


@pytest.mark.usefixtures("references_here")
def test_without_torch_and_onnx_the_file_itself_is_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = file_subject(_save(tmp_path / "net.onnx", IMAGE))
    find = importlib.util.find_spec

    def find_others(name: str, package: str | None = None) -> importlib.machinery.ModuleSpec | None:
        return None if name in ("torch", "onnx") else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_others)
    subject = file_subject(tmp_path / "net.onnx")
    assert "as it is, not optimised; no FP64 here" in subject.warnings[0]
    assert relative_l2(subject.outputs_fp64["y"], exact.outputs_fp64["y"]) < 1e-6
    assert 2.0**-24 < subject.floors["y"] < 1e-5


@pytest.mark.usefixtures("references_here")
def test_operator_that_the_reference_does_not_know(tmp_path: Path) -> None:
    text = "(float[1, 8] x) => (float[1, 8] y) { y = com.microsoft.BiasGelu(x, b) }"
    path = _save(tmp_path / "net.onnx", text, domains=', "com.microsoft": 1', b=np.ones(8, np.float32))
    subject = file_subject(path)
    assert "as it is, not optimised; no FP64 here: " in subject.warnings[0]
    with pytest.raises(InputError, match="no reference outputs in FP64") as caught:
        reference_of(subject, need_fp64=True)
    assert caught.value.fix == f"verify it by itself: cspdeploy verify {path}"


def test_file_of_a_bundle_is_judged_as_such(tiny_bundle: Path, tmp_path: Path) -> None:
    subject = file_subject(tiny_bundle / "tiny.fp16.onnx")
    assert [item.artifact for item in subject.candidates] == ["onnx-fp16"]
    assert not subject.synthetic
    assert subject.golden is not None
    assert subject.notes[0].startswith("judged by the golden outputs of its bundle")
    copy = Path(shutil.copy(tiny_bundle / "tiny.onnx", tmp_path / "tiny.onnx"))
    (tmp_path / "manifest.json").write_text("{}")
    assert "the manifest.json beside it is no bundle's" in file_subject(copy, reference=False).notes[0]


# --- what it gets ---


def test_inputs_of_many_kinds(tmp_path: Path) -> None:
    text = """(float[batch, 4] a, float16[2, 2] b, int64[3] i, bool[2] m, uint8[1, 3, 4, 4] u, double d)
        => (float[batch, 4] y) { y = Relu(a) }"""
    feeds = file_subject(_save(tmp_path / "net.onnx", text), reference=False).feeds
    kinds = {name: (array.dtype.name, array.shape) for name, array in feeds.items()}
    assert kinds == {
        "a": ("float32", (1, 4)), "b": ("float16", (2, 2)), "i": ("int64", (3,)), "m": ("bool", (2,)),
        "u": ("uint8", (1, 3, 4, 4)), "d": ("float64", ()),
    }  # fmt: skip
    assert feeds["i"].max() < 4 <= feeds["u"].max()  # type: ignore[operator]
    again = file_subject(tmp_path / "net.onnx", reference=False).feeds
    assert all(np.array_equal(array, again[name]) for name, array in feeds.items())


@pytest.mark.usefixtures("references_here")
def test_real_images(tmp_path: Path, photos: Path) -> None:
    text = "(float[N, 3, 8, 8] image) => (float[N, 4, 1, 1] y) { c = Conv(image, w)  y = GlobalAveragePool(c) }"
    subject = file_subject(_save(tmp_path / "net.onnx", text), images=photos, contract="unit")
    x = subject.feeds["image"]
    assert (x.shape, subject.synthetic, subject.one_call) == ((3, 3, 8, 8), False, False)
    assert 0 <= x.min() < x.max() <= 1  # type: ignore[operator]
    assert subject.candidates[0].batch == 1
    assert subject.outputs_fp64["y"].shape == (3, 4, 1, 1)


@pytest.mark.usefixtures("references_here")
def test_thousand_scores_are_classes(tmp_path: Path, photos: Path) -> None:
    text = "(float[1, 3, 4, 4] x) => (float[1, 1000] y) { f = Flatten(x)  y = MatMul(f, m) }"
    path = _save(tmp_path / "net.onnx", text, m=RNG.normal(size=(48, 1000)).astype(np.float32))
    subject = file_subject(path, images=photos, contract="imagenet")
    assert (subject.task, len(subject.labels)) == ("classify", 1000)
    assert file_subject(path).task == "features"  # of random numbers no decision means anything


def test_a_negative_dimension_is_a_free_one(tmp_path: Path) -> None:
    path = _save(tmp_path / "net.onnx", "(float[N, 3] x) => (float[N, 3] y) { y = Relu(x) }")
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    onnx.save(model, path)
    assert file_subject(path, reference=False).feeds["x"].shape == (1, 3)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = -1
    onnx.save(model, path)
    with pytest.raises(InputError, match="leaves -1 free"):
        file_subject(path, reference=False)


# --- what is refused ---


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("() => (float[2] y) { y = Constant<value = float[2] {1, 2}>() }", "has no inputs"),
        ("(float[N, 3, h, v] x) => (float[N, 3, h, v] y) { y = Relu(x) }", "leaves h, v free"),
        ("(string[2] x) => (string[2] y) { y = Identity(x) }", "takes no numbers"),
        ("(float[70000, 70000] x) => (float[70000, 70000] y) { y = Relu(x) }", "is larger than 1 GiB"),
        ("(float[2] x) => (float[2] y) { y = Log(x) }", "output 'y' is NaN or infinite by itself"),
        ("(float[2] x) => (seq(float[2]) y) { y = SequenceConstruct(x) }", "output 'y' is no array of numbers"),
        ("(float[2, 0] x) => (float[2, 0] y) { y = Relu(x) }", "is empty"),
        ("(float[2] x) => (float[2] y) { y = mine.Twist(x) }", "Twist"),
    ],
)  # fmt: skip
def test_file_that_cannot_be_judged(tmp_path: Path, text: str, reason: str) -> None:
    path = _save(tmp_path / "net.onnx", text, domains=', "mine": 1' if "mine" in text else "")
    with pytest.raises(InputError, match=reason) as caught:
        file_subject(path)
    assert "\n" not in caught.value.message
    assert str(path) in caught.value.message
    assert caught.value.fix


def test_images_need_a_contract_and_a_contract_needs_images(tmp_path: Path, photos: Path) -> None:
    path = _save(tmp_path / "net.onnx", IMAGE)
    with pytest.raises(InputError, match="never guessed") as caught:
        file_subject(path, images=photos)
    assert "imagenet" in caught.value.fix
    with pytest.raises(InputError, match="--preprocess unit"):
        file_subject(path, contract="unit")


@pytest.mark.usefixtures("references_here")
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("(float[1, 4] x) => (float[1, 4] y) { y = Relu(x) }", r"input 'x' float32 \[1, 4\], expected float32 \["),
        ("(float[1, 3, 4, 4] a, float[1] b) => (float[1, 3, 4, 4] y) { y = Add(a, b) }", "has 2 inputs"),
        ("(float[1, 3, 4, 4] x) => (float[48] y) { y = Reshape(x, s) }", r"output 'y' is \[48\] for 1 images"),
    ],
)  # fmt: skip
def test_no_network_of_one_image(tmp_path: Path, photos: Path, text: str, reason: str) -> None:
    path = _save(tmp_path / "net.onnx", text, s=np.array([48]))
    with pytest.raises(InputError, match=reason):
        file_subject(path, images=photos, contract="unit")


@pytest.mark.usefixtures("references_here")
def test_broken_file_is_told_how_to_find_the_node(tiny_bundle: Path, tmp_path: Path) -> None:
    plain, broken = tiny_bundle / "tiny.onnx", tmp_path / "broken.onnx"
    model = onnx.load(plain)
    slope = next(item for node in model.graph.node for item in node.attribute if item.name == "alpha")
    slope.f = 0.5
    onnx.save(model, broken)
    settings = VerifySettings(runtimes=("ort-cpu",), latency=None, isolate=False)
    report = verify_subjects([file_subject(broken, against=plain)], settings)
    assert report.verdict == "fail"
    assert report.settings["next_step"] == f"cspdeploy blame {broken} --against {plain} --runtime ort-cpu"
