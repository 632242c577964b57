"""The step that puts preprocessing into the graph, and the measurement of how true it is. Shapes: N images."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from cspdeploy.core.catalog import CLASSES_OUTPUT, FRONTEND_KINDS, IMAGE_INPUT, PROBABILITIES_OUTPUT
from cspdeploy.core.errors import InputError
from cspdeploy.core.metrics import relative_l2
from cspdeploy.core.preprocess import load_image, normalise, resize_image
from cspdeploy.core.spec import ModelSpec, Preprocess
from cspdeploy.core.types import Artifact, Frontend, StepRecord, TensorInfo
from cspdeploy.export.frontend import add_frontend, write_pixel_graph
from cspdeploy.export.resize_graph import ANTIALIAS_OPSET, pillow_order
from cspdeploy.runtimes.ort import open_cpu_session

__all__ = ["MAX_MEAN_STEPS", "MAX_STEPS", "STEP_NAME", "FrontendStep", "frontend_refusal", "measure_pixels",
           "synthetic_photographs"]  # fmt: skip

STEP_NAME = "frontend"
MAX_MEAN_STEPS, MAX_STEPS = 0.1, 2
"""A resize in the graph is taken up to this distance from Pillow's, in steps of the 8-bit input: mean, and largest.

Measured on 29 noisy pictures of 20 to 1920 px a side under six contracts: bilinear 0.042 and 2 at most, bicubic 0.001
and 1, nearest 0 and 0 (ONNX Runtime 1.31; Pillow 12 and 13). What is left are sums that end on .5 and are rounded to
the other side. A resize that is another one is beyond it: passes in the other order have a mean of 0.2, no rounding
between them 0.14, no antialias 3.
"""

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Distance:
    """Of some pictures, in steps of 255; of the mean the worst picture's."""

    mean: float
    largest: int

    @property
    def faithful(self) -> bool:
        return self.mean <= MAX_MEAN_STEPS and self.largest <= MAX_STEPS

    def record(self) -> dict[str, Any]:
        # Rounded up, so that a difference is never recorded as none.
        return {"mean": float(np.ceil(self.mean * 1e4) / 1e4), "max": self.largest}


