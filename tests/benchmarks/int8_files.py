"""The INT8 files to compare, made by cspdeploy and by its peers, each in a child process that is measured."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

PEER_METHODS = (
    "ort-default", "ort-u8s8-minmax", "ort-u8s8-percentile", "ort-u8s8-entropy",
    "nncf-openvino", "nncf-openvino-mixed", "nncf-onnx", "onnxsim",
)  # fmt: skip
PEER_PACKAGES = ("openvino==2026.4.1", "nncf==3.4.0", "torch==2.13.0", "onnx", "onnxruntime", "onnxsim")
ROOT = Path(__file__).resolve().parents[2]
OURS, OURS_FROM_ONNX = "cspdeploy", "cspdeploy-onnx"


class ChildFailedError(Exception):
    """A tool did not make its file; the message is the end of what it wrote."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one process with all that it waited for. Imports count."""

    seconds: float
    peak_mib: float


def run_child(command: list[str]) -> Cost:
    """Run to the end and measure.

    The peak is the largest resident size of any one process of the child's tree (`ru_maxrss` of wait4). A child starts
    with its parent's own peak in that figure, so the parent loads no engine before the last measured child.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    # A cache of its own: observations of an earlier round would save ours the pass over the images.
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryFile() as log:
        environment["CSPDEPLOY_CACHE"] = cache
        started = time.perf_counter()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            log.seek(0)
            tail = log.read()[-2000:].decode(errors="replace").strip()
            raise ChildFailedError(f"exit {process.returncode}: {' '.join(command)}\n{tail}")
    return Cost(seconds, usage.ru_maxrss / 1024)


def prepare_peers(folder: Path) -> Path:
    """The interpreter of the peers' virtual environment, made on first use (some 2 GB)."""
    python = folder / "bin" / "python"
    if not python.is_file():
        sys.stderr.write(f"peers: installing {', '.join(PEER_PACKAGES)} into {folder}\n")
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        constraints = str(ROOT / "constraints.txt")
        subprocess.run([str(python), "-m", "pip", "install", "-q", "-c", constraints, *PEER_PACKAGES], check=True)
    return python


def cspdeploy(*arguments: str | Path) -> list[str]:
    """The command line as this checkout runs it."""
    return [sys.executable, "-m", "cspdeploy.cli.app", *map(str, arguments)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Maker:
    """Makes every file from one FP32 ONNX and one set of calibration images.

    Attributes:
        float_onnx: of the bundle, which every peer starts from.
        calibration_npy: `[N, 3, H, W]` float32, for the peers.
        calibration_folder: the same N images as PNG files, for cspdeploy.
    """

    model: str
    models: Path
    work: Path
    float_onnx: Path
    calibration_npy: Path
    calibration_folder: Path
    peers: Path
    target: str | None
    extra: tuple[str, ...]

    def path(self, method: str, folder: Path) -> Path:
        """Where a method's file lies."""
        if method in (OURS, OURS_FROM_ONNX):
            # A file that is called as a registry network gets a name of its own.
            name = self.model if method == OURS else f"{self.float_onnx.stem}-onnx"
            return folder / method / name / f"{name}.int8.onnx"
        return folder / f"{method}{'.xml' if method.startswith('nncf-openvino') else '.onnx'}"

    def command(self, method: str, folder: Path, *, images: Path | None = None) -> list[str]:
        """What makes it; `images` in place of the calibration folder (cspdeploy only). All images are used."""
        if method in (OURS, OURS_FROM_ONNX):
            images = images or self.calibration_folder
            named = [self.model, "--models", self.models]
            adopted = [self.float_onnx, "--preprocess", self.models / self.model / "spec.json"]
            return cspdeploy(
                "export", *(named if method == OURS else adopted), "--int8", "--no-verify", "--calib", images,
                "--calib-images", str(len(list(images.iterdir()))), *(["--target", self.target] if self.target else []),
                *self.extra, "-o", folder / method,
            )  # fmt: skip
        script = Path(__file__).with_name("int8_peers.py")
        target_file = self.path(method, folder)
        return [*map(str, (self.peers, script, method, self.float_onnx, self.calibration_npy, target_file))]

    def make(self, method: str, folder: Path) -> Cost:
        """Make it anew."""
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder / method, ignore_errors=True)
        cost = run_child(self.command(method, folder))
        if not self.path(method, folder).is_file():
            raise ChildFailedError(f"{method}: wrote no {self.path(method, folder)}")
        return cost


def write_pngs(images: npt.NDArray[np.uint8], folder: Path) -> None:
    """Images as stored, `[N, h, w]` or `[N, h, w, 3]`, one file each."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index:05}.png")


def measure_costs(maker: Maker, methods: tuple[str, ...], *, rounds: int) -> dict[str, list[Cost]]:
    """Every method once a round, in turning order, so that a slow minute of the machine falls on all."""
    costs: dict[str, list[Cost]] = {method: [] for method in methods}
    with tempfile.TemporaryDirectory(dir=maker.work) as folder:
        for number in range(rounds):
            for method in methods[number % len(methods) :] + methods[: number % len(methods)]:
                try:
                    cost = maker.make(method, Path(folder))
                except ChildFailedError as error:
                    sys.stderr.write(f"quantise-time: {method}: {error}\n")
                    continue
                costs[method].append(cost)
                sys.stderr.write(
                    f"quantise-time: round {number + 1}/{rounds} {method} {cost.seconds:.1f} s, "
                    f"peak {cost.peak_mib:.0f} MiB\n"
                )
    return {method: found for method, found in costs.items() if found}


def measure_memory(maker: Maker, images: npt.NDArray[np.uint8], counts: tuple[int, ...]) -> dict[int, Cost]:
    """cspdeploy's own INT8 export with that many calibration images."""
    costs: dict[int, Cost] = {}
    with tempfile.TemporaryDirectory(dir=maker.work) as name:
        folder = Path(name)
        for count in counts:
            indices = np.linspace(0, len(images) - 1, count).astype(np.int64)
            write_pngs(images[indices], folder / "images")
            costs[count] = run_child(maker.command(OURS, folder / str(count), images=folder / "images"))
            sys.stderr.write(
                f"memory: {count} images {costs[count].seconds:.1f} s, peak {costs[count].peak_mib:.0f} MiB\n"
            )
    return costs
