"""The command blame: exit codes, text and JSON."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from onnx import numpy_helper

from cspdeploy.cli.app import main


@pytest.fixture
def faulty(tiny_bundle: Path, tmp_path: Path) -> Path:
    model = onnx.load(tiny_bundle / "tiny.onnx")
    node = next(node for node in model.graph.node if node.op_type == "Conv")
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == node.input[1])
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * 2, tensor.name))
    path = tmp_path / "faulty.onnx"
    onnx.save(model, path)
    return path


def test_says_that_there_is_nothing_to_blame(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["blame", str(tiny_bundle / "tiny.onnx")]) == 0
    assert "nothing to blame: onnx on ort-cpu is within its limits" in capsys.readouterr().out


def test_names_the_node_and_exits_with_1(tiny_bundle: Path, faulty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["blame", str(faulty), "--against", str(tiny_bundle / "tiny.onnx")]) == 1
    text = capsys.readouterr().out
    assert "/stem/conv1/conv/Conv (Conv of stem.conv1.conv) introduces the error" in text
    assert "2 times the reference's" in text


def test_json_holds_the_same(tiny_bundle: Path, faulty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["blame", str(faulty), "--against", str(tiny_bundle / "tiny.onnx"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["schema_version"], found["verdict"]) == (1, "introduced")
    assert found["blamed"]["module"] == "stem.conv1.conv"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing says what it should compute"),
        (["--against", "golden"], "is not of a bundle"),
        (["--against", "no.onnx"], "no.onnx"),
        (["--against", "itself", "--runtime", "torch-cpu"], "cannot be looked into"),
    ],
)
def test_wrong_use_exits_with_2(
    faulty: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["blame", str(faulty), *arguments]) == 2
    assert message in capsys.readouterr().err
