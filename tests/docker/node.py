"""Node.js, as the tests of the JavaScript examples run it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cspdeploy.core.bundle import file_record, read_manifest, write_manifest

DOCKER = Path(__file__).parents[2] / "docker"
LIB = DOCKER / "edge-web" / "lib"


def node(*arguments: object, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `node`; its exit status, output and errors."""
    program = shutil.which("node")
    assert program is not None, "no Node.js: apt-get install nodejs"
    return subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True, cwd=folder, timeout=110, check=False
    )


def run_module(code: str, *arguments: object) -> Any:
    """What a module prints as JSON; `$LIB` in `code` is the folder of the shared modules."""
    done = node("--input-type=module", "-e", code.replace("$LIB", LIB.as_uri()), *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def copy_sources(target: Path) -> Path:
    """Both examples without what npm may have put beside them; the folder that holds them."""
    for name in ("edge-node", "edge-web"):
        shutil.copytree(DOCKER / name, target / name, ignore=shutil.ignore_patterns("node_modules", "dist"))
    return target


def npm_install(folder: Path) -> None:
    """The packages of the lock file, as the Dockerfiles install them."""
    program = shutil.which("npm")
    assert program is not None, "no npm: apt-get install npm"
    subprocess.run(
        [program, "ci", "--omit=dev", "--ignore-scripts", "--no-audit", "--no-fund"],
        cwd=folder, env={**os.environ, "ONNXRUNTIME_NODE_INSTALL": "skip"}, check=True, capture_output=True,
        timeout=600,
    )  # fmt: skip


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a folder, on a port of its own."""
    program = shutil.which("node")
    assert program is not None, "no Node.js: apt-get install nodejs"
    command = [program, str(DOCKER / "edge-web" / "serve.mjs"), str(folder), "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().strip()
        finally:
            server.terminate()


def make_too_new(bundle: Path) -> None:
    """Give the ONNX file of a bundle of "tiny" a version of its format that no engine knows yet."""
    path, manifest = bundle / "tiny.onnx", read_manifest(bundle)
    path.write_bytes(b"\x08\x63" + path.read_bytes()[2:])  # IR version 99
    record = file_record(path)
    artifacts = tuple(
        dataclasses.replace(one, sha256=record.sha256, num_bytes=record.num_bytes) if one.kind == "onnx" else one
        for one in manifest.artifacts
    )
    write_manifest(bundle, dataclasses.replace(manifest, artifacts=artifacts))
