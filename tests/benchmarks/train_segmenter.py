"""A segmenter from nothing to a bundle: a feature pyramid over any backbone, trained on shapes drawn on photographs.

    python tests/benchmarks/train_segmenter.py cspresnet50 MODELS [--photos FOLDER] [--size 64] [--steps 300] [--seed 0]
    cspdeploy export MODELS/fpn-cspresnet50 --fp16 --int8

Pictures are drawn as they are needed: discs, squares and triangles, each a class beside the background, on photographs
or, without --photos, on coloured noise. Written is what `cspdeploy export` takes: spec.json with the task "segment",
model.safetensors, labels.txt, calibration.npz. What is printed is the mean intersection over union of the classes on
pictures of another seed. Needs torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from torch import nn

from cspdeploy.core.bundle import file_sha256
from cspdeploy.core.codec import from_json, to_json
from cspdeploy.core.model_folder import write_calibration, write_spec, write_text
from cspdeploy.core.preprocess import normalise
from cspdeploy.core.spec import ModelSpec, NetworkSpec, Provenance
from cspdeploy.nets.network import darknet_contract
from cspdeploy.nets.registry import find_network
from cspdeploy.nets.segmentation import FpnConfig, FpnSegmenter
from cspdeploy.nets.weights import write_safetensors

LABELS = ("background", "disc", "square", "triangle")
WIDTH = 64
BATCH = 8

UInt8Array = npt.NDArray[np.uint8]


def segmenter_spec(backbone: NetworkSpec, *, name: str, size_px: int) -> ModelSpec:
    """The description of a segmenter of `LABELS` over a classifier's network."""
    return ModelSpec(
        name=name,
        network=NetworkSpec(family="fpn", config=to_json(FpnConfig(backbone=backbone, width=WIDTH))),
        num_classes=len(LABELS),
        preprocess=darknet_contract(size_px),
        provenance=Provenance(source="user"),
        task="segment",
    )


def draw(rng: np.random.Generator, size_px: int, photos: list[Image.Image]) -> tuple[UInt8Array, UInt8Array]:
    """A picture `[H, W, 3]` and the class of each of its pixels `[H, W]`."""
    picture, mask = _background(rng, size_px, photos), Image.new("L", (size_px, size_px))
    for _ in range(int(rng.integers(1, 4))):
        index = int(rng.integers(1, len(LABELS)))
        half = size_px * float(rng.uniform(0.1, 0.25))
        x, y = (float(value) for value in rng.uniform(half, size_px - half, 2))
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        for image, fill in ((picture, colour), (mask, index)):
            _shape(ImageDraw.Draw(image), LABELS[index], x, y, half, fill)
    return np.asarray(picture), np.asarray(mask)


def _shape(
    canvas: ImageDraw.ImageDraw, label: str, x: float, y: float, half: float, fill: int | tuple[int, ...]
) -> None:
    if label == "disc":
        canvas.ellipse((x - half, y - half, x + half, y + half), fill=fill)
    elif label == "square":
        canvas.rectangle((x - half, y - half, x + half, y + half), fill=fill)
    else:
        canvas.polygon([(x, y - half), (x - half, y + half), (x + half, y + half)], fill=fill)


def _background(rng: np.random.Generator, size_px: int, photos: list[Image.Image]) -> Image.Image:
    if not photos:
        coarse = rng.integers(0, 256, (6, 6, 3), np.uint8)
        return Image.fromarray(coarse).resize((size_px, size_px), Image.Resampling.BICUBIC)
    photo = photos[int(rng.integers(len(photos)))]
    side = int(rng.integers(min(photo.size) // 2, min(photo.size) + 1))
    left, top = (int(rng.integers(0, extent - side + 1)) for extent in photo.size)
    return photo.crop((left, top, left + side, top + side)).resize((size_px, size_px))


def batch_of(
    num: int, spec: ModelSpec, rng: np.random.Generator, photos: list[Image.Image]
) -> tuple[UInt8Array, torch.Tensor, torch.Tensor]:
    """Pictures `[N, H, W, 3]`, the network's input `[N, 3, H, W]` and the classes `[N, H, W]` int64."""
    drawn = [draw(rng, spec.preprocess.height_px, photos) for _ in range(num)]
    pictures, masks = (np.stack(part) for part in zip(*drawn, strict=True))
    return pictures, torch.from_numpy(normalise(pictures, spec.preprocess)), torch.from_numpy(masks.astype(np.int64))


def make_segmenter(spec: ModelSpec) -> FpnSegmenter:
    """With fresh weights."""
    config = from_json(FpnConfig, spec.network.config, where="$.network.config")
    return FpnSegmenter(config, num_classes=spec.num_classes)


def train(spec: ModelSpec, *, steps: int, seed: int, photos: list[Image.Image]) -> FpnSegmenter:
    """A network that has seen `steps` batches, in evaluation mode."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    network = make_segmenter(spec)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=max(5, steps), pct_start=0.1)
    for _ in range(steps):
        _, x_NCHW, classes = batch_of(BATCH, spec, rng, photos)
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(x_NCHW)
        loss = nn.functional.cross_entropy(logits.float(), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.inference_mode()
def mean_iou(
    network: nn.Module, spec: ModelSpec, *, seed: int, photos: list[Image.Image], num: int = 64
) -> list[float]:
    """Intersection over union of each class."""
    _, x_NCHW, classes = batch_of(num, spec, np.random.default_rng(seed), photos)
    found = network(x_NCHW).argmax(1)
    pairs = [((found == i) & (classes == i), (found == i) | (classes == i)) for i in range(spec.num_classes)]
    return [float(both.sum() / either.sum().clamp(min=1)) for both, either in pairs]


def write_model(folder: Path, spec: ModelSpec, network: nn.Module, *, photos: list[Image.Image]) -> None:
    """What `cspdeploy export` takes."""
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", network, dtype=torch.float32)
    sha256 = file_sha256(folder / "model.safetensors")
    provenance = Provenance(source="trained", weights_sha256=sha256, origin=spec.name, dataset="drawn shapes")
    write_spec(folder, dataclasses.replace(spec, provenance=provenance))
    write_text(folder / "labels.txt", "".join(f"{label}\n" for label in LABELS))
    pictures, _, _ = batch_of(128, spec, np.random.default_rng(7), photos)
    write_calibration(folder / "calibration.npz", pictures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backbone", help="a classifier of 'cspdeploy list'")
    parser.add_argument("models", type=Path, help="folder of model folders")
    parser.add_argument("--photos", type=Path, help="folder of photographs")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    row = find_network(given.backbone)
    spec = segmenter_spec(
        NetworkSpec(family=row.family, config=to_json(row.config)), name=f"fpn-{row.name}", size_px=given.size
    )
    photos = [Image.open(path).convert("RGB") for path in sorted(given.photos.iterdir())] if given.photos else []
    network = train(spec, steps=given.steps, seed=given.seed, photos=photos)
    found = mean_iou(network, spec, seed=given.seed + 1, photos=photos)
    write_model(given.models / spec.name, spec, network, photos=photos)
    rows = ", ".join(f"{label} {value:.3f}" for label, value in zip(LABELS, found, strict=True))
    sys.stdout.write(f"{given.models / spec.name}: mean IoU {np.mean(found):.3f} ({rows})\n")


if __name__ == "__main__":
    main()
