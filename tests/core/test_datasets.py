from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from cspdeploy.core.datasets import FASHION_MNIST_FOLDER, FASHION_MNIST_LABELS, open_dataset
from cspdeploy.core.errors import InputError
from cspdeploy.core.spec import Preprocess

IMAGES, LABELS = "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"
PIXELS = np.random.default_rng(0).integers(0, 256, (20, 28, 28), np.uint8)
CLASSES = (np.arange(20) % 10).astype(np.uint8)


def _idx(array: npt.NDArray[np.uint8], *, magic: int | None = None, shape: tuple[int, ...] | None = None) -> bytes:
    sizes = shape or array.shape
    header = struct.pack(">I", magic or 0x0800 | array.ndim) + struct.pack(f">{len(sizes)}I", *sizes)
    return header + array.tobytes()


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    """A test split as Fashion-MNIST stores it, with 20 images."""
    (tmp_path / IMAGES).write_bytes(gzip.compress(_idx(PIXELS), mtime=0))
    (tmp_path / LABELS).write_bytes(gzip.compress(_idx(CLASSES), mtime=0))
    return tmp_path


def _add_class(folder: Path, *, num: int, level: int = 0) -> None:
    folder.mkdir(parents=True)
    for i in range(num):
        Image.fromarray(np.full((4, 4), level + i, np.uint8)).save(folder / f"{i:02}.png")


# --- IDX files ---


def test_idx_round_trip(idx_folder: Path, tiny_contract: Preprocess) -> None:
    data = open_dataset(str(idx_folder), split="test")
    assert len(data) == 20
    assert data.labels == FASHION_MNIST_LABELS
    assert data.stored is not None
    assert np.array_equal(data.stored, PIXELS)
    assert np.array_equal(data.classes, CLASSES)
    assert data.classes.dtype == np.int64
    assert np.array_equal(data.source(3), PIXELS[3])
    assert [batch.tolist() for batch in data.batches(8)] == [[*range(8)], [*range(8, 16)], [*range(16, 20)]]
    resized = data.resized(np.array([5, 1]), tiny_contract)
    assert resized.shape == (2, 32, 32, 3)
    assert abs(float(resized[0].mean()) - float(PIXELS[5].mean())) < 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_idx(PIXELS, magic=0x0801), "magic"),
        (_idx(PIXELS, magic=0x0D03), "magic"),
        (_idx(PIXELS)[:-1], "bytes of data"),
        (_idx(PIXELS) + b"x", "bytes of data"),
        (_idx(PIXELS)[:9], "not an IDX file"),
        (b"", "not an IDX file"),
        (_idx(PIXELS[:19]), "19 images, but 20 labels"),
        (_idx(PIXELS[:0], shape=(2**31, 2**31, 4)), "images-idx3"),  # 2**64 bytes: wraps to 0 in 64 bits
        (_idx(PIXELS[:0], shape=(2**32 - 1, 2**32 - 1, 2**32 - 1)), "images-idx3"),
    ],
    ids=["magic of labels", "magic of floats", "truncated", "too long", "cut header", "empty", "other count",
         "size wraps to 0", "size overflows"],
)  # fmt: skip
def test_bad_idx_file(idx_folder: Path, content: bytes, message: str) -> None:
    (idx_folder / IMAGES).write_bytes(gzip.compress(content))
    with pytest.raises(InputError, match=message):
        open_dataset(str(idx_folder), split="test")


