"""What all tests share: versions in the report's header, and a network small enough to train in a second."""

from __future__ import annotations

import platform

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import settings

from cspdeploy.core.codec import to_json
from cspdeploy.core.spec import ModelSpec, NetworkSpec, Preprocess, Provenance
from cspdeploy.nets.cspnet import CspNetConfig, StageConfig, StemConfig

# No deadline: tests never judge a duration. No example database: the checkout stays clean, the order is fixed.
settings.register_profile("fast", max_examples=40, deadline=None, database=None, derandomize=True)
settings.load_profile("fast")


def pytest_report_header() -> str:
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
        "numpy": np.__version__,
    }
    return ", ".join(f"{name} {version}" for name, version in versions.items())


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
