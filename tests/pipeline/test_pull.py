"""Pulling checkpoints from a stand-in hub on 127.0.0.1 that serves real files of a real, small network.

The network stands in a row of the registry, in the place of the large one; the hub library, its cache and all of the
code are the real ones.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import io
import os
import pickle
import resource
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load, load_file, save
from torch import Tensor

from cspdeploy.core.bundle import MODEL_FOLDER, staged_folder
from cspdeploy.core.errors import InputError
from cspdeploy.core.imagenet import recognise_order
from cspdeploy.core.model_folder import read_labels, read_spec
from cspdeploy.core.spec import Accuracy
from cspdeploy.nets.checkpoints import CHECKPOINTS
from cspdeploy.nets.cspnet import CspNetConfig
from cspdeploy.nets.hub import MAX_GETS
from cspdeploy.nets.registry import NETWORKS, build, spec_of
from cspdeploy.pipeline import pull
from cspdeploy.pipeline.pull import PullReport, find_checkpoint, pull_checkpoint
from cspdeploy.pipeline.source import resolve_source

TAG = "cspdarknet53.ra_in1k"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CHUNK_BYTES = 4096  # of the library: it resumes after whole ones
MAX_WAIT_S = 60

Pull = Callable[..., PullReport]


class Handler(BaseHTTPRequestHandler):
    """One file, in ranges where they are asked for, as the hub gives it."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, *args: Any, **kwargs: Any) -> None:
        """Quiet."""

    def _answer(self, *, with_body: bool) -> None:
        hub = self.server.hub
        if self.path != f"/timm/{TAG}/resolve/main/{hub.file}":
            self._send_head(404, {"X-Error-Code": "EntryNotFound"}, 0)
            return
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        headers = {
            "X-Repo-Commit": COMMIT,
            "X-Linked-Etag": f'"{hub.stated_sha256 or hashlib.sha256(hub.body).hexdigest()}"',
            "X-Linked-Size": str(len(hub.body)),
            "Accept-Ranges": "bytes",
            **({"Content-Range": f"bytes {start}-{len(hub.body) - 1}/{len(hub.body)}"} if start else {}),
        }
        self._send_head(206 if start else 200, headers, len(hub.body) - start)
        if with_body:
            hub.starts.append(start)
            cut_at = hub.cuts.pop(0) if hub.cuts else None
            self.wfile.write(hub.body[start:cut_at])
            self.close_connection |= cut_at is not None
            if cut_at is not None and hub.when_cut:
                self.wfile.flush()
                hub.when_cut()

    def _send_head(self, status: int, headers: dict[str, str], num_bytes: int) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(num_bytes)}.items():
            self.send_header(name, value)
        self.end_headers()


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: Hub) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub = hub
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


@dataclass(kw_only=True)
class Hub:
    """What the stand-in serves, where it cuts the connection, and from which byte on it was asked for data."""

    body: bytes
    file: str = "model.safetensors"
    stated_sha256: str = ""
    cuts: list[int] = field(default_factory=list)
    when_cut: Callable[[], object] | None = None
    starts: list[int] = field(default_factory=list)


@pytest.fixture
def state(tiny_config: CspNetConfig, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The published weights. From here on the registry builds the small network under the checkpoint's name."""
    row = dataclasses.replace(NETWORKS["cspdarknet53"], config=tiny_config)
    monkeypatch.setitem(NETWORKS, "cspdarknet53", row)
    torch.manual_seed(3)
    return build(spec_of(row)).state_dict()


@pytest.fixture
def hub(state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub library, with an empty cache, asks this one."""
    library = pytest.importorskip("huggingface_hub")
    constants = importlib.import_module("huggingface_hub.constants")
    stand_in = Hub(body=save(state))
    server = Server(stand_in)
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("NO_PROXY", "*")
    for name, value in {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": False,
        "DOWNLOAD_CHUNK_SIZE": CHUNK_BYTES,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the library's waits between tries
    library.close_session()
    yield stand_in
    library.close_session()
    server.shutdown()
    server.server_close()


@pytest.fixture
def go_offline(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    constants = pytest.importorskip("huggingface_hub.constants")
    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def pulled(hub: Hub, models: Path) -> Pull:
    """`pulled(overwrite=True)`: a pull of the tag into `models`."""
    return lambda name=TAG, **options: pull_checkpoint(name, **({"models": models} | options))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def left_in(models: Path) -> list[str]:
    """All that lies there; a lock file that nobody holds is harmless."""
    return sorted(path.name for path in models.iterdir() if path.suffix != ".lock") if models.is_dir() else []


def other_state(config: CspNetConfig) -> dict[str, Tensor]:
    """Weights of a network with one stage less."""
    smaller = dataclasses.replace(
        NETWORKS["cspdarknet53"], config=dataclasses.replace(config, stages=config.stages[:-1])
    )
    return build(spec_of(smaller)).state_dict()


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
