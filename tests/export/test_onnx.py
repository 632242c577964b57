from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from torch import nn

from cspdeploy.core.metrics import relative_l2
from cspdeploy.core.onnx_file import external_data_files
from cspdeploy.export.onnx import export_onnx
from cspdeploy.runtimes.ort import open_cpu_session

Array = npt.NDArray[np.float32]


def _eager(model: nn.Module, x_NCHW: Array) -> Array:
    with torch.inference_mode():
        return np.asarray(model(torch.from_numpy(x_NCHW)).numpy())


@pytest.mark.parametrize("opset", [13, 18, 20])
def test_opset_is_the_one_asked_for_and_outputs_are_eager_ones(
    tiny_model: nn.Module, tiny_x_NCHW: Array, tmp_path: Path, opset: int
) -> None:
    path = tmp_path / "tiny.onnx"
    x_NCHW = tiny_x_NCHW[:1]
    record = export_onnx(
        tiny_model, torch.from_numpy(x_NCHW), path, names=("logits",), opset=opset, dynamic_batch=False
    )
    model = onnx.load(path)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]
    assert record.facts["opset"] == opset
    onnx.checker.check_model(path, full_check=True)
    outputs = open_cpu_session(path).run({"input": x_NCHW})
    assert list(outputs) == ["logits"]
    assert relative_l2(outputs["logits"], _eager(tiny_model, x_NCHW)) < 1e-5  # type: ignore[arg-type]


def test_one_file_that_needs_no_other(tiny_model: nn.Module, tiny_x_NCHW: Array, tmp_path: Path) -> None:
    path = tmp_path / "tiny.onnx"
    export_onnx(tiny_model, torch.from_numpy(tiny_x_NCHW[:1]), path, names=("logits",), opset=18, dynamic_batch=False)
    assert list(tmp_path.iterdir()) == [path]
    assert external_data_files(path) == []


def test_static_batch_is_fixed(tiny_raw: Path, tiny_x_NCHW: Array) -> None:
    session = open_cpu_session(tiny_raw)
    assert session.inputs == {"input": (1, 3, 32, 32)}
    with pytest.raises(Exception, match="invalid dimensions"):  # ONNX Runtime's exceptions share no base class
        session.run({"input": tiny_x_NCHW})


def test_dynamic_batch_takes_one_image_and_three(tiny_model: nn.Module, tiny_x_NCHW: Array, tmp_path: Path) -> None:
    path = tmp_path / "tiny.onnx"
    export_onnx(tiny_model, torch.from_numpy(tiny_x_NCHW[:1]), path, names=("logits",), opset=18, dynamic_batch=True)
    onnx.checker.check_model(path, full_check=True)
    session = open_cpu_session(path)
    assert session.inputs == {"input": ("N", 3, 32, 32)}
    for batch in (1, 3):
        got = session.run({"input": tiny_x_NCHW[:batch]})["logits"]
        assert got.shape == (batch, 10)
        assert relative_l2(got, _eager(tiny_model, tiny_x_NCHW[:batch])) < 1e-5  # type: ignore[arg-type]


def test_same_network_gives_the_same_bytes(
    tiny_raw: Path, tiny_model: nn.Module, tiny_x_NCHW: Array, tmp_path: Path
) -> None:
    again = tmp_path / "again.onnx"
    export_onnx(tiny_model, torch.from_numpy(tiny_x_NCHW[:1]), again, names=("logits",), opset=18, dynamic_batch=False)
    assert again.read_bytes() == tiny_raw.read_bytes()
