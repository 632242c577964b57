"""Judge INT8 files: outputs over labelled images, latency in turns, and what the engine makes of the graph."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from int8_files import ROOT

FloatArray = npt.NDArray[np.float32]
WORKERS = 2
"""Images run one at a time, as the graphs have a batch of 1; two sessions of one thread beat one of two at 32x32."""


@dataclass(frozen=True, slots=True)
class Subject:
    """One file on one engine: "ort" or "openvino"; "eager" names a network instead of a file."""

    name: str
    engine: str
    path: Path


def engines_of(path: Path) -> tuple[str, ...]:
    """The engines that read it, of those present."""
    try:
        import openvino  # noqa: F401
    except ImportError:
        present: tuple[str, ...] = ("ort",)
    else:
        present = ("ort", "openvino")
    return tuple(engine for engine in present if engine == "openvino" or path.suffix == ".onnx")


def open_ort(path: Path) -> Callable[[FloatArray], FloatArray]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # it warns of every weight that its own optimisation leaves without a reader
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x_NCHW: np.asarray(session.run(None, {name: x_NCHW})[0])


def open_openvino(path: Path) -> Callable[[FloatArray], FloatArray]:
    import openvino as ov

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    request = ov.Core().compile_model(str(path), "CPU", settings).create_infer_request()
    return lambda x_NCHW: np.array(request.infer([x_NCHW])[0])


def logits_of(subject: Subject, images_NCHW: FloatArray) -> FloatArray:
    """`[N, classes]`, image by image."""
    opener = open_ort if subject.engine == "ort" else open_openvino

    def part(images: FloatArray) -> list[FloatArray]:
        call = opener(subject.path)
        return [call(images[index : index + 1]) for index in range(len(images))]

    with ThreadPoolExecutor(WORKERS) as pool:
        parts = pool.map(part, np.array_split(images_NCHW, WORKERS))
        return np.concatenate([row for rows in parts for row in rows])


def accuracy_of(logits: FloatArray, reference: FloatArray, classes: npt.NDArray[np.int64]) -> dict[str, float]:
    """SQNR of all logits in dB, agreement of the first class with the reference, and how much top-1 falls."""
    exact = reference.astype(np.float64)
    noise = np.square(logits - exact).sum()
    found, expected = logits.argmax(1), reference.argmax(1)
    top1 = float((found == classes).mean())
    return {
        "sqnr_db": float(10 * np.log10(np.square(exact).sum() / max(noise, 1e-30))),
        "agreement": float((found == expected).mean()),
        "top1": top1,
        "top1_drop_points": 100 * (float((expected == classes).mean()) - top1),
    }


class _Timed:
    """A timing child."""

    def __init__(self, subject: Subject, *, models: Path, size_px: int, threads: int) -> None:
        script = Path(__file__).with_name("int8_timing.py")
        command = [
            sys.executable, "-W", "ignore", str(script), subject.engine, str(subject.path),
            "--models", str(models), "--size", str(size_px), "--threads", str(threads),
        ]  # fmt: skip
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        self._read()

    def _read(self) -> list[float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the timing child ended with {self._process.wait()}")
        return [float(value) for value in json.loads(line)]

    def run(self, count: int) -> list[float]:
        """Milliseconds of each of `count` calls."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def measure_latency(
    subjects: list[Subject], *, models: Path, size_px: int, threads: int, rounds: int, calls: int
) -> dict[Subject, list[float]]:
    """The median milliseconds of each round. A round runs every subject in turn: two calls to warm up, then `calls`."""
    opened: dict[Subject, _Timed] = {}
    try:
        for subject in subjects:
            try:
                opened[subject] = _Timed(subject, models=models, size_px=size_px, threads=threads)
            except RuntimeError as error:
                sys.stderr.write(f"latency: {subject.name} on {subject.engine}: {error}\n")
        medians: dict[Subject, list[float]] = {subject: [] for subject in opened}
        for number in range(rounds):
            order = list(opened) if number % 2 == 0 else list(opened)[::-1]
            for subject in order:
                opened[subject].run(2)
                medians[subject].append(float(np.median(opened[subject].run(calls))))
            sys.stderr.write(f"latency: round {number + 1}/{rounds}\n")
    finally:
        for child in opened.values():
            child.close()
    return medians


def ratio(samples: list[float], base: list[float]) -> float:
    """Median over the rounds of one subject's time in parts of another's."""
    return float(np.median(np.asarray(samples) / np.asarray(base)))


def node_counts(subject: Subject) -> dict[str, int]:
    """Nodes by operator after the engine's own optimisation; for OpenVINO with the precision they run in."""
    if subject.engine == "ort":
        return _ort_nodes(subject.path)
    import openvino as ov

    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    runtime = ov.Core().compile_model(str(subject.path), "CPU", settings).get_runtime_model()
    kinds: Counter[str] = Counter()
    for node in runtime.get_ops():
        facts: dict[str, Any] = {key: str(value.astype(str)) for key, value in node.get_rt_info().items()}
        kind = facts.get("layerType", node.get_type_name())
        # A convolution's runtime precision is that of its computation: i8 or u8 where it runs in integers.
        kinds[f"{kind} {facts.get('runtimePrecision', '')}".strip()] += 1
    return dict(kinds.most_common())


def _ort_nodes(path: Path) -> dict[str, int]:
    import onnx
    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 3  # it warns that such a file is for this machine alone
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        model = onnx.load(options.optimized_model_filepath)
    return dict(Counter(node.op_type for node in model.graph.node).most_common())


def convolutions(counts: dict[str, int]) -> tuple[int, int]:
    """How many run in integers, and how many in float."""
    names = [name for name in counts if re.search(r"conv", name, re.IGNORECASE) and not name.startswith("Convert")]
    integer = sum(counts[name] for name in names if name.startswith("QLinear") or re.search(r"\b[iu]8\b", name, re.I))
    return integer, sum(counts[name] for name in names) - integer
