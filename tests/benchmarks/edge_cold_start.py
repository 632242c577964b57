"""What `cspdeploy.edge` costs a device: cold start, import, and one call, each against bare onnxruntime.

python tests/benchmarks/edge_cold_start.py BUNDLE IMAGE [--artifact onnx-int8] [--rounds 9]

Cold start is a process from its start to its first result, in turn with a bare script that decodes with Pillow,
resizes, normalises and runs the same file; wall time and CPU time, which other work on the machine disturbs less. For
the call the decoded image is given, and both run in one process, in turn.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cspdeploy.core.bundle import read_manifest
from cspdeploy.core.preprocess import normalise, read_pixels, resize_pixels
from cspdeploy.edge import Predictor

BARE = """
import sys
import numpy as np
import onnxruntime
from PIL import Image
options = onnxruntime.SessionOptions()
options.log_severity_level = 3
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
image = Image.open(sys.argv[2]).convert("RGB").resize((int(sys.argv[3]),) * 2, Image.Resampling.BILINEAR)
x = np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 255
x = ((x - 0.45) / 0.25).astype(np.float32)
session.run(None, {session.get_inputs()[0].name: x})[0].argmax()
"""
PREDICTOR = """
import sys
from cspdeploy.edge import Predictor
Predictor.open(sys.argv[1], artifact=sys.argv[2])(sys.argv[3])
"""
IMPORT = "import time, numpy, onnxruntime; t = time.process_time(); {}; print(1e3 * (time.process_time() - t))"


def _process(command: list[str]) -> tuple[float, float]:
    """Wall time and CPU time of a process, in ms."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command[:2])} ...")
    return 1e3 * (time.perf_counter() - started), 1e3 * (usage.ru_utime + usage.ru_stime)


def _show(title: str, samples: dict[str, list[float]]) -> None:
    bare, ours = samples
    ratios = [b / a for a, b in zip(samples[bare], samples[ours], strict=True)]
    told = ", ".join(f"{name} {statistics.median(values):.2f} ms" for name, values in samples.items())
    sys.stdout.write(f"{title:20} {told}; ratio {statistics.median(ratios):.3f} (median of pairs), "
                     f"{min(samples[ours]) / min(samples[bare]):.3f} (of the best)\n")  # fmt: skip


def _cold_start(bundle: Path, image: Path, artifact: str, rounds: int) -> None:
    manifest = read_manifest(bundle)
    file = bundle / next(one.file for one in manifest.artifacts if one.kind == artifact)
    commands = {
        "bare": [sys.executable, "-c", BARE, str(file), str(image), str(manifest.spec.preprocess.height_px)],
        "Predictor": [sys.executable, "-c", PREDICTOR, str(bundle), artifact, str(image)],
    }
    wall: dict[str, list[float]] = {name: [] for name in commands}
    cpu: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(rounds + 1):
        for name, command in commands.items():
            seconds, used = _process(command)
            if turn:  # the first fills the disk's cache
                wall[name].append(seconds)
                cpu[name].append(used)
    _show("cold start, wall", wall)
    _show("cold start, CPU", cpu)


def _import(rounds: int) -> None:
    command = [sys.executable, "-c", IMPORT.format("import cspdeploy.edge")]
    found = [float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(rounds)]
    sys.stdout.write(f"{'import, CPU':20} {statistics.median(found):.1f} ms beyond numpy and onnxruntime\n")


def _call(bundle: Path, image: Path, artifact: str, rounds: int) -> None:
    pixels = read_pixels(image)
    with Predictor.open(bundle, artifact=artifact) as predictor:
        x = normalise(resize_pixels(pixels, predictor.preprocess)[None], predictor.preprocess)
        resized = resize_pixels(pixels, predictor.preprocess)
        session = predictor._calls.opened.session
        name = predictor._calls.opened.input_name
        calls: dict[str, Callable[[], object]] = {
            "session.run": lambda: session.run({name: x}), "Predictor": lambda: predictor(resized),
        }  # fmt: skip
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(30 * rounds):
            for name_, call in calls.items():
                started = time.perf_counter()
                call()
                if turn >= rounds:
                    samples[name_].append(1e3 * (time.perf_counter() - started))
    _show("one call", samples)
    parts = {"normalise": lambda: normalise(resized[None], predictor.preprocess)}
    for part, call in parts.items():
        started = time.perf_counter()
        for _ in range(100):
            call()
        sys.stdout.write(f"{part:20} {10 * (time.perf_counter() - started):.3f} ms\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("--artifact", default="onnx-int8")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    sys.stdout.write(f"numpy {np.__version__}, {os.cpu_count()} CPUs\n")
    _import(given.rounds)
    _cold_start(given.bundle, given.image, given.artifact, given.rounds)
    _call(given.bundle, given.image, given.artifact, given.rounds)


if __name__ == "__main__":
    main()
