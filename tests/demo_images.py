"""Real images for `make demo`: PNG files of the Fashion-MNIST test split, named by index and true class."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from cspdeploy.core.datasets import FASHION_MNIST, LabelledImages, open_dataset
from cspdeploy.core.errors import InputError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the images go; made if missing")
    parser.add_argument("--count", type=int, default=4, help="how many images (default: %(default)s)")
    options = parser.parse_args()
    try:
        data = open_dataset(FASHION_MNIST, split="test")
    except InputError as error:
        sys.stderr.write(f"error: {error.message}\nfix: {error.fix}\n")
        return error.exit_code
    options.folder.mkdir(parents=True, exist_ok=True)
    for index in of_many_classes(data)[: options.count]:
        slug = re.sub(r"[^a-z0-9]+", "-", data.labels[data.classes[index]].lower())
        path = options.folder / f"{index:05d}-{slug}.png"
        Image.fromarray(np.asarray(data.source(index))).save(path)
        sys.stdout.write(f"{path}\n")
    return 0


def of_many_classes(data: LabelledImages) -> list[int]:
    """All indices: the first image of each class, in order of index, then the second of each, and so on."""
    rank = np.zeros(len(data), np.int64)
    for index in range(len(data.labels)):
        members = np.flatnonzero(data.classes == index)
        rank[members] = np.arange(len(members))
    return [int(index) for index in np.argsort(rank, kind="stable")]


if __name__ == "__main__":
    sys.exit(main())
