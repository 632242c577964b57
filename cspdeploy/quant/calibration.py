"""Calibration images: read lazily through the model's own preprocessing, so that any number of them uses flat memory.

Shapes: N images, H height, W width of the network's input.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cspdeploy.core.codec import to_json
from cspdeploy.core.errors import InputError
from cspdeploy.core.model_folder import read_calibration
from cspdeploy.core.preprocess import list_images, load_image, preprocess, resize_image
from cspdeploy.core.spec import Preprocess
from cspdeploy.quant.copies import exact_copies, near_copies
from cspdeploy.quant.image_traits import ImageTraits, measure_image

__all__ = ["CalibrationSet", "CalibrationSplit", "SetTraits", "open_calibration"]

Indices = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]
Progress = Callable[[str, int, int], None]

MIN_IMAGES_TO_SPLIT = 8
"""Of fewer, a quarter is one image, and what is kept by one image's error is kept by chance."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CalibrationSplit:
    """Which images ranges and repairs are made from, and which decide whether a repair is kept."""

    fit: Indices
    held_out: Indices
    shared: bool
    """The set is too small to hold any image out: both sides are all of it, and gains on it prove little."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SetTraits:
    """What one pass over all images found."""

    images: tuple[ImageTraits, ...]
    histogram_RGB: npt.NDArray[np.int64]
    """`[3, 256]`: how often each value occurs in red, green and blue, at the network's size."""
    exact: Indices
    """`[N]`: the first image with the same pixels."""
    group: Indices
    """`[N]`: the first image that shows the same, exact copies and near ones."""


class CalibrationSet:
    """Images of one preprocessing contract. Each batch is decoded when it is asked for, and nothing of it is kept.

    Args:
        sources: image files, or the images `[h, w]` or `[h, w, 3]` uint8.
        contract: the model's preprocessing.
        origin: where the images come from, for the manifest.
        ignored: how many files of the folder are no images, by suffix.
    """

    def __init__(
        self, sources: Sequence[Path] | Pixels, *, contract: Preprocess, origin: str,
        ignored: Counter[str] | None = None,
    ) -> None:  # fmt: skip
        self.contract = contract
        self.origin = origin
        self.ignored = ignored or Counter()
        self._sources = sources
        self._digests: list[bytes] | None = None
        self._traits: SetTraits | None = None

    def __len__(self) -> int:
        return len(self._sources)

    def name(self, index: int) -> str:
        """Of one image, for messages: its path, or "image 3"."""
        source = self._sources[index]
        return str(source) if isinstance(source, Path) else f"image {index}"

    def batches(self, size: int, indices: npt.ArrayLike | None = None) -> Iterator[npt.NDArray[np.float32]]:
        """The network's input, `[<=size, 3, H, W]` float32 each, exactly as prediction would prepare these images.

        Args:
            size: images a batch, at least 1.
            indices: which images, in which order; all in their own order if None.

        Raises:
            InputError: an image cannot be read.
            ValueError: `size` is below 1.
        """
        if size < 1:
            raise ValueError(f"size: got {size}, expected at least 1")
        chosen = range(len(self)) if indices is None else [int(i) for i in np.asarray(indices, np.int64)]
        for start in range(0, len(chosen), size):
            yield preprocess([self._sources[i] for i in chosen[start : start + size]], self.contract)

    @property
    def content_hash(self) -> str:
        """SHA-256 over the contract and the bytes of all images, whatever their names and their order."""
        if self._digests is None:
            self._digests = [self._digest(i) for i in range(len(self))]
        found = hashlib.sha256(json.dumps(to_json(self.contract), sort_keys=True).encode())
        for digest in sorted(self._digests):
            found.update(digest)
        return found.hexdigest()

    def _digest(self, index: int) -> bytes:
        source = self._sources[index]
        if not isinstance(source, Path):
            return hashlib.sha256(f"{source.shape}".encode() + source.tobytes()).digest()
        try:
            with source.open("rb") as file:
                return hashlib.file_digest(file, "sha256").digest()
        except OSError as error:
            raise InputError(f"{source}: {error.strerror or error}", fix="restore the file, or remove it") from error

    def traits(self, *, progress: Progress = lambda what, done, total: None) -> SetTraits:
        """What all images are like, found in one pass at the first call and kept: about a kilobyte an image.

        Raises:
            InputError: an image cannot be read; names the first such file and how many there are.
        """
        if self._traits is None:
            self._traits = self._scan(progress)
        return self._traits

    def _scan(self, progress: Progress) -> SetTraits:
        found: list[ImageTraits] = []
        digests: list[bytes] = []
        broken: list[InputError] = []
        histogram = np.zeros((3, 256), np.int64)
        for index in range(len(self)):
            progress("looking at the calibration images", index, len(self))
            try:
                image = load_image(self._sources[index])
                resized = resize_image(image, self.contract)
                digests.append(self._digest(index))
            except InputError as error:
                broken.append(error)
                continue
            found.append(measure_image(image, resized))
            histogram += [np.bincount(resized[:, :, channel].ravel(), minlength=256) for channel in range(3)]
        if broken:
            others = f"; {len(broken)} of {len(self)} images cannot be read" if len(self) > 1 else ""
            raise InputError(f"{broken[0].message}{others}", fix="remove or replace what cannot be read")
        self._digests = digests
        exact = exact_copies(found)
        group = near_copies(found, exact)
        return SetTraits(images=tuple(found), histogram_RGB=histogram, exact=exact, group=group)

    def split(self, *, holdout: float = 0.25, seed: int = 0) -> CalibrationSplit:
        """Divide the images: the same way each time, spread evenly over their order, copies on one side.

        One group of images that show the same is drawn from each run of about `1 / holdout` groups, at random, since a
        fixed step would meet the same class again and again where classes take turns.

        Args:
            holdout: share of the images to hold out, in (0, 1).
            seed: of the draw.

        Raises:
            InputError: an image cannot be read.
            ValueError: `holdout` is not in (0, 1).
        """
        if not 0 < holdout < 1:
            raise ValueError(f"holdout: got {holdout}, expected a number in (0, 1)")
        group = self.traits().group
        firsts, sizes = np.unique(group, return_counts=True)
        if len(firsts) < MIN_IMAGES_TO_SPLIT:
            everything = np.arange(len(self))
            return CalibrationSplit(fit=everything, held_out=everything, shared=True)
        num_held = min(len(firsts) - 1, max(1, round(len(firsts) * holdout)))
        generator = np.random.default_rng(seed)
        bounds = np.arange(num_held + 1) * len(firsts) // num_held
        held = []
        for low, high in itertools.pairwise(bounds):
            # The smallest groups of the run: sixty copies of one image would be a poor judge.
            smallest = low + np.flatnonzero(sizes[low:high] == sizes[low:high].min())
            held.append(firsts[generator.choice(smallest)])
        inside = np.isin(group, held)
        return CalibrationSplit(fit=np.flatnonzero(~inside), held_out=np.flatnonzero(inside), shared=False)


