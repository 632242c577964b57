"""Files to read, made by each test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from tests.core.archives import GOOD, packed


@pytest.fixture
def package(tmp_path: Path) -> Path:
    (tmp_path / "model.zip").write_bytes(packed(GOOD))
    return tmp_path / "model.zip"


@pytest.fixture
def write(tmp_path: Path) -> Callable[[onnx.ModelProto | bytes], Path]:
    """`write(model)`: it as a file."""

    def save(model: onnx.ModelProto | bytes) -> Path:
        path = tmp_path / "net.onnx"
        path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
        return path

    return save
