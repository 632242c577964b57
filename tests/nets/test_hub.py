"""Fetching checkpoints, against a stand-in hub on 127.0.0.1 and the real huggingface_hub library.

The library reads its settings when it is imported, so every fetch is a process of its own, with the settings in its
environment. Its sleeps are added up instead of slept: the sum is what a user would wait between tries.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

import cspdeploy
from cspdeploy.core.errors import InputError, MissingExtraError
from cspdeploy.nets import hub

TAG = "cspdarknet53.ra_in1k"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILE_PATH = f"/timm/{TAG}/resolve/main/model.safetensors"
PICKLE_PATH = f"/timm/{TAG}/resolve/main/pytorch_model.bin"
CDN_PATH = "/cdn/model.safetensors"
TENSORS = {"stem.conv1.weight": np.arange(4096, dtype=np.float32).reshape(32, 128)}
CHECKPOINT = save(TENSORS)
SHA256 = hashlib.sha256(CHECKPOINT).hexdigest()
OTHER_SHA256 = "0" * 64
OVER_ONE_CHUNK_BYTES = (10 << 20) + 4096  # the library takes data in chunks of 10 MiB, and only then counts it
MAX_WAIT_S = 60
PROCESS_LIMIT_S = 120

FETCH = """
import json, sys, time
waits = []
time.sleep = waits.append
from cspdeploy.core.errors import CspDeployError
from cspdeploy.nets import hub
tag, pin = sys.argv[1:]
if pin:
    hub.PINNED_SHA256[tag] = pin
try:
    fetched = hub.fetch_checkpoint(tag)
    result = {"path": str(fetched.path), "sha256": fetched.sha256, "origin": fetched.origin}
except CspDeployError as error:
    result = {"kind": type(error).__name__, "error": error.message, "fix": error.fix}
