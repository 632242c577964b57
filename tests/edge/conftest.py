"""Bundles whose network gives the mean of each colour, so that no image, channel or order can stand for another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from cspdeploy.core.bundle import file_record, write_manifest
from cspdeploy.core.card import card_of, stamp_card
from cspdeploy.core.golden import Golden, write_golden
from cspdeploy.core.preprocess import preprocess
from cspdeploy.core.spec import ModelSpec, Preprocess
from cspdeploy.core.types import Artifact, Frontend, Manifest, TensorInfo

CONTRACT = Preprocess(
    height_px=32, width_px=32, resize="crop", crop_pct=1.0, interpolation="bilinear", channel_order="rgb",
    mean=(0.5, 0.4, 0.3), std=(0.25, 0.5, 0.125),
)  # fmt: skip
NORMALISE = """
        floats = Cast<to = 1>(image)
        planes = Transpose<perm = [0, 3, 1, 2]>({pixels})
        scaled = Mul(planes, gain)
        input = Add(scaled, offset)"""
TOP = """
        likely = Softmax<axis = 1>(logits)
        k = Constant<value = int64[1] {2}>()
        probabilities, classes = TopK<axis = 1>(likely, k)"""

MakeBundle = Callable[..., Path]


def _constants(contract: Preprocess) -> str:
    std = np.asarray(contract.std, np.float64)
    gain = (1 / (255 * std)).astype(np.float32)
    offset = (-np.asarray(contract.mean) / std).astype(np.float32)
    spelt = [", ".join(f"{value:.9g}" for value in row) for row in (gain, offset)]
    return f"<float[1,3,1,1] gain = {{{spelt[0]}}}, float[1,3,1,1] offset = {{{spelt[1]}}}>"


def _text(contract: Preprocess, frontend: Frontend | None, batch: str, opset: int, ir: int) -> str:
    head = f'<ir_version: {ir}, opset_import: ["" : {opset}]>'
    network = "logits = ReduceMean<axes = [2, 3], keepdims = 0>(input)"
    if frontend is None:
        return f"""{head}
    mean (float[{batch},3,32,32] input) => (float[{batch},3] logits) {{
        {network}
    }}"""
    size = "H,W" if frontend.resize else "32,32"
    flipped = frontend.channel_order != contract.channel_order
    order = """
        turned = Constant<value = int64[3] {2, 1, 0}>()
        rgb = Gather<axis = 3>(floats, turned)"""
    body = NORMALISE.replace("{pixels}", "rgb" if flipped else "floats")
    cast, rest = body.strip("\n").split("\n", 1)
    steps = "\n".join([cast, order if flipped else "", rest])
    tops = f", float[{batch},2] probabilities, int64[{batch},2] classes" if frontend.top_k else ""
    return f"""{head}
    mean (uint8[{batch},{size},3] image) => (float[{batch},3] logits{tops})
    {_constants(contract)}
    {{
        {steps}
        {network}
        {TOP if frontend.top_k else ""}
    }}"""


@pytest.fixture
def make_bundle(tmp_path: Path, tiny_spec: ModelSpec) -> MakeBundle:
    """`make_bundle(batch=..., frontend=..., card=...)`: a bundle with one artifact, "onnx" or "onnx-u8"."""

    def make(
        *, batch: int | str = 1, frontend: Frontend | None = None, card: bool = False, opset: int = 17, ir: int = 8,
        labels: tuple[str, ...] = ("red", "green", "blue"), contract: Preprocess = CONTRACT,
    ) -> Path:  # fmt: skip
        folder = tmp_path / "mean"
        folder.mkdir()
        path = folder / ("mean.onnx" if frontend is None else "mean.u8.onnx")
        model = onnx.parser.parse_model(_text(contract, frontend, str(batch), opset, ir))
        path.write_bytes(model.SerializeToString())
        spec = dataclasses.replace(tiny_spec, name="mean", num_classes=3, preprocess=contract)
        size: tuple[int | str, ...] = ("H", "W") if frontend is not None and frontend.resize else (32, 32)
        outputs = [TensorInfo(name="logits", dtype="float32", shape=(batch, 3))]
        if frontend is not None and frontend.top_k:
            outputs += [
                TensorInfo(name="probabilities", dtype="float32", shape=(batch, 2)),
                TensorInfo(name="classes", dtype="int64", shape=(batch, 2)),
            ]
        taken = (
            TensorInfo(name="input", dtype="float32", shape=(batch, 3, 32, 32))
            if frontend is None
            else TensorInfo(name="image", dtype="uint8", shape=(batch, *size, 3))
        )
        record = file_record(path)
        artifact = Artifact(
            kind="onnx" if frontend is None else "onnx-u8", file=path.name, format="onnx", precision="fp32",
            sha256=record.sha256, num_bytes=record.num_bytes, opset=opset, steps=(), inputs=(taken,),
            outputs=tuple(outputs), frontend=frontend,
        )  # fmt: skip
        images = np.random.default_rng(3).integers(0, 256, (6, 1, 1, 3)) + np.zeros((1, 32, 32, 1), np.int64)
        images = (images + np.random.default_rng(4).integers(-40, 41, images.shape)).clip(0, 255).astype(np.uint8)
        x_NCHW = preprocess(list(images), contract)
        exact = x_NCHW.astype(np.float64).mean(axis=(2, 3))
        golden = Golden(
            images=images, x_NCHW=x_NCHW, outputs_fp64={"logits": exact},
            outputs_fp32={"logits": exact.astype(np.float32)},
        )  # fmt: skip
        write_golden(folder / "golden.npz", golden)
        manifest = Manifest(
            spec=spec, labels=("red", "green", "blue"), artifacts=(artifact,),
            files=(file_record(folder / "golden.npz"),), options={}, tools={},
        )  # fmt: skip
        if card:
            described = card_of(manifest, artifact, tool="cspdeploy 1")
            stamp_card(path, dataclasses.replace(described, labels=labels))
            record = file_record(path)
            stamped = dataclasses.replace(artifact, sha256=record.sha256, num_bytes=record.num_bytes)
            manifest = dataclasses.replace(manifest, artifacts=(stamped,))
        write_manifest(folder, manifest)
        return folder

    return make


@pytest.fixture
def colours() -> np.ndarray:
    """Nine images `[9, 40, 36, 3]` uint8, each of one colour of its own."""
    colours = np.random.default_rng(0).integers(0, 256, (9, 3), np.uint8)
    return np.ascontiguousarray(np.broadcast_to(colours[:, None, None], (9, 40, 36, 3)))


@pytest.fixture
def expected_logits(colours: np.ndarray) -> np.ndarray:
    """Of these images."""
    return (colours[:, 0, 0] / 255 - np.array(CONTRACT.mean)) / np.array(CONTRACT.std)
