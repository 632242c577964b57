"""What all tests share: versions in the report's header, and a network small enough to train in a second."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import settings
from PIL import Image

from cspdeploy.check import reference
from cspdeploy.check.worker import EngineError
from cspdeploy.core.codec import to_json
from cspdeploy.core.errors import CspDeployError
from cspdeploy.core.model_folder import write_calibration, write_spec
from cspdeploy.core.results import Timing
from cspdeploy.core.spec import ModelSpec, NetworkSpec, Preprocess, Provenance
from cspdeploy.core.types import Frontend
from cspdeploy.export import simplify
from cspdeploy.nets.cspnet import CspNetConfig, StageConfig, StemConfig
from cspdeploy.nets.registry import build
from cspdeploy.nets.weights import write_safetensors
from cspdeploy.pipeline.int8_step import Int8Request
from cspdeploy.pipeline.recipe import ExportRequest, export_bundle
from cspdeploy.quant import judge
from cspdeploy.runtimes import all_runtimes
from cspdeploy.runtimes.base import Feeds, Outputs, Session, SessionRequest

# No deadline: tests never judge a duration. No example database: the checkout stays clean, the order is fixed.
settings.register_profile("fast", max_examples=40, deadline=None, database=None, derandomize=True)
settings.load_profile("fast")


# Each engine is opened by the tests that are about it; in every ladder of every test it would take minutes.
os.environ["CSPDEPLOY_RUNTIMES"] = ",".join(name for name in all_runtimes() if name != "openvino")
# The networks here are so small that threads spend their time in waiting for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

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


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Path]) -> Path:
    """What `make(empty folder)` gave, once for all workers of pytest-xdist: the others wait for the first."""
    base = factory.getbasetemp()
    if base.name.startswith("popen-"):  # of one worker; the folder above is of the whole run
        base = base.parent
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = base / f"{name}.made"
        if not made.is_file():
            shutil.rmtree(base / name, ignore_errors=True)  # of a worker whose making failed
            (base / name).mkdir()
            made.write_text(str(make(base / name)), encoding="utf-8")
        return Path(made.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def tiny_models(tiny_spec: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with the model "tiny": random weights given as a user's own, 40 random images."""

    def make(models: Path) -> Path:
        folder = models / "tiny"
        folder.mkdir()
        torch.manual_seed(0)
        write_safetensors(folder / "model.safetensors", build(tiny_spec), dtype=torch.float32)
        write_spec(folder, dataclasses.replace(tiny_spec, provenance=Provenance(source="user", origin="test")))
        (folder / "labels.txt").write_text("".join(f"label {i}\n" for i in range(tiny_spec.num_classes)))
        images = np.random.default_rng(0).integers(0, 256, (40, 28, 28), np.uint8)
        write_calibration(folder / "calibration.npz", images)
        return models

    return made_once(tmp_path_factory, "models", make)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of "tiny" with FP16. Shared and so read-only: a test that changes files copies the folder first."""

    def make(output: Path) -> Path:
        return Path(export_bundle(ExportRequest(model="tiny", models=tiny_models, output=output, fp16=True)).folder)

    return made_once(tmp_path_factory, "exported", make)


@pytest.fixture
def process_settings() -> Iterator[None]:
    """TF32 and cuDNN's search are settings of the whole process: what a test makes of them is put back."""
    cudnn: Any = torch.backends.cudnn
    matmul = torch.backends.cuda.matmul
    parts: list[Any] = [torch.backends, matmul, cudnn, cudnn.conv, cudnn.rnn]
    words, flags, benchmark = (
        [part.fp32_precision for part in parts], (cudnn.allow_tf32, matmul.allow_tf32), cudnn.benchmark
    )  # fmt: skip
    yield
    cudnn.allow_tf32, matmul.allow_tf32 = flags
    for part, word in zip(parts, words, strict=True):
        part.fp32_precision = word
    cudnn.benchmark = benchmark
    assert (cudnn.allow_tf32, matmul.allow_tf32) == flags


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What INT8 exports remember between runs stays out of the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CSPDEPLOY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def photos() -> np.ndarray:
    """96 images `[96, 28, 28]` uint8 that look like photographs: neighbouring pixels are alike, no two images are."""
    coarse = np.random.default_rng(0).integers(0, 256, (96, 7, 7), np.uint8)
    return np.stack([np.asarray(Image.fromarray(image).resize((28, 28), Image.Resampling.BICUBIC)) for image in coarse])


