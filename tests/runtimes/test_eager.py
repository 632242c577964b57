from __future__ import annotations

import dataclasses
from pathlib import Path

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
from cspdeploy.runtimes.torch_device import TorchSession

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

    bound = TorchSession(compute, device="cpu", outputs=("y",)).bind({"x": np.array([1.5], np.float32)})
    assert seen == []
    bound()
    bound()
    assert seen == [([1.5], True)] * 2


def test_probe() -> None:
    all_runtimes()["torch-cpu"].probe()
