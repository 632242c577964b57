"""`docker/edge-web`: the page in a real browser, against Python. Needs Chromium, Node.js and npm."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
from PIL import Image

from cspdeploy.core.bundle import file_record, read_manifest, write_manifest
from cspdeploy.core.detection.spec import Decode
from cspdeploy.core.golden import read_golden, write_golden
from cspdeploy.core.metrics import softmax
from cspdeploy.core.preprocess import preprocess
from cspdeploy.edge import Predictor
from tests.docker.browser import Page, open_page
from tests.docker.node import DOCKER, copy_sources, make_too_new, node, npm_install, served
from tests.edge.detectors import ALL_DECODES, write_detector
from tests.pictures import pictures

WEB = DOCKER / "edge-web"


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
    with served(built) as url:
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
    with served(changed) as url:
        page.open(url)
        assert page.settle() == "failed"
        assert expected in _text(page, "error")
        assert page.messages == []


@pytest.mark.slow
def test_a_file_that_is_too_new_for_the_engine_names_both_versions(page: Page, changed: Path) -> None:
    make_too_new(changed / "model")
    version = json.loads((WEB / "package.json").read_text())["dependencies"]["onnxruntime-web"]
    with served(changed) as url:
        page.open(url)
        assert page.settle() == "failed"
        assert f"tiny.onnx (opset 18): onnxruntime-web {version} does not open it" in _text(page, "error")


@pytest.mark.slow
def test_random_weights_are_told(page: Page, changed: Path, address: str) -> None:
    page.open(address)
    assert page.run("document.getElementById('untrained').hidden")
    manifest = changed / "model" / "manifest.json"
    manifest.write_text(re.sub(r'"source": "\w+"', '"source": "random"', manifest.read_text()))
    with served(changed) as url:
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
    with served(changed) as url:
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
    with served(changed) as url:
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
    with served(built) as url:
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


@pytest.mark.slow
@pytest.mark.parametrize("decode", ALL_DECODES)
def test_a_detectors_boxes_are_found_and_drawn(page: Page, installed: Path, tmp_path: Path, decode: Decode) -> None:
    picture = np.full((200, 300, 3), 200, np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    folder = write_detector(tmp_path / "b", decode=decode)
    done = node("build.mjs", folder, "--output", tmp_path / "dist", folder=installed)
    assert done.returncode == 0, done.stderr
    expected = Predictor.open(folder)(picture)
    assert len(expected) > 5
    with served(tmp_path / "dist") as url:
        page.open(url)
        assert page.choose(tmp_path / "a.png") == "ready", _text(page, "error")
        names = ("left", "top", "right", "bottom", "score", "index")
        values = ", ".join(f"+li.dataset.{name}" for name in names)
        found = page.run(f"Array.from(document.querySelectorAll('#classes li'), (li) => [{values}])")
        listed = [[getattr(box, name) for name in names] for box in expected[:50]]  # the picture shows all of them
        np.testing.assert_allclose(found, listed, atol=2e-3)
        assert _text(page, "classes").splitlines()[0].startswith(expected[0].label)
        assert f"{len(expected)} boxes" in _text(page, "status")
        assert page.run("[drawn.width, drawn.height, drawn.hidden, preview.hidden]") == [300, 200, False, True]
        for box in expected[:3]:
            # The best boxes are drawn last: the middle of a lower edge, which no name covers, is in a class's colour.
            assert _colourful(page, (box.left + box.right) / 2, min(box.bottom, 199)), box
        assert _prove(page) == ("ready", ["pass", "pass"]), _text(page, "checks")
        assert page.messages == []


def _colourful(page: Page, x: float, y: float) -> bool:
    """Whether something other than the grey picture is drawn within two pixels of there."""
    code = f"Array.from(drawn.getContext('2d').getImageData({x:.0f} - 2, {y:.0f} - 2, 5, 5).data)"
    pixels = np.array(page.run(code)).reshape(-1, 4)[:, :3]
    return bool((np.ptp(pixels, axis=1) > 40).any())


@pytest.mark.slow
def test_a_picture_without_a_box_is_told(page: Page, installed: Path, tmp_path: Path) -> None:
    Image.fromarray(pictures(1)[0]).save(tmp_path / "a.png")
    outputs = {"boxes": np.zeros((1, 2, 4), np.float32), "scores": np.full((1, 2, 3), 0.2, np.float32)}
    folder = write_detector(tmp_path / "b", outputs=outputs)
    assert node("build.mjs", folder, "--output", tmp_path / "dist", folder=installed).returncode == 0
    with served(tmp_path / "dist") as url:
        page.open(url)
        assert page.choose(tmp_path / "a.png") == "ready", _text(page, "error")
        assert "no box above 0.25" in _text(page, "status")
        assert _shown(page) == []
        assert not page.run("drawn.hidden")