@pytest.fixture(scope="session")
def photo_models(tiny_models: Path, photos: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_models` with images that INT8 may be calibrated on: those of the other are random, and refused for that."""

    def make(folder: Path) -> Path:
        models = Path(shutil.copytree(tiny_models, folder / "models"))
        write_calibration(models / "tiny" / "calibration.npz", photos)
        return models

    return made_once(tmp_path_factory, "photo", make)


def set_int8_speed(patch: pytest.MonkeyPatch, speed: float) -> None:
    """As if INT8 files ran that many times as fast as FP32. Which is faster of networks of microseconds is chance."""
    fp32 = Timing(
        p50_ms=1.0, ci_low_ms=1.0, ci_high_ms=1.0, num_runs=1, verdict="reference", ratio=1.0, samples_ms=(1.0,)
    )  # fmt: skip
    int8 = dataclasses.replace(
        fp32, p50_ms=1 / speed, ratio=speed, ratio_low=speed, ratio_high=speed,
        verdict="faster" if speed > 1 else "slower",
    )  # fmt: skip
    patch.setattr(judge, "measure_latency", lambda *_, **__: {"FP32": fp32, "INT8": int8})


@pytest.fixture
def int8_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a half, so that speed is no reason to refuse a file."""
    set_int8_speed(monkeypatch, 1.5)


@pytest.fixture
def int8_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a half."""
    set_int8_speed(monkeypatch, 0.5)


@pytest.fixture(scope="session")
def tiny_int8_bundle(photo_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of "tiny" with FP16 and INT8. Shared and so read-only."""

    def make(output: Path) -> Path:
        request = ExportRequest(
            model="tiny", models=photo_models, output=output, fp16=True, int8=Int8Request(calibration="minmax")
        )
        with pytest.MonkeyPatch.context() as patch:
            set_int8_speed(patch, 1.5)
            return Path(export_bundle(request).folder)

    return made_once(tmp_path_factory, "quantised", make)


@pytest.fixture(scope="session")
def tiny_also_bundle(photo_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of "tiny" with INT8 and every further form. Shared and so read-only."""

    def make(output: Path) -> Path:
        request = ExportRequest(
            model="tiny", models=photo_models, output=output, also=("pt2", "ort", "opt"),
            int8=Int8Request(calibration="minmax"),
        )  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            set_int8_speed(patch, 1.5)
            return Path(export_bundle(request).folder)

    return made_once(tmp_path_factory, "also", make)


@pytest.fixture(scope="session")
def tiny_u8_bundle(photo_models: Path, photos: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of "tiny" with FP16, INT8, and all of them once more with preprocessing and top-3 in the graph.

    Made with pictures in colour: of a grey one every channel order is right. Shared and so read-only.
    """

    def make(folder: Path) -> Path:
        pictures = folder / "colour"
        pictures.mkdir()
        for i in range(24):
            picture = np.stack([photos[i], photos[i + 24], photos[i + 48]], axis=-1)
            Image.fromarray(picture).save(pictures / f"{i:02}.png")
        request = ExportRequest(
            model="tiny", models=photo_models, output=folder / "exported", calibration=pictures, fp16=True,
            int8=Int8Request(calibration="minmax"), frontend=Frontend(channel_order="bgr", top_k=3),
        )  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            set_int8_speed(patch, 1.5)
            patch.setattr(simplify, "_CHILD", ["false"])
            return Path(export_bundle(request).folder)

    return made_once(tmp_path_factory, "u8", make)


class SessionHere:
    """What `reference.Worker` does, in this process: a session of the same runtime, opened and run."""

    def __init__(self, runtime: str, request: SessionRequest, *, time_limit_s: float) -> None:
        self._runtime, self._request = all_runtimes()[runtime], request
        self._sessions: list[Session] = []

    def __enter__(self) -> SessionHere:
        return self

    def __exit__(self, *_: object) -> None:
        self._sessions.clear()

    def wait_opened(self) -> None:
        self._sessions.append(self._told(lambda: self._runtime.open(self._request)))

    def run(self, feeds: Feeds) -> Outputs:
        return self._told(lambda: self._sessions[0].run(feeds))

    def _told(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except CspDeployError:
            raise
        except Exception as error:  # an engine's own, told as by a worker
            raise EngineError(str(error).split("\n")[0]) from error


@pytest.fixture
def references_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """References of ONNX files are computed in this process: each process of an engine takes seconds to start.

    For files that run. What an engine that dies does to the parent is the matter of tests that do without this.
    """
    monkeypatch.setattr(reference, "Worker", SessionHere)