print(json.dumps({**result, "waited_s": sum(waits)}))
"""

needs_library = pytest.mark.skipif(
    importlib.util.find_spec("huggingface_hub") is None, reason="huggingface_hub is not installed"
)


class StandInServer(ThreadingHTTPServer):
    """Answers as the stand-in hub that it belongs to says."""

    daemon_threads = True

    def __init__(self, owner: StandInHub) -> None:
        super().__init__(("127.0.0.1", 0), StandInHandler)
        self.owner = owner
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class StandInHandler(BaseHTTPRequestHandler):
    """One file, with the headers that the hub and its CDN send. Ranges are not taken, as with some mirrors."""

    protocol_version = "HTTP/1.1"
    server: StandInServer

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, *args: Any, **kwargs: Any) -> None:
        """Quiet."""

    def _answer(self, *, with_body: bool) -> None:
        owner = self.server.owner
        if self.path not in (
            FILE_PATH,
            PICKLE_PATH,
            CDN_PATH,
        ):  # the library also asks for a list that it can do without
            self._send(404, {}, b"{}" if with_body else b"")
            return
        owner.requests.append(f"{self.command} {self.path}")
        if owner.silent.is_set():
            owner.released.wait(PROCESS_LIMIT_S)
            self.close_connection = True
        elif self.path in owner.missing:
            self._send(404, {"X-Error-Code": "EntryNotFound"}, b"{}" if with_body else b"")
        elif (status := owner.get_status if with_body else owner.head_status) != 200:
            self._send(status, owner.error_headers, b"{}" if with_body else b"")
        elif self.path == CDN_PATH:
            self._send_file({"ETag": '"of-the-storage"'}, with_body=with_body)
        elif owner.cdn is not None:
            self._send(302, owner.headers | {"Location": owner.cdn.url + CDN_PATH}, b"")
        else:
            self._send_file(owner.headers, with_body=with_body)

    def _send_file(self, headers: dict[str, str], *, with_body: bool) -> None:
        body = self.server.owner.body
        self._send_head(200, headers | {"Accept-Ranges": "none"}, len(body))
        if with_body:
            cut_at = self.server.owner.cut_at_byte
            self.wfile.write(body[:cut_at])
            self.close_connection |= cut_at is not None

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self._send_head(status, headers, len(body))
        self.wfile.write(body)

    def _send_head(self, status: int, headers: dict[str, str], num_bytes: int) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(num_bytes)}.items():
            self.send_header(name, value)
        self.end_headers()


@dataclass(kw_only=True)
class StandInHub:
    """What the stand-in serves and how it misbehaves; and what it was asked."""

    body: bytes = CHECKPOINT
    headers: dict[str, str] = field(default_factory=lambda: hub_headers(CHECKPOINT))
    head_status: int = 200
    get_status: int = 200
    error_headers: dict[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = (PICKLE_PATH,)
    cut_at_byte: int | None = None
    silent: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)
    cdn: StandInServer | None = None
    requests: list[str] = field(default_factory=list)

    def num_requests(self, method: str) -> int:
        return sum(request.startswith(method) for request in self.requests)


@dataclass(frozen=True, kw_only=True)
class Place:
    """A stand-in hub, an empty cache, and how to fetch between them."""

    hub: StandInHub
    server: StandInServer
    home: Path
    fetch: Callable[..., dict[str, Any]]

    @property
    def cached_files(self) -> list[Path]:
        """Everything in the cache that could be taken for a checkpoint, whole or not."""
        found = [*self.home.rglob("blobs/*"), *self.home.rglob("*.safetensors"), *self.home.rglob("*.incomplete")]
        return [path for path in found if not path.name.endswith(".lock")]


def hub_headers(body: bytes, *, sha256: str = "") -> dict[str, str]:
    return {
        "X-Repo-Commit": COMMIT,
        "X-Linked-Etag": f'"{sha256 or hashlib.sha256(body).hexdigest()}"',
        "X-Linked-Size": str(len(body)),
        "ETag": '"of-the-pointer"',
    }


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    stand_in = StandInHub()
    server = StandInServer(stand_in)
    home = tmp_path / "hf"

    def fetch(*, pin: str = "", **settings: str) -> dict[str, Any]:
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(Path(cspdeploy.__file__).parents[1]),
            "HOME": str(tmp_path),
            "NO_PROXY": "*",
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(home),
            **settings,
        }
        command = [sys.executable, "-c", FETCH, TAG, pin]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=PROCESS_LIMIT_S, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        result: dict[str, Any] = json.loads(done.stdout)
        assert result["waited_s"] <= MAX_WAIT_S
        return result

    yield Place(hub=stand_in, server=server, home=home, fetch=fetch)
    stand_in.released.set()
    server.stop()
    if stand_in.cdn is not None:
        stand_in.cdn.stop()


def assert_refused(result: dict[str, Any], *words: str) -> None:
    """An `InputError` of one line, with those words and with a fix."""
    assert result.get("kind") == "InputError", result
    assert TAG in result["error"]
    assert "\n" not in result["error"] + result["fix"]
    assert result["fix"]
    for word in words:
        assert word in result["error"] + result["fix"]


def assert_good(result: dict[str, Any]) -> None:
    """The right bytes, hash and origin."""
    assert "error" not in result, result
    path = Path(result["path"])
    assert path.name == "model.safetensors"
    assert path.read_bytes() == CHECKPOINT
    assert result["sha256"] == SHA256
    assert result["origin"] == f"hf://timm/{TAG}@{COMMIT}/model.safetensors"
    np.testing.assert_array_equal(load(path.read_bytes())["stem.conv1.weight"], TENSORS["stem.conv1.weight"])


@needs_library
@pytest.mark.parametrize("over_cdn", [False, True], ids=["from-the-hub", "over-a-cdn"])
def test_fetch_gives_the_file_its_hash_and_its_origin(place: Place, *, over_cdn: bool) -> None:
    if over_cdn:
        place.hub.cdn = StandInServer(place.hub)
    assert_good(place.fetch())
    assert place.hub.requests[-1] == f"GET {CDN_PATH if over_cdn else FILE_PATH}"


@needs_library
def test_second_fetch_comes_from_the_cache(place: Place) -> None:
    first = place.fetch()
    assert_good(first)
    second = place.fetch()
    assert second == first
    assert place.hub.num_requests("GET") == 1


@needs_library
def test_repository_without_safetensors_gives_its_pickle(place: Place) -> None:
    place.hub.missing = (FILE_PATH,)
    first = place.fetch()
    assert "error" not in first, first
    assert Path(first["path"]).name == "pytorch_model.bin"
    assert Path(first["path"]).read_bytes() == CHECKPOINT
    assert (first["sha256"], first["origin"]) == (SHA256, f"hf://timm/{TAG}@{COMMIT}/pytorch_model.bin")
    assert place.hub.requests[:2] == [f"HEAD {FILE_PATH}", f"HEAD {PICKLE_PATH}"]
    assert place.fetch(HF_HUB_OFFLINE="1") == first


@needs_library
def test_pickle_is_not_taken_where_there_is_safetensors(place: Place) -> None:
    place.hub.missing = ()
    assert_good(place.fetch())
    assert not any(PICKLE_PATH in request for request in place.hub.requests)


@needs_library
def test_pickle_with_another_hash_is_refused(place: Place) -> None:
    place.hub.missing = (FILE_PATH,)
    place.hub.body = CHECKPOINT[:-1] + b"\xff"
    assert_refused(place.fetch(), SHA256, "removed from the cache")
    assert place.cached_files == []


@needs_library
def test_pinned_tag_is_never_fetched_as_a_pickle(place: Place) -> None:
    place.hub.missing = (FILE_PATH,)
    assert_refused(place.fetch(pin=SHA256), "HTTP 404")
    assert place.hub.requests == [f"HEAD {FILE_PATH}"]


@needs_library
def test_repository_without_either_file_is_refused(place: Place) -> None:
    place.hub.missing = (FILE_PATH, PICKLE_PATH)
    assert_refused(place.fetch(), "HTTP 404", "--weights FILE")
    assert place.hub.num_requests("GET") == 0


@needs_library
def test_offline_mode_uses_the_cache_and_asks_nobody(place: Place) -> None:
    assert_good(place.fetch())
    place.hub.requests.clear()
    assert_good(place.fetch(HF_HUB_OFFLINE="1"))
    assert place.hub.requests == []


@needs_library
def test_cached_file_is_used_while_the_hub_is_down(place: Place) -> None:
    assert_good(place.fetch())
    place.hub.head_status = 503
    assert_good(place.fetch())
    place.server.stop()
    assert_good(place.fetch())


@needs_library
def test_offline_mode_without_a_cached_file_is_refused(place: Place) -> None:
    result = place.fetch(HF_HUB_OFFLINE="1")
    assert_refused(result, "HF_HUB_OFFLINE", "--weights FILE", "go online")
    assert place.hub.requests == []


@needs_library
def test_no_server_is_refused_without_waiting(place: Place) -> None:
    place.server.stop()
    result = place.fetch()
    assert_refused(result, place.server.url.removeprefix("http://"), "--weights FILE", "go online")
    assert result["waited_s"] == 0


@needs_library
def test_silent_server_is_refused(place: Place) -> None:
    place.hub.silent.set()
    assert_refused(place.fetch(HF_HUB_ETAG_TIMEOUT="1", HF_HUB_DISABLE_TELEMETRY="1"), "timed out", "go online")
    assert place.hub.requests == [f"HEAD {FILE_PATH}"]


@needs_library
def test_file_with_another_hash_is_refused_and_fetched_again(place: Place) -> None:
    place.hub.body = CHECKPOINT[:-1] + b"\xff"
    assert_refused(place.fetch(), SHA256, hashlib.sha256(place.hub.body).hexdigest(), "removed from the cache")
    assert place.cached_files == []
    assert_refused(place.fetch(HF_HUB_OFFLINE="1"), "not in the cache")

    place.hub.body = CHECKPOINT
    assert_good(place.fetch())
    assert place.hub.num_requests("GET") == 2


@needs_library
@pytest.mark.parametrize("offline", ["0", "1"], ids=["online", "offline"])
def test_cached_file_that_was_altered_is_refused_and_removed(place: Place, *, offline: str) -> None:
    path = Path(place.fetch()["path"])
    path.write_bytes(CHECKPOINT[:-1] + b"\xff")
    assert_refused(place.fetch(HF_HUB_OFFLINE=offline), SHA256, "removed from the cache")
    assert place.cached_files == []
    assert_good(place.fetch())


@needs_library
def test_file_outside_the_cache_is_not_removed(place: Place, tmp_path: Path) -> None:
    path = Path(place.fetch()["path"])
    mine = tmp_path / "mine.safetensors"
    mine.write_bytes(b"another file, linked into the cache by hand")
    path.unlink()
    path.symlink_to(mine)
    assert_refused(place.fetch(), SHA256)
    assert mine.exists()
    assert not path.is_symlink()


@needs_library
def test_pinned_hash_is_asked_of_the_hub_before_the_download(place: Place) -> None:
    assert_refused(place.fetch(pin=OTHER_SHA256), SHA256, OTHER_SHA256, "pinned")
    assert place.hub.num_requests("GET") == 0
    assert_good(place.fetch(pin=SHA256))


@needs_library
def test_pinned_hash_is_asked_of_a_cached_file(place: Place) -> None:
    assert_good(place.fetch())
    assert_good(place.fetch(pin=SHA256, HF_HUB_OFFLINE="1"))
    assert_refused(place.fetch(pin=OTHER_SHA256, HF_HUB_OFFLINE="1"), SHA256, OTHER_SHA256, "pinned")


@needs_library
def test_cache_without_links_keeps_no_hash_so_it_needs_the_hub_or_a_pin(place: Place) -> None:
    no_links = {"HF_HUB_DISABLE_SYMLINKS": "1"}
    assert_good(place.fetch(**no_links))
    assert_good(place.fetch(**no_links))
    assert place.hub.num_requests("GET") == 1
    assert_refused(place.fetch(**no_links, HF_HUB_OFFLINE="1"), "without the hash")
    assert_good(place.fetch(**no_links, HF_HUB_OFFLINE="1", pin=SHA256))


@needs_library
def test_connection_cut_half_way_leaves_nothing(place: Place) -> None:
    place.hub.cut_at_byte = len(CHECKPOINT) // 2
    assert_refused(place.fetch(), "not fetched", "--weights FILE")
    assert place.cached_files == []
    assert place.hub.num_requests("GET") <= hub.MAX_GETS

    place.hub.cut_at_byte = None
    assert_good(place.fetch())


@needs_library
def test_download_that_is_cut_and_restarted_for_ever_ends(place: Place) -> None:
    place.hub.body = bytes(OVER_ONE_CHUNK_BYTES + 1)
    place.hub.headers = hub_headers(place.hub.body)
    place.hub.cut_at_byte = OVER_ONE_CHUNK_BYTES
    assert_refused(place.fetch(), f"cut or sent elsewhere {hub.MAX_GETS} times")
    assert place.cached_files == []
    assert place.hub.num_requests("GET") == 1 + hub.MAX_GETS  # the first one got as far as none after it


@needs_library
def test_shorter_file_than_stated_is_refused(place: Place) -> None:
    place.hub.body = CHECKPOINT[:-1]
    assert_refused(place.fetch(), "not fetched")
    assert place.cached_files == []


@needs_library
@pytest.mark.parametrize("status", [401, 403, 404])
def test_refusal_of_the_hub_is_final(place: Place, *, status: int) -> None:
    assert_good(place.fetch())
    place.hub.requests.clear()
    place.hub.head_status = status
    place.hub.error_headers = {"X-Error-Code": "RepoNotFound"} if status == 404 else {}
    assert_refused(place.fetch(), f"HTTP {status}", "--weights FILE")
    assert place.hub.requests == [f"HEAD {FILE_PATH}"]


@needs_library
@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_hub_that_is_down_or_asks_to_wait_is_not_waited_for(place: Place, *, method: str, status: int) -> None:
    setattr(place.hub, f"{method.lower()}_status", status)
    place.hub.error_headers = {"Retry-After": "86400"}
    result = place.fetch()
    assert_refused(result, f"HTTP {status}", "--weights FILE")
    assert result["waited_s"] == 0
    assert place.cached_files == []


@needs_library
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"X-Linked-Etag": '"' + "a" * 40 + '"'}, "no SHA-256"),
        ({"X-Linked-Etag": '"../../' + "a" * 64 + '"'}, "no SHA-256"),
        ({"X-Repo-Commit": "", "X-Linked-Etag": ""}, "no SHA-256"),
        ({"X-Repo-Commit": "../../elsewhere"}, "40 hexadecimal digits"),
        ({"X-Linked-Size": str(hub.MAX_FILE_BYTES + 1)}, str(hub.MAX_FILE_BYTES)),
    ],
    ids=["git-hash", "path-as-hash", "not-a-hub", "path-as-commit", "too-large"],
)
def test_answer_that_cannot_be_checked_is_refused(place: Place, *, change: dict[str, str], words: str) -> None:
    place.hub.headers |= change
    assert_refused(place.fetch(), words)
    assert place.hub.num_requests("GET") == 0
    assert place.cached_files == []


@needs_library
def test_cache_that_cannot_be_written_is_named(place: Place, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert_refused(place.fetch(HF_HOME=str(tmp_path / "file" / "hf")), "the cache cannot be used", "HF_HOME")


@needs_library
@pytest.mark.parametrize("tag", ["", "../secret", "timm/resnet50", "a--b", "a..b", "-a", "a\nb", "a?b"])
def test_name_that_is_no_tag_is_refused(tag: str) -> None:
    with pytest.raises(InputError, match="not a name"):
        hub.fetch_checkpoint(tag)


def test_absent_library_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"huggingface_hub.*cspdeploy\[hub\]"):
        hub.fetch_checkpoint(TAG)


def test_pins_are_hashes() -> None:
    assert all(len(pin) == 64 and set(pin) <= set("0123456789abcdef") for pin in hub.PINNED_SHA256.values())
