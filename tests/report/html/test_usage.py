"""The snippets, run as an application would: without cspdeploy."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cspdeploy.core.golden import Golden
from cspdeploy.core.preprocess import preprocess
from cspdeploy.core.results import VerifyReport
from cspdeploy.core.spec import Preprocess
from cspdeploy.core.types import Artifact, Manifest, TensorInfo
from cspdeploy.report.html import render_report
from cspdeploy.report.html.usage import cpp_snippet, node_snippet, python_snippet

NODE = shutil.which("node")
CONTRACTS = [
    {"resize": "crop", "crop_pct": 0.875, "interpolation": "bicubic"},
    {"resize": "crop", "crop_pct": 1.0, "interpolation": "bilinear", "channel_order": "bgr"},
    {"resize": "stretch", "interpolation": "nearest"},
    {"resize": "letterbox", "interpolation": "bilinear", "height_px": 24, "std": (0.2, 0.3, 0.4)},
]


class _CodeReader(HTMLParser):
    """The code blocks of a page, as a browser would show them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self._language = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "code":
            self._language = (dict(attrs).get("class") or "").removeprefix("language-")

    def handle_endtag(self, tag: str) -> None:
        if tag == "code":
            self._language = ""

    def handle_data(self, data: str) -> None:
        if self._language:
            self.found[self._language] = self.found.get(self._language, "") + data


def _page_snippets(folder: Path, manifest: Manifest, golden: Golden, report: VerifyReport) -> dict[str, str]:
    reader = _CodeReader()
    reader.feed(render_report(folder, manifest=manifest, golden=golden, report=report))
    return {name: code for name, code in reader.found.items() if name in ("python", "node", "cpp")}


def _run_python(source: str, folder: Path) -> str:
    """In the folder of the bundle; cspdeploy cannot be imported."""
    blocked = f"import sys; sys.modules['cspdeploy'] = None\n{source}"
    done = subprocess.run(
        [sys.executable, "-I", "-c", blocked], cwd=folder, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_python_as_the_page_shows_it_gives_the_golden_class(
    tiny_bundle: Path, tiny_manifest: Manifest, tiny_golden: Golden, tiny_report: VerifyReport, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "tiny"))
    source = _page_snippets(tiny_bundle, tiny_manifest, tiny_golden, tiny_report)["python"]
    expected = tiny_golden.outputs_fp64["logits"].argmax(axis=1)
    for i in (0, 7):
        Image.fromarray(tiny_golden.images[i]).save(folder / "photo.jpg", "PNG")  # lossless under that name
        assert _run_python(source, folder) == tiny_manifest.labels[expected[i]]


@pytest.mark.parametrize("changes", CONTRACTS)
def test_python_makes_the_pixels_of_the_contract(
    tiny_manifest: Manifest, tiny_contract: Preprocess, tmp_path: Path, changes: dict[str, object]
) -> None:
    """All lines up to the session, against `cspdeploy.core.preprocess`."""
    contract = dataclasses.replace(tiny_contract, **changes)  # type: ignore[arg-type]
    manifest = _with_contract(tiny_manifest, contract)
    for size in ((90, 61), (20, 44)):
        picture = np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(picture).save(tmp_path / "photo.jpg", "PNG")
        source = python_snippet(manifest, manifest.artifacts[1]).partition("session =")[0]
        _run_python(f'{source}\nnp.save("x.npy", x)', tmp_path)
        np.testing.assert_allclose(np.load(tmp_path / "x.npy"), preprocess([picture], contract), rtol=0, atol=1e-5)


def _with_contract(manifest: Manifest, contract: Preprocess) -> Manifest:
    return dataclasses.replace(manifest, spec=dataclasses.replace(manifest.spec, preprocess=contract))


def _batched(artifact: Artifact, batch: int | str) -> Artifact:
    value = artifact.inputs[0]
    info = TensorInfo(name=value.name, dtype=value.dtype, shape=(batch, *value.shape[1:]))
    return dataclasses.replace(artifact, inputs=(info,))


