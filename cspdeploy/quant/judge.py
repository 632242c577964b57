"""An INT8 file on the engine that it is meant for, against the FP32 file that it is made from. Shapes: N images."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from cspdeploy.check.accuracy import measure_accuracy
from cspdeploy.check.latency import LatencySettings, measure_latency, noise_warning
from cspdeploy.check.machine import MachineWatch
from cspdeploy.check.worker import Worker
from cspdeploy.core.datasets import LabelledImages
from cspdeploy.core.detection.spec import Detection
from cspdeploy.core.errors import InputError
from cspdeploy.core.metrics import sqnr_db, top_k
from cspdeploy.core.onnx_graph import read_onnx
from cspdeploy.core.results import Timing
from cspdeploy.core.spec import Accuracy, Preprocess
from cspdeploy.quant.box_agreement import BoxAgreement
from cspdeploy.quant.budget import Judgement
from cspdeploy.quant.view import view_arrays, view_of
from cspdeploy.runtimes import require_runtime
from cspdeploy.runtimes.base import Outputs, SessionRequest

__all__ = ["JUDGE_LATENCY", "Judge", "Labelled"]

Floats = npt.NDArray[np.float32]
Progress = Callable[[str, int, int], None]

JUDGE_LATENCY = LatencySettings(
    min_runs=20, min_seconds=0.2, min_rounds=8, max_seconds=2.0, max_wall_seconds=8.0, warmup_seconds=0.1,
    max_warmup_seconds=1.0, close_enough=0.02,
)  # fmt: skip
"""A search judges many files, so a ratio is known to within 2 %, not 1 %; `verify` times again what it chooses."""
FIRST_LOOK = LatencySettings(
    min_runs=18, min_seconds=0.1, min_rounds=6, max_wall_seconds=2.0, warmup_seconds=0.1, max_warmup_seconds=0.5
)
"""Enough where one file is plainly the faster: an INT8 file that is worth shipping takes half of FP32's time."""
PLAINLY = 1.1
"""The interval of the ratio lies wholly beyond this, on either side of 1."""
TIME_LIMIT_S = 120.0
_BATCH = 64
"""Images a call, of a file that takes any number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """Images to count top-1 on, and how they become the network's input."""

    images: LabelledImages
    contract: Preprocess


@dataclass(slots=True)
class _Distance:
    """Of one output, summed over batches in float64."""

    noise: float = 0.0
    signal: float = 0.0

    def add(self, actual: npt.NDArray[Any], exact: npt.NDArray[Any]) -> None:
        wide = exact.astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):  # inf - inf is NaN, which is judged below
            self.noise += float(np.sum(np.square(actual.astype(np.float64) - wide)))
        self.signal += float(np.sum(np.square(wide)))

    @property
    def relative(self) -> float:
        if not math.isfinite(self.noise):
            return math.inf
        if self.signal:
            return math.sqrt(self.noise / self.signal)
        return math.inf if self.noise else 0.0


@dataclass(slots=True)
class _Agreement:
    """First classes that are those of FP32; a row that is not finite names none."""

    same: int = 0
    total: int = 0

    def add(self, actual: npt.NDArray[Any], exact: npt.NDArray[Any]) -> None:
        finite = np.isfinite(actual).all(axis=1)
        self.same += int(np.count_nonzero((top_k(actual, 1)[:, 0] == top_k(exact, 1)[:, 0]) & finite))
        self.total += len(exact)


