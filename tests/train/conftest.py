"""Data that a tiny network learns soon: horizontal against vertical stripes, coloured rectangles and their boxes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from cspdeploy.core.codec import to_json
from cspdeploy.core.datasets import LabelledImages
from cspdeploy.core.spec import ModelSpec, NetworkSpec, Provenance
from cspdeploy.nets.darknet.cfg import parse_cfg
from cspdeploy.nets.darknet.plan import plan_network
from cspdeploy.nets.network import darknet_contract
from cspdeploy.pipeline.darknet import detection_of_cfg


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


TINY_CFG = """
[net]
width=64
height=64
channels=3
{stages}
# layer 10: the map of stride 32
[convolutional]
batch_normalize=1
filters=32
size=3
stride=2
pad=1
activation=leaky
[convolutional]
filters=24
size=1
stride=1
pad=1
activation=linear
[yolo]
mask=3,4,5
anchors=4,4, 8,8, 12,12, 16,16, 24,24, 40,40
classes=3
num=6
scale_x_y=1.05
[route]
layers=3
[convolutional]
filters=24
size=1
stride=1
pad=1
activation=linear
[yolo]
mask=0,1,2
anchors=4,4, 8,8, 12,12, 16,16, 24,24, 40,40
classes=3
num=6
scale_x_y=1.05
"""
TINY_STAGE = "[convolutional]\nbatch_normalize=1\nfilters={}\nsize=3\nstride=2\npad=1\nactivation=leaky\n"
COLOURS = ((220, 40, 40), (40, 200, 60), (50, 70, 230))


@pytest.fixture(scope="session")
def detector_spec() -> ModelSpec:
    """A detector of 64 px with heads of stride 32 and 16 as yolov4-tiny has them, 30 000 parameters, three classes."""
    stages = "".join(TINY_STAGE.format(chs) for chs in (8, 16, 32, 32))
    config = parse_cfg(TINY_CFG.format(stages=stages), source="tiny.cfg")
    plan = plan_network(config)
    detection = detection_of_cfg(config, plan)
    assert detection is not None
    return ModelSpec(
        name="tiny-detector", network=NetworkSpec(family="darknet", config=to_json(config)), num_classes=3,
        preprocess=darknet_contract().with_size(64, 64), provenance=Provenance(source="user"), task="detect",
        outputs=detection.network_outputs, detection=detection,
    )  # fmt: skip


def draw_scene(rng: np.random.Generator, *, side_px: int) -> tuple[Image.Image, list[str]]:
    """Grey noise with one to three rectangles in the colour of their class, and their lines of YOLO txt."""
    pixels = rng.normal(110, 15, (side_px, side_px, 3)).clip(0, 255).astype(np.uint8)
    lines = []
    for _ in range(int(rng.integers(1, 4))):
        width, height = (int(side) for side in rng.integers(side_px // 6, side_px // 2, 2))
        left, top = (int(rng.integers(0, side_px - side + 1)) for side in (width, height))
        index = int(rng.integers(3))
        pixels[top : top + height, left : left + width] = COLOURS[index]
        centre = ((left + width / 2) / side_px, (top + height / 2) / side_px)
        lines.append(f"{index} {centre[0]:.6f} {centre[1]:.6f} {width / side_px:.6f} {height / side_px:.6f}")
    return Image.fromarray(pixels), lines


@pytest.fixture(scope="session")
def make_boxes_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make(train, val)`: a labelled folder of so many scenes of 80 px."""

    def make(train: int, val: int) -> Path:
        root = tmp_path_factory.mktemp("boxes")
        for seed, (split, num) in enumerate((("train", train), ("val", val))):
            rng = np.random.default_rng(seed)
            for kind in ("images", "labels"):
                (root / kind / split).mkdir(parents=True)
            for i in range(num):
                image, lines = draw_scene(rng, side_px=80)
                image.save(root / "images" / split / f"{i:03}.png")
                (root / "labels" / split / f"{i:03}.txt").write_text("".join(f"{line}\n" for line in lines))
        (root / "classes.txt").write_text("red\ngreen\nblue\n")
        return root

    return make


@pytest.fixture(scope="session")
def boxes_folder(make_boxes_folder: Callable[..., Path]) -> Path:
    """16 scenes to train on, 6 to judge by. Shared and so read-only."""
    return make_boxes_folder(16, 6)
