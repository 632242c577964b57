"""How an application uses the bundle, without cspdeploy: Python, Node and C++, true for its names, shapes and contract.

The snippets follow `cspdeploy.core.preprocess`, which is the contract. The Python one makes the same pixels, since both
use Pillow; sharp and OpenCV have filters of their own, which the page says.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from cspdeploy.core.model_folder import LABELS_FILE
from cspdeploy.core.preprocess import LETTERBOX_GREY
from cspdeploy.core.sizes import contract_of
from cspdeploy.core.spec import Preprocess
from cspdeploy.core.types import Artifact, Manifest
from cspdeploy.report.html.snippet import Snippet
from cspdeploy.report.html.usage_detect import EDGE, TENSORRT, decode_of, python_boxes, python_place

__all__ = ["cpp_snippet", "node_snippet", "python_snippet", "snippets_for"]

PHOTO = "photo.jpg"
_SHARP_KERNELS = {"bilinear": "linear", "bicubic": "cubic", "nearest": "nearest"}
_SHARP_FITS = {"crop": "cover", "stretch": "fill", "letterbox": "contain"}
_OPENCV_FILTERS = {"bilinear": "cv::INTER_LINEAR", "bicubic": "cv::INTER_CUBIC", "nearest": "cv::INTER_NEAREST"}


@dataclass(frozen=True, slots=True)
class _Facts:
    """What the snippets are filled with."""

    contract: Preprocess
    file: str
    inputs: str
    """Name of the input, quoted."""
    outputs: tuple[str, ...]
    """Names of the outputs, quoted."""
    batch: int
    classes: int
    """0: the outputs are no classes."""

    @property
    def size(self) -> tuple[int, int]:
        return self.contract.width_px, self.contract.height_px

    @property
    def fit(self) -> tuple[int, int]:
        """Width and height that the picture covers before its centre is cut out."""
        return int(self.size[0] / self.contract.crop_pct), int(self.size[1] / self.contract.crop_pct)

    def numbers(self, values: tuple[float, ...]) -> str:
        return ", ".join(f"{value:.10g}" for value in values)


def _quote(text: str) -> str:
    """A string literal, the same in all three languages."""
    return json.dumps(text, ensure_ascii=False)


def _facts(manifest: Manifest, artifact: Artifact) -> _Facts:
    batch = artifact.inputs[0].shape[0]
    return _Facts(
        contract=contract_of(manifest, artifact),
        file=_quote(artifact.file),
        inputs=_quote(artifact.inputs[0].name),
        outputs=tuple(_quote(value.name) for value in artifact.outputs),
        batch=batch if isinstance(batch, int) else 1,
        classes=manifest.spec.num_classes if manifest.spec.task == "classify" else 0,
    )


# --- Python ---


def python_snippet(manifest: Manifest, artifact: Artifact) -> str:
    """onnxruntime, NumPy and Pillow alone."""
    facts, decode = _facts(manifest, artifact), decode_of(manifest, artifact)
    boxed = decode in ("nms", "decoded", "ultralytics")
    order = "[:, :, ::-1]" if facts.contract.channel_order == "bgr" else ""
    lines = [
        "import numpy as np, onnxruntime as ort",
        "from PIL import Image, ImageOps",
        f'image = ImageOps.exif_transpose(Image.open("{PHOTO}")).convert("RGB")',
        *(["width, height = image.size"] if boxed else []),
        *_python_resize(facts),
        *(python_place(facts.contract) if boxed else []),
        f"mean, std = np.float32([[{facts.numbers(facts.contract.mean)}], [{facts.numbers(facts.contract.std)}]])",
        f"x = ((np.asarray(image, np.float32){order} / 255 - mean) / std).transpose(2, 0, 1)[None]"
        + (f".repeat({facts.batch}, axis=0)" if facts.batch > 1 else ""),
        f'session = ort.InferenceSession({facts.file}, providers=["CPUExecutionProvider"])',
    ]
    names = ", ".join(facts.outputs)
    if boxed and decode is not None and manifest.spec.detection is not None:
        run = f"session.run([{names}], {{{facts.inputs}: x}})"
        return "\n".join([*lines, *python_boxes(decode, run=run, rule=manifest.spec.detection.suppression)])
    if not facts.classes:
        lines += [
            f"outputs = session.run([{names}], {{{facts.inputs}: x}})",
            f"print(*(f\"{{name}} {{y.shape}}\" for name, y in zip([{names}], outputs)), sep=\"\\n\")",
        ]  # fmt: skip
        return "\n".join(lines)
    lines += [
        f"logits = session.run([{names}], {{{facts.inputs}: x}})[0][0]",
        f'print(open("{LABELS_FILE}", encoding="utf-8").read().splitlines()[logits.argmax()])',
    ]
    return "\n".join(lines)


def _python_resize(facts: _Facts) -> list[str]:
    (width, height), filter_ = facts.size, f"Image.Resampling.{facts.contract.interpolation.upper()}"
    if facts.contract.resize == "stretch":
        return [f"image = image.resize(({width}, {height}), {filter_})"]
    if facts.contract.resize == "letterbox":
        return [
            f"wide = {width} * image.height < {height} * image.width",
            f"w = {width} if wide else max(1, image.width * {height} // image.height)",
            f"h = max(1, image.height * {width} // image.width) if wide else {height}",
            f'image, inner = Image.new("RGB", ({width}, {height}), ({LETTERBOX_GREY},) * 3), '
            f"image.resize((w, h), {filter_})",
            f"image.paste(inner, (({width} - w) // 2, ({height} - h) // 2))",
        ]
    fit = facts.fit
    return [
        f"scale = max({fit[0]} / image.width, {fit[1]} / image.height)",
        f"w, h = max({width}, round(image.width * scale)), max({height}, round(image.height * scale))",
        f"left, top = round((w - {width}) / 2), round((h - {height}) / 2)",
        f"image = image.resize((w, h), {filter_}).crop((left, top, left + {width}, top + {height}))",
    ]


# --- Node ---


def node_snippet(manifest: Manifest, artifact: Artifact) -> str:
    """onnxruntime-node, and sharp for the picture: an ES module."""
    facts = _facts(manifest, artifact)
    (width, height), contract = facts.size, facts.contract
    channel = "2 - c" if contract.channel_order == "bgr" else "c"
    length = f"{facts.batch} * 3 * area" if facts.batch > 1 else "3 * area"
    plane = "Math.floor(i / area) % 3" if facts.batch > 1 else "Math.floor(i / area)"
    lines = [
        'import { readFileSync } from "node:fs";' if facts.classes else "",
        'import * as ort from "onnxruntime-node";',
        'import sharp from "sharp";',
        f'const pixels = await sharp("{PHOTO}").rotate().removeAlpha().toColourspace("srgb")',
        f"  {_sharp_resize(facts)}.raw().toBuffer();",
        f"const mean = [{facts.numbers(contract.mean)}], std = [{facts.numbers(contract.std)}], "
        f"area = {width} * {height};",
        f"const normalise = (i, c) => (pixels[3 * (i % area) + {channel}] / 255 - mean[c]) / std[c];",
        f"const x = Float32Array.from({{ length: {length} }}, (_, i) => normalise(i, {plane}));",
        f"const session = await ort.InferenceSession.create({facts.file});",
        f"const outputs = await session.run({{ {facts.inputs}: "
        f'new ort.Tensor("float32", x, [{facts.batch}, 3, {height}, {width}]) }});',
    ]
    if facts.classes:
        lines += [
            f"const logits = outputs[{facts.outputs[0]}].data.slice(0, {facts.classes});",
            f'console.log(readFileSync("{LABELS_FILE}", "utf8").split("\\n")[logits.indexOf(Math.max(...logits))]);',
        ]
    else:
        lines.append("for (const [name, y] of Object.entries(outputs)) console.log(name, y.dims);")
    return "\n".join(filter(None, lines))


def _sharp_resize(facts: _Facts) -> str:
    contract, (width, height), fit = facts.contract, facts.size, facts.fit
    options = f'fit: "{_SHARP_FITS[contract.resize]}", kernel: "{_SHARP_KERNELS[contract.interpolation]}"'
    if contract.resize == "letterbox":
        grey = ", ".join(f"{channel}: {LETTERBOX_GREY}" for channel in "rgb")
        options += f", background: {{ {grey} }}"
    if contract.resize != "crop" or fit == (width, height):
        return f".resize({width}, {height}, {{ {options} }})"
    left, top = round((fit[0] - width) / 2), round((fit[1] - height) / 2)
    cut = f".extract({{ left: {left}, top: {top}, width: {width}, height: {height} }})"
    return f".resize({fit[0]}, {fit[1]}, {{ {options} }}){cut}"


# --- C++ ---


def cpp_snippet(manifest: Manifest, artifact: Artifact) -> str:
    """The C++ API of ONNX Runtime, and OpenCV for the picture: C++17."""
    facts = _facts(manifest, artifact)
    (width, height), contract, batch = facts.size, facts.contract, facts.batch
    blob = "blobFromImages(images" if batch > 1 else "blobFromImage(sized"
    swap = "true" if contract.channel_order == "rgb" else "false"
    lines = [
        "#include <onnxruntime_cxx_api.h>",
        "#include <opencv2/opencv.hpp>",
        "#include <iostream>",
        "int main() {",
        f'  cv::Mat image = cv::imread("{PHOTO}"), sized;  // BGR, upright',
        *(f"  {line}" for line in _opencv_resize(facts)),
        *([f"  std::vector<cv::Mat> images({batch}, sized);"] if batch > 1 else []),
        f"  cv::Mat x = cv::dnn::{blob}, 1 / 255.0, cv::Size(), cv::Scalar(), {swap});",
        f"  const float mean[]{{{facts.numbers(contract.mean)}}}, deviation[]{{{facts.numbers(contract.std)}}};",
        f"  for (int i = 0, c = 0; i < {3 * batch}; c = ++i % 3) {{",
        f"    cv::Mat plane({height}, {width}, CV_32F, x.ptr<float>(i / 3, c));",
        "    plane = (plane - mean[c]) / deviation[c];",
        "  }",
        "  Ort::Env env;",
        f"  Ort::Session session(env, ORT_TSTR({facts.file}), Ort::SessionOptions());",
        f"  const int64_t shape[]{{{batch}, 3, {height}, {width}}};",
        f"  const char *inputs[]{{{facts.inputs}}}, *outputs[]{{{', '.join(facts.outputs)}}};",
        "  auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);",
        "  auto input = Ort::Value::CreateTensor<float>(memory, x.ptr<float>(), x.total(), shape, 4);",
        f"  auto result = session.Run(Ort::RunOptions(), inputs, &input, 1, outputs, {len(facts.outputs)});",
    ]
    if facts.classes:
        lines += [
            "  const float* logits = result[0].GetTensorData<float>();",
            f"  auto best = std::max_element(logits, logits + {facts.classes}) - logits;",
            f'  std::cout << "line " << best + 1 << " of {LABELS_FILE}" << std::endl;',
        ]
    else:
        lines.append(
            "  for (auto& y : result) std::cout << y.GetTensorTypeAndShapeInfo().GetElementCount() << std::endl;"
        )
    return "\n".join([*lines, "}"])


def _opencv_resize(facts: _Facts) -> list[str]:
    (width, height), fit, contract = facts.size, facts.fit, facts.contract
    enlarge = _OPENCV_FILTERS[contract.interpolation]
    filter_ = enlarge if contract.interpolation == "nearest" else f"scale < 1 ? cv::INTER_AREA : {enlarge}"
    if contract.resize == "stretch":
        scale = f"double scale = std::max({width}.0 / image.cols, {height}.0 / image.rows);"
        unused = [] if contract.interpolation == "nearest" else [scale]
        return [*unused, f"cv::resize(image, sized, cv::Size({width}, {height}), 0, 0, {filter_});"]
    if contract.resize == "letterbox":
        return [
            f"double scale = std::min({width}.0 / image.cols, {height}.0 / image.rows);",
            "cv::Size inner(std::max(1, int(image.cols * scale + 1e-6)), std::max(1, int(image.rows * scale + 1e-6)));",
            f"cv::resize(image, sized, inner, 0, 0, {filter_});",
            f"int left = ({width} - inner.width) / 2, top = ({height} - inner.height) / 2;",
            f"cv::copyMakeBorder(sized, sized, top, {height} - inner.height - top, left, {width} - inner.width - left, "
            f"cv::BORDER_CONSTANT, cv::Scalar::all({LETTERBOX_GREY}));",
        ]
    return [
        f"double scale = std::max({fit[0]}.0 / image.cols, {fit[1]}.0 / image.rows);",
        f"cv::resize(image, sized, cv::Size(), scale, scale, {filter_});",
        f"sized = sized(cv::Rect((sized.cols - {width}) / 2, (sized.rows - {height}) / 2, {width}, {height}));",
    ]


# --- as shown ---


_OTHER_FILTER = "has its own resize filter, so pixels differ by a few steps of 255 from those of the proof."
SNIPPETS = (
    Snippet(
        name="python", title="Python", install="pip install onnxruntime pillow", write=python_snippet,
        note="Makes the same pixels as the proof, which Pillow made too.",
    ),
    Snippet(
        name="node", title="Node", install="npm install onnxruntime-node sharp", write=node_snippet,
        note=f"sharp {_OTHER_FILTER}",
    ),
    Snippet(
        name="cpp", title="C++", install="-std=c++17 -lonnxruntime $(pkg-config --cflags --libs opencv4)",
        note=f"OpenCV {_OTHER_FILTER}", write=cpp_snippet,
    ),
)  # fmt: skip


def snippets_for(manifest: Manifest, artifact: Artifact) -> Sequence[Snippet]:
    """Those that can open the file."""
    decode = decode_of(manifest, artifact)
    if decode == "trt":
        return (TENSORRT,)
    return (EDGE, *SNIPPETS) if decode is not None else SNIPPETS
