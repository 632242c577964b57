from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

Refuse = Callable[..., str]


def test_train_refuses_what_it_cannot_do(refuse: Refuse, tmp_path: Path) -> None:
    models: list[Any] = ["--models", tmp_path / "models"]
    assert "did you mean 'cspdarknet53'?" in refuse("train", "cspdarknet35", "--data", tmp_path, *models)
    assert "nowhere" in refuse("train", "cspdarknet53", "--data", "nowhere", *models)
    assert not (tmp_path / "models").exists()
