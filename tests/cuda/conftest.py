"""A GPU for every test of this folder: selected without one, they fail. Skipped, they would look as if all was well."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cspdeploy.core.bundle import read_manifest
from cspdeploy.core.catalog import INPUT_NAME
from cspdeploy.core.golden import GOLDEN_FILE, Golden, read_golden
from cspdeploy.pipeline.recipe import ExportRequest, export_bundle
from cspdeploy.runtimes import require_runtime
from cspdeploy.runtimes.base import Feeds, Session, SessionRequest
from cspdeploy.runtimes.cuda_driver import CudaDevice, driver_problem

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "cspdarknet53"

Open = Callable[..., Session]


@pytest.fixture(scope="session", autouse=True)
def gpu() -> CudaDevice:
    """The first GPU that this process sees."""
    problem = driver_problem()
    if problem:
        pytest.fail(f"these tests need a GPU: {problem}", pytrace=False)
    if importlib.util.find_spec("onnxruntime") is None:
        pytest.fail("these tests need onnxruntime-gpu", pytrace=False)
    return CudaDevice(0)


@pytest.fixture(scope="session")
def trained(gpu: CudaDevice, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of the model that is shipped, with FP16 and a free batch, at its own 32 pixels."""
    output = tmp_path_factory.mktemp("exported")
    request = ExportRequest(
        model=str(MODEL), models=MODEL.parent, output=output, fp16=True, dynamic_batch=True,
    )  # fmt: skip
    return Path(export_bundle(request).folder)


@pytest.fixture(scope="session")
def golden(trained: Path) -> Golden:
    return read_golden(trained / GOLDEN_FILE)


@pytest.fixture(scope="session")
def feeds(golden: Golden) -> Feeds:
    """Eight real images."""
    return {INPUT_NAME: np.ascontiguousarray(golden.x_NCHW[:8])}


@pytest.fixture(scope="session")
def expected(golden: Golden) -> np.ndarray:
    """Their logits in FP64."""
    return next(iter(golden.outputs_fp64.values()))[:8]


@pytest.fixture(scope="session")
def request_of(trained: Path) -> Callable[[str], SessionRequest]:
    """Of "eager", "onnx" or "onnx-fp16"."""
    manifest = read_manifest(trained)
    files = {artifact.kind: trained / artifact.file for artifact in manifest.artifacts}

    def make(kind: str) -> SessionRequest:
        if kind == "eager":
            return SessionRequest(path=MODEL / "model.safetensors", spec=manifest.spec)
        return SessionRequest(path=files[kind], outputs=manifest.spec.outputs)

    return make


@pytest.fixture(scope="session")
def open_on(request_of: Callable[[str], SessionRequest]) -> Open:
    """`open_on("ort-cuda", "onnx-fp16", cuda_graph=True)`."""

    def make(runtime: str, kind: str, **changes: object) -> Session:
        return require_runtime(runtime).open(dataclasses.replace(request_of(kind), **changes))  # type: ignore[arg-type]

    return make
