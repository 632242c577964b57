"""Several workers on the command line: who starts them, who speaks, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
from PIL import Image

import cspdeploy
from cspdeploy.cli.train_workers import recorded_command
from cspdeploy.core.json_file import read_json

Run = Callable[..., CompletedProcess[str]]
Refuse = Callable[..., str]
ROOT = Path(cspdeploy.__file__).parents[1]


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """`torchrun(rank, world)`: its environment, with nobody else there."""

    def be(rank: int, world: int) -> None:
        given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
        for name, value in given.items():
            monkeypatch.setenv(name, str(value))

    return be


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes, four pictures to train on and two to judge by."""
    rng = np.random.default_rng(0)
    for split, num in (("train", 2), ("test", 1)):
        for name, low in (("dark", 0), ("light", 150)):
            place = tmp_path / "photos" / split / name
            place.mkdir(parents=True)
            for i in range(num):
                Image.fromarray(rng.integers(low, low + 100, (32, 32, 3), np.uint8)).save(place / f"{i}.png")
    return tmp_path / "photos"


def test_fine_tuning_has_one_worker(
    refuse: Refuse, run: Run, torchrun: Callable[[int, int], None], tmp_path: Path
) -> None:
    assert "--qat: trains on one worker, got 2" in refuse("train", "x", "--qat", "--workers", 2)
    assert "--device cuda: --qat trains on the CPU" in refuse("train", "x", "--qat", "--device", "cuda")
    torchrun(0, 2)
    assert "start it without torchrun" in refuse("train", "x", "--qat", "--models", tmp_path)
    torchrun(1, 2)
    done = run("train", "x", "--qat", "--models", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_another_number_of_workers_than_torchrun_started(
    refuse: Refuse, run: Run, torchrun: Callable[[int, int], None], tmp_path: Path
) -> None:
    words = ("train", "cspdarknet53", "--data", tmp_path, "--workers", 3)
    torchrun(0, 2)
    assert "--workers 3: torchrun has started 2" in refuse(*words)
    torchrun(1, 2)
    done = run(*words)
    assert (done.returncode, done.stderr) == (2, "")


def test_half_an_environment_of_torchrun(refuse: Refuse, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    lines = refuse("train", "cspdarknet53", "--data", tmp_path)
    assert "LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set" in lines


def test_the_number_of_workers_is_of_the_recorded_command(torchrun: Callable[[int, int], None]) -> None:
    assert recorded_command("cspdeploy train x") == "cspdeploy train x"
    torchrun(0, 2)
    assert recorded_command("cspdeploy train x") == "cspdeploy train x --workers 2"
    assert recorded_command("cspdeploy train x --workers 2") == "cspdeploy train x --workers 2"


def _two(*words: object) -> CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "cspdeploy", "train", *(str(word) for word in words), "--workers", "2"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=100)


@pytest.mark.slow
def test_two_workers_train_and_one_speaks(photos: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    words = ("cspdarknet21", "--data", photos, "--size", 32, "--epochs", 1, "--models", models, "--device", "cpu")
    done = _two(*words, "--batch", 4)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("top-1") == 1
    assert done.stderr.count("reading 4 + 2 images") == 1
    assert read_json(models / "cspdarknet21" / "train.json")["places"][0]["workers"] == 2
    assert read_json(models / "cspdarknet21" / "spec.json")["provenance"]["command"].endswith("--workers 2")
    refused = _two(*words, "--batch", 3, "--overwrite")
    assert refused.returncode == 2
    assert refused.stderr.count("error:") == refused.stderr.count("fix:") == 1
    assert "fix: --batch 4" in refused.stderr
