"""Pulls that are refused, and what is left of them: nothing, or the older folder."""

from __future__ import annotations

import os
import pickle
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from cspdeploy.core.bundle import MODEL_FOLDER, staged_folder
from cspdeploy.core.errors import InputError
from cspdeploy.nets.cspnet import CspNetConfig
from cspdeploy.pipeline import pull
from tests.pipeline.stand_in_hub import CHUNK_BYTES, TAG, Hub, Pull, contents, left_in, other_state

# --- downloads that are refused ---


def _wrong_hash(hub: Hub, config: CspNetConfig) -> None:
    hub.stated_sha256 = "0" * 64


def _another_network(hub: Hub, config: CspNetConfig) -> None:
    hub.body = save(other_state(config))


def _other_classes(hub: Hub, config: CspNetConfig) -> None:
    tensors = load(hub.body)
    hub.body = save({key: value[:10].clone() if key.startswith("head.fc") else value for key, value in tensors.items()})


def _not_a_number(hub: Hub, config: CspNetConfig) -> None:
    tensors = load(hub.body)
    tensors["head.fc.bias"][7] = torch.nan
    hub.body = save(tensors)


def _no_safetensors(hub: Hub, config: CspNetConfig) -> None:
    hub.body = b"<html>Sign in to this network</html>" * 40


def _cut_for_ever(hub: Hub, config: CspNetConfig) -> None:
    hub.cuts = [CHUNK_BYTES + 1] * 100


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harm-was-done",)


def _harmful_pickle(hub: Hub, config: CspNetConfig) -> None:
    hub.body, hub.file = pickle.dumps({"head.fc.bias": Harmful()}), "pytorch_model.bin"


bad_hub = pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_wrong_hash, "expected 0000"),
        (_another_network, "weights of another network: "),
        (_other_classes, r"head.fc.bias is \[10\], expected \[1000\]"),
        (_not_a_number, "NaN or infinite values in head.fc.bias"),
        (_no_safetensors, "not a safetensors file"),
        (_cut_for_ever, "not fetched from 127.0.0.1"),
        (_harmful_pickle, "pickle needs code"),
    ],
)

Spoil = Callable[[Hub, CspNetConfig], None]


