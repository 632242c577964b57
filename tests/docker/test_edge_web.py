"""`docker/edge-web`: the page in a real browser, against Python.

Tests that are not `slow` need Node.js and neither its packages nor a browser.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
from PIL import Image

from cspdeploy.core.bundle import file_record, read_manifest, write_manifest
from cspdeploy.core.golden import read_golden, write_golden
from cspdeploy.core.metrics import softmax
from cspdeploy.core.preprocess import preprocess
from tests.docker.browser import Page, open_page
from tests.docker.node import DOCKER, copy_sources, node, npm_install
from tests.pictures import pictures

WEB = DOCKER / "edge-web"


@contextmanager
def _served(folder: Path) -> Iterator[str]:
    """The address of a folder, on a port of its own."""
    program = shutil.which("node")
    assert program is not None, "no Node.js: apt-get install nodejs"
    command = [program, str(WEB / "serve.mjs"), str(folder), "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().strip()
        finally:
            server.terminate()


def test_the_server_keeps_to_its_folder_and_says_what_threads_need(tmp_path: Path) -> None:
    page = tmp_path / "dist"
    page.mkdir()
    (page / "index.html").write_text("page")
    (page / "a.mjs").write_text("export {};")
    (tmp_path / "secret").write_text("secret")
    with _served(page) as address:
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
    with _served(tmp_path) as address:
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


# --------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy_sources(tmp_path_factory.mktemp("installed")) / "edge-web"
    npm_install(folder)
    return folder


@pytest.fixture(scope="module")
def built(installed: Path, tiny_int8_bundle: Path) -> Path:
    """The page with FP32, FP16 and INT8. Shared: a test that changes files copies the folder first."""
    done = node("build.mjs", tiny_int8_bundle, folder=installed)
    assert done.returncode == 0, done.stderr
    return installed / "dist"


@pytest.fixture(scope="module")
def address(built: Path) -> Iterator[str]:
    with _served(built) as url:
        yield url


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    with open_page(tmp_path / "profile") as opened:
        yield opened


@pytest.fixture
def changed(built: Path, tmp_path: Path) -> Path:
    """A copy of the page that may be broken."""
    return Path(shutil.copytree(built, tmp_path / "changed"))


def _python(bundle: Path, artifact: str, images: list[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float64]:
    """Probabilities `[N, C]` of the same file by ONNX Runtime in Python."""
    manifest = read_manifest(bundle)
    found = next(item for item in manifest.artifacts if item.kind == artifact)
    session = onnxruntime.InferenceSession(bundle / found.file, providers=["CPUExecutionProvider"])
    x_NCHW = preprocess(images, manifest.spec.preprocess)
    return softmax(np.concatenate([session.run(None, {found.inputs[0].name: x[None]})[0] for x in x_NCHW]))


def _shown(page: Page) -> list[tuple[int, float]]:
    """Index and probability of each class that the page lists."""
    code = "Array.from(document.querySelectorAll('#classes li'), (li) => [+li.dataset.index, +li.dataset.probability])"
    return [(int(index), float(probability)) for index, probability in page.run(code)]


def _text(page: Page, name: str) -> str:
    return str(page.run(f"document.getElementById({json.dumps(name)}).innerText"))


def _prove(page: Page) -> tuple[str, list[str]]:
    """What "Check this device" finds: the state of the page, and the class of each row."""
    page.run("document.body.dataset.state = 'asked'; document.getElementById('prove').click()")
    return page.settle(), page.run("Array.from(document.querySelectorAll('#checks li'), (li) => li.className)")


@pytest.mark.slow
@pytest.mark.parametrize("artifact", ["onnx", "onnx-fp16", "onnx-int8"])
def test_every_golden_image_gets_pythons_class(
    page: Page, address: str, tiny_int8_bundle: Path, tmp_path: Path, artifact: str
) -> None:
    images = list(read_golden(tiny_int8_bundle / "golden.npz").images)
    expected = _python(tiny_int8_bundle, artifact, images)
    page.open(f"{address}?artifact={artifact}")
    assert page.run("artifact.value") == artifact
    for index, (image, row) in enumerate(zip(images, expected, strict=True)):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
        assert page.choose(tmp_path / f"{index}.png") == "ready", _text(page, "error")
        shown = _shown(page)
        if artifact != "onnx-int8":  # where one 8-bit step of another build changes places further down
            assert [best for best, _ in shown] == list(np.argsort(-row, kind="stable")[:5])
        assert shown[0][0] == int(row.argmax())
        # Two builds of one engine: float32 in the graph, so 1e-5; an 8-bit step of INT8 moves a probability by more.
        assert shown[0][1] == pytest.approx(row.max(), abs=1e-2 if artifact == "onnx-int8" else 1e-5)
    assert page.messages == []
    assert _prove(page) == ("ready", ["pass", "pass"]), _text(page, "checks")


@pytest.mark.slow
def test_a_photograph_gets_pythons_classes_and_nothing_leaves_the_page(
    page: Page, address: str, tiny_int8_bundle: Path, tmp_path: Path
) -> None:
    photo = Image.fromarray(pictures(1, height=403, width=601)[0])
    turned = Image.Exif()
    turned[0x0112] = 6
    photo.save(tmp_path / "photo.jpg", quality=92, exif=turned)
    upright = np.asarray(Image.open(tmp_path / "photo.jpg").transpose(Image.Transpose.ROTATE_270))
    row = _python(tiny_int8_bundle, "onnx", [upright])[0]
    page.open(address)
    assert page.run("crossOriginIsolated")
    assert page.choose(tmp_path / "photo.jpg") == "ready", _text(page, "error")
    shown = _shown(page)
    assert shown[0][0] == int(row.argmax())
    # The browser's own JPEG decoder: a step or two of 255 in some pixels.
    assert shown[0][1] == pytest.approx(row.max(), abs=5e-3)
    assert "403x601 px" in _text(page, "status")
    for name in ("preprocessing", "inference"):
        assert re.fullmatch(r"\d+\.\d ms", _text(page, name))
    assert "WASM" in _text(page, "ran-on")
    hosts = [url for url in page.requests if not url.startswith((address, f"blob:{address}", "data:"))]
    assert hosts == []
    assert any(url.endswith(".wasm") for url in page.requests)
    assert page.run("fetch('https://example.org/').then(() => 'went out', () => 'refused')") == "refused"


@pytest.mark.slow
def test_a_transparent_image_is_classified_and_told_of(page: Page, address: str, tmp_path: Path) -> None:
    glass = Image.fromarray(pictures(1)[0]).convert("RGBA")
    glass.putalpha(128)
    glass.save(tmp_path / "glass.png")
    page.open(address)
    assert page.choose(tmp_path / "glass.png") == "ready"
    assert "transparent parts" in _text(page, "status")


@pytest.mark.slow
def test_what_is_no_image_is_explained_and_the_page_goes_on(page: Page, address: str, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not an image")
    Image.fromarray(pictures(1)[0]).save(tmp_path / "good.png")
    page.open(address)
    assert page.choose(tmp_path / "text.png") == "failed"
    assert "text.png: not an image that this browser can read. To mend it:" in _text(page, "error")
    assert _shown(page) == []
    assert page.choose(tmp_path / "good.png") == "ready"
    assert page.run("document.getElementById('error').hidden")
    assert len(_shown(page)) == 5


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["truncated", "altered", "missing", "manifest", "version"])
def test_a_half_copied_model_is_explained(page: Page, changed: Path, fault: str) -> None:
    model, manifest = changed / "model" / "tiny.onnx", changed / "model" / "manifest.json"
    whole, expected = model.read_bytes(), ""
    if fault == "truncated":
        model.write_bytes(whole[:-9])
        expected = f"tiny.onnx: {len(whole) - 9} bytes, the manifest says {len(whole)}"
    elif fault == "altered":
        model.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        expected = "tiny.onnx: SHA-256 differs from the manifest's"
    elif fault == "missing":
        model.unlink()
        expected = "tiny.onnx: 404 from the page's server"
    elif fault == "manifest":
        manifest.write_text("{")
        expected = "manifest.json: not JSON"
    else:
        manifest.write_text(manifest.read_text().replace('"schema_version": 3', '"schema_version": 99', 1))
        expected = "schema_version 99, expected 3"
    with _served(changed) as url:
        page.open(url)
        assert page.settle() == "failed"
        assert expected in _text(page, "error")
        assert page.messages == []


@pytest.mark.slow
def test_a_file_that_is_too_new_for_the_engine_names_both_versions(page: Page, changed: Path) -> None:
    folder = changed / "model"
    manifest = read_manifest(folder)
    (folder / "tiny.onnx").write_bytes(b"\x08\x63" + (folder / "tiny.onnx").read_bytes()[2:])  # IR version 99
    record = file_record(folder / "tiny.onnx")
    artifacts = tuple(
        dataclasses.replace(one, sha256=record.sha256, num_bytes=record.num_bytes) if one.kind == "onnx" else one
        for one in manifest.artifacts
    )
    write_manifest(folder, dataclasses.replace(manifest, artifacts=artifacts))
    version = json.loads((WEB / "package.json").read_text())["dependencies"]["onnxruntime-web"]
    with _served(changed) as url:
        page.open(url)
        assert page.settle() == "failed"
        assert f"tiny.onnx (opset 18): onnxruntime-web {version} does not open it" in _text(page, "error")


@pytest.mark.slow
def test_random_weights_are_told(page: Page, changed: Path, address: str) -> None:
    page.open(address)
    assert page.run("document.getElementById('untrained').hidden")
    manifest = changed / "model" / "manifest.json"
    manifest.write_text(re.sub(r'"source": "\w+"', '"source": "random"', manifest.read_text()))
    with _served(changed) as url:
        page.open(url)
        assert "UNTRAINED" in _text(page, "untrained")


@pytest.mark.slow
def test_the_check_fails_where_the_original_said_something_else(page: Page, changed: Path) -> None:
    folder = changed / "model"
    golden, manifest = read_golden(folder / "golden.npz"), read_manifest(folder)
    other = {name: array * 1.01 for name, array in golden.outputs_fp64.items()}
    write_golden(folder / "golden.npz", dataclasses.replace(
        golden, outputs_fp64=other, outputs_fp32={name: array.astype(np.float32) for name, array in other.items()}
    ))  # fmt: skip
    files = tuple(file_record(folder / record.file) for record in manifest.files)
    write_manifest(folder, dataclasses.replace(manifest, files=files))
    with _served(changed) as url:
        page.open(url)
        assert _prove(page) == ("ready", ["pass", "fail"])
        assert "something else" in _text(page, "status")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_and_can_be_read(page: Page, address: str, tmp_path: Path, width: int, scheme: str) -> None:
    Image.fromarray(pictures(1, height=300, width=900)[0]).save(tmp_path / "wide.png")
    page.prefer(scheme)
    page.resize(width, 900)
    page.open(address)
    page.choose(tmp_path / "wide.png")
    assert page.run("document.documentElement.scrollWidth <= innerWidth")
    ground, text = page.run("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
    assert (_luminance(ground) < _luminance(text)) == (scheme == "dark")
    lighter, darker = max(_luminance(ground), _luminance(text)), min(_luminance(ground), _luminance(text))
    assert (lighter + 0.05) / (darker + 0.05) >= 7  # WCAG 2.2, 1.4.6: the stricter level
    controls = "Array.from(document.querySelectorAll('input, select, button'))"
    assert page.run(f"{controls}.filter((one) => !(one.labels?.length || one.innerText)).length") == 0


@pytest.mark.slow
def test_long_names_are_broken_and_not_cut(page: Page, changed: Path, tmp_path: Path) -> None:
    path = changed / "model" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["labels"] = [f"{index}{'n' * 200}" for index in range(10)]
    manifest["spec"]["name"] = "m" * 300
    path.write_text(json.dumps(manifest))
    photo = tmp_path / f"{'p' * 200}.png"
    Image.fromarray(pictures(1)[0]).save(photo)
    page.resize(360, 900)
    with _served(changed) as url:
        page.open(url)
        assert page.choose(photo) == "ready"
        wide = "filter((one) => one.getBoundingClientRect().right > innerWidth).map((one) => one.id || one.tagName)"
        for asked in ("photograph", "proof"):
            assert asked == "photograph" or _prove(page) == ("ready", ["pass", "pass"])
            assert page.run("document.documentElement.scrollWidth <= innerWidth"), asked
            assert page.run(f"Array.from(document.querySelectorAll('body *')).{wide}") == [], asked


@pytest.mark.slow
def test_it_works_without_its_server_after_one_visit(page: Page, built: Path, tmp_path: Path) -> None:
    Image.fromarray(pictures(1)[0]).save(tmp_path / "a.png")
    with _served(built) as url:
        page.open(url)
        look = "const look = () => document.body.dataset.offline ? done(true) : setTimeout(look, 20)"
        assert page.run(f"new Promise((done) => {{ {look}; look(); }})")
        assert page.choose(tmp_path / "a.png") == "ready"
        online = _shown(page)
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url)  # noqa: S310
    page.open(f"{url}?artifact=onnx")
    assert page.settle() == "ready", _text(page, "error")
    assert page.run("crossOriginIsolated")
    assert page.choose(tmp_path / "a.png") == "ready", _text(page, "error")
    assert _shown(page) == online


@pytest.mark.slow
def test_a_session_is_let_go_before_the_next_one(page: Page, address: str, tmp_path: Path) -> None:
    page.open(address)
    code = """
        import('./lib/engine.js').then(({ Engine }) => {
          window.released = 0;
          const own = Engine.prototype.release;
          Engine.prototype.release = function () { window.released += 1; return own.call(this); };
        }).then(() => true)
    """
    assert page.run(code)
    for kind in ("onnx-fp16", "onnx"):
        page.run(
            "document.body.dataset.state = 'asked'; artifact.value = "
            f"{json.dumps(kind)}; artifact.dispatchEvent(new Event('change'))"
        )
        assert page.settle() == "ready", _text(page, "error")
    assert page.run("window.released") == 2


def _luminance(colour: str) -> float:
    """Relative luminance of `rgb(r, g, b)`, as WCAG 2.2 defines it."""
    levels = [int(level) / 255 for level in re.findall(r"\d+", colour)[:3]]
    linear = [level / 12.92 if level <= 0.04045 else ((level + 0.055) / 1.055) ** 2.4 for level in levels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.slow
def test_webgpu_gives_the_same_classes(address: str, tiny_int8_bundle: Path, tmp_path: Path) -> None:
    """On a processor's own Vulkan, where there is no graphics card: the same shaders, slowly."""
    with open_page(tmp_path / "profile", webgpu=True) as page:
        page.open(f"{address}?engine=webgpu")
        if page.run("document.querySelector('[value=webgpu]').disabled"):
            pytest.skip("this Chromium gives no WebGPU device")
        assert _prove(page) == ("ready", ["pass", "pass"]), _text(page, "checks") + _text(page, "error")
        image = read_golden(tiny_int8_bundle / "golden.npz").images[0]
        Image.fromarray(image).save(tmp_path / "first.png")
        assert page.choose(tmp_path / "first.png") == "ready"
        assert _shown(page)[0][0] == int(_python(tiny_int8_bundle, "onnx", [image])[0].argmax())
        assert _text(page, "ran-on") == "WebGPU"
