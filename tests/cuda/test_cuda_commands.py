"""The commands on a GPU: doctor, verify, bench, train; and what the CUDA provider makes of an INT8 file."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cspdeploy.cli.app import main
from cspdeploy.core.bundle import read_manifest
from cspdeploy.core.golden import GOLDEN_FILE, read_golden
from cspdeploy.core.metrics import relative_l2
from cspdeploy.pipeline.int8_step import Int8Request
from cspdeploy.pipeline.recipe import ExportRequest, export_bundle
from cspdeploy.runtimes import require_runtime
from cspdeploy.runtimes.base import SessionRequest

pytestmark = [pytest.mark.cuda, pytest.mark.timeout(300)]  # each engine starts in a process of its own

CUDA = "CUDAExecutionProvider"
INT8_LIMIT = 0.3
"""Of a network of 50,000 weights with ranges of 40 pictures: far from the float one, and near enough to be the same."""

Command = Callable[..., tuple[int, dict[str, object]]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Exit code, and what was printed as JSON."""

    def run(*arguments: object) -> tuple[int, dict[str, object]]:
        code = main([str(argument) for argument in (*arguments, "--json")])
        out = capsys.readouterr().out
        return code, json.loads(out) if out.strip() else {}

    return run


def test_doctor_opens_a_session_on_the_gpu(command: Command) -> None:
    code, found = command("doctor")
    states = {one["name"]: one for one in found["runtimes"]}  # type: ignore[union-attr]
    assert {"ort-cuda", "torch-cuda"} <= set(states)
    assert (code, found["healthy"]) == (0, True), found
    for name in ("ort-cuda", "torch-cuda"):
        assert states[name]["works"], states[name]


def test_verify_passes_on_the_gpu(command: Command, tiny_bundle: Path) -> None:
    code, report = command("verify", tiny_bundle, "--runtime", "ort-cuda", "--no-latency", "--strict-placement")
    rows = report["rows"]
    assert isinstance(rows, list)
    assert (code, report["verdict"]) == (0, "pass"), rows
    assert {row["artifact"] for row in rows} >= {"onnx", "onnx-fp16"}
    assert all(set(row["placement"]) == {CUDA} for row in rows if row["runtime"] == "ort-cuda")


def test_bench_times_graphs_and_the_device(command: Command, tiny_bundle: Path) -> None:
    code, report = command("bench", tiny_bundle, "--runtime", "ort-cuda", "--cuda-graph", "--min-runs", "20",
                           "--min-seconds", "0.2", "--max-seconds", "0")  # fmt: skip
    assert code == 0, report
    rows = report["rows"]
    assert isinstance(rows, list)
    assert {row["variant"] for row in rows} == {"", "cuda-graph"}
    for row in rows:
        assert row["timing"]["p50_ms"] > 0
        assert row["timing"]["events_p50_ms"] > 0


def test_a_gpu_that_is_not_there_is_wrong_use(tiny_bundle: Path) -> None:
    assert main(["bench", str(tiny_bundle), "--runtime", "ort-cuda", "--device", "99"]) == 2


def test_training_on_the_gpu_leaves_a_model_that_predicts(tmp_path: Path, command: Command) -> None:
    """Two steps of AMP, and the evaluation after them."""
    rng = np.random.default_rng(0)
    from PIL import Image

    for name in ("one", "two"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(10):
            Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / "data" / name / f"{i}.png")
    code, report = command(
        "train", "cspresnet50", "--data", tmp_path / "data", "--models", tmp_path / "models", "--epochs", "1",
        "--batch", "8", "--size", "64", "--device", "cuda",
    )  # fmt: skip
    assert code == 0, report
    curve = json.loads((tmp_path / "models" / "cspresnet50" / "train.json").read_text())
    assert all(np.isfinite(epoch["train_loss"]) for epoch in curve["epochs"])


def test_what_the_provider_makes_of_int8(photo_models: Path, tmp_path: Path) -> None:
    """Which nodes it runs as what is told here and judged nowhere: that the outputs are right is."""
    models = Path(shutil.copytree(photo_models, tmp_path / "models"))
    request = ExportRequest(
        model="tiny", models=models, output=tmp_path / "out", target="tensorrt", opset=17,
        int8=Int8Request(calibration="minmax"),
    )  # fmt: skip
    folder = Path(export_bundle(request).folder)
    artifacts = {artifact.kind: artifact for artifact in read_manifest(folder).artifacts}
    assert "onnx-int8" in artifacts, artifacts["onnx"].steps
    session = require_runtime("ort-cuda").open(
        SessionRequest(path=folder / artifacts["onnx-int8"].file, outputs=("logits",))
    )  # fmt: skip
    placed = Counter((node.provider, node.operator) for node in session.nodes)
    assert sum(count for (provider, _), count in placed.items() if provider == CUDA) > 0
    golden = read_golden(folder / GOLDEN_FILE)
    name = artifacts["onnx-int8"].inputs[0].name
    runs = [session.run({name: golden.x_NCHW[i : i + 1]})["logits"] for i in range(8)]
    assert relative_l2(np.concatenate(runs), golden.outputs_fp64["logits"][:8]) < INT8_LIMIT, placed
