"""Outputs on the GPU against the network in FP64: FP32 with TF32 off, the drift of TF32, FP16 over many runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cspdeploy.core.catalog import INPUT_NAME
from cspdeploy.core.datasets import FASHION_MNIST, FASHION_MNIST_FOLDER, open_dataset
from cspdeploy.core.metrics import relative_l2
from cspdeploy.core.model_folder import read_spec
from cspdeploy.core.preprocess import preprocess
from cspdeploy.runtimes import require_runtime
from cspdeploy.runtimes.base import CudaOptions, Feeds, Session, SessionRequest

pytestmark = pytest.mark.cuda

MODEL = Path(__file__).parents[2] / "models" / "cspdarknet53"
FP32_LIMIT, FP16_LIMIT = 1e-5, 1e-2
AGREEMENT = 0.995
NUM_RUNS = 10
CHUNK = 500

HALVES = {
    "ort": ("ort-cuda", "onnx-fp16", {}),
    "ort nhwc": ("ort-cuda", "onnx-fp16", {"cuda": CudaOptions(channels_last=True)}),
    "ort graph": ("ort-cuda", "onnx-fp16", {"cuda_graph": True}),
    "torch": ("torch-cuda", "eager", {"cuda": CudaOptions(half=True, channels_last=True)}),
}


def logits(session: Session, feeds: Feeds) -> np.ndarray:
    return next(iter(session.run(feeds).values()))


@pytest.mark.parametrize(("runtime", "kind"), [("torch-cuda", "eager"), ("ort-cuda", "onnx")])
def test_fp32_is_fp32_and_tf32_drifts(
    runtime: str, kind: str, open_on: Callable[..., Session], feeds: Feeds, expected: np.ndarray
) -> None:
    exact = relative_l2(logits(open_on(runtime, kind, tf32=False), feeds), expected)
    rounded = relative_l2(logits(open_on(runtime, kind, tf32=True), feeds), expected)
    assert exact < FP32_LIMIT
    assert rounded > exact  # 10 bits of mantissa in place of 23; on a GPU before Ampere there is no TF32
    assert rounded < FP16_LIMIT


@pytest.mark.parametrize("name", HALVES)
def test_fp16_is_near_and_finite_in_every_run(
    name: str, open_on: Callable[..., Session], feeds: Feeds, expected: np.ndarray
) -> None:
    runtime, kind, changes = HALVES[name]
    session = open_on(runtime, kind, **changes)  # type: ignore[arg-type]
    runs = [logits(session, feeds) for _ in range(NUM_RUNS)]
    assert [bool(np.isfinite(run).all()) for run in runs] == [True] * NUM_RUNS
    assert max(relative_l2(run, expected) for run in runs) < FP16_LIMIT


def test_first_classes_agree_on_the_test_images(open_on: Callable[..., Session]) -> None:
    if not FASHION_MNIST_FOLDER.is_dir():
        pytest.skip("the test images of Fashion-MNIST are not installed: dataset-fashion-mnist")
    stored = open_dataset(FASHION_MNIST, split="test").stored
    assert stored is not None
    x_NCHW = preprocess(list(stored), read_spec(MODEL).preprocess)
    parts = np.array_split(x_NCHW, len(x_NCHW) // CHUNK)

    def classes(session: Session) -> np.ndarray:
        return np.concatenate([logits(session, {INPUT_NAME: part}).argmax(1) for part in parts])

    reference = classes(open_on("torch-cuda", "eager"))
    for name in ("ort", "torch"):
        runtime, kind, changes = HALVES[name]
        found = classes(open_on(runtime, kind, **changes))  # type: ignore[arg-type]
        assert (found == reference).mean() >= AGREEMENT, name


def test_channels_last_is_the_same_network(
    request_of: Callable[[str], SessionRequest], feeds: Feeds, expected: np.ndarray
) -> None:
    for runtime, kind in (("torch-cuda", "eager"), ("ort-cuda", "onnx")):
        request = dataclasses.replace(request_of(kind), cuda=CudaOptions(channels_last=True))
        session = require_runtime(runtime).open(request)
        assert relative_l2(logits(session, feeds), expected) < FP32_LIMIT, runtime