class FrontendStep:
    """Makes files with preprocessing in their graph from those without.

    Args:
        frontend: what is asked for.
        opset: of the files.

    Raises:
        InputError: classes are asked for where there are none or not so many, or a resize that the opset has not.
    """

    def __init__(self, frontend: Frontend, spec: ModelSpec, *, opset: int) -> None:
        self._spec, self._opset = spec, opset
        self.frontend = frontend
        self._facts: dict[str, Any] = {}
        self._refusal = ""
        contract = spec.preprocess
        if frontend.top_k and spec.task != "classify":
            raise InputError(f"--embed-topk {frontend.top_k}: {spec.name} gives {', '.join(spec.outputs)}, not classes",
                             fix="leave out --embed-topk")  # fmt: skip
        if frontend.top_k > spec.num_classes:
            raise InputError(f"--embed-topk {frontend.top_k}: {spec.name} has {spec.num_classes} classes",
                             fix=f"--embed-topk {min(5, spec.num_classes)}")  # fmt: skip
        if frontend.resize and opset < ANTIALIAS_OPSET and contract.interpolation != "nearest":
            raise InputError(
                f"--embed-resize: {contract.interpolation} as Pillow does it needs opset {ANTIALIAS_OPSET}, for its "
                f"antialias; the files have {opset}",
                fix=f"--opset {ANTIALIAS_OPSET}, or leave out --embed-resize (and --target, if it takes no more)",
            )

    def measure(
        self, stored: npt.NDArray[np.uint8], x_NCHW: npt.NDArray[np.float32], *, floats: Path, work: Path
    ) -> None:
        """Find out how true the resize is; before `make`.

        Args:
            stored: the golden images as stored, `[N, h, w]` or `[N, h, w, 3]`.
            x_NCHW: the same after the shared preprocessing.
            floats: the FP32 file without preprocessing.
            work: folder for a file that nobody keeps.
        """
        if not self.frontend.resize:
            return
        contract = self._spec.preprocess
        path = work / "pixels.onnx"
        write_pixel_graph(path, contract, opset=self._opset)
        images = [np.asarray(load_image(image)) for image in stored]
        golden, made = measure_pixels(path, contract, images)
        others, _ = measure_pixels(path, contract, synthetic_photographs(contract))
        exact = np.stack([resize_image(Image.fromarray(image), contract) for image in images])
        # Another engine has a resize of its own, which the bound holds for as well: the error as it is here, grown to
        # the bound (its energy goes with the number of values that are off), or spread evenly, whichever moves more.
        # Measured on CSPDarknet53: 3.5e-3 here, 5.9e-3 grown, 3.9e-3 spread; OpenVINO's own 5.4e-3.
        grown = math.sqrt(max(1.0, MAX_MEAN_STEPS / golden.mean)) if golden.mean else 0.0
        change = max(
            factor * _output_change(floats, normalise(pixels, contract), x_NCHW)
            for factor, pixels in ((grown, np.stack(made)), (1.0, at_bound(exact)))
        )
        self.frontend = dataclasses.replace(self.frontend, max_difference=float(golden.largest))
        self._facts = {
            "golden": golden.record(), "synthetic": others.record(), "pillow_order": pillow_order(),
            "bound": {"mean": MAX_MEAN_STEPS, "max": MAX_STEPS}, "output_change": _rounded_up(change),
        }  # fmt: skip
        worst = max((golden, others), key=lambda found: (not found.faithful, found.mean))
        if not worst.faithful:
            self._refusal = (
                f"its resize is not Pillow's: {worst.mean:.2g} steps of 255 in the mean, {worst.largest} at most; "
                f"bound {MAX_MEAN_STEPS:g} and {MAX_STEPS}"
            )

    def make(self, source: Path, target: Path) -> StepRecord:
        """Write `target`; the outcome is "kept", and there is no file, where its pixels would not be Pillow's."""
        asked = self.frontend
        facts: dict[str, Any] = {"channel_order": asked.channel_order, "resize": asked.resize, "top_k": asked.top_k}
        facts |= self._facts
        if self._refusal:
            detail = f"no file with preprocessing in the graph: {self._refusal}"
            return StepRecord(name=STEP_NAME, outcome="kept", detail=detail, facts=facts)
        add_frontend(source, target, contract=self._spec.preprocess, frontend=asked)
        return StepRecord(name=STEP_NAME, outcome="done", detail=self._detail(), facts=facts)

    def _detail(self) -> str:
        asked, contract = self.frontend, self._spec.preprocess
        size = "of any size" if asked.resize else f"{contract.height_px}x{contract.width_px} px"
        parts = [f"{asked.channel_order.upper()} bytes {size} in, scaled and normalised in the graph"]
        if asked.resize:
            golden, others = self._facts["golden"], self._facts["synthetic"]
            parts.append(
                f"resized in it as Pillow does, up to steps of 255: {golden['max']} on the golden images (mean "
                f"{golden['mean']:.2g}), {others['max']} on synthetic ones of other sizes (mean {others['mean']:.2g})"
            )
        if asked.top_k:
            parts.append(f"softmax and the {asked.top_k} likeliest classes at its end")
        return "; ".join(parts)

    def extend(
        self,
        artifacts: Sequence[Artifact],
        *,
        path: Callable[[str], Path],
        describe: Callable[[str, tuple[StepRecord, ...]], Artifact],
    ) -> list[Artifact]:
        """The artifacts, and after them those with preprocessing in the graph; where it is refused, "onnx" says so.

        Args:
            path: of an artifact of that kind.
            describe: an artifact of that kind from its file and steps, as if it took what the others take.
        """
        found, further = list(artifacts), []
        for i, artifact in enumerate(artifacts):
            kind = FRONTEND_KINDS.get(artifact.kind)
            if kind is None:
                continue
            step = self.make(path(artifact.kind), path(kind))
            if step.outcome == "done":
                further.append(self._described(describe(kind, (*artifact.steps, step))))
            elif artifact.kind == "onnx":
                found[i] = dataclasses.replace(artifact, steps=(*artifact.steps, step))
        return found + further

    def _described(self, artifact: Artifact) -> Artifact:
        """With the input and outputs that the file really has."""
        batch = artifact.inputs[0].shape[0]
        contract, asked = self._spec.preprocess, self.frontend
        size: tuple[int | str, int | str] = ("H", "W") if asked.resize else (contract.height_px, contract.width_px)
        image = TensorInfo(name=IMAGE_INPUT, dtype="uint8", shape=(batch, *size, 3))
        classes = (
            TensorInfo(name=PROBABILITIES_OUTPUT, dtype="float32", shape=(batch, asked.top_k)),
            TensorInfo(name=CLASSES_OUTPUT, dtype="int64", shape=(batch, asked.top_k)),
        )
        outputs = (*artifact.outputs, *(classes if asked.top_k else ()))
        return dataclasses.replace(artifact, inputs=(image,), outputs=outputs, frontend=asked)


