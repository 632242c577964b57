"""`docker/edge-web` without a browser: how the page is built and served. Needs Node.js and none of its packages."""

from __future__ import annotations

import re
import shutil
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.docker.node import DOCKER, copy_sources, node, served

WEB = DOCKER / "edge-web"


def test_the_server_keeps_to_its_folder_and_says_what_threads_need(tmp_path: Path) -> None:
    page = tmp_path / "dist"
    page.mkdir()
    (page / "index.html").write_text("page")
    (page / "a.mjs").write_text("export {};")
    (tmp_path / "secret").write_text("secret")
    with served(page) as address:
        with urllib.request.urlopen(address) as answer:  # noqa: S310
            assert answer.read() == b"page"
            assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
            assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        with urllib.request.urlopen(f"{address}a.mjs") as answer:  # noqa: S310
            assert answer.headers["Content-Type"] == "text/javascript"
        for path in ("../secret", "%2e%2e/secret", "..%2fsecret", "none", "%ff"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(address + path)  # noqa: S310


@pytest.mark.parametrize(
    ("arguments", "told"), [(("dist", "x"), "port x: expected"), (("none",), "none: holds no index.html")]
)
def test_the_server_refuses_in_one_line(tmp_path: Path, arguments: tuple[str, ...], told: str) -> None:
    done = node(WEB / "serve.mjs", *arguments, folder=tmp_path)
    assert done.returncode == 2
    assert told in done.stderr
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["error", "fix"]


def test_a_port_that_is_taken_is_told(tmp_path: Path) -> None:
    (tmp_path / "index.html").touch()
    with served(tmp_path) as address:
        done = node(WEB / "serve.mjs", tmp_path, address.rstrip("/").rpartition(":")[2])
    assert (done.returncode, "EADDRINUSE" in done.stderr) == (2, True)


def test_the_image_serves_with_the_same_headers_and_types() -> None:
    local, image = (WEB / "serve.mjs").read_text(), (WEB / "nginx.conf").read_text()
    for name in ("Cross-Origin-Embedder-Policy", "Cross-Origin-Opener-Policy", "X-Content-Type-Options"):
        value = re.search(f'"{name}": "([^"]+)"', local)
        assert value is not None
        assert f"add_header {name} {value[1]} always;" in image
    types = dict(re.findall(r'"\.(\w+)": "([^;"]+)', local))
    listed = {
        ending: kind
        for kind, endings in re.findall(r"^    (\S+/\S+) ([\w ]+);", image, re.M)
        for ending in endings.split()
    }
    assert types == listed


def test_the_page_names_no_other_host() -> None:
    for path in [
        WEB / "index.html",
        WEB / "style.css",
        WEB / "app.js",
        WEB / "sw.js",
        *sorted((WEB / "lib").iterdir()),
    ]:
        addresses = set(re.findall(r"https?://[^\s\"']+", path.read_text())) - {"http://www.w3.org/2000/svg"}
        assert addresses == set(), path.name
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', (WEB / "index.html").read_text())
    assert policy is not None
    assert "default-src 'none'" in policy[1]
    assert "connect-src 'self'" in policy[1]
    assert "unsafe-inline" not in policy[1]


def test_build_refuses_in_one_line(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = copy_sources(tmp_path / "sources") / "edge-web"
    kept = tmp_path / "mine"
    kept.mkdir()
    (kept / "thesis.txt").write_text("mine")

    def refused(*arguments: object) -> str:
        done = node(folder / "build.mjs", *arguments, folder=tmp_path)
        assert done.returncode == 2
        assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["error", "fix"], done.stderr
        return done.stderr

    assert "is not a built page" in refused(tiny_bundle, "--output", kept)
    assert "onnxruntime-web is missing" in refused(tiny_bundle)
    vendor = folder / "node_modules" / "onnxruntime-web" / "dist"
    vendor.mkdir(parents=True)
    for name in re.findall(r'"(ort[^"]+\.(?:mjs|wasm))"', (folder / "build.mjs").read_text()):
        (vendor / name).touch()  # nothing is run here
    assert "manifest.json: no such file" in refused(tmp_path / "none")
    assert "no artifact 'onnx-int7'" in refused(tiny_bundle, "--artifact", "onnx-int7")
    hollow = Path(shutil.copytree(tiny_bundle, tmp_path / "hollow"))
    for text, told in (("null", "schema_version undefined"), ("{", "not JSON"), ('{"schema_version": 3}', "missing")):
        (hollow / "manifest.json").write_text(text)
        assert told in refused(hollow)
    shutil.rmtree(hollow)
    broken = Path(shutil.copytree(tiny_bundle, tmp_path / "broken"))
    (broken / "tiny.onnx").write_bytes(b"half")
    assert "SHA-256 differs" in refused(broken)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "mine", "sources"], (
        "something was left behind"
    )
    assert (kept / "thesis.txt").read_text() == "mine"
    assert node(folder / "build.mjs", tiny_bundle, "--artifact", "onnx", folder=tmp_path).returncode == 0
    assert {path.name for path in (tmp_path / "dist" / "model").iterdir()} == {
        "golden.npz", "labels.txt", "manifest.json", "tiny.onnx",
    }  # fmt: skip