def open_calibration(
    source: Path | Pixels, contract: Preprocess, *, max_images: int | None = None, origin: str = ""
) -> CalibrationSet:
    """Open calibration images without reading them.

    Args:
        source: a folder of image files, at any depth; a file that holds stored images (`calibration.npz`); or stored
            images, `[N, h, w]` or `[N, h, w, 3]` uint8.
        contract: the model's preprocessing.
        max_images: take at most so many, spread evenly over their order; all if None.
        origin: where they come from, for the manifest; the path and the count if empty.

    Raises:
        InputError: no such folder, no image in it, an array of another kind, or `max_images` below 1.
    """
    if max_images is not None and max_images < 1:
        raise InputError(f"calibration: got at most {max_images} images, expected at least 1")
    ignored: Counter[str] = Counter()
    sources: Sequence[Path] | Pixels
    if not isinstance(source, Path):
        name, sources = "stored images", _require_stored(source)
    elif source.suffix == ".npz" and source.is_file():
        name, sources = str(source), read_calibration(source)
    else:
        name = str(source)
        sources, ignored = _image_files(source)
    num = len(sources)
    if max_images is not None and max_images < num:
        chosen = np.arange(max_images) * num // max_images
        sources = [sources[i] for i in chosen] if isinstance(sources, list) else np.asarray(sources)[chosen]
    count = f"{len(sources)} images" if len(sources) == num else f"{len(sources)} of {num} images"
    return CalibrationSet(sources, contract=contract, origin=origin or f"{name} ({count})", ignored=ignored)


def _require_stored(images: Pixels) -> Pixels:
    colour = images.ndim == 4 and images.shape[3] == 3
    if images.dtype != np.uint8 or not (images.ndim == 3 or colour) or images.size == 0:
        raise InputError(
            f"calibration images: got {images.dtype} {list(images.shape)}, expected uint8 [N, h, w] or [N, h, w, 3]",
            fix="give the images before preprocessing, as bytes",
        )
    return images


def _image_files(folder: Path) -> tuple[list[Path], Counter[str]]:
    """The image files, and how many others there are of each suffix."""
    listed = list_images(folder)
    # What systems leave behind: ".ipynb_checkpoints", and "._photo.jpg", which is no JPEG.
    paths = [path for path in listed if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not paths:
        raise InputError(f"{folder}: all of its {len(listed)} images are hidden files, expected others",
                         fix="name a folder with at least one image")  # fmt: skip
    known = set(paths)
    others = (path for path in folder.rglob("*") if path not in known and path.is_file())
    return paths, Counter(path.suffix.lower() or path.name for path in others)
