"""What goes wrong on a GPU: one line that says what, and nothing left behind."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cspdeploy.check.worker import Worker
from cspdeploy.core.catalog import INPUT_NAME
from cspdeploy.core.errors import EXIT_USAGE, DeviceMemoryError, InputError
from cspdeploy.runtimes.base import CudaOptions, Session, SessionRequest
from cspdeploy.runtimes.cuda_driver import CudaDevice

pytestmark = pytest.mark.cuda

MIB = 1 << 20
SLACK_BYTES = 256 * MIB
"""What a context and its libraries may have taken meanwhile, which is no session's."""
TIME_LIMIT_S = 120.0


@pytest.mark.parametrize(("runtime", "kind"), [("ort-cuda", "onnx"), ("torch-cuda", "eager")])
def test_a_wrong_index_says_how_many_there_are(runtime: str, kind: str, open_on: Callable[..., Session]) -> None:
    with pytest.raises(InputError, match="99") as told:
        open_on(runtime, kind, cuda=CudaOptions(device=99))
    assert told.value.exit_code == EXIT_USAGE
    assert "\n" not in told.value.message


def test_out_of_memory_is_one_line_and_leaves_nothing(open_on: Callable[..., Session], gpu: CudaDevice) -> None:
    session = open_on("ort-cuda", "onnx", cuda=CudaOptions(memory_limit_bytes=256 * MIB))
    session.run({INPUT_NAME: np.zeros((1, 3, 32, 32), np.float32)})
    before = gpu.free_bytes()
    with pytest.raises(DeviceMemoryError) as told:
        session.run({INPUT_NAME: np.zeros((4096, 3, 32, 32), np.float32)})
    assert told.value.exit_code == EXIT_USAGE
    assert "\n" not in told.value.message
    assert "2048" in told.value.fix
    gc.collect()
    assert gpu.free_bytes() > before - SLACK_BYTES


def test_torch_out_of_memory_gives_all_of_it_back(open_on: Callable[..., Session], gpu: CudaDevice) -> None:
    import torch

    session = open_on("torch-cuda", "eager")
    session.run({INPUT_NAME: np.zeros((1, 3, 32, 32), np.float32)})
    before = gpu.free_bytes()
    # 8192 images of 32 channels of 32x32 are 1 GiB after the first convolution.
    batch = 8192
    torch.cuda.set_per_process_memory_fraction(min(1.0, 512 * MIB / gpu.total_bytes))
    try:
        with pytest.raises(DeviceMemoryError) as told:
            session.run({INPUT_NAME: np.zeros((batch, 3, 32, 32), np.float32)})
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert str(batch // 2) in told.value.fix
    gc.collect()
    torch.cuda.empty_cache()
    assert gpu.free_bytes() > before - SLACK_BYTES


def test_a_worker_that_ends_gives_its_memory_back(request_of: Callable[[str], SessionRequest], gpu: CudaDevice) -> None:
    before = gpu.free_bytes()
    with Worker("ort-cuda", request_of("onnx"), time_limit_s=TIME_LIMIT_S) as worker:
        worker.run({INPUT_NAME: np.zeros((64, 3, 32, 32), np.float32)})
        assert gpu.free_bytes() < before - 64 * MIB  # it has a context of its own
    assert gpu.free_bytes() > before - SLACK_BYTES


def test_a_file_that_is_no_model_is_refused_as_on_the_cpu(tmp_path: Path) -> None:
    from cspdeploy.runtimes import require_runtime

    (tmp_path / "noise.onnx").write_bytes(b"no model")
    with pytest.raises(InputError):
        require_runtime("ort-cuda").open(SessionRequest(path=tmp_path / "noise.onnx"))
