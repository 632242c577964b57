"""A hub on 127.0.0.1 that serves one real file of a real, small network, in ranges, and cuts where it is told to."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from torch import Tensor

from cspdeploy.nets.cspnet import CspNetConfig
from cspdeploy.nets.registry import NETWORKS, build, spec_of
from cspdeploy.pipeline.pull import PullReport

TAG = "cspdarknet53.ra_in1k"

COMMIT = "0123456789abcdef0123456789abcdef01234567"

CHUNK_BYTES = 4096  # of the library: it resumes after whole ones

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
