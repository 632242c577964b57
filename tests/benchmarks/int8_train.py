"""Train a network for the INT8 benchmark: shortly, but really, so that quantisation meets a trained network's ranges.

    python tests/benchmarks/int8_train.py cspresnet50 /tmp/models

Writes the first 16,000 training images of Fashion-MNIST (Debian's dataset-fashion-mnist) as a data set of their own,
FOLDER, and runs `cspdeploy train MODEL --data FOLDER --size 32 --epochs 2 --batch 64 --models DIR`: some 4 minutes of
two cores, 82 % top-1 for cspresnet50.
"""

from __future__ import annotations

import argparse
import gzip
import struct
import subprocess
import tempfile
from pathlib import Path

from int8_files import cspdeploy

from cspdeploy.core.datasets import FASHION_MNIST_FOLDER

NUM_IMAGES = 16_000


def write_subset(folder: Path, count: int) -> None:
    """Fashion-MNIST with only the first `count` training images, in its own IDX files."""
    for source in sorted(FASHION_MNIST_FOLDER.glob("*.gz")):
        data = gzip.decompress(source.read_bytes())
        if source.name.startswith("train"):
            header = 4 + 4 * data[3]  # the fourth byte is the number of dimensions, each a big-endian uint32
            each = (len(data) - header) // struct.unpack(">I", data[4:8])[0]
            data = data[:4] + struct.pack(">I", count) + data[8 : header + count * each]
        (folder / source.name).write_bytes(gzip.compress(data, 1, mtime=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("models", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_subset(folder, NUM_IMAGES)
        recipe = ["--size", "32", "--epochs", "2", "--batch", "64"]
        subprocess.run(cspdeploy("train", given.model, "--data", folder, *recipe, "--models", given.models), check=True)


if __name__ == "__main__":
    main()
