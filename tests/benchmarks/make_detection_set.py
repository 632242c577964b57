"""A labelled detection set: cut-out photographs of four classes pasted on photographs, with exact boxes as YOLO txt.

    apt-get download tuxpaint-stamps-default            # cut-outs with an alpha channel; dpkg -x it into DIR
    python tests/benchmarks/make_detection_set.py DIR/usr/share/tuxpaint/stamps PHOTOS OUT \\
        [--train 800] [--val 200] [--size 192] [--seed 0]
    cspdeploy train yolov4-tiny --data OUT --size 192

PHOTOS is any folder of at least four photographs. Every third of them is a background of the validation images and of
no training image, so that no background is seen in both; the cut-outs are the same, at other places, sizes,
brightnesses and mirrored. A box is that of the pixels whose alpha is above 127 after scaling, before the next cut-out
is laid over them. The same arguments give the same files.

Written: `images/{train,val}/*.png`, `labels/{train,val}/*.txt` (class, centre x, centre y, width, height in parts of
the sides) and `classes.txt`. Needs numpy and pillow.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance, ImageOps

CLASSES = {"bird": "animals/birds", "flower": "plants/flowers", "fruit": "food/fruit", "vehicle": "vehicles"}
MIN_CUTOUT_PX = 48  # a stamp smaller than that is an icon
SHARE_OF_SIDE = (0.14, 0.5)  # longer side of a pasted object, in parts of the picture's side
MAX_COVERED = 0.3  # of a box by a later one; above, the label would be of something that can hardly be seen
MAX_OBJECTS = 5

UInt8Array = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Pasted:
    """One object: its class and its box as left, top, right, bottom in pixels."""

    class_index: int
    box: tuple[int, int, int, int]


def read_cutouts(stamps: Path) -> list[list[Image.Image]]:
    """The cut-outs of each class, each cropped to what can be seen of it; drawings in `cartoon/` are left out."""
    found: list[list[Image.Image]] = []
    for folder in CLASSES.values():
        images = []
        for path in sorted((stamps / folder).rglob("*.png")):
            if "cartoon" in path.parts:
                continue
            image = Image.open(path).convert("RGBA")
            box = visible_box(image)
            if box is not None and min(box[2] - box[0], box[3] - box[1]) >= MIN_CUTOUT_PX:
                images.append(image.crop(box))
        if not images:
            raise SystemExit(f"{stamps / folder}: holds no cut-out")
        found.append(images)
    return found


def visible_box(image: Image.Image) -> tuple[int, int, int, int] | None:
    """Left, top, right, bottom of the pixels with an alpha above 127; None where there is none."""
    rows, columns = np.nonzero(np.asarray(image.getchannel("A")) > 127)
    if not rows.size:
        return None
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def background(photo: Image.Image, *, size_px: int, rng: np.random.Generator) -> Image.Image:
    """A random square of the photograph, at least half as wide as its shorter side, perhaps mirrored."""
    shorter = min(photo.size)
    side = int(rng.integers(shorter // 2, shorter + 1))
    left, top = (int(rng.integers(0, extent - side + 1)) for extent in photo.size)
    square = photo.crop((left, top, left + side, top + side)).resize((size_px, size_px), Image.Resampling.BICUBIC)
    return ImageOps.mirror(square) if rng.integers(2) else square


def compose(
    photo: Image.Image, cutouts: list[list[Image.Image]], *, size_px: int, rng: np.random.Generator
) -> tuple[Image.Image, list[Pasted]]:
    """A picture of `size_px` square with 1 to `MAX_OBJECTS` objects, none of them cut by an edge or much hidden."""
    picture, pasted = background(photo, size_px=size_px, rng=rng), list[Pasted]()
    for _ in range(int(rng.integers(1, MAX_OBJECTS + 1))):
        class_index = int(rng.integers(len(cutouts)))
        stamp = cutouts[class_index][int(rng.integers(len(cutouts[class_index])))]
        longer = size_px * np.exp(rng.uniform(*np.log(SHARE_OF_SIDE)))
        scale = longer / max(stamp.size)
        small = stamp.resize((max(4, round(stamp.width * scale)), max(4, round(stamp.height * scale))))
        small = ImageOps.mirror(small) if rng.integers(2) else small
        alpha = small.getchannel("A")
        bright = ImageEnhance.Brightness(small.convert("RGB")).enhance(float(rng.uniform(0.7, 1.25)))
        left, top = (int(rng.integers(0, size_px - extent + 1)) for extent in small.size)
        seen = visible_box(small)
        if seen is None:
            continue
        box = (left + seen[0], top + seen[1], left + seen[2], top + seen[3])
        if any(_covered(old.box, box) > MAX_COVERED for old in pasted):
            continue
        picture.paste(bright, (left, top), alpha)
        pasted.append(Pasted(class_index, box))
    return picture, pasted


def _covered(old: tuple[int, int, int, int], new: tuple[int, int, int, int]) -> float:
    width = min(old[2], new[2]) - max(old[0], new[0])
    height = min(old[3], new[3]) - max(old[1], new[1])
    return max(0, width) * max(0, height) / ((old[2] - old[0]) * (old[3] - old[1]))


def yolo_line(one: Pasted, size_px: int) -> str:
    """Class, centre and size in parts of the sides."""
    left, top, right, bottom = one.box
    values = ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)
    return f"{one.class_index} " + " ".join(f"{value / size_px:.6f}" for value in values)


def write_set(stamps: Path, photos: Path, out: Path, *, num: dict[str, int], size_px: int, seed: int) -> None:
    """Write the whole set below `out`."""
    cutouts = read_cutouts(stamps)
    paths = sorted(path for path in photos.iterdir() if path.suffix.lower() in {".jpg", ".jpeg", ".png"})
    if len(paths) < 4:
        raise SystemExit(f"{photos}: holds {len(paths)} photographs, expected at least 4")
    parts = {"train": [p for i, p in enumerate(paths) if i % 3 != 2], "val": paths[2::3]}
    for number, (split, chosen) in enumerate(parts.items()):
        images, labels = out / "images" / split, out / "labels" / split
        images.mkdir(parents=True, exist_ok=True)
        labels.mkdir(parents=True, exist_ok=True)
        opened = [Image.open(path).convert("RGB") for path in chosen]
        for image in opened:
            image.thumbnail((1024, 1024))
        rng = np.random.default_rng((seed, number))
        for index in range(num[split]):
            picture, pasted = compose(opened[index % len(opened)], cutouts, size_px=size_px, rng=rng)
            picture.save(images / f"{index:05}.png")
            text = "".join(f"{yolo_line(one, size_px)}\n" for one in pasted)
            (labels / f"{index:05}.txt").write_text(text, encoding="ascii")
    (out / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES), encoding="ascii")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stamps", type=Path)
    parser.add_argument("photos", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=int, default=800, help="training pictures")
    parser.add_argument("--val", type=int, default=200, help="validation pictures")
    parser.add_argument("--size", type=int, default=192, help="side in pixels")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    write_set(
        given.stamps, given.photos, given.out, num={"train": given.train, "val": given.val}, size_px=given.size,
        seed=given.seed,
    )  # fmt: skip


if __name__ == "__main__":
    main()
