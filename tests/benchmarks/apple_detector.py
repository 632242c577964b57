"""A trained YOLOv4-tiny (one class, apples) as float ONNX, photographs with apples, and matched boxes of two files.

    pip download --no-deps napari-apple==0.0.8          # a Keras h5 with its Darknet cfg, BSD-3-Clause
    apt-get download tuxpaint-stamps-default            # cut-out photographs of apples; dpkg -x it into DIR
    python tests/benchmarks/apple_detector.py convert napari_apple-0.0.8-py3-none-any.whl apple.onnx [--size 416]
    python tests/benchmarks/apple_detector.py darknet napari_apple-0.0.8-py3-none-any.whl FOLDER [--size 416]
    python tests/benchmarks/apple_detector.py scenes STAMPS PHOTOS FOLDER [--count 96] [--seed 0]
    python tests/benchmarks/apple_detector.py detect apple.onnx IMAGE...
    cspdeploy export apple.onnx --preprocess darknet --int8 --calib FOLDER -o OUT
    python tests/benchmarks/apple_detector.py match apple.onnx OUT/apple/apple.int8.onnx FOLDER2 [--engine openvino]

STAMPS is the folder `food/fruit` of the stamps, PHOTOS any folder of photographs. Give calibration and judgement
scenes of different seeds; FOLDER.npy beside FOLDER holds the same images for int8_peers.py. `convert` needs
h5py and torch, the rest numpy, pillow and an engine. --preprocess darknet tells the export what the input is.
`darknet` writes the same network as apple.cfg, apple.weights and apple.names, which `cspdeploy export apple.cfg
--weights apple.weights --names apple.names` takes; Darknet's eps is 1e-5, so the difference goes into the variances.

Input `input` [1, 3, S, S] float32, RGB in [0, 1], stretched to the square. Outputs: `boxes` [1, A, 4] as left, top,
right, bottom in parts of the sides, and `scores` [1, A, C] = objectness x class; A = 3 anchors of each cell of the two
heads, stride 32 first. With --raw: the heads themselves.

The network is the cfg's (Darknet's nearest upsampling); the numbers are the h5's: batch norms are found by what they
read, since Keras counts them in another order than the convolutions from the 17th on, and their eps is Keras's 1e-3.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from apple_boxes import detections, images_of, input_size, match, open_engine, read_image
from PIL import Image

if TYPE_CHECKING:
    import torch

    from cspdeploy.nets.darknet.network import DarknetNet

CFG = "napari_apple/main_folder/yolov4-tiny-train.cfg"
H5 = "napari_apple/weight-darknet/yolov4-tiny-960.h5"
KERAS_EPS = 1e-3  # of every BatchNormalization in the h5's model_config


def _layers_by_input(config: dict[str, Any], class_name: str) -> dict[str, str]:
    """Name of the layer that a layer of that class reads -> its own name."""
    layers = (layer for layer in config["config"]["layers"] if layer["class_name"] == class_name)
    return {layer["inbound_nodes"][0][0][0]: layer["name"] for layer in layers}


def load_keras(network: DarknetNet, data: bytes) -> None:
    """Put the values of the h5 into the network: the n-th Conv2D is the n-th convolution of the cfg."""
    import h5py
    import torch

    from cspdeploy.nets.blocks import BN_EPS
    from cspdeploy.nets.darknet.network import ConvolutionalLayer

    with h5py.File(io.BytesIO(data)) as file:
        norms = _layers_by_input(json.loads(file.attrs["model_config"]), "BatchNormalization")

        def value(name: str, field: str) -> torch.Tensor:
            return torch.from_numpy(np.asarray(file[f"model_weights/{name}/{name}/{field}:0"]))

        layers = [layer for layer in network.layers if isinstance(layer, ConvolutionalLayer)]
        with torch.no_grad():
            for index, layer in enumerate(layers):
                name = f"conv2d_{index}" if index else "conv2d"
                layer.conv.weight.copy_(value(name, "kernel").permute(3, 2, 0, 1))  # HWIO -> OIHW
                if layer.conv.bias is not None:
                    layer.conv.bias.copy_(value(name, "bias"))
                    continue
                norm = layer.bn
                norm.weight.copy_(value(norms[name], "gamma"))
                norm.bias.copy_(value(norms[name], "beta"))
                norm.running_mean.copy_(value(norms[name], "moving_mean"))
                norm.running_var.copy_(value(norms[name], "moving_variance") + (KERAS_EPS - BN_EPS))


def open_wheel(wheel: Path, size_px: int) -> tuple[str, DarknetNet]:
    """The cfg's text at that size, and its network with the trained values."""
    from cspdeploy.nets.darknet.cfg import parse_cfg
    from cspdeploy.nets.darknet.network import DarknetNet

    with zipfile.ZipFile(wheel) as archive:
        cfg, h5 = archive.read(CFG).decode(), archive.read(H5)
    for side in ("width", "height"):
        cfg = re.sub(rf"^{side}\s*=\s*\d+", f"{side}={size_px}", cfg, count=1, flags=re.MULTILINE)
    network = DarknetNet(parse_cfg(cfg, source=CFG)).eval()
    load_keras(network, h5)
    return cfg, network