class Judge:
    """Holds the FP32 file open and its outputs ready; each INT8 file is opened in a process of its own.

    Args:
        source: the FP32 file.
        batches: makes the held-out images anew, `[n, 3, H, W]` float32 each; one image at least.
        runtime: name of a runtime that can be used here.
        labelled: also count top-1 on these.
        detection: of a detector, whose files give its raw maps: scores and boxes are compared, and boxes counted.
        latency: None: time nothing.
        exact_latency: the ratio itself is asked for, not just which of the two is the faster.
        time_limit_s: for opening a session, and for each run.

    Raises:
        InputError: unknown runtime, or a source that is not an ONNX file with one image input.
        RuntimeUnavailableError: the runtime is not here.
    """

    def __init__(
        self,
        source: Path,
        batches: Callable[[], Iterable[Floats]],
        *,
        runtime: str,
        labelled: Labelled | None = None,
        detection: Detection | None = None,
        latency: LatencySettings | None = JUDGE_LATENCY,
        exact_latency: bool = False,
        time_limit_s: float = TIME_LIMIT_S,
        progress: Progress = lambda what, done, total: None,
    ) -> None:
        graph = read_onnx(source).graph
        if len(graph.inputs) != 1:
            raise InputError(f"{source.name}: {len(graph.inputs)} inputs, expected one, the image",
                             fix="export the network with one input")  # fmt: skip
        self._runtime = require_runtime(runtime)
        self._input, self._outputs = graph.inputs[0].name, tuple(value.name for value in graph.outputs)
        shape = graph.inputs[0].shape
        self._fixed = shape[0] if shape and isinstance(shape[0], int) else None
        self._batches, self._labelled, self._latency = batches, labelled, latency
        self._exact_latency, self._time_limit_s, self._progress = exact_latency, time_limit_s, progress
        self._detection, self._view = detection, view_of(detection)
        self._reference = self._open(source)
        self._expected: list[Outputs] = []
        self._accuracy: Accuracy | None = None

    def judge(self, path: Path) -> Judgement:
        """Judge a file with the same input and outputs.

        Raises:
            InputError: the engine cannot read it, or its outputs have other shapes.
            EngineError, WorkerCrashedError, WorkerHungError: the engine failed on it.
        """
        with self._open(path) as worker:
            operators = Counter(node.operator for node in worker.wait_opened().nodes)
            distances: dict[str, _Distance] = {}
            agreement = _Agreement()
            boxes = None if self._detection is None else BoxAgreement(self._detection)
            for i, x_NCHW in enumerate(self._batches()):
                if i == len(self._expected):  # those of the source are computed with the first file
                    self._expected.append(self._run(self._reference, x_NCHW))
                exact, actual = self._expected[i], self._run(worker, x_NCHW)
                self._add(distances, actual, exact)
                if boxes is not None:
                    boxes.add(actual, exact)
                if self._classifies(exact):
                    agreement.add(actual[self._outputs[0]], exact[self._outputs[0]])
                self._progress("INT8 against FP32", (i + 1) * len(x_NCHW), 0)
            if not self._expected:
                raise InputError("no held-out images to judge an INT8 file on", fix="give --calib a folder of images")
            return Judgement(
                runtime=self._runtime.name,
                sqnr_db=min(sqnr_db(distance.relative) for distance in distances.values()),
                num_images=sum(len(next(iter(one.values()))) for one in self._expected),
                agreement=agreement.same / agreement.total if agreement.total else None,
                boxes=None if boxes is None else boxes.total,
                operators=dict(sorted(operators.items())), **self._count_top1(worker), **self._time(worker),
            )  # fmt: skip

    def _add(self, distances: dict[str, _Distance], actual: Outputs, exact: Outputs) -> None:
        """What is compared of one batch; shapes are those of the outputs, before any view of them."""
        for name in self._outputs:
            if actual[name].shape != exact[name].shape:
                raise InputError(
                    f"INT8 file: an output of shape {list(actual[name].shape)}, expected {list(exact[name].shape)}"
                )
        if self._detection is None:
            pairs = {name: (actual[name], exact[name]) for name in self._outputs}
        else:
            seen = view_arrays(self._view, exact, exact)
            pairs = {name: (array, seen[name]) for name, array in view_arrays(self._view, actual, exact).items()}
        for name, (got, reference) in pairs.items():
            distances.setdefault(name, _Distance()).add(got, reference)

    def close(self) -> None:
        """End the FP32 session. May be called twice."""
        self._reference.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, path: Path) -> Worker:
        request = SessionRequest(path=path, outputs=self._outputs)
        return Worker(self._runtime.name, request, time_limit_s=self._time_limit_s)

    def _calls(self, x_NCHW: Floats) -> Iterator[tuple[Floats, int]]:
        """As many images a call as the file takes, the last call filled up; with each how many of them count."""
        step = self._fixed or _BATCH
        for start in range(0, len(x_NCHW), step):
            part = x_NCHW[start : start + step]
            count = len(part)
            if self._fixed and count < step:
                part = np.concatenate([part, np.repeat(part[-1:], step - count, axis=0)])
            yield np.ascontiguousarray(part), count

    def _run(self, worker: Worker, x_NCHW: Floats) -> Outputs:
        parts = [
            {name: array[:count] for name, array in worker.run({self._input: part}).items()}
            for part, count in self._calls(x_NCHW)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in self._outputs}

    def _classifies(self, outputs: Outputs) -> bool:
        return (
            len(self._outputs) == 1 and outputs[self._outputs[0]].ndim == 2 and outputs[self._outputs[0]].shape[1] > 1
        )

    def _count_top1(self, worker: Worker) -> dict[str, Any]:
        if self._labelled is None:
            return {}
        if self._accuracy is None:
            self._accuracy = self._measure_accuracy(self._reference, self._labelled, "FP32")
        found = self._measure_accuracy(worker, self._labelled, "INT8")
        return {"top1": found.top1, "top1_fp32": self._accuracy.top1, "num_labelled": found.num_images}

    def _measure_accuracy(self, worker: Worker, labelled: Labelled, what: str) -> Accuracy:
        return measure_accuracy(
            lambda x_NCHW: self._run(worker, x_NCHW)[self._outputs[0]], labelled.images, labelled.contract,
            progress=lambda done, total: self._progress(f"top-1 of the {what} file", done, total),
        )  # fmt: skip

    def _time(self, worker: Worker) -> dict[str, Any]:
        """Both files in turns on one image, or as many as the file fixes."""
        if self._latency is None or not self._runtime.timed:
            return {}
        x_NCHW = next(iter(self._batches()))[: self._fixed or 1]
        feeds = {self._input: next(self._calls(x_NCHW))[0]}
        watch = MachineWatch()
        calls = {"FP32": self._reference.bind(feeds), "INT8": worker.bind(feeds)}
        found = {} if self._exact_latency else measure_latency(calls, FIRST_LOOK, progress=self._progress)
        if not found or not _is_plain(found["INT8"]):
            found = measure_latency(calls, self._latency, progress=self._progress)
        exact, timing = found["FP32"], found["INT8"]
        return {
            "latency_ms": timing.p50_ms, "fp32_latency_ms": exact.p50_ms, "speed": timing.ratio,
            "speed_low": timing.ratio_low, "speed_high": timing.ratio_high, "verdict": timing.verdict,
            "warning": noise_warning(found, watch.findings()),
        }  # fmt: skip


def _is_plain(timing: Timing) -> bool:
    return timing.ratio_low > PLAINLY or timing.ratio_high < 1 / PLAINLY