def frontend_refusal(steps: Iterable[StepRecord]) -> str:
    """Why there is no file with preprocessing in its graph although one was asked for; empty otherwise."""
    return next((step.detail for step in steps if (step.name, step.outcome) == (STEP_NAME, "kept")), "")


def measure_pixels(path: Path, contract: Preprocess, images: Iterable[Pixels]) -> tuple[_Distance, list[Pixels]]:
    """How far the pixels of a graph by `write_pixel_graph` are from `resize_image`, and these pixels `[H, W, 3]`."""
    session = open_cpu_session(path)
    mean, largest, made = 0.0, 0, []
    for image in images:
        (found,) = session.run({IMAGE_INPUT: np.ascontiguousarray(image)[None]}).values()
        pixels = np.asarray(found[0], np.uint8)
        off = np.abs(pixels.astype(np.int16) - resize_image(Image.fromarray(image), contract))
        mean, largest = max(mean, float(off.mean())), max(largest, int(off.max()))
        made.append(pixels)
    return _Distance(mean=mean, largest=largest), made


def synthetic_photographs(contract: Preprocess) -> Sequence[Pixels]:
    """Pictures `[h, w, 3]` to be enlarged, shrunk and cut: smooth, with edges and noise, as cameras make them.

    Golden images often have the network's own size, which proves nothing of a resize.
    """
    height, width = contract.height_px, contract.width_px
    # Whole and odd ratios, both orientations, and sides that go different ways; nothing beyond 3 times the input.
    ratios = ((0.7, 0.9), (1.0, 1.0), (1.9, 2.5), (2.6, 1.7), (3.0, 0.8), (0.6, 2.2))
    rng = np.random.default_rng(0)
    found = []
    for down, across in ratios:
        size = max(2, round(height * down) + 1), max(2, round(width * across) - 1)
        coarse = rng.integers(0, 256, (max(2, size[0] // 8), max(2, size[1] // 8), 3), np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC), np.int16)
        found.append((smooth + rng.integers(-12, 13, (*size, 3), np.int16)).clip(0, 255).astype(np.uint8))
    return found


def at_bound(images_NHWC: Pixels) -> Pixels:
    """Pictures as far off as the bound allows in the mean: one step down in a tenth of the values.

    All to the same side, as measured (sums that end on .5 are rounded down), which moves outputs more than a mixture.
    """
    chosen = np.random.default_rng(0).random(images_NHWC.shape) < MAX_MEAN_STEPS
    return images_NHWC - (chosen & (images_NHWC > 0)).astype(np.uint8)


def _rounded_up(value: float) -> float:
    """To two digits, so that another machine's last digits do not show, and never below what was measured."""
    if not value:
        return 0.0
    digit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / digit) * digit:.1e}")


def _output_change(path: Path, x_NCHW: npt.NDArray[np.float32], exact_NCHW: npt.NDArray[np.float32]) -> float:
    """Relative L2 of what other pixels do to the outputs of a file, of the output that moves most."""
    session = open_cpu_session(path)
    name = next(iter(session.inputs))
    runs: list[list[dict[str, npt.NDArray[Any]]]] = [
        [dict(session.run({name: inputs[i : i + 1]})) for i in range(len(inputs))] for inputs in (x_NCHW, exact_NCHW)
    ]
    moved, exact = (
        {output: np.concatenate([one[output] for one in run]).astype(np.float64) for output in run[0]} for run in runs
    )
    return max(relative_l2(moved[output], exact[output]) for output in exact)
