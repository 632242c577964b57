"""A tiny network with batch norms that do something, and small graphs in text form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from cspdeploy.core.spec import ModelSpec
from cspdeploy.export.onnx import export_onnx
from cspdeploy.export.simplify import start_simplify
from cspdeploy.nets.registry import build

Array = npt.NDArray[np.float32]


@pytest.fixture(scope="session")
def tiny_model(tiny_spec: ModelSpec) -> nn.Module:
    """In evaluation mode. Shared, and so left as it is."""
    torch.manual_seed(1)
    model = build(tiny_spec)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


@pytest.fixture(scope="session")
def tiny_x_NCHW() -> Array:
    return np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)


@pytest.fixture(scope="session")
def tiny_raw(tiny_model: nn.Module, tiny_x_NCHW: Array, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny network as the exporter writes it: opset 18, one image a call."""
    path = tmp_path_factory.mktemp("tiny") / "raw.onnx"
    export_onnx(tiny_model, torch.from_numpy(tiny_x_NCHW[:1]), path, names=("logits",), opset=18, dynamic_batch=False)
    return path


@pytest.fixture(scope="session")
def tiny_simplified(tiny_raw: Path, tiny_x_NCHW: Array) -> Path:
    """What onnxsim makes of it."""
    path = tiny_raw.with_name("simplified.onnx")
    record = start_simplify(tiny_raw, path).finish(tiny_x_NCHW, batch=1)
    assert record.outcome == "done"
    return path


@pytest.fixture
def make_onnx(tmp_path: Path) -> Callable[..., Path]:
    """`make_onnx("(inputs) => (outputs) {nodes}", w=array)`: a valid file. Nodes are named after their first output."""

    def make(text: str, *, file: str = "source.onnx", **weights: npt.NDArray[np.generic]) -> Path:
        model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 18]> graph {text}')
        model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
        for node in model.graph.node:
            node.name = node.output[0]
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, tmp_path / file)
        return tmp_path / file

    return make
