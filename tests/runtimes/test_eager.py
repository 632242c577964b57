from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cspdeploy.core.errors import InputError
from cspdeploy.core.model_folder import read_spec
from cspdeploy.core.spec import ModelSpec
from cspdeploy.nets.registry import build
from cspdeploy.nets.weights import load_weights, read_state_dict
from cspdeploy.runtimes import all_runtimes
from cspdeploy.runtimes.base import SessionRequest
from cspdeploy.runtimes.torch_device import UNPROFILED_RUNS, TorchSession

X_NCHW = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)


def test_computes_what_the_network_computes(tiny_models: Path) -> None:
    folder = tiny_models / "tiny"
    spec = read_spec(folder)
    session = all_runtimes()["torch-cpu"].open(SessionRequest(path=folder / "model.safetensors", spec=spec))
    model = build(spec)
    load_weights(model, read_state_dict(folder / "model.safetensors"), source="test")
    with torch.inference_mode():
        expected = model.eval()(torch.from_numpy(X_NCHW)).numpy()
    outputs = session.run({"input": X_NCHW})
    assert list(outputs) == ["logits"]
    assert np.allclose(outputs["logits"], expected, rtol=1e-5, atol=1e-6)
    session.bind({"input": X_NCHW})()


def test_without_a_spec(tiny_models: Path) -> None:
    with pytest.raises(InputError, match="needs its spec"):
        all_runtimes()["torch-cpu"].open(SessionRequest(path=tiny_models / "tiny" / "model.safetensors"))


def test_weights_of_another_network(tiny_models: Path, tiny_spec: ModelSpec) -> None:
    other = dataclasses.replace(tiny_spec, num_classes=7)
    with pytest.raises(InputError, match="weights of another network"):
        all_runtimes()["torch-cpu"].open(SessionRequest(path=tiny_models / "tiny" / "model.safetensors", spec=other))


def test_bound_call_computes_each_time_without_gradients() -> None:
    seen: list[tuple[list[float], bool]] = []

    def compute(x: torch.Tensor) -> torch.Tensor:
        seen.append((x.tolist(), torch.is_inference_mode_enabled()))
        return x

    bound = TorchSession(compute, device="cpu", request=SessionRequest(path=Path("none"), outputs=("y",))).bind(
        {"x": np.array([1.5], np.float32)}
    )
    assert seen == []
    bound()
    bound()
    assert seen == [([1.5], True)] * 2


def test_probe() -> None:
    all_runtimes()["torch-cpu"].probe()


def _double(**options: Any) -> TorchSession:
    request = SessionRequest(path=Path("none"), outputs=("y",), **options)
    return TorchSession(lambda x: x + x, device="cpu", request=request)


def test_threads_are_those_of_the_request() -> None:
    before = torch.get_num_threads()
    try:
        _double(num_threads=before + 1)
        assert torch.get_num_threads() == before + 1
        _double()
        assert torch.get_num_threads() == before + 1  # 0 leaves them
    finally:
        torch.set_num_threads(before)


def test_cuda_graph_on_the_cpu_is_refused() -> None:
    with pytest.raises(InputError, match="asked for on cpu"):
        _double(cuda_graph=True)


@pytest.mark.slow  # the profiler of PyTorch takes seconds to start
def test_profile_is_of_the_runs_after_the_first(tmp_path: Path) -> None:
    session = _double(profile=tmp_path)
    call = session.bind({"x": np.ones(3, np.float32)})
    for _ in range(UNPROFILED_RUNS + 4):
        call()
    found = {node.operator: node for node in session.end_profile()}
    assert found["aten::add"].num_calls == 1
    assert found["aten::add"].ms > 0
    with pytest.raises(InputError, match="without one"):
        session.end_profile()


def test_profile_of_too_few_runs(tmp_path: Path) -> None:
    session = _double(profile=tmp_path)
    session.run({"x": np.ones(3, np.float32)})
    with pytest.raises(InputError, match=f"expected more than {UNPROFILED_RUNS}"):
        session.end_profile()
