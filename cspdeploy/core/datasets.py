"""Labelled images: Fashion-MNIST as Debian packages it, or any folder with one folder per class.

Reading decodes through `cspdeploy.core.preprocess` alone. Shapes: N images, H height, W width.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cspdeploy.core.errors import InputError
from cspdeploy.core.preprocess import list_images, load_image, resize_image
from cspdeploy.core.spec import Preprocess

__all__ = ["LabelledImages", "open_dataset"]

FASHION_MNIST = "fashion-mnist"
MAX_IDX_BYTES = 1 << 30
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of the Debian package dataset-fashion-mnist
FASHION_MNIST_LABELS = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LabelledImages:
    """Images with their class indices.

    `stored` holds all images as `[N, H, W]` uint8 (an IDX file), or `paths` names one file for each.
    """

    name: str
    labels: tuple[str, ...]
    classes: npt.NDArray[np.int64]
    stored: npt.NDArray[np.uint8] | None = None
    paths: tuple[Path, ...] = ()

    def __len__(self) -> int:
        return len(self.classes)

    def source(self, index: int) -> npt.NDArray[np.uint8] | Path:
        """What `preprocess` takes for image `index`."""
        return self.stored[index] if self.stored is not None else self.paths[index]

    def resized(self, indices: npt.NDArray[np.int64], contract: Preprocess) -> npt.NDArray[np.uint8]:
        """`[len(indices), H, W, 3]` uint8 RGB at the contract's size."""
        return np.stack([resize_image(load_image(self.source(int(i))), contract) for i in indices])

    def batches(self, size: int) -> Iterator[npt.NDArray[np.int64]]:
        """All indices, in order, at most `size` at a time."""
        for start in range(0, len(self), size):
            yield np.arange(start, min(start + size, len(self)))


def open_dataset(name: str, *, split: str) -> LabelledImages:
    """Open "fashion-mnist" or a folder of labelled images.

    A folder holds one folder per class, or `train/` and `test/` (or `val/`) with one folder per class each.

    Args:
        name: "fashion-mnist", the folder of its four IDX files, or a folder of class folders.
        split: "train" or "test". A folder without splits gives every tenth image of each class to "test".

    Raises:
        InputError: neither of these, or no image in it.
    """
    if name == FASHION_MNIST:
        return _read_fashion_mnist(FASHION_MNIST_FOLDER, split)
    folder = Path(name)
    if (folder / _idx_names(split)[0]).is_file():
        return _read_fashion_mnist(folder, split)
    if not folder.is_dir():
        raise InputError(f"{name}: not a folder", fix=f"give {FASHION_MNIST}, or a folder with a folder for each class")
    return _read_folder(folder, split)


def _idx_names(split: str) -> tuple[str, str]:
    prefix = "train" if split == "train" else "t10k"
    return f"{prefix}-images-idx3-ubyte.gz", f"{prefix}-labels-idx1-ubyte.gz"


def _read_fashion_mnist(folder: Path, split: str) -> LabelledImages:
    images_name, labels_name = _idx_names(split)
    if not (folder / images_name).is_file():
        raise InputError(f"{folder / images_name}: not found", fix="apt-get install dataset-fashion-mnist")
    images = _read_idx(folder / images_name, num_dims=3)
    classes = _read_idx(folder / labels_name, num_dims=1)
    if len(images) != len(classes):
        raise InputError(f"{folder}: {len(images)} images, but {len(classes)} labels")
    if len(classes) == 0 or classes.max() >= len(FASHION_MNIST_LABELS):
        raise InputError(f"{folder / labels_name}: expected classes 0 to {len(FASHION_MNIST_LABELS) - 1}, and some")
    name = f"{FASHION_MNIST}/{split}"
    return LabelledImages(name=name, labels=FASHION_MNIST_LABELS, classes=classes.astype(np.int64), stored=images)


def _read_idx(path: Path, *, num_dims: int) -> npt.NDArray[np.uint8]:
    """One IDX file of unsigned bytes: magic 0x0000'08'<dims>, big-endian sizes, data."""
    try:
        with gzip.open(path) as file:
            magic = struct.unpack(">I", file.read(4))[0]
            if magic != 0x0800 | num_dims:
                raise InputError(f"{path}: magic {magic:#010x}, expected {0x0800 | num_dims:#010x}")
            shape = struct.unpack(f">{num_dims}I", file.read(4 * num_dims))
            size = math.prod(shape)
            if size > MAX_IDX_BYTES:
                raise InputError(f"{path}: {size} bytes of data, expected at most {MAX_IDX_BYTES}")
            data = file.read(size + 1)
    except (OSError, EOFError, struct.error, zlib.error) as error:
        raise InputError(f"{path}: not an IDX file ({error})") from error
    if len(data) != size:
        raise InputError(f"{path}: {len(data)} bytes of data, expected {size}")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _read_folder(folder: Path, split: str) -> LabelledImages:
    names = ("train",) if split == "train" else ("test", "val")
    root = next((folder / name for name in names if (folder / name).is_dir()), None)
    whole = root is not None
    others = [name for name in ("train", "test", "val") if (folder / name).is_dir()]
    if others and not whole:
        raise InputError(f"{folder}: has {', '.join(others)}/, but no {' or '.join(names)}/", fix="add the folder")
    root = root or folder
    labels = tuple(sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")))
    if len(labels) < 2:
        raise InputError(f"{root}: {len(labels)} class folders, expected at least 2", fix="put each class in a folder")
    paths: list[Path] = []
    classes: list[int] = []
    for index, label in enumerate(labels):
        found = list_images(root / label)
        chosen = found if whole else [path for i, path in enumerate(found) if (i % 10 == 9) == (split == "test")]
        paths += chosen
        classes += [index] * len(chosen)
    if not paths:
        raise InputError(f"{folder}: no image for split '{split}'", fix="add images, or make train/ and test/ folders")
    name = f"{folder.name}/{split}"
    return LabelledImages(name=name, labels=labels, classes=np.asarray(classes, np.int64), paths=tuple(paths))