def write_darknet_files(wheel: Path, folder: Path, *, size_px: int) -> None:
    """apple.cfg, apple.weights and apple.names, as Darknet itself would have left them after the training."""
    from cspdeploy.nets.darknet.weights import write_darknet

    cfg, network = open_wheel(wheel, size_px)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "apple.cfg").write_text(cfg)
    (folder / "apple.names").write_text("apple\n")
    write_darknet(folder / "apple.weights", network)


def decoded(network: DarknetNet) -> torch.nn.Module:
    """The network with its heads decoded (Darknet's [yolo] without new_coords)."""
    import torch

    from cspdeploy.nets.darknet.sections import Yolo

    heads = [layer for layer in network.config.layers if isinstance(layer, Yolo)]
    side_px = network.config.net.width
    with torch.no_grad():
        cells = [int(t_NCHW.shape[-1]) for t_NCHW in network(torch.zeros(1, 3, side_px, side_px))]

    class Decoded(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network
            for index, (head, count) in enumerate(zip(heads, cells, strict=True)):
                line = torch.arange(count, dtype=torch.float32)
                anchors = torch.tensor([head.anchors[anchor] for anchor in head.mask]) / side_px / 2
                self.register_buffer(f"grid{index}", torch.stack(torch.meshgrid(line, line, indexing="xy"), -1))
                self.register_buffer(f"halves{index}", anchors.reshape(1, -1, 1, 1, 2))

        def forward(self, x_NCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            boxes, scores = [], []
            for index, (head, count, t_NCHW) in enumerate(zip(heads, cells, self.network(x_NCHW), strict=True)):
                grid, halves = self.get_buffer(f"grid{index}"), self.get_buffer(f"halves{index}")
                t = t_NCHW.reshape(1, len(head.mask), 5 + head.classes, count, count).permute(0, 1, 3, 4, 2)
                centre = (torch.sigmoid(t[..., :2]) * head.scale_x_y - (head.scale_x_y - 1) / 2 + grid) / count
                half = torch.exp(t[..., 2:4]) * halves
                boxes.append(torch.cat([centre - half, centre + half], -1).reshape(1, -1, 4))
                scores.append((torch.sigmoid(t[..., 4:5]) * torch.sigmoid(t[..., 5:])).reshape(1, -1, head.classes))
            return torch.cat(boxes, 1), torch.cat(scores, 1)

    return Decoded()


def convert(wheel: Path, target: Path, *, size_px: int, raw: bool) -> None:
    """Write the simplified float ONNX and compare it with the eager network on noise."""
    import onnx
    import onnxsim
    import torch

    from cspdeploy.export.onnx import export_onnx

    _, network = open_wheel(wheel, size_px)
    model = network if raw else decoded(network).eval()
    names = network.output_names if raw else ("boxes", "scores")
    x_NCHW = torch.rand(1, 3, size_px, size_px, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "plain.onnx"
        export_onnx(model, x_NCHW, plain, names=names, opset=18, dynamic_batch=False)
        onnx.save(onnxsim.simplify(str(plain))[0], target)
    with torch.no_grad():
        expected = dict(zip(names, model(x_NCHW), strict=True))
    got = open_engine(target, "ort")(x_NCHW.numpy())
    for name, reference in expected.items():
        error = np.linalg.norm(got[name] - reference.numpy()) / np.linalg.norm(reference.numpy())
        sys.stdout.write(f"{name:10} {list(got[name].shape)} relative L2 to eager {error:.1e}\n")


def make_scenes(stamps: Path, photos: Path, folder: Path, *, count: int, seed: int, size_px: int) -> None:
    """Write `count` PNG images: crops of photographs with up to twelve cut-out apples, turned and scaled."""
    rng = np.random.default_rng(seed)
    apples = [Image.open(path).convert("RGBA") for path in sorted(stamps.glob("apple_*.png"))]
    backgrounds = [Image.open(path).convert("RGB") for path in images_of(photos)]
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        photo = backgrounds[int(rng.integers(len(backgrounds)))]
        side = int(min(photo.size) * rng.uniform(0.5, 1.0))
        left, top = (int(rng.integers(0, whole - side + 1)) for whole in photo.size)
        scene = photo.crop((left, top, left + side, top + side)).resize((size_px, size_px), Image.Resampling.BILINEAR)
        for _ in range(int(rng.integers(1, 13))):
            apple = apples[int(rng.integers(len(apples)))]
            scale = float(rng.uniform(0.5, 1.8)) * size_px / 416  # the stamps are 50 px: 25 to 90 px at 416
            apple = apple.rotate(float(rng.uniform(-40, 40)), Image.Resampling.BICUBIC, expand=True)
            apple = apple.resize((round(apple.width * scale), round(apple.height * scale)), Image.Resampling.BICUBIC)
            place = tuple(int(rng.integers(0, size_px - side_px)) for side_px in apple.size)
            scene.paste(apple, (place[0], place[1]), apple)
        scene.save(folder / f"scene{seed}-{index:03}.png")
    scenes = [read_image(path, size_px) for path in images_of(folder)]
    np.save(folder.with_suffix(".npy"), np.concatenate(scenes))


def detect(model: Path, images: list[Path]) -> None:
    """One line for each image: scores and boxes in pixels of the network's input."""
    run, size_px = open_engine(model, "ort"), input_size(model)
    for path in images:
        boxes, scores = detections(run(read_image(path, size_px)))
        found = " ".join(
            f"{score:.2f}@{','.join(f'{v * size_px:.0f}' for v in box)}"
            for box, score in zip(boxes, scores, strict=True)
        )
        sys.stdout.write(f"{path.name}: {len(boxes)} boxes {found}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, *paths: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name)
        for path in paths:
            one.add_argument(path, type=Path, nargs="+" if path == "images" else None)
        return one

    converting, scenes = command("convert", "wheel", "target"), command("scenes", "stamps", "photos", "folder")
    darknet = command("darknet", "wheel", "folder")
    command("detect", "model", "images")
    command("match", "reference", "other", "folder").add_argument(
        "--engine", choices=("ort", "openvino"), default="ort"
    )
    for one in (converting, darknet, scenes):
        one.add_argument("--size", type=int, default=416)
    converting.add_argument("--raw", action="store_true", help="the heads, not boxes and scores")
    scenes.add_argument("--count", type=int, default=96)
    scenes.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.command == "convert":
        convert(given.wheel, given.target, size_px=given.size, raw=given.raw)
    elif given.command == "darknet":
        write_darknet_files(given.wheel, given.folder, size_px=given.size)
    elif given.command == "scenes":
        numbers = {"count": given.count, "seed": given.seed, "size_px": given.size}
        make_scenes(given.stamps, given.photos, given.folder, **numbers)
    elif given.command == "detect":
        detect(given.model, given.images)
    else:
        result = match(given.reference, given.other, given.folder, engine=given.engine)
        sys.stdout.write(
            f"{result['boxes']:.0f} boxes, {result['found']:.0f} found, matched {result['matched']:.2%}, extra "
            f"{result['extra']:.2%}; SQNR of boxes {result['boxes_db']:.1f}, of scores {result['scores_db']:.1f} dB\n"
        )


if __name__ == "__main__":
    main()
