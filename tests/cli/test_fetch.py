"""`cspdeploy pull`, from a filled cache of the hub library: what it prints, answers and leaves behind."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from safetensors.torch import save

from cspdeploy.core.model_folder import read_spec
from cspdeploy.nets.cspnet import CspNetConfig
from cspdeploy.nets.registry import NETWORKS, build, spec_of
from cspdeploy.pipeline import pull

TAG = "cspdarknet53.ra_in1k"
COMMIT = "0123456789abcdef0123456789abcdef01234567"

Run = Callable[..., CompletedProcess[str]]
Refuse = Callable[..., str]


@pytest.fixture
def cache(tiny_config: CspNetConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache, as the library lays it out, holds the checkpoint of a small network in that one's place; offline."""
    constants = pytest.importorskip("huggingface_hub.constants")
    row = dataclasses.replace(NETWORKS["cspdarknet53"], config=tiny_config)
    monkeypatch.setitem(NETWORKS, "cspdarknet53", row)
    torch.manual_seed(3)
    body = save(build(spec_of(row)).state_dict())
    cache = tmp_path / "cache"
    repository = cache / f"models--timm--{TAG}"
    blob = repository / "blobs" / hashlib.sha256(body).hexdigest()
    pointer = repository / "snapshots" / COMMIT / "model.safetensors"
    for path in (blob, pointer, repository / "refs" / "main"):
        path.parent.mkdir(parents=True)
    blob.write_bytes(body)
    pointer.symlink_to(Path("..") / ".." / "blobs" / blob.name)
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cache


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.mark.usefixtures("cache")
def test_pull_tells_what_it_got_and_what_comes_next(run: Run, models: Path) -> None:
    done = run("pull", TAG, "--models", models)
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    assert words[0] == f"{models / TAG}:"
    for part in ("Apache-2.0;", "80.08", "95.06", "256"):
        assert part in words
    assert " ".join(words).endswith(f"cspdeploy export {TAG} --models {models} --calib DIR")
    assert "Traceback" not in done.stderr
    assert (models / TAG / "model.safetensors").is_file()


@pytest.mark.usefixtures("cache")
def test_default_models_folder_is_not_repeated(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("pull", "cspdarknet53", "--name", "mine")
    assert done.stdout.splitlines()[-1].endswith("cspdeploy export mine --calib DIR")
    assert (tmp_path / "models" / "mine" / "spec.json").is_file()


@pytest.mark.usefixtures("cache")
def test_json(run: Run, models: Path) -> None:
    report = json.loads(run("pull", TAG, "--models", models, "--json").stdout)
    assert report["folder"] == str(models / TAG)
    assert report["tag"] == TAG
    assert report["num_bytes"] == (models / TAG / "model.safetensors").stat().st_size
    assert report["spec"] == json.loads((models / TAG / "spec.json").read_text())
    assert report["spec"]["provenance"]["accuracy"]["top1"] == 0.80078


@pytest.mark.usefixtures("cache")
def test_command_is_kept_without_what_does_not_belong_to_the_model(
    run: Run, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["pull", TAG, "--models", str(models), "--overwrite"]
    monkeypatch.setattr(sys, "argv", ["cspdeploy", *arguments])
    assert run(*arguments).returncode == 0
    assert read_spec(models / TAG).provenance.command == f"cspdeploy pull {TAG} --models {models}"


@pytest.mark.usefixtures("cache")
def test_existing_folder_needs_overwrite(run: Run, refuse: Refuse, models: Path) -> None:
    assert run("pull", TAG, "--models", models).returncode == 0
    assert "exists already" in refuse("pull", TAG, "--models", models)
    assert run("pull", TAG, "--models", models, "--overwrite").returncode == 0


@pytest.mark.usefixtures("cache")
def test_export_of_what_was_pulled_asks_for_images(run: Run, refuse: Refuse, models: Path, tmp_path: Path) -> None:
    assert run("pull", TAG, "--models", models).returncode == 0
    told = refuse("export", TAG, "--models", models, "-o", tmp_path / "exported")
    assert "no real images" in told
    assert "--calib DIR" in told


def test_offline_without_a_cached_file(refuse: Refuse, cache: Path, models: Path) -> None:
    shutil.rmtree(cache)
    told = refuse("pull", TAG, "--models", models)
    assert "offline mode is on" in told
    assert not models.exists()


@pytest.mark.usefixtures("cache")
def test_altered_cache_is_refused(refuse: Refuse, cache: Path, models: Path) -> None:
    (blob,) = cache.rglob("blobs/*")
    blob.write_bytes(blob.read_bytes()[:-1] + b"\xff")
    assert "expected " + blob.name in refuse("pull", TAG, "--models", models)
    assert not models.exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cspdarknet35.ra_in1k", "did you mean 'cspdarknet53.ra_in1k'?"),
        ("qqqqqqqq", "see: cspdeploy list"),
    ],
)
def test_unknown_name(refuse: Refuse, models: Path, name: str, words: str) -> None:
    told = refuse("pull", name, "--models", models)
    assert words in told
    assert "cs3edgenet_x.c2_in1k" in told


def test_absent_library_names_its_extra(refuse: Refuse, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'cspdeploy[hub]'" in refuse("pull", TAG, "--models", models, code=3)


@pytest.mark.usefixtures("cache")
def test_ctrl_c(run: Run, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pull, "write_text", interrupt)
    done = run("pull", TAG, "--models", models)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "error: interrupted; nothing half-written was left\n"
    assert [path for path in models.iterdir() if path.suffix != ".lock"] == []
