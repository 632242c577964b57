"""README's commands, run in order on the shipped model; its table of artifacts; its Python example."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from cspdeploy.cli.app import main
from cspdeploy.core.datasets import FASHION_MNIST_FOLDER, open_dataset
from cspdeploy.nets.darknet.cfg import read_cfg
from cspdeploy.nets.darknet.network import DarknetNet
from cspdeploy.nets.darknet.weights import write_darknet
from cspdeploy.nets.registry import NETWORKS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


CFG = """
[net]
height=32
width=32
channels=3
[convolutional]
batch_normalize=1
filters=8
size=3
stride=2
pad=1
activation=leaky
[avgpool]
[convolutional]
filters=10
size=1
activation=linear
[softmax]
"""


USER_NETWORK = """
<ir_version: 8, opset_import: ["": 17]>
user (float[1,3,32,32] picture) => (float[1,8] embedding) {
    c = Conv<strides = [2, 2], pads = [1, 1, 1, 1]>(picture, weight)
    a = HardSwish(c)
    pooled = GlobalAveragePool(a)
    embedding = Flatten(pooled)
}
"""


def write_user_network(path: Path) -> None:
    """A file of somebody else's: other names, other outputs, made by another tool."""
    model = onnx.parser.parse_model(USER_NETWORK)
    weight = np.random.default_rng(0).standard_normal((8, 3, 3, 3), np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "weight"))
    onnx.save(model, path)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    lines = (line for block in blocks("sh") for line in block.splitlines())
    return [shlex.split(line, comments=True) for line in lines if line.startswith(("cspdeploy ", "python "))]


def run_python(words: list[str]) -> int:
    """In a process of its own, as a device has it."""
    return subprocess.run([sys.executable, *words], check=False, stdout=subprocess.DEVNULL).returncode


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder with a `models/` in it, a photo and a folder of labelled photos."""
    if not (FASHION_MNIST_FOLDER / "t10k-images-idx3-ubyte.gz").is_file():
        pytest.skip("the Debian package dataset-fashion-mnist is not installed")
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "models" / "cspdarknet53", folder / "models" / "cspdarknet53")
    data = open_dataset("fashion-mnist", split="test")
    Image.fromarray(np.asarray(data.source(0))).save(folder / "photo.png")
    for index in range(120):
        below = folder / "photos" / str(data.classes[index] % 2)
        below.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(data.source(index))).save(below / f"{index}.png")
    (folder / "net.cfg").write_text(CFG)
    write_user_network(folder / "user.onnx")
    write_darknet(folder / "net.weights", DarknetNet(read_cfg(folder / "net.cfg")))
    return folder


@pytest.mark.timeout(1800)  # the shipped network, whole, on whatever machine this is
def test_every_command_runs_in_order(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    torch.set_num_threads(os.cpu_count() or 1)  # as a user has it; the tests otherwise compute small things on one
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = commands()
    assert {words[1] for words in found if words[0] == "cspdeploy"} >= {
        "export",
        "verify",
        "bench",
        "predict",
        "list",
        "doctor",
        "inspect",
        "train",
        "compare",
        "blame",
        "check",
        "reproduce",
        "package",
    }
    for words in found:
        code = main(words[1:]) if words[0] == "cspdeploy" else run_python(words[1:])
        assert code == 0, f"{shlex.join(words)}: {capsys.readouterr().err}"
    classifies, detects = (
        subprocess.run([sys.executable, "-c", block], check=True, capture_output=True, text=True).stdout
        for block in blocks("python")
    )
    assert classifies == "Ankle boot\n"
    assert all(len([float(value) for value in line.split(" ", 5)[:5]]) == 5 for line in detects.splitlines())


def test_table_of_networks_names_those_of_the_registry() -> None:
    rows = README.partition("## Networks")[2].partition("\n## ")[0].splitlines()
    words = [word for row in rows if row.startswith("| ") for word in re.findall(r"`([^`]+)`", row)]
    names: list[str] = []
    for word in words:
        start, _, rest = word.partition("{")
        names += [start + part + rest.partition("}")[2] for part in rest.partition("}")[0].split(",")]
    assert sorted(name for name in names if name != "-omega") == sorted(NETWORKS)


def test_commands_for_a_gpu_say_that_there_is_none(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Never an answer of the CPU in its place. Where there is a GPU, `make test-cuda` is what runs them."""
    monkeypatch.chdir(place)
    found = [shlex.split(line, comments=True) for block in blocks("bash") for line in block.splitlines()]
    asked = [words[1:] for words in found if words[0] == "cspdeploy" and "--runtime" in words]
    assert {words[0] for words in asked} == {"verify", "bench", "compare"}
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for words in asked:
        assert main(words) == 3, shlex.join(words)
        told = capsys.readouterr()
        assert told.out == ""
        assert told.err.splitlines()[-2].startswith("error: --runtime ")
