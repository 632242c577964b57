from __future__ import annotations

import copy
import io
import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

import cspdeploy
from cspdeploy.core.errors import InputError
from cspdeploy.core.metrics import relative_l2
from cspdeploy.export.pt2 import export_pt2
from cspdeploy.runtimes import all_runtimes
from cspdeploy.runtimes.base import Session, SessionRequest

Array = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def exported(tiny_model: nn.Module, tiny_x_NCHW: Array, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pt2") / "tiny.pt2"
    record = export_pt2(tiny_model, torch.from_numpy(tiny_x_NCHW[:1]), path)
    assert (record.name, record.outcome) == ("pt2", "done")
    assert "retiring TorchScript" in record.detail
    return path


def _open(path: Path) -> Session:
    return all_runtimes()["pt2-cpu"].open(SessionRequest(path=path))


@pytest.mark.parametrize("batch", [1, 3])
def test_it_equals_eager_at_any_batch(exported: Path, tiny_model: nn.Module, tiny_x_NCHW: Array, batch: int) -> None:
    x_NCHW = tiny_x_NCHW[:batch]
    with torch.inference_mode():
        expected = tiny_model(torch.from_numpy(x_NCHW)).numpy()
    outputs = _open(exported).run({"input": x_NCHW})
    assert list(outputs) == ["logits"]
    assert relative_l2(outputs["logits"], expected) < 1e-6


def test_weights_that_went_through_inference_mode_are_taken(
    tiny_model: nn.Module, tiny_x_NCHW: Array, tmp_path: Path
) -> None:
    own = copy.deepcopy(tiny_model)
    with torch.inference_mode():
        own.double().float()
    assert next(own.parameters()).is_inference()
    assert export_pt2(own, torch.from_numpy(tiny_x_NCHW[:1]), tmp_path / "tiny.pt2").outcome == "done"


def test_same_bytes_again_under_another_name_and_no_path_of_this_machine(
    exported: Path, tiny_model: nn.Module, tiny_x_NCHW: Array, tmp_path: Path
) -> None:
    export_pt2(tiny_model, torch.from_numpy(tiny_x_NCHW[1:2]), tmp_path / "other.pt2")
    assert (tmp_path / "other.pt2").read_bytes() == exported.read_bytes()
    here = str(Path(cspdeploy.__file__).parent).encode()
    with zipfile.ZipFile(exported) as archive:
        contents = b"".join(archive.read(name) for name in archive.namelist())
    assert here not in contents
    assert b"stack_trace" not in contents
    assert tiny_x_NCHW[1].tobytes() not in contents, "pixels of whoever exports"


def _zip_of(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, b"{")
    return buffer.getvalue()


@pytest.mark.parametrize("content", [b"", b"not an archive", _zip_of("model/models/model.json")])
def test_garbage_is_an_input_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"model\.pt2: not a \.pt2 file") as caught:
        _open(path)
    assert "\n" not in str(caught.value)
