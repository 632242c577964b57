"""Every network of the registry through the whole ladder: eager, TorchScript, ONNX, simplified, FP16, classes and maps.

At 64 px, with random weights. The small ones run by default; the others with `-m slow`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cspdeploy.check.ladder import VerifySettings, verify_bundles
from cspdeploy.core.results import VerifyReport
from cspdeploy.nets.registry import NETWORKS, find_network, spec_of
from cspdeploy.nets.weights import write_safetensors
from cspdeploy.pipeline.recipe import ExportRequest, export_bundle
from cspdeploy.pipeline.weights import make_untrained

SIDE_PX = 64
BY_DEFAULT = ("cs3darknet_s", "cs3darknet_focus_s", "csppeleenet", "csppeleenet_gamma25_fusion_first", "peleenet")
RUNGS = {
    ("eager", "torch-cpu"), ("torchscript", "torchscript-cpu"), ("onnx", "ort-cpu"), ("onnx-fp16", "fp16-rounding"),
    ("onnx-fp16", "ort-cpu"),
}  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Smooth pictures: noise would fall to grey when it is resized."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for index in range(8):
        small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8))
        small.resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    return folder


def _write_weights(name: str, path: Path) -> None:
    """The untrained network as `--weights random` makes it, but as a user's file, so that eager is a rung too."""
    _, model = make_untrained(spec_of(find_network(name), num_classes=10))
    write_safetensors(path, model, dtype=torch.float32)


def _climb(name: str, photos: Path, tmp_path: Path, *, features: bool) -> VerifyReport:
    weights = tmp_path / "model.safetensors"
    _write_weights(name, weights)
    request = ExportRequest(
        model=name, models=tmp_path / "none", weights=str(weights), calibration=photos, output=tmp_path / "exported",
        size_px=(SIDE_PX, SIDE_PX), fp16=True, features=features,
    )  # fmt: skip
    report = export_bundle(request)
    steps = {step.name: step for artifact in report.manifest.artifacts for step in artifact.steps}
    assert steps["simplify"].outcome == "done", steps["simplify"].detail
    return verify_bundles([Path(report.folder)], VerifySettings(isolate=False, latency=None))


def _require_all_hold(report: VerifyReport) -> None:
    assert report.verdict == "pass", report.first_break
    checked = {(row.artifact, row.runtime) for row in report.rows if row.verdict == "pass"}
    assert checked >= RUNGS


@pytest.mark.parametrize("name", BY_DEFAULT)
def test_every_rung_holds(name: str, photos: Path, tmp_path: Path) -> None:
    _require_all_hold(_climb(name, photos, tmp_path, features=False))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in NETWORKS if name not in BY_DEFAULT and NETWORKS[name].detection is None]
)
def test_every_rung_holds_for_the_large_ones(name: str, photos: Path, tmp_path: Path) -> None:
    _require_all_hold(_climb(name, photos, tmp_path, features=False))


@pytest.mark.parametrize("name", ["csppeleenet"])
def test_every_rung_of_the_pyramid_holds(name: str, photos: Path, tmp_path: Path) -> None:
    _require_all_hold(_climb(name, photos, tmp_path, features=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in NETWORKS if name != "csppeleenet" and NETWORKS[name].detection is None]
)
def test_every_rung_of_the_pyramid_holds_for_the_others(name: str, photos: Path, tmp_path: Path) -> None:
    _require_all_hold(_climb(name, photos, tmp_path, features=True))
