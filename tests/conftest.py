"""What all tests share: versions in the report's header, and a network small enough to train in a second."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import settings

from cspdeploy.core.codec import to_json
from cspdeploy.core.model_folder import write_calibration, write_spec
from cspdeploy.core.spec import ModelSpec, NetworkSpec, Preprocess, Provenance
from cspdeploy.nets.cspnet import CspNetConfig, StageConfig, StemConfig
from cspdeploy.nets.registry import build
from cspdeploy.nets.weights import write_safetensors
from cspdeploy.pipeline.recipe import ExportRequest, export_bundle

# No deadline: tests never judge a duration. No example database: the checkout stays clean, the order is fixed.
settings.register_profile("fast", max_examples=40, deadline=None, database=None, derandomize=True)
settings.load_profile("fast")


GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden; review the difference")


def pytest_report_header() -> str:
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
        "numpy": np.__version__,
    }
    return ", ".join(f"{name} {version}" for name, version in versions.items())


@pytest.fixture
def check_golden(pytestconfig: pytest.Config) -> Callable[[str, str], None]:
    """`check_golden("help/export.txt", text)`: `text` is what that file of tests/golden holds."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / name
        if pytestconfig.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.is_file(), f"no {path}; to make it: pytest --update-golden"
        assert text == path.read_text(encoding="utf-8"), "if this is meant: pytest --update-golden"

    return check


@pytest.fixture(scope="session")
def tiny_config() -> CspNetConfig:
    """Three csp stages with dark blocks, the first one unhalved as in CSPDarknet53: fewer than 50,000 parameters."""

    def stage(out_chs: int, *, expand_ratio: float, block_ratio: float, bottle_ratio: float) -> StageConfig:
        return StageConfig(
            kind="csp", block="dark", depth=1, out_chs=out_chs, stride=2, groups=1, expand_ratio=expand_ratio,
            block_ratio=block_ratio, bottle_ratio=bottle_ratio, cross_linear=False, down_growth=True, avg_down=False,
            se_ratio=0.0,
        )  # fmt: skip

    return CspNetConfig(
        stem=StemConfig(out_chs=(8,), kernel=3, stride=1, pool="none", padding=None),
        stages=(
            stage(16, expand_ratio=2.0, block_ratio=1.0, bottle_ratio=0.5),
            stage(32, expand_ratio=1.0, block_ratio=0.5, bottle_ratio=1.0),
            stage(48, expand_ratio=1.0, block_ratio=0.5, bottle_ratio=1.0),
        ),
        activation="leaky_relu",
        leaky_slope=0.01,
    )


@pytest.fixture(scope="session")
def tiny_contract() -> Preprocess:
    return Preprocess(
        height_px=32, width_px=32, resize="crop", crop_pct=1.0, interpolation="bilinear", channel_order="rgb",
        mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25),
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiny_spec(tiny_config: CspNetConfig, tiny_contract: Preprocess) -> ModelSpec:
    """10 classes, 32 px."""
    return ModelSpec(
        name="tiny",
        network=NetworkSpec(family="cspnet", config=to_json(tiny_config)),
        num_classes=10,
        preprocess=tiny_contract,
        provenance=Provenance(source="random", origin="seed 0"),
    )


@pytest.fixture(scope="session")
def tiny_models(tiny_spec: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with the model "tiny": random weights given as a user's own, 40 random images."""
    models = tmp_path_factory.mktemp("models")
    folder = models / "tiny"
    folder.mkdir()
    torch.manual_seed(0)
    write_safetensors(folder / "model.safetensors", build(tiny_spec), dtype=torch.float32)
    write_spec(folder, dataclasses.replace(tiny_spec, provenance=Provenance(source="user", origin="test")))
    (folder / "labels.txt").write_text("".join(f"label {i}\n" for i in range(tiny_spec.num_classes)))
    images = np.random.default_rng(0).integers(0, 256, (40, 28, 28), np.uint8)
    write_calibration(folder / "calibration.npz", images)
    return models


@pytest.fixture(scope="session")
def tiny_bundle(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of "tiny" with FP16. Shared and so read-only: a test that changes files copies the folder first."""
    output = tmp_path_factory.mktemp("exported")
    export_bundle(ExportRequest(model="tiny", models=tiny_models, output=output, fp16=True))
    return output / "tiny"