def test_truncated_corrupt_or_foreign_compression(idx_folder: Path) -> None:
    path = idx_folder / IMAGES
    whole = path.read_bytes()
    broken_block = whole[:10] + b"\xff" + whole[11:]  # an invalid deflate block type right after the header
    for content in (whole[: len(whole) // 2], whole[:-4], b"plain text", broken_block):
        path.write_bytes(content)
        with pytest.raises(InputError, match="not an IDX file"):
            open_dataset(str(idx_folder), split="test")


def test_images_without_labels_file(idx_folder: Path) -> None:
    (idx_folder / LABELS).unlink()
    with pytest.raises(InputError, match="t10k-labels"):
        open_dataset(str(idx_folder), split="test")


def test_class_beyond_the_labels(idx_folder: Path) -> None:
    (idx_folder / LABELS).write_bytes(gzip.compress(_idx(np.full(20, 10, np.uint8))))
    with pytest.raises(InputError):
        open_dataset(str(idx_folder), split="test")


def test_no_images_at_all(idx_folder: Path) -> None:
    (idx_folder / IMAGES).write_bytes(gzip.compress(_idx(PIXELS[:0])))
    (idx_folder / LABELS).write_bytes(gzip.compress(_idx(CLASSES[:0])))
    with pytest.raises(InputError):
        open_dataset(str(idx_folder), split="test")


@pytest.mark.skipif(not FASHION_MNIST_FOLDER.is_dir(), reason=f"no data set in {FASHION_MNIST_FOLDER}")
def test_the_data_set_of_the_debian_package() -> None:
    data = open_dataset("fashion-mnist", split="test")
    assert data.name == "fashion-mnist/test"
    assert data.stored is not None
    assert data.stored.shape == (10_000, 28, 28)
    assert np.bincount(data.classes).tolist() == [1000] * 10
    assert data.labels[data.classes[0]] == "Ankle boot"


# --- folders ---


def test_folder_with_splits(tmp_path: Path) -> None:
    for split, num in (("train", 3), ("val", 2)):
        _add_class(tmp_path / split / "dog", num=num, level=100)
        _add_class(tmp_path / split / "cat", num=num)
    (tmp_path / "train" / ".cache").mkdir()
    training, testing = (open_dataset(str(tmp_path), split=split) for split in ("train", "test"))
    assert training.labels == testing.labels == ("cat", "dog")
    assert training.classes.tolist() == [0, 0, 0, 1, 1, 1]
    assert testing.classes.tolist() == [0, 0, 1, 1]
    assert isinstance(testing.source(2), Path)
    assert testing.source(2) == tmp_path / "val" / "dog" / "00.png"


def test_folder_without_splits_gives_every_tenth_image_to_the_test(tmp_path: Path) -> None:
    _add_class(tmp_path / "cat", num=20)
    _add_class(tmp_path / "dog", num=10, level=100)
    training, testing = (open_dataset(str(tmp_path), split=split) for split in ("train", "test"))
    assert len(training) == 27
    chosen = [path.relative_to(tmp_path).as_posix() for path in testing.paths]
    assert chosen == ["cat/09.png", "cat/19.png", "dog/09.png"]
    assert not set(training.paths) & set(testing.paths)
    assert testing.classes.tolist() == [0, 0, 1]


@pytest.mark.parametrize("asked", ["train", "test"])
def test_a_split_that_is_not_there_is_not_replaced_by_the_other_folders(tmp_path: Path, asked: str) -> None:
    """Else `train/` beside `extra/` would pass for two classes."""
    for split in ("test" if asked == "train" else "train", "extra"):
        _add_class(tmp_path / split / "cat", num=10)
        _add_class(tmp_path / split / "dog", num=10)
    with pytest.raises(InputError):
        open_dataset(str(tmp_path), split=asked)


def test_too_few_images_for_a_test_split(tmp_path: Path) -> None:
    _add_class(tmp_path / "cat", num=3)
    _add_class(tmp_path / "dog", num=3)
    with pytest.raises(InputError, match="no image for split 'test'"):
        open_dataset(str(tmp_path), split="test")


def test_one_class_is_none(tmp_path: Path) -> None:
    _add_class(tmp_path / "cat", num=3)
    with pytest.raises(InputError, match="1 class folders"):
        open_dataset(str(tmp_path), split="train")


def test_class_without_images(tmp_path: Path) -> None:
    _add_class(tmp_path / "cat", num=3)
    (tmp_path / "dog").mkdir()
    with pytest.raises(InputError, match="dog: holds no image"):
        open_dataset(str(tmp_path), split="train")


def test_neither_a_folder_nor_a_known_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a folder"):
        open_dataset(str(tmp_path / "none"), split="train")
