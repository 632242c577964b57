"""`export --int8` on the command line: what it prints, what it answers, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from cspdeploy.core.bundle import check_hashes, read_manifest
from cspdeploy.core.catalog import INT8_MAX_IMAGES, INT8_TIME_LIMIT_S
from cspdeploy.quant import int8 as quantiser

Run = Callable[..., CompletedProcess[str]]
Refuse = Callable[..., str]

pytestmark = pytest.mark.usefixtures("without_simplifier")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "exported"


@pytest.fixture
def export(photo_models: Path, output: Path) -> list[object]:
    """The words of an INT8 export that works."""
    return ["export", "tiny", "--models", photo_models, "-o", output, "--no-verify", "--int8"]


def _left_in(output: Path) -> list[str]:
    return sorted(path.name for path in output.iterdir() if path.suffix != ".lock") if output.is_dir() else []


# --- exports that work ---


@pytest.mark.usefixtures("int8_is_faster")
def test_summary_says_what_was_chosen_and_why(run: Run, export: list[object], output: Path) -> None:
    done = run(*export, "--calib-images", 48)
    assert done.returncode == 0, done.stderr
    step = read_manifest(output / "tiny").artifacts[-1].steps[-1]
    assert (step.name, step.outcome) == ("int8", "done")
    printed = " ".join(done.stdout.split())
    assert "tiny.int8.onnx" in printed
    assert f"int8: {' '.join(step.detail.split())}" in printed
    assert "dB" in step.detail
    assert "warning: no INT8 file" not in done.stderr


@pytest.mark.usefixtures("int8_is_slower")
def test_file_that_is_slower_than_fp32_is_refused_in_one_line(run: Run, export: list[object], output: Path) -> None:
    """And the command succeeds: nothing is wrong with the bundle."""
    done = run(*export, "--calibration", "minmax", "--int8-time-limit", 0.01)
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert len(told) == 1
    assert told[0].startswith("warning: no INT8 file")
    assert "slower than FP32 on ort-cpu" in told[0]
    assert not list((output / "tiny").glob("*int8*"))


@pytest.mark.usefixtures("int8_is_slower")
def test_required_int8_that_is_refused_fails_and_leaves_a_whole_bundle(
    run: Run, export: list[object], output: Path
) -> None:
    done = run(*export, "--calibration", "minmax", "--int8-time-limit", 0.01, "--require-int8", "--json")
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert lines[-2].startswith("error: --require-int8: no INT8 file")
    assert lines[-1].startswith("fix: ")
    assert json.loads(done.stdout)["folder"] == str(output / "tiny")
    check_hashes(output / "tiny", read_manifest(output / "tiny"))


@pytest.mark.usefixtures("sessions_here")
@pytest.mark.slow
@pytest.mark.usefixtures("quick_latency")
@pytest.mark.parametrize(("mode", "kind"), [("dynamic", "onnx-int8"), ("weights", "onnx-int8-weights")])
def test_other_modes_are_judged_by_the_same_ladder(
    run: Run, export: list[object], output: Path, mode: str, kind: str
) -> None:
    """A file that is slower than FP32 is refused; either way the bundle holds and the reason is told."""
    done = run(*export, "--int8-mode", mode, "--verify")
    assert done.returncode == 0, done.stdout + done.stderr
    kinds = [artifact.kind for artifact in read_manifest(output / "tiny").artifacts]
    assert kind in kinds or "warning: no INT8 file" in done.stderr


# --- options ---


@pytest.mark.parametrize(
    "option",
    [
        ("--int8-mode", "static"), ("--calibration", "mse"), ("--calib-images", 9), ("--effort", "high"),
        ("--power-of-two",), ("--max-drop", "36dB"), ("--max-latency", "0.5x"), ("--labelled", "fashion-mnist"),
        ("--int8-time-limit", 9), ("--require-int8",),
    ],
    ids=lambda option: option[0],
)  # fmt: skip
def test_option_of_int8_without_int8(
    refuse: Refuse, photo_models: Path, output: Path, option: tuple[object, ...]
) -> None:
    lines = refuse("export", "tiny", "--models", photo_models, "-o", output, *option)
    assert f"error: {option[0]}: is of the INT8 file, and none is asked for" in lines
    assert "fix: add --int8" in lines
    assert not output.exists()


@pytest.mark.parametrize(
    ("options", "subject"),
    [
        (("--max-drop", "0.1"), "--max-drop 0.1: points of top-1 need labelled images"),
        (("--max-drop=-3dB",), "--max-drop '-3dB': expected points"),
        (("--max-latency", "soon"), "--max-latency 'soon': expected milliseconds"),
        (("--labelled", "nowhere"), "nowhere: not a folder"),
        (("--labelled", "fashion-mnist"), "its classes (T-shirt/top, "),
        (("--calib-images", 0), "--calib-images 0: expected 1 or more"),
        (("--int8-time-limit", "inf"), "--int8-time-limit inf: expected"),
        (("--int8-mode", "dynamic", "--calibration", "mse"), "--calibration mse: is of static ranges"),
        (("--int8-mode", "fast"), "--int8-mode"),
        (("--calibration", "mean"), "--calibration"),
    ],
)
def test_bad_option_value(
    refuse: Refuse, export: list[object], output: Path, options: tuple[object, ...], subject: str
) -> None:
    assert subject in refuse(*export, *options)
    assert _left_in(output) == []


def test_help_has_the_defaults_of_the_recipe(run: Run) -> None:
    printed = " ".join(run("export", "--help").stdout.split())
    assert f"[default: {INT8_MAX_IMAGES}]" in printed
    assert f"[default: {INT8_TIME_LIMIT_S:g}]" in printed
    assert printed.index("Options of the INT8 file:") > printed.index("--help")


# --- images ---


def _fill(folder: Path, kind: str, photos: np.ndarray) -> None:
    folder.mkdir()
    if kind == "random":
        pictures = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)
    else:
        pictures = np.zeros((40, 32, 32), np.uint8) if kind == "black" else photos[:40]
    for i, picture in enumerate(pictures if kind != "empty" else ()):
        Image.fromarray(picture).save(folder / f"{i}.png")
    if kind == "corrupt":
        (folder / "7.png").write_bytes(b"no image")


@pytest.mark.parametrize(
    ("kind", "subject"),
    [("empty", "holds no image"), ("black", "calib"), ("random", "random data is refused"), ("corrupt", "7.png")],
)
def test_calibration_images_that_will_not_do(
    refuse: Refuse, export: list[object], output: Path, tmp_path: Path, photos: np.ndarray, kind: str, subject: str
) -> None:
    _fill(tmp_path / "calib", kind, photos)
    lines = refuse(*export, "--calib", tmp_path / "calib")
    assert subject in lines
    assert str(tmp_path / "calib") in lines
    assert _left_in(output) == []


def test_random_images_of_a_model_folder_are_refused(refuse: Refuse, tiny_models: Path, output: Path) -> None:
    lines = refuse("export", "tiny", "--models", tiny_models, "-o", output, "--int8", "--no-verify")
    assert "random data is refused" in lines
    assert "--calib DIR" in lines
    assert _left_in(output) == []


@pytest.mark.usefixtures("int8_is_faster")
def test_few_images_are_warned_of(run: Run, export: list[object], photos: np.ndarray, tmp_path: Path) -> None:
    _fill(tmp_path / "calib", "few", photos[:9])
    done = run(*export, "--calib", tmp_path / "calib", "--calibration", "minmax")
    assert done.returncode == 0, done.stderr
    assert "9 images" in done.stdout


# --- files from elsewhere ---


def _network(path: Path, *, opset: int = 18, operator: str = "Conv") -> Path:
    """`data` [N, 3, 16, 16] -> two convolutions -> `scores` [N, 5]; or none, with another operator."""
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.normal(0, 0.3, (8, 3, 3, 3)), "v": rng.normal(0, 0.2, (24, 8, 3, 3)), "m": rng.normal(0, 1, (24, 5)),
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["data", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Conv", ["r", "v"], ["d"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["d"], ["s"]),
        helper.make_node("GlobalAveragePool", ["s"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("MatMul", ["f", "m"], ["scores"]),
    ]
    if operator != "Conv":
        nodes = [
            helper.make_node("GlobalAveragePool", ["data"], ["p"]), helper.make_node(operator, ["p"], ["scores4"]),
            helper.make_node("Flatten", ["scores4"], ["scores"]),
        ]  # fmt: skip
    width = 5 if operator == "Conv" else 3
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("data", TensorProto.FLOAT, ["N", 3, 16, 16])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", width])],
        [numpy_helper.from_array(w.astype(np.float32), name) for name, w in weights.items() if name in used],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)
    return path


@pytest.fixture
def calib(tmp_path: Path, photos: np.ndarray) -> Path:
    _fill(tmp_path / "calib", "good", photos)
    return tmp_path / "calib"


@pytest.mark.usefixtures("references_here")
@pytest.mark.usefixtures("int8_is_faster")
def test_onnx_file_from_elsewhere(run: Run, tmp_path: Path, output: Path, calib: Path) -> None:
    """Opset 11 has no scales by channel: the INT8 file's is raised, the others' is not."""
    path = _network(tmp_path / "net.onnx", opset=11)
    done = run("export", path, "--int8", "--calib", calib, "--preprocess", "unit", "-o", output, "--no-verify")
    assert done.returncode == 0, done.stderr
    made = {artifact.kind: artifact for artifact in read_manifest(output / "net").artifacts}
    assert made["onnx-int8"].opset is not None
    assert made["onnx-int8"].opset >= 13
    assert made["onnx"].opset == 11
    onnx.checker.check_model(output / "net" / "net.int8.onnx", full_check=True)


@pytest.mark.usefixtures("references_here")
def test_graph_without_convolution(refuse: Refuse, tmp_path: Path, output: Path, calib: Path) -> None:
    path = _network(tmp_path / "net.onnx", operator="Relu")
    lines = refuse("export", path, "--int8", "--calib", calib, "--preprocess", "unit", "-o", output, "--no-verify")
    assert "convolution" in lines
    assert _left_in(output) == []


@pytest.mark.usefixtures("references_here")
def test_file_that_is_quantised_already(refuse: Refuse, tiny_int8_bundle: Path, output: Path, calib: Path) -> None:
    path = tiny_int8_bundle / "tiny.int8.onnx"
    lines = refuse("export", path, "--int8", "--calib", calib, "--preprocess", "unit", "-o", output, "--no-verify")
    assert "computes in INT8, expected float32 to begin with" in lines
    assert _left_in(output) == []


# --- interruption ---


def test_ctrl_c_outside_of_a_search_keeps_the_old_bundle(
    run: Run, export: list[object], bundle: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    monkeypatch.setattr(quantiser, "quantise", stop)
    done = run(*export)
    assert done.returncode == 130
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before
    assert _left_in(output) == ["tiny"]
