from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cspdeploy.core.errors import InputError
from cspdeploy.runtimes import all_runtimes
from cspdeploy.runtimes.base import Session, SessionRequest


class _Picky(nn.Module):
    """Doubles its input, and fails on a negative one, so that a test can see it compute."""

    def forward(self, x: Tensor) -> Tensor:
        if bool((x < 0).any()):
            raise ValueError("negative")
        return 2 * x


def _open(path: Path) -> Session:
    return all_runtimes()["torchscript-cpu"].open(SessionRequest(path=path))


@pytest.fixture
def picky(tmp_path: Path) -> Path:
    path = tmp_path / "picky.torchscript.pt"
    torch.jit.script(_Picky()).save(str(path))
    return path


def test_runs(picky: Path) -> None:
    outputs = _open(picky).run({"input": np.array([1.0, 2.5], np.float32)})
    assert list(outputs) == ["logits"]
    assert outputs["logits"].dtype == np.float32
    assert outputs["logits"].tolist() == [2.0, 5.0]


def test_bound_call_computes_each_time_it_is_called(picky: Path) -> None:
    session = _open(picky)
    good: Callable[[], None] = session.bind({"input": np.ones(2, np.float32)})
    bad: Callable[[], None] = session.bind({"input": -np.ones(2, np.float32)})
    good()
    good()
    with pytest.raises(Exception, match="negative"):
        bad()


@pytest.mark.parametrize("content", [b"", b"not a TorchScript file", b"PK\x05\x06" + bytes(18)])
def test_garbage_is_an_input_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.torchscript.pt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"model\.torchscript\.pt: not a TorchScript file") as caught:
        _open(path)
    assert "\n" not in str(caught.value)


def test_plain_pickle_is_not_torchscript(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / "model.pt")
    with pytest.raises(InputError, match="not a TorchScript file"):
        _open(tmp_path / "model.pt")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.pt"):
        _open(tmp_path / "none.pt")


def test_probe() -> None:
    all_runtimes()["torchscript-cpu"].probe()
