from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

import cspdeploy
from cspdeploy.core.metrics import relative_l2
from cspdeploy.core.types import StepRecord
from cspdeploy.export.torchscript import export_torchscript

Array = npt.NDArray[np.float32]


@pytest.fixture
def exported(tiny_model: nn.Module, tiny_x_NCHW: Array, tmp_path: Path) -> tuple[Path, StepRecord]:
    path = tmp_path / "tiny.torchscript.pt"
    return path, export_torchscript(tiny_model, torch.from_numpy(tiny_x_NCHW[:1]), path)


def test_it_loads_and_equals_eager_at_any_batch(
    exported: tuple[Path, StepRecord], tiny_model: nn.Module, tiny_x_NCHW: Array
) -> None:
    path, record = exported
    loaded = torch.jit.load(path)
    with torch.inference_mode():
        for batch in (1, 3):  # traced with one image
            x_NCHW = torch.from_numpy(tiny_x_NCHW[:batch])
            expected, got = tiny_model(x_NCHW).numpy(), loaded(x_NCHW).numpy()
            assert got.dtype == np.float32
            assert relative_l2(got, expected) < 1e-5
    assert (record.name, record.outcome) == ("torchscript", "done")


def test_batch_norms_are_folded(exported: tuple[Path, StepRecord]) -> None:
    graph = str(torch.jit.load(exported[0]).inlined_graph)
    assert "aten::_convolution" in graph
    assert "batch_norm" not in graph


def test_the_model_itself_is_left_as_it_was(tiny_model: nn.Module, tiny_x_NCHW: Array, tmp_path: Path) -> None:
    before = {key: value.clone() for key, value in tiny_model.state_dict().items()}
    export_torchscript(tiny_model, torch.from_numpy(tiny_x_NCHW[:1]), tmp_path / "tiny.pt")
    after = tiny_model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_no_path_of_this_machine_is_in_the_file(exported: tuple[Path, StepRecord]) -> None:
    """PyTorch adds where each line of the network lay, so that another installation would give other bytes."""
    with zipfile.ZipFile(exported[0]) as archive:
        found = [name for name in archive.namelist() if b"site-packages" in archive.read(name)]
        found += [
            name for name in archive.namelist() if str(Path(cspdeploy.__file__).parent).encode() in archive.read(name)
        ]
    assert found == []


def test_same_network_gives_the_same_bytes_however_often_it_was_traced(
    exported: tuple[Path, StepRecord], tiny_model: nn.Module, tiny_x_NCHW: Array, tmp_path: Path
) -> None:
    again = tmp_path / "again.pt"
    export_torchscript(tiny_model, torch.from_numpy(tiny_x_NCHW[:1]), again)
    assert again.read_bytes() == exported[0].read_bytes()
