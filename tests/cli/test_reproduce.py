from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import jsonschema
import pytest

import cspdeploy.report
from cspdeploy.core.bundle import read_manifest, write_manifest

Run = Callable[..., CompletedProcess[str]]
Refuse = Callable[..., str]


def test_reproduce(run: Run, bundle: Path, tiny_models: Path) -> None:
    done = run("reproduce", bundle, "--models", tiny_models)
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1] == "EQUAL: all 5 files have the same bytes"
    assert "reproduce: ONNX" in done.stderr


@pytest.mark.usefixtures("without_simplifier")
def test_a_difference_is_exit_1_and_valid_by_the_published_schema(run: Run, bundle: Path, tiny_models: Path) -> None:
    manifest = read_manifest(bundle)
    write_manifest(bundle, dataclasses.replace(manifest, tools={**manifest.tools, "onnx": "1.0"}))
    done = run("reproduce", bundle, "--models", tiny_models, "--json")
    assert done.returncode == 1
    report = json.loads(done.stdout)
    schema = json.loads((Path(cspdeploy.report.__file__).parent / "reproduce.schema.json").read_text())
    jsonschema.validate(report, schema)
    assert report["verdict"] == "differs"
    assert [tool["name"] for tool in report["tools"]] == ["onnx"]


def test_what_is_not_here_is_exit_2(refuse: Refuse, bundle: Path, tmp_path: Path) -> None:
    manifest = read_manifest(bundle)
    write_manifest(bundle, dataclasses.replace(manifest, options={**manifest.options, "weights": "gone.safetensors"}))
    text = refuse("reproduce", bundle, "--models", tmp_path / "none", code=2)
    assert f"the weights gone.safetensors (SHA-256 {manifest.spec.provenance.weights_sha256})" in text
    refuse("reproduce", tmp_path / "none", code=2)