@bad_hub
def test_bad_download_leaves_nothing(
    hub: Hub,
    pulled: Pull,
    models: Path,
    tiny_config: CspNetConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    spoil: Spoil,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    spoil(hub, tiny_config)
    with pytest.raises(InputError, match=words) as caught:
        pulled()
    assert TAG in caught.value.message
    assert "\n" not in caught.value.message + caught.value.fix
    assert caught.value.fix
    assert left_in(models) == []
    assert not (tmp_path / "harm-was-done").exists()


@bad_hub
def test_bad_download_keeps_the_old_folder(
    hub: Hub, pulled: Pull, models: Path, tiny_config: CspNetConfig, tmp_path: Path, *, spoil: Spoil, words: str
) -> None:
    pulled()
    before = contents(models / TAG)
    shutil.rmtree(tmp_path / "cache")
    spoil(hub, tiny_config)
    with pytest.raises(InputError, match=words):
        pulled(overwrite=True)
    assert contents(models / TAG) == before
    assert left_in(models) == [TAG]


def test_pull_works_once_the_connection_does(hub: Hub, pulled: Pull, models: Path, tiny_config: CspNetConfig) -> None:
    _cut_for_ever(hub, tiny_config)
    with pytest.raises(InputError):
        pulled()
    hub.cuts = []
    pulled()
    assert (models / TAG / "model.safetensors").read_bytes() == hub.body


@pytest.mark.usefixtures("hub")
def test_offline(pulled: Pull, models: Path, go_offline: Callable[[], None]) -> None:
    go_offline()
    with pytest.raises(InputError, match="offline mode is on") as caught:
        pulled()
    assert "go online" in caught.value.fix
    assert not models.exists()


def test_file_that_changes_while_it_is_copied(pulled: Pull, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def copy_and_change(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:-1] + b"\xff")

    monkeypatch.setattr(pull.shutil, "copyfile", copy_and_change)
    with pytest.raises(InputError, match="was changed while it was copied"):
        pulled()
    assert left_in(models) == []


# --- places that are refused ---


def test_existing_folder_is_refused_before_the_download(hub: Hub, pulled: Pull, models: Path) -> None:
    pulled()
    (models / TAG / "labels.txt").write_text("mine")
    before = contents(models / TAG)
    hub.starts.clear()
    with pytest.raises(InputError, match="exists already") as caught:
        pulled()
    assert "--overwrite" in caught.value.fix
    assert contents(models / TAG) == before
    assert hub.starts == []


def test_folder_that_came_meanwhile_is_refused(pulled: Pull, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch = pull.fetch_checkpoint

    def fetch_while_another_writes(tag: str, *, progress: bool) -> object:
        (models / TAG).mkdir(parents=True)
        (models / TAG / "spec.json").write_text("another's")
        return fetch(tag, progress=progress)

    monkeypatch.setattr(pull, "fetch_checkpoint", fetch_while_another_writes)
    with pytest.raises(InputError, match="exists already"):
        pulled()
    assert contents(models / TAG) == {"spec.json": b"another's"}


def test_overwrite_replaces_the_folder_whole(hub: Hub, pulled: Pull, models: Path) -> None:
    pulled()
    (models / TAG / "calibration.npz").write_bytes(b"of the old model")
    pulled(overwrite=True)
    assert sorted(contents(models / TAG)) == ["labels.txt", "model.safetensors", "spec.json"]
    assert (models / TAG / "model.safetensors").read_bytes() == hub.body
    assert left_in(models) == [TAG]


@pytest.mark.parametrize("overwrite", [False, True])
def test_folder_that_is_no_model_is_never_replaced(pulled: Pull, models: Path, *, overwrite: bool) -> None:
    (models / TAG).mkdir(parents=True)
    (models / TAG / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="exists and is not a model folder" if overwrite else "exists already"):
        pulled(overwrite=overwrite)
    assert contents(models / TAG) == {"thesis.txt": b"precious"}


def test_file_in_the_place_of_the_folder(pulled: Pull, models: Path) -> None:
    models.mkdir()
    (models / TAG).write_text("mine")
    with pytest.raises(InputError, match="is a file, expected a folder"):
        pulled(overwrite=True)
    assert (models / TAG).read_text() == "mine"


def test_second_writer_is_refused(pulled: Pull, models: Path) -> None:
    with staged_folder(models / TAG, kind=MODEL_FOLDER) as staging:
        (staging / "spec.json").write_text("first")
        with pytest.raises(InputError, match="another command is writing it"):
            pulled()
    assert contents(models / TAG) == {"spec.json": b"first"}


def test_models_folder_that_cannot_be_written(pulled: Pull, tmp_path: Path) -> None:
    """Permission bits do not stop root; the kernel's own file system stops everybody."""
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file" / "models", Path("/proc/models")):
        with pytest.raises(InputError, match="cannot be written") as caught:
            pulled(models=place)
        assert "--models" in caught.value.fix


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


@pytest.mark.parametrize("cached", [True, False], ids=["models folder", "cache"])
def test_full_disk_keeps_the_old_folder(pulled: Pull, models: Path, tmp_path: Path, *, cached: bool) -> None:
    pulled()
    before = contents(models / TAG)
    if not cached:
        shutil.rmtree(tmp_path / "cache")
    with _files_of_at_most(20_000), pytest.raises(InputError, match="File too large") as caught:
        pulled(overwrite=True)
    assert ("free some space" if cached else "HF_HOME") in caught.value.fix
    assert contents(models / TAG) == before
    assert left_in(models) == [TAG]
