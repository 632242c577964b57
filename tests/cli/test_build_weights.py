"""What an export refuses of weights and images."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

Refuse = Callable[..., str]


# --- weights ---


class _Code:
    """A pickle of it runs a command when it is loaded without care."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self._marker}",)


def _weights(tiny_models: Path) -> dict[str, Tensor]:
    return load_file(tiny_models / "tiny" / "model.safetensors")


@pytest.mark.parametrize(
    ("file", "why"),
    [
        ("missing.safetensors", "not found"),
        ("empty.safetensors", "empty file (0 bytes)"),
        ("empty.pth", "empty file (0 bytes)"),
        ("corrupt.safetensors", "not a safetensors file"),
        ("corrupt.pth", "corrupt.pth"),
        ("cut.safetensors", "not a safetensors file"),
        ("cut.pth", "not a PyTorch file"),
        ("other.safetensors", "weights of another network: "),
        ("code.pth", "needs code to be run"),
        ("code-in-dict.pth", "needs code to be run"),
        ("nan.safetensors", "NaN or infinite values in head.fc.weight"),
        ("infinite.pth", "NaN or infinite values in head.fc.weight"),
    ],
)
def test_bad_weights(
    refuse: Refuse, export: list[object], output: Path, tiny_models: Path, tmp_path: Path, file: str, why: str
) -> None:
    path, marker = tmp_path / file, tmp_path / "code-has-run"
    whole = _weights(tiny_models)
    kind = path.stem
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "corrupt":
        path.write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{broken}" * 9)
    elif kind == "other":
        save_file({"backbone.weight": torch.zeros(3)}, path)
    elif kind == "code":
        path.write_bytes(pickle.dumps(_Code(marker)))
    elif kind == "code-in-dict":
        torch.save({**whole, "hook": _Code(marker)}, path)
    elif kind in ("nan", "infinite"):
        whole["head.fc.weight"][0, 0] = float("nan" if kind == "nan" else "inf")
    if kind in ("cut", "nan", "infinite"):
        (save_file if path.suffix == ".safetensors" else torch.save)(whole, path)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:2000])
    lines = refuse(*export, "--weights", path)
    assert str(path) in lines
    assert why in lines
    assert not output.exists()
    assert not marker.exists()


def test_weights_of_another_network_are_named_key_by_key(
    refuse: Refuse, export: list[object], tiny_models: Path, tmp_path: Path
) -> None:
    state = _weights(tiny_models)
    state["head.fc.weight"] = torch.zeros(7, 48)
    state["extra"] = torch.zeros(2)
    del state["stem.conv1.conv.weight"]
    save_file(state, tmp_path / "other.safetensors")
    lines = refuse(*export, "--weights", tmp_path / "other.safetensors")
    for part in (
        "missing stem.conv1.conv.weight [8, 3, 3, 3]", "unexpected extra [2]",
        "head.fc.weight is [7, 48], expected [10, 48]",
    ):  # fmt: skip
        assert part in lines


# --- images ---


@pytest.mark.parametrize("kind", ["empty", "no image", "broken image", "empty image"])
def test_bad_calibration_folder(refuse: Refuse, export: list[object], output: Path, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "calib"
    folder.mkdir()
    if kind == "no image":
        (folder / "notes.txt").write_text("none")
    elif kind == "broken image":
        Image.fromarray(np.zeros((9, 9), np.uint8)).save(folder / "a.png")
        (folder / "b.png").write_bytes(b"no image")
    elif kind == "empty image":
        (folder / "b.png").write_bytes(b"")
    lines = refuse(*export, "--calib", folder)
    assert (str(folder / "b.png") if kind.endswith(" image") and kind != "no image" else str(folder)) in lines
    assert not output.exists()
