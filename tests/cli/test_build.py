from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from PIL import Image

import cspdeploy
from cspdeploy.cli.build import parse_size, parse_sizes
from cspdeploy.cli.decode_options import suppression_request
from cspdeploy.core.bundle import check_hashes, read_manifest
from cspdeploy.core.detection.spec import SuppressionOptions
from cspdeploy.core.errors import InputError

Run = Callable[..., CompletedProcess[str]]
Refuse = Callable[..., str]
ROOT = Path(cspdeploy.__file__).parents[1]


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _left_in(output: Path) -> list[str]:
    """All that lies there; a lock file that nobody holds is harmless."""
    return sorted(path.name for path in output.iterdir() if path.suffix != ".lock") if output.is_dir() else []


# --- exports that work ---


@pytest.mark.usefixtures("quick_latency")
def test_export_is_verified_by_default(run: Run, tiny_models: Path, output: Path) -> None:
    done = run("export", "tiny", "--models", tiny_models, "-o", output, "--fp16")
    assert done.returncode == 0, done.stdout
    assert "tiny.fp16.onnx" in done.stdout
    assert "PASS: " in done.stdout
    assert "export: ONNX" in done.stderr
    assert _left_in(output) == ["tiny"]


@pytest.mark.usefixtures("quick_latency", "without_simplifier", "sessions_here")
def test_failing_artifact_makes_the_command_fail(
    run: Run, tiny_models: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And leaves the bundle, so that one can look at it."""
    monkeypatch.setattr("cspdeploy.core.tolerance.FP32_NOISE_FACTOR", 1e-6)
    done = run("export", "tiny", "--models", tiny_models, "-o", output, "--json")
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert report["verdict"] == "fail"
    assert report["first_break"]
    check_hashes(output / "tiny", read_manifest(output / "tiny"))


@pytest.mark.usefixtures("without_simplifier", "sessions_here")
def test_untrained_is_said_everywhere(run: Run, export: list[object], output: Path, tmp_path: Path) -> None:
    done = run(*export, "--weights", "random")
    assert done.returncode == 0
    assert "UNTRAINED" in done.stdout
    Image.new("RGB", (40, 40)).save(tmp_path / "photo.png")
    assert "UNTRAINED" in run("predict", output / "tiny", tmp_path / "photo.png").stdout
    report = json.loads(run("predict", output / "tiny", tmp_path / "photo.png", "--json").stdout)
    assert report["untrained"] is True
    verified = run("verify", output / "tiny", "--no-latency", "--json")
    assert json.loads(verified.stdout)["untrained"] == [str(output / "tiny")]
    assert "UNTRAINED" in run("verify", output / "tiny", "--no-latency", "-r", "ort-cpu").stdout


@pytest.mark.usefixtures("without_simplifier")
def test_json_without_verification_is_the_manifest(run: Run, export: list[object], output: Path) -> None:
    report = json.loads(run(*export, "--json", "--opset", 13, "--size", "48x40,32").stdout)
    assert report["folder"] == str(output / "tiny")
    assert report["manifest"] == json.loads((output / "tiny" / "manifest.json").read_text())
    options = report["manifest"]["options"]
    assert (options["opset"], options["size_px"], options["further_sizes_px"]) == (13, [48, 40], [[32, 32]])
    assert [made["kind"] for made in report["manifest"]["artifacts"]] == ["torchscript", "onnx", "onnx@32x32"]


# --- options ---


@pytest.mark.parametrize(
    ("text", "size"), [(None, None), ("256", (256, 256)), ("256x192", (256, 192)), ("16X4096", (16, 4096))]
)
def test_size(text: str | None, size: tuple[int, int] | None) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["banana", "", "x", "32x", "x32", "1x2x3", "-32", "32.5", "15", "4097", "32x0", "1e3"])
def test_size_that_is_none(text: str) -> None:
    with pytest.raises(InputError, match=f"--size {text}: expected") as caught:
        parse_size(text)
    assert caught.value.fix == "--size 256"


@pytest.mark.parametrize(
    ("text", "sizes"), [(None, ()), ("256", ((256, 256),)), ("224, 256,320x256", ((224, 224), (256, 256), (320, 256)))]
)
def test_sizes(text: str | None, sizes: tuple[tuple[int, int], ...]) -> None:
    assert parse_sizes(text) == sizes


@pytest.mark.parametrize("text", ["224,", ",224", "224,,256", "224,banana", "224;256", "224,8"])
def test_sizes_of_which_one_is_none(text: str) -> None:
    with pytest.raises(InputError, match=r"^--size .*: expected"):
        parse_sizes(text)


def test_a_size_twice(refuse: Refuse, export: list[object], output: Path) -> None:
    lines = refuse(*export, "--size", "48,32,48x48")
    assert "--size 48,32,48x48: 48x48 is there twice" in lines
    assert "--size 48x48,32x32" in lines
    assert not output.exists()


@pytest.mark.parametrize(
    ("options", "subject"),
    [
        (("--opset", 99), "--opset 99: expected 13 to 20"),
        (("--opset", 12), "--opset 12: expected 13 to 20"),
        (("--size", "banana"), "--size banana: expected"),
        (("--size", 8), "--size 8: expected 16 to 4096"),
        (("--calib", "nowhere"), "nowhere: not a folder"),
        (("--weights", "nowhere.safetensors"), "nowhere.safetensors: not found"),
    ],
)
def test_bad_option_value(
    refuse: Refuse, export: list[object], output: Path, options: tuple[object, ...], subject: str
) -> None:
    assert subject in refuse(*export, *options)
    assert not output.exists()


def test_unknown_model_suggests_the_nearest(refuse: Refuse, tiny_models: Path, output: Path) -> None:
    lines = refuse("export", "cspdarknet35", "--models", tiny_models, "-o", output)
    assert "error: model 'cspdarknet35': unknown" in lines
    assert "did you mean 'cspdarknet53'?" in lines
    assert not output.exists()


# --- places ---


def test_output_that_is_a_file(refuse: Refuse, export: list[object], output: Path) -> None:
    output.write_text("mine")
    lines = refuse(*export)
    assert str(output) in lines
    assert "-o" in lines
    assert output.read_text() == "mine"


def test_output_below_a_file(refuse: Refuse, export: list[object], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert "cannot be written" in refuse(*export, "-o", tmp_path / "file" / "deep" / "exported")
    assert (tmp_path / "file").read_text() == "mine"


def test_output_where_nobody_may_write(refuse: Refuse, export: list[object]) -> None:
    """Permission bits do not stop root; the kernel's own file system stops everybody."""
    assert "cannot be written" in refuse(*export, "-o", "/proc/exported")


def test_output_that_holds_something_else(refuse: Refuse, export: list[object], output: Path) -> None:
    (output / "tiny").mkdir(parents=True)
    (output / "tiny" / "thesis.txt").write_text("precious")
    assert "exists and is not a bundle" in refuse(*export)
    assert _contents(output / "tiny") == {"thesis.txt": b"precious"}
    assert _left_in(output) == ["tiny"]


@contextmanager
def _files_of_at_most(num_bytes: int) -> Iterator[None]:
    """Writes beyond it fail with EFBIG, as those on a full disk do with ENOSPC."""
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN  # Python's own doing; else it would end the process
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("without_simplifier")
@pytest.mark.parametrize(
    ("size_px", "num_bytes", "last_step"),
    [(32, 20_000, "ONNX"), (128, 400_000, "reference outputs in FP64")],
    ids=["network", "golden file, which is the larger one at that size"],
)
def test_disk_that_is_full_while_writing(
    run: Run, export: list[object], bundle: Path, output: Path, size_px: int, num_bytes: int, last_step: str
) -> None:
    before = _contents(bundle)
    with _files_of_at_most(num_bytes):
        done = run(*export, "--size", size_px)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    step, error, fix = done.stderr.splitlines()[-3:]
    assert step == f"export: {last_step}"
    assert error == f"error: {bundle}: cannot be written: File too large"
    assert fix.startswith("fix: free some space")
    assert _contents(bundle) == before
    assert _left_in(output) == ["tiny"]


# --- other processes ---

# The simplifier waits for as long as its parent lives.
DRIVER = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits it ignored
from cspdeploy.cli.app import main
from cspdeploy.export import simplify
wait = "import os, time; parent = os.getppid()\\nwhile os.getppid() == parent: time.sleep(0.02)"
simplify._CHILD = [sys.executable, "-c", wait]
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def half_done_export(export: list[object]) -> Iterator[subprocess.Popen[str]]:
    """An export in a process of its own that has written files and now waits, for its simplifier never ends."""
    command = [sys.executable, "-c", DRIVER, *map(str, export), "--fp16"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        told = []
        for line in process.stderr:
            told.append(line)
            if line == "export: simplifying\n":
                break
        assert process.poll() is None, told
        yield process
        if process.poll() is None:
            process.kill()


def test_ctrl_c_during_export_keeps_the_old_bundle(
    bundle: Path, output: Path, tiny_bundle: Path, half_done_export: subprocess.Popen[str]
) -> None:
    half_done_export.send_signal(signal.SIGINT)
    printed, told = half_done_export.communicate()
    assert half_done_export.returncode == 130
    assert printed == ""
    assert told == "error: interrupted; nothing half-written was left\n"
    assert _contents(bundle) == _contents(tiny_bundle)
    assert _left_in(output) == ["tiny"]


@pytest.mark.usefixtures("without_simplifier", "sessions_here")
def test_second_export_is_refused_and_kill_9_of_the_first_keeps_the_old_bundle(
    run: Run,
    refuse: Refuse,
    export: list[object],
    bundle: Path,
    output: Path,
    tiny_bundle: Path,
    half_done_export: subprocess.Popen[str],
) -> None:
    assert f"{bundle}: another export is writing it" in refuse(*export)
    half_done_export.kill()
    half_done_export.communicate()
    assert _contents(bundle) == _contents(tiny_bundle)
    check_hashes(bundle, read_manifest(bundle))
    assert len(_left_in(output)) == 2  # what was half-written is hidden, and no bundle
    report = json.loads(run("verify", output, "--no-latency", "--json", "-r", "ort-cpu").stdout)
    assert {row["bundle"] for row in report["rows"]} == {str(bundle)}
    assert run(*export, "--weights", "random").returncode == 0
    assert _left_in(output) == ["tiny"]
    assert read_manifest(bundle).spec.provenance.untrained


# --- features ---


@pytest.mark.usefixtures("without_simplifier")
def test_features_of_chosen_strides(run: Run, export: list[object], output: Path) -> None:
    done = run(*export, "--features", "--strides", "8,4", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["manifest"]["spec"]["outputs"] == ["features_s4", "features_s8"]
    assert _left_in(output) == ["tiny-features"]


@pytest.mark.parametrize("text", ["", "8,", "8;16", "-8", "eight", "8.0"])
def test_strides_that_are_none(refuse: Refuse, export: list[object], output: Path, text: str) -> None:
    assert "--strides" in refuse(*export, "--features", "--strides", text)
    assert _left_in(output) == []


def test_stride_that_the_network_has_not(refuse: Refuse, export: list[object], output: Path) -> None:
    assert "it has [1, 2, 4, 8]" in refuse(*export, "--features", "--strides", "64")
    assert _left_in(output) == []


# --- boxes ---


def test_a_name_with_a_colon_that_is_nothing(refuse: Refuse, output: Path) -> None:
    assert "error: model 'foo:bar': unknown, none of the" in refuse("export", "foo:bar", "-o", output)


def test_a_model_folder_may_have_a_colon_in_its_path(run: Run, tiny_models: Path, tmp_path: Path, output: Path) -> None:
    """The bundle is called as the folder, and for that the folder's own name has none."""
    folder = Path(shutil.copytree(tiny_models / "tiny", tmp_path / "run:3" / "tiny"))
    assert run("export", folder, "-o", output, "--no-verify").returncode == 0
    assert _left_in(output) == ["tiny"]


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [("--score-threshold", 1.5, "0 to below 1"), ("--iou-threshold", 0, "above 0 to 1"),
     ("--max-detections", 5000, "1 to 4096")],
)  # fmt: skip
def test_an_option_of_boxes_that_is_wrong(
    refuse: Refuse, export: list[object], option: str, value: float, expected: str
) -> None:
    assert f"{option}: got {value}, expected {expected}".replace("got 0,", "got 0.0,") in refuse(*export, option, value)


def test_options_of_boxes_for_a_classifier_name_the_one_that_was_given(refuse: Refuse, export: list[object]) -> None:
    assert "--max-detections: 'tiny' gives logits, not boxes" in refuse(*export, "--max-detections", 9)
    asked = suppression_request(score=None, iou=0.5, detections=None)
    assert asked == SuppressionOptions(iou_threshold=0.5)
    assert suppression_request(score=None, iou=None, detections=None) is None
