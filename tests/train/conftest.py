"""Data that a tiny network learns within an epoch: horizontal against vertical stripes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from cspdeploy.core.datasets import LabelledImages
from cspdeploy.core.spec import ModelSpec


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Layers this small only wait for each other on several threads, all the more on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def make_stripes() -> Callable[..., LabelledImages]:
    """`make(num, seed=...)`: images `[num, 32, 32]` of two classes by turns, which flips and shifts do not mix up."""

    def make(num: int, *, seed: int) -> LabelledImages:
        rng = np.random.default_rng(seed)
        stripes = (np.arange(32) // 4 % 2 * 120 + 60).astype(np.float64)
        images: npt.NDArray[np.float64] = rng.normal(0, 12, (num, 32, 32))
        classes = np.arange(num) % 2
        images += np.where(classes[:, None, None] == 0, stripes[None, :, None], stripes[None, None, :])
        stored = images.clip(0, 255).astype(np.uint8)
        return LabelledImages(name="stripes", labels=("flat", "upright"), classes=classes, stored=stored)

    return make


@pytest.fixture(scope="session")
def stripes_folder(make_stripes: Callable[..., LabelledImages], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as files: `train/` with 32 and `test/` with 16 images, half of each class."""
    root = tmp_path_factory.mktemp("stripes")
    for seed, (split, num) in enumerate((("train", 32), ("test", 16))):
        data = make_stripes(num, seed=seed)
        for i in range(num):
            place = root / split / data.labels[data.classes[i]]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(data.source(i)).save(place / f"{i:03}.png")
    return root


@pytest.fixture(scope="session")
def stripes_spec(tiny_spec: ModelSpec) -> ModelSpec:
    return dataclasses.replace(tiny_spec, num_classes=2)
