"""`train --qat` on the command line: what it prints, what it answers, what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cspdeploy.core.errors import EXIT_CHECK_FAILED, InterruptedRunError
from cspdeploy.pipeline import qat as stage
from cspdeploy.pipeline.qat import QatReport, QatRequest
from cspdeploy.quant.qat_train import QatScore

Run = Callable[..., CompletedProcess[str]]
Refuse = Callable[..., str]


def _report(*, kept: bool) -> QatReport:
    before = QatScore(num_images=100, top1=0.9, top5=0.99, agreement=0.95, loss=0.5)
    after = QatScore(num_images=100, top1=0.92, top5=0.99, agreement=0.97, loss=0.25 if kept else 0.75)
    return QatReport(
        file="models/tiny/qat-ort-cpu.safetensors", placement="ort-cpu", dataset="d/train", kept=kept, before=before,
        after=after, curve=(),
    )  # fmt: skip


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[QatRequest]:
    """Requests that reach the stage, which is tested by itself and answers at once here."""
    found: list[QatRequest] = []

    def note(request: QatRequest, **_: Any) -> QatReport:
        found.append(request)
        return _report(kept=request.model == "tiny")

    monkeypatch.setattr(stage, "train_qat", note)
    return found


def test_options_reach_the_stage_and_the_result_is_told(run: Run, asked: list[QatRequest], tmp_path: Path) -> None:
    done = run(
        "train", "tiny", "--qat", "--data", "d", "--epochs", 3, "--batch", 8, "--learning-rate", 0.5, "--epoch-steps",
        7, "--target", "openvino", "--calib", tmp_path, "--seed", 9, "--models", tmp_path, "--overwrite",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    request = asked[0]
    assert (request.data, request.target, request.calibration, request.models) == ("d", "openvino", tmp_path, tmp_path)
    assert (request.overwrite, request.resume) == (True, False)
    recipe = request.recipe
    assert (recipe.epochs, recipe.batch, recipe.max_learning_rate) == (3, 8, 0.5)
    assert (recipe.steps_per_epoch, recipe.seed) == (7, 9)
    printed = " ".join(done.stdout.split())
    assert "qat-ort-cpu.safetensors: INT8 for ort-cpu: top-1 90.00 -> 92.00 %" in printed
    assert "loss 0.5000 -> 0.2500 on 100 test images" in printed


def test_defaults_are_those_of_fine_tuning(run: Run, asked: list[QatRequest]) -> None:
    assert run("train", "tiny", "--qat", "--json").returncode == 0
    recipe = asked[0].recipe
    assert (recipe.epochs, recipe.batch, recipe.max_learning_rate, recipe.steps_per_epoch) == (4, 64, 0.002, 250)
    assert (asked[0].data, asked[0].target) == (None, None)


def test_json_is_the_report(run: Run, asked: list[QatRequest]) -> None:
    printed = json.loads(run("train", "tiny", "--qat", "--json").stdout)
    assert (printed["kept"], printed["after"]["top1"]) == (True, 0.92)


def test_training_that_helps_nothing_is_a_failed_check(refuse: Refuse, asked: list[QatRequest]) -> None:
    told = refuse("train", "other", "--qat", code=EXIT_CHECK_FAILED)
    assert "no better than without training" in told
    assert "loss 0.5000 -> 0.7500" in told


def test_interruption_names_the_command_that_goes_on(
    refuse: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, "train_qat", interrupt)
    told = refuse("train", "tiny", "--qat", "--models", tmp_path, code=InterruptedRunError("").exit_code)
    assert "before the first epoch was finished" in told
    assert "--resume" not in told
    (tmp_path / ".tiny.qat-x.run").mkdir()
    (tmp_path / ".tiny.qat-x.run" / "checkpoint.pt").touch()
    told = refuse("train", "tiny", "--qat", "--models", tmp_path, code=InterruptedRunError("").exit_code)
    assert "finished epochs are kept" in told
    assert "--resume" in told


@pytest.mark.parametrize("option", [("--epoch-steps", 5), ("--target", "openvino"), ("--calib", "x")])
def test_options_of_fine_tuning_without_it(refuse: Refuse, option: tuple[object, ...]) -> None:
    told = refuse("train", "cspdarknet53", "--data", "fashion-mnist", *option)
    assert f"{option[0]}: is of fine-tuning" in told
    assert "fix: add --qat" in told


def test_size_with_it(refuse: Refuse) -> None:
    assert "leave out --size" in refuse("train", "tiny", "--qat", "--size", 64)


def test_plain_training_without_data(refuse: Refuse) -> None:
    assert "--data fashion-mnist" in refuse("train", "cspdarknet53")


def test_real_refusals_come_through(refuse: Refuse, photo_models: Path, tmp_path: Path) -> None:
    models = shutil.copytree(photo_models, tmp_path / "models")
    assert "no labelled images" in refuse("train", "tiny", "--qat", "--models", models)
    (tmp_path / "flat").mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "flat" / "a.png")
    assert "class folders" in refuse("train", "tiny", "--qat", "--models", models, "--data", tmp_path / "flat")
    assert "unknown" in refuse("train", "tiny", "--qat", "--models", models, "--target", "no-such-engine")
