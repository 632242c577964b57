"""Fixtures of the pipeline's tests."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from PIL import Image

from cspdeploy.check.latency import LatencySettings
from cspdeploy.core.codec import to_json
from cspdeploy.core.model_folder import read_spec, write_spec
from cspdeploy.core.spec import NetworkSpec
from cspdeploy.core.types import Frontend
from cspdeploy.export import simplify
from cspdeploy.nets.cspnet import CspNetConfig
from cspdeploy.nets.registry import build
from cspdeploy.nets.weights import write_safetensors
from cspdeploy.pipeline.compare import CompareReport, CompareRequest, compare_models
from cspdeploy.pipeline.package import PackageReport, PackageRequest, package_bundle
from cspdeploy.pipeline.recipe import ExportRequest, export_bundle

Pack = Callable[..., PackageReport]


@pytest.fixture
def pack(tiny_bundle: Path, tmp_path: Path) -> Pack:
    """`pack("model.zip", artifacts=("onnx",))`: of the tiny bundle, into the test's folder."""

    def call(name: str, *, bundle: Path = tiny_bundle, **options: object) -> PackageReport:
        return package_bundle(PackageRequest(bundle=bundle, output=tmp_path / name, **options))  # type: ignore[arg-type]

    return call


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle that a test may change."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "exported" / "tiny"))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(3).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    key = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    pem = serialization.Encoding.PEM
    private, public = tmp_path / "key.pem", tmp_path / "key.pub"
    private.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )  # fmt: skip
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


QUICK = LatencySettings(min_runs=5, min_seconds=0.0, warmup_runs=1, warmup_seconds=0.0, lead_in_seconds=0.0)


@pytest.fixture
def models(tiny_models: Path, tiny_config: CspNetConfig, tmp_path: Path) -> Path:
    """The models "tiny" and "plain", its baseline without the cross-stage path; 10 classes, 32 px."""
    models = Path(shutil.copytree(tiny_models, tmp_path / "models"))
    spec = read_spec(models / "tiny")
    stages = tuple(
        dataclasses.replace(stage, kind="dark", block_ratio=1.0, bottle_ratio=0.5) for stage in tiny_config.stages
    )
    network = NetworkSpec(family="cspnet", config=to_json(dataclasses.replace(tiny_config, stages=stages)))
    plain = dataclasses.replace(spec, name="plain", network=network)
    shutil.copytree(models / "tiny", models / "plain")
    write_spec(models / "plain", plain)
    torch.manual_seed(0)
    write_safetensors(models / "plain" / "model.safetensors", build(plain), dtype=torch.float32)
    return models


@pytest.fixture
def compare(models: Path) -> Callable[..., CompareReport]:
    """`compare("tiny", "plain", latency=True)`: by default without latency."""

    def call(a: str, b: str, **fields: Any) -> CompareReport:
        return compare_models(
            CompareRequest(**{"a": a, "b": b, "models": models, "latency": False, "settings": QUICK, **fields})
        )

    return call


def quantities(report: CompareReport) -> dict[str, tuple[int, int]]:
    return {quantity.name: (quantity.a, quantity.b) for quantity in report.quantities}


Export = Callable[..., Path]


@pytest.fixture(scope="module")
def export(photo_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    def call(frontend: Frontend, **options: Any) -> Path:
        output = tmp_path_factory.mktemp("out")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(simplify, "_CHILD", ["false"])
            request = ExportRequest(
                model="tiny", models=photo_models, output=output, frontend=frontend, **options
            )  # fmt: skip
            return Path(export_bundle(request).folder)

    return call


@pytest.fixture
def plain(tiny_u8_bundle: Path) -> Path:
    """Bytes of the network's size in, BGR, and the classes out."""
    return tiny_u8_bundle
