"""What a device does not have is not needed, and what `--help` does not need is not loaded. Each in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cspdeploy
from tests.without import WITHOUT

ROOT = Path(cspdeploy.__file__).parents[1]
EXPORT_PACKAGES = ("torch", "onnx", "onnxscript", "onnxsim", "safetensors")
ENGINES = ("torch", "onnx", "onnxruntime", "numpy")


def _python(code: str, *arguments: str, blocked: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", WITHOUT.format(blocked=blocked) + code, *arguments]
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)


PREDICT = """
import json
import numpy as np
from cspdeploy.core.golden import read_golden
from cspdeploy.core.metrics import relative_l2
from cspdeploy.edge import Predictor

folder = sys.argv[1]
from pathlib import Path
golden = read_golden(Path(folder) / "golden.npz")
predictor = Predictor.open(folder)
distance = relative_l2(predictor.logits(*golden.images), golden.outputs_fp64["logits"])
label = predictor(golden.images[0])[0].label
loaded = [name for name in blocked if name in sys.modules]
print(json.dumps({"distance": distance, "label": label, "loaded": loaded}))
"""


def test_device_predicts_with_numpy_pillow_and_an_engine(tiny_bundle: Path) -> None:
    done = _python(PREDICT, str(tiny_bundle), blocked=EXPORT_PACKAGES)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["distance"] < 1e-5
    assert found["label"].startswith("label ")
    assert found["loaded"] == []


def _main(*arguments: str, blocked: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    code = "from cspdeploy.cli.app import main\nsys.exit(main(sys.argv[1:]))"
    return _python(code, *arguments, blocked=blocked)


def test_device_verifies_without_torch_and_onnx(tiny_bundle: Path) -> None:
    done = _main("verify", str(tiny_bundle), "--json", "--no-latency", blocked=EXPORT_PACKAGES)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    rows = {(row["artifact"], row["runtime"]): row for row in report["rows"]}
    assert report["verdict"] == "pass"
    assert rows["onnx", "ort-cpu"]["verdict"] == rows["onnx-fp16", "ort-cpu"]["verdict"] == "pass"
    assert rows["preprocess", "shared"]["verdict"] == "pass"
    for key in (("torchscript", "torchscript-cpu"), ("eager", "torch-cpu"), ("onnx-fp16", "fp16-rounding")):
        assert rows[key]["verdict"] == "not-checkable"
        assert rows[key]["rel_l2"] is None
        assert "pip install 'cspdeploy[export]'" in rows[key]["reason"]


def test_device_predicts_from_the_command_line(tiny_bundle: Path) -> None:
    photo = ROOT / "tests" / "no-such-photo.png"
    done = _main("predict", str(tiny_bundle), str(photo), blocked=EXPORT_PACKAGES)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {photo}: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [["export", "cspdarknet53"], ["blame", "tiny.onnx", "--against", "itself"]])
def test_command_whose_extra_is_missing_names_it(tiny_bundle: Path, command: list[str]) -> None:
    arguments = [str(tiny_bundle / word) if word.endswith(".onnx") else word for word in command]
    done = _main(*arguments, blocked=EXPORT_PACKAGES)
    assert done.returncode == 3
    assert "pip install 'cspdeploy[export]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("command", "shows"),
    [
        (["inspect"], "MACs"),
        (["check", "--target", "ort-1.16"], "ort-1.16"),
        (["bench", "--min-seconds", "0.1"], "onnx"),
    ],
)
def test_device_looks_at_files_and_times_them(tiny_bundle: Path, command: list[str], shows: str) -> None:
    done = _main(command[0], str(tiny_bundle / "tiny.onnx"), *command[1:], blocked=EXPORT_PACKAGES)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert shows in done.stdout


def test_without_any_engine_verify_proves_nothing_and_says_so(tiny_bundle: Path) -> None:
    done = _main("verify", str(tiny_bundle), "--no-latency", blocked=(*EXPORT_PACKAGES, "onnxruntime", "openvino"))
    assert done.returncode == 2
    assert "nothing could be checked" in done.stderr
    done = _main("predict", str(tiny_bundle), "photo.png", blocked=(*EXPORT_PACKAGES, "onnxruntime"))
    assert done.returncode == 3
    assert "pip install 'cspdeploy[cpu]'" in done.stderr


# --- --help ---

IMPORT = """
import cspdeploy.cli.app
print(*[name for name in sys.argv[1:] if name in sys.modules])
"""

HELP = """
import contextlib, io, json
import typer
from cspdeploy.cli.app import app, main

root = typer.main.get_command(app)
found = {}
for words in ([], *([name] for name in root.commands)):
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        code = main([*words, "--help"])
    found[" ".join(words)] = [code, shown.getvalue()]
silent = [
    f"{name} {option.name}" for name, command in root.commands.items() for option in command.params
    if not (option.help or "").strip()
]
loaded = [name for name in sys.argv[1:] if name in sys.modules]
print(json.dumps({"help": found, "loaded": loaded, "silent": silent}))
"""


def test_command_line_loads_no_engine() -> None:
    done = _python(IMPORT, *ENGINES)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_every_command_has_help_that_loads_no_engine() -> None:
    done = _python(HELP, *ENGINES)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["loaded"] == []
    assert found["silent"] == []  # an option without a word of help
    assert {"", "export", "verify", "bench", "predict", "train", "list", "inspect", "doctor"} <= set(found["help"])
    for name, (code, text) in found["help"].items():
        assert code == 0, name
        assert "Usage" in text, name
        assert "--help" in text, name
        assert len(text.split()) > 20, name


def test_help_works_with_nothing_but_the_base_installed() -> None:
    done = _main("--help", blocked=(*EXPORT_PACKAGES, "onnxruntime", "numpy", "PIL"))
    assert done.returncode == 0, done.stderr
    assert "export" in done.stdout