def test_a_fixed_batch_is_filled(tiny_manifest: Manifest) -> None:
    artifact = _batched(tiny_manifest.artifacts[1], 4)
    assert ".repeat(4, axis=0)" in python_snippet(tiny_manifest, artifact)
    assert "[4, 3, 32, 32]" in node_snippet(tiny_manifest, artifact)
    assert "shape[]{4, 3, 32, 32}" in cpp_snippet(tiny_manifest, artifact)


def test_a_free_batch_is_one(tiny_manifest: Manifest) -> None:
    artifact = _batched(tiny_manifest.artifacts[1], "N")
    assert "repeat" not in python_snippet(tiny_manifest, artifact)
    assert "[1, 3, 32, 32]" in node_snippet(tiny_manifest, artifact)


def test_the_cpp_snippet_has_the_names_shapes_and_numbers_of_the_model(tiny_manifest: Manifest) -> None:
    contract = dataclasses.replace(
        tiny_manifest.spec.preprocess, height_px=48, channel_order="bgr", mean=(0.1, 0.2, 0.3)
    )
    source = cpp_snippet(_with_contract(tiny_manifest, contract), tiny_manifest.artifacts[1])
    for part in (
        'ORT_TSTR("tiny.onnx")', '*outputs[]{"logits"}', 'inputs[]{"input"}', "shape[]{1, 3, 48, 32}",
        "mean[]{0.1, 0.2, 0.3}", "deviation[]{0.25, 0.25, 0.25}", "cv::Scalar(), false)", "logits + 10",
    ):  # fmt: skip
        assert part in source
    assert source.count("{") == source.count("}")
    assert source.count("(") == source.count(")")


def test_snippets_are_short(tiny_manifest: Manifest) -> None:
    artifact = tiny_manifest.artifacts[1]
    lengths = [len(write(tiny_manifest, artifact).splitlines()) for write in (python_snippet, node_snippet)]
    assert max(lengths) <= 12


def test_a_hostile_file_name_stays_inside_its_string(tiny_manifest: Manifest) -> None:
    artifact = dataclasses.replace(tiny_manifest.artifacts[1], file='a"; import os #.onnx')
    source = python_snippet(tiny_manifest, artifact)
    assert r'"a\"; import os #.onnx"' in source
    compile(source, "snippet", "exec")


@pytest.mark.parametrize("task", ["classify", "features"])
@pytest.mark.parametrize("changes", CONTRACTS)
def test_python_and_node_are_well_formed_for_every_contract(
    tiny_manifest: Manifest, tiny_contract: Preprocess, tmp_path: Path, changes: dict[str, object], task: str
) -> None:
    manifest = _with_contract(tiny_manifest, dataclasses.replace(tiny_contract, **changes))  # type: ignore[arg-type]
    manifest = dataclasses.replace(manifest, spec=dataclasses.replace(manifest.spec, task=task))  # type: ignore[arg-type]
    compile(python_snippet(manifest, manifest.artifacts[1]), "snippet", "exec")
    if NODE is None:
        pytest.skip("node is not installed")
    (tmp_path / "app.mjs").write_text(node_snippet(manifest, manifest.artifacts[1]), encoding="utf-8")
    done = subprocess.run([NODE, "--check", str(tmp_path / "app.mjs")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_maps_are_named_with_their_shapes(
    tiny_bundle: Path, tiny_manifest: Manifest, tiny_golden: Golden, tmp_path: Path
) -> None:
    manifest = dataclasses.replace(tiny_manifest, spec=dataclasses.replace(tiny_manifest.spec, task="features"))
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "tiny"))
    Image.fromarray(tiny_golden.images[0]).save(folder / "photo.jpg", "PNG")
    assert _run_python(python_snippet(manifest, manifest.artifacts[1]), folder) == "logits (1, 10)"


def test_the_page_takes_a_file_that_nothing_speaks_against(
    tiny_bundle: Path, tiny_manifest: Manifest, tiny_golden: Golden, tiny_report: VerifyReport
) -> None:
    rows = tuple(dataclasses.replace(row, verdict="nan") if row.artifact == "onnx" else row for row in tiny_report.rows)
    broken = dataclasses.replace(tiny_report, rows=rows)
    found = _page_snippets(tiny_bundle, tiny_manifest, tiny_golden, broken)
    assert all(re.search(r'"tiny\.fp16\.onnx"', source) for source in found.values())
    assert set(found) == {"python", "node", "cpp"}
