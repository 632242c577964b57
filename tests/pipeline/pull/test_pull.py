"""Pulling checkpoints from a stand-in hub on 127.0.0.1 that serves real files of a real, small network.

The network stands in a row of the registry, in the place of the large one; the hub library, its cache and all of the
code are the real ones.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from cspdeploy.core.errors import InputError
from cspdeploy.core.imagenet import recognise_order
from cspdeploy.core.model_folder import read_labels, read_spec
from cspdeploy.core.spec import Accuracy
from cspdeploy.nets.checkpoints import CHECKPOINTS
from cspdeploy.nets.hub import MAX_GETS
from cspdeploy.nets.registry import build
from cspdeploy.pipeline import pull
from cspdeploy.pipeline.pull import find_checkpoint, pull_checkpoint
from cspdeploy.pipeline.source import resolve_source
from tests.pipeline.stand_in_hub import CHUNK_BYTES, COMMIT, TAG, Hub, Pull, contents, left_in

MAX_WAIT_S = 60


# --- pulls that work ---


def test_pull_writes_a_whole_model_folder(hub: Hub, pulled: Pull, models: Path) -> None:
    report = pulled(command="cspdeploy pull it")
    folder = models / TAG
    assert report.folder == str(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["labels.txt", "model.safetensors", "spec.json"]
    assert left_in(models) == [TAG]
    assert (folder / "model.safetensors").read_bytes() == hub.body
    assert report.num_bytes == len(hub.body)

    spec = read_spec(folder)
    assert spec == report.spec
    assert spec.name == TAG
    assert spec.preprocess == CHECKPOINTS[TAG].preprocess
    provenance = spec.provenance
    assert provenance.source == "published"
    assert not provenance.untrained
    assert provenance.weights_sha256 == hashlib.sha256(hub.body).hexdigest()
    assert provenance.origin == f"hf://timm/{TAG}@{COMMIT}/model.safetensors"
    assert provenance.licence == "Apache-2.0"
    assert provenance.command == "cspdeploy pull it"
    assert provenance.accuracy == Accuracy(
        dataset="ImageNet-1k validation", num_images=50_000, top1=0.80078, top5=0.95060
    )

    labels = read_labels(folder / "labels.txt", num_classes=1000)
    assert labels[0] == "tench"
    assert recognise_order(labels) == "wnid"


def test_pulled_folder_is_a_model_that_can_be_exported(
    pulled: Pull, models: Path, state: dict[str, Tensor], tmp_path: Path
) -> None:
    pulled()
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (40, 30), "red").save(tmp_path / "photos" / "red.png")
    source = resolve_source(TAG, models=models, weights=None, images=tmp_path / "photos", size_px=None)
    assert source.labels[999] == "toilet tissue"
    assert source.spec.provenance.accuracy is not None
    x_NCHW = torch.randn(2, 3, 64, 64)
    reference = build(source.spec)
    reference.load_state_dict(state)
    torch.testing.assert_close(source.model(x_NCHW), reference.eval()(x_NCHW), rtol=0, atol=0)


def test_without_real_images_the_export_says_how_to_give_some(pulled: Pull, models: Path) -> None:
    pulled()
    with pytest.raises(InputError, match="no real images") as caught:
        resolve_source(TAG, models=models, weights=None, images=None, size_px=None)
    assert "--calib DIR" in caught.value.fix


def test_weights_file_is_no_link_into_the_cache(pulled: Pull, models: Path, tmp_path: Path) -> None:
    pulled()
    path = models / TAG / "model.safetensors"
    assert not path.is_symlink()
    assert path.stat().st_nlink == 1
    (cached,) = (tmp_path / "cache").glob("*/snapshots/*/model.safetensors")
    assert not cached.samefile(path)


@pytest.mark.parametrize("name", ["cspdarknet53", f"timm/{TAG}"])
def test_other_ways_to_name_it(pulled: Pull, models: Path, name: str) -> None:
    assert pulled(name, folder_name="mine").tag == TAG
    assert left_in(models) == ["mine"]
    assert read_spec(models / "mine").name == "mine"


def test_connection_that_is_cut_is_resumed_where_it_was_cut(hub: Hub, pulled: Pull, models: Path) -> None:
    assert len(hub.body) > 20 * CHUNK_BYTES
    hub.cuts = [5 * CHUNK_BYTES + 7, 12 * CHUNK_BYTES + 1]
    pulled()
    assert hub.starts == [0, 5 * CHUNK_BYTES, 12 * CHUNK_BYTES]
    assert (models / TAG / "model.safetensors").read_bytes() == hub.body


def test_connection_that_is_cut_many_times_but_gets_further_is_enough(hub: Hub, pulled: Pull, models: Path) -> None:
    hub.cuts = [(2 * time + 2) * CHUNK_BYTES for time in range(4 * MAX_GETS)]
    pulled()
    assert len(hub.starts) == 1 + 4 * MAX_GETS
    assert (models / TAG / "model.safetensors").read_bytes() == hub.body


def test_second_pull_takes_the_cached_file(
    hub: Hub, pulled: Pull, models: Path, go_offline: Callable[[], None]
) -> None:
    pulled()
    pulled(folder_name="second")
    assert hub.starts == [0]
    go_offline()
    pulled(folder_name="third")
    assert len({(models / name / "model.safetensors").read_bytes() for name in (TAG, "second", "third")}) == 1


def test_repository_with_a_pickle_alone(hub: Hub, pulled: Pull, models: Path, state: dict[str, Tensor]) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    hub.body, hub.file = buffer.getvalue(), "pytorch_model.bin"
    provenance = pulled().spec.provenance
    written = models / TAG / "model.safetensors"
    assert provenance.weights_sha256 == hashlib.sha256(written.read_bytes()).hexdigest()
    assert "pytorch_model.bin" in provenance.origin
    assert hashlib.sha256(hub.body).hexdigest() in provenance.origin
    tensors = load_file(written)
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[key], state[key]) for key in state)


# --- Ctrl-C ---


@pytest.fixture
def sigint() -> Iterator[None]:
    """Ctrl-C as a shell gives it, also where the tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("sigint")
