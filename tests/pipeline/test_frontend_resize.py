"""How true the resize in the graph is to Pillow's, and that one which is not is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from cspdeploy.core.bundle import read_manifest
from cspdeploy.core.spec import Preprocess
from cspdeploy.core.types import Frontend
from cspdeploy.export import resize_graph
from cspdeploy.export.frontend import write_pixel_graph
from cspdeploy.pipeline import frontend_step
from cspdeploy.pipeline.frontend_step import (
    MAX_MEAN_STEPS,
    MAX_STEPS,
    measure_pixels,
    synthetic_photographs,
)
from tests.pipeline.conftest import Export
from tests.pipeline.frontend_parts import contract_of, edit


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize(
    ("resize", "size_px", "crop_pct"),
    [("crop", (48, 48), 0.875), ("crop", (32, 64), 1.0), ("stretch", (40, 30), 1.0), ("letterbox", (48, 40), 1.0)],
)
def test_resize_is_within_the_bound(
    tmp_path: Path, resize: str, interpolation: str, size_px: tuple[int, int], crop_pct: float
) -> None:
    contract = contract_of(resize, interpolation, size_px, crop_pct)
    write_pixel_graph(tmp_path / "pixels.onnx", contract, opset=18)
    pictures = [*synthetic_photographs(contract), *synthetic_photographs(contract.with_size(97, 61))]
    found, pixels = measure_pixels(tmp_path / "pixels.onnx", contract, pictures)
    assert found.faithful
    assert found.mean <= MAX_MEAN_STEPS
    assert found.largest <= (0 if interpolation == "nearest" else MAX_STEPS)
    assert {image.shape for image in pixels} == {(*size_px, 3)}


def test_nearest_needs_no_antialias_and_so_no_new_opset(tmp_path: Path) -> None:
    contract = contract_of("crop", "nearest", (33, 21))
    write_pixel_graph(tmp_path / "pixels.onnx", contract, opset=13)
    found, _ = measure_pixels(tmp_path / "pixels.onnx", contract, synthetic_photographs(contract))
    assert (found.mean, found.largest) == (0.0, 0)


def test_order_of_the_passes_is_pillows() -> None:
    tall = Image.fromarray(synthetic_photographs(contract_of("crop", "bilinear", (64, 16)))[0]).resize((16, 64))
    at_once = np.asarray(tall.resize((24, 40), Image.Resampling.BICUBIC))
    width_first = tall.resize((24, 64), Image.Resampling.BICUBIC).resize((24, 40), Image.Resampling.BICUBIC)
    assert np.array_equal(at_once, np.asarray(width_first)) == (resize_graph.pillow_order() == "width-first")


def _without_antialias(path: Path) -> None:
    def change(graph: onnx.GraphProto) -> None:
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.name in ("antialias", "exclude_outside"):
                    attribute.i = 0

    edit(path, change)


def test_resize_without_antialias_is_beyond_the_bound(tmp_path: Path) -> None:
    contract = contract_of("stretch", "bilinear", (32, 32))
    write_pixel_graph(tmp_path / "pixels.onnx", contract, opset=18)
    _without_antialias(tmp_path / "pixels.onnx")
    found, _ = measure_pixels(tmp_path / "pixels.onnx", contract, synthetic_photographs(contract))
    assert not found.faithful
    assert found.mean > 10 * MAX_MEAN_STEPS


def test_unfaithful_resize_is_refused_and_the_rest_is_written(export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    write = write_pixel_graph

    def other(path: Path, contract: Preprocess, *, opset: int) -> None:
        write(path, contract, opset=opset)
        _without_antialias(path)

    monkeypatch.setattr(frontend_step, "write_pixel_graph", other)
    manifest = read_manifest(export(Frontend(resize=True)))
    assert [item.kind for item in manifest.artifacts] == ["torchscript", "onnx"]
    step = manifest.artifacts[-1].steps[-1]
    assert (step.name, step.outcome) == ("frontend", "kept")
    assert "not Pillow's" in step.detail
    assert "bound 0.1 and 2" in step.detail
