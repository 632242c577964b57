from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

from cspdeploy.core.targets import TARGETS

Run = Callable[..., CompletedProcess[str]]
Refuse = Callable[..., str]


def test_a_file_that_its_target_takes(run: Run, tiny_bundle: Path) -> None:
    done = run("check", tiny_bundle / "tiny.onnx", "--target", "ort>=1.16", "-t", "opencv-4.11")
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1] == "PASS: 2 of 2 targets take it"


def test_a_violation_is_exit_1_and_names_the_fix(run: Run, tiny_bundle: Path) -> None:
    done = run("check", tiny_bundle / "tiny.onnx", "--target", "opencv-4")
    assert done.returncode == 1
    assert "cspdeploy export MODEL --target opencv-4" in done.stdout


def test_without_a_target_all_of_them_as_json(run: Run, tiny_bundle: Path) -> None:
    done = run("check", tiny_bundle / "tiny.onnx", "--json")
    report = json.loads(done.stdout)
    assert [target["target"] for target in report["targets"]] == list(TARGETS)
    assert done.returncode == 1  # opset 18 is more than some of them know
    assert (report["schema_version"], report["opset"]) == (1, 18)


def test_help_names_every_target(run: Run) -> None:
    words = run("check", "--help").stdout.replace(",", " ").split()
    assert set(TARGETS) <= set(words)


def test_unknown_target_and_bad_file(refuse: Refuse, tiny_bundle: Path, tmp_path: Path) -> None:
    assert "did you mean 'openvino'?" in refuse("check", tiny_bundle / "tiny.onnx", "--target", "openvin")
    assert "labels.txt" in refuse("check", tiny_bundle / "labels.txt")
    assert "absent.onnx" in refuse("check", tmp_path / "absent.onnx")