def test_ctrl_c_during_the_download_leaves_nothing(hub: Hub, pulled: Pull, models: Path, tmp_path: Path) -> None:
    released = threading.Event()

    def interrupt_and_hold() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        released.wait(MAX_WAIT_S)

    hub.cuts, hub.when_cut = [2 * CHUNK_BYTES], interrupt_and_hold
    try:
        with pytest.raises(KeyboardInterrupt):
            pulled()
    finally:
        released.set()
    assert left_in(models) == []
    assert not list((tmp_path / "cache").rglob("*.incomplete"))
    hub.when_cut = None
    pulled()
    assert (models / TAG / "model.safetensors").read_bytes() == hub.body


def test_ctrl_c_while_writing_keeps_the_old_folder(pulled: Pull, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pulled()
    before = contents(models / TAG)

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pull, "write_text", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pulled(overwrite=True)
    assert contents(models / TAG) == before
    assert left_in(models) == [TAG]


# --- names ---


@pytest.mark.parametrize("tag", CHECKPOINTS)
def test_every_tag_is_found(tag: str) -> None:
    assert find_checkpoint(tag) is CHECKPOINTS[tag]
    assert find_checkpoint(CHECKPOINTS[tag].network) is CHECKPOINTS[tag]


@pytest.mark.parametrize("name", ["cspdarknet35.ra_in1k", "cspdarknet53.ra_in1k ", "csp_darknet53"])
def test_unknown_tag_names_the_nearest_and_all(name: str) -> None:
    with pytest.raises(InputError, match="unknown, known are ") as caught:
        find_checkpoint(name)
    assert "did you mean 'cspdarknet53.ra_in1k'?" in caught.value.fix
    assert all(tag in caught.value.message for tag in CHECKPOINTS)


@pytest.mark.parametrize("name", ["", "..", "/etc/passwd", "qqqqqqqq"])
def test_name_like_nothing(name: str) -> None:
    with pytest.raises(InputError, match="unknown") as caught:
        find_checkpoint(name)
    assert caught.value.fix == "see: cspdeploy list"


def test_network_with_several_checkpoints_lists_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHECKPOINTS, "cspdarknet53.new", dataclasses.replace(CHECKPOINTS[TAG], tag="cspdarknet53.new"))
    with pytest.raises(InputError, match=r"has 2 checkpoints: cspdarknet53.ra_in1k, cspdarknet53.new"):
        find_checkpoint("cspdarknet53")
    assert find_checkpoint("cspdarknet53.new").tag == "cspdarknet53.new"


def test_network_without_a_checkpoint_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(CHECKPOINTS, TAG)
    with pytest.raises(InputError, match="no checkpoint is published") as caught:
        find_checkpoint("cspdarknet53")
    assert "cspdeploy train cspdarknet53" in caught.value.fix


@pytest.mark.usefixtures("state")
@pytest.mark.parametrize("name", ["../escaped", ".hidden", "a/b", "a b", ""])
def test_folder_name_that_is_none(models: Path, name: str) -> None:
    with pytest.raises(InputError, match="--name: got"):
        pull_checkpoint(TAG, models=models, folder_name=name)
    assert not models.exists()
