"""Latency of a detector's files, interleaved in one run on an otherwise idle machine. Each prints a ratio.

    cspdeploy export apple.cfg --weights apple.weights --names apple.names --int8 --calib IMAGES -o decoded
    cspdeploy export apple.cfg --weights apple.weights --names apple.names --decode raw --calib IMAGES -o raw
    cspdeploy export apple.cfg --weights apple.weights --names apple.names --decode nms --calib IMAGES -o nms
    python tests/benchmarks/detector_latency.py engines apple.cfg apple.weights decoded/apple IMAGES
    python tests/benchmarks/detector_latency.py nms raw/apple nms/apple IMAGES
    python tests/benchmarks/detector_latency.py edge decoded/apple IMAGES

`engines`: FP32 and, where the bundle has it, INT8 on ONNX Runtime, against PyTorch eager and against FP32.
`nms`: the file that suppresses boxes itself, against raw heads that numpy decodes and suppresses.
`edge`: preprocessing of an image in memory, and decoding with suppression, in parts of the network's own time; with
--file of a JPEG or PNG on disk, so that reading it counts too. apple.cfg is written by apple_detector.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from cspdeploy.check.latency import LatencySettings, measure_latency, noise_warning
from cspdeploy.check.machine import MachineWatch
from cspdeploy.core.detection.fast import find_boxes_fast
from cspdeploy.core.results import Timing
from cspdeploy.edge.detecting import rule_of
from cspdeploy.edge.images import Feed
from cspdeploy.edge.opening import OpenedArtifact, open_artifact

SUFFIXES = (".png", ".jpg", ".jpeg")


def first_image(folder: Path) -> Path:
    """By name."""
    return min(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def read_pixels(path: Path) -> npt.NDArray[np.uint8]:
    return np.asarray(Image.open(path).convert("RGB"))


def opened(bundle: Path, artifact: str = "onnx", *, threads: int) -> OpenedArtifact:
    return open_artifact(bundle, artifact=artifact, runtime="ort-cpu", num_threads=threads)


def feed_of(one: OpenedArtifact) -> Feed:
    return Feed(contract=one.contract, frontend=one.frontend)


def timed(calls: Mapping[str, Callable[[], None]], settings: LatencySettings) -> dict[str, Timing]:
    """Interleaved; the first is the reference. One line each."""
    watch = MachineWatch()
    told: set[str] = set()

    def tell(what: str, done: int, total: int) -> None:
        del done, total
        if what not in told:  # once each: on a busy machine a run takes minutes
            told.add(what)
            sys.stderr.write(f"{what}\n")

    found = measure_latency(calls, settings, progress=tell)
    for name, timing in found.items():
        interval = f"{timing.ci_low_ms:.2f} to {timing.ci_high_ms:.2f}"
        sys.stdout.write(f"{name:24} p50 {timing.p50_ms:9.3f} ms ({interval})\n")
    sys.stdout.write(noise_warning(found, watch.findings()) + "\n")
    return found


def compare_engines(given: argparse.Namespace, settings: LatencySettings) -> None:
    """Eager, FP32 and INT8."""
    import torch

    from cspdeploy.core.bundle import read_manifest
    from cspdeploy.pipeline.source import resolve_source

    if given.threads:
        torch.set_num_threads(given.threads)
    sys.stderr.write("loading the network\n")
    source = resolve_source(
        str(given.cfg), models=Path("models"), weights=str(given.weights), images=given.images, size_px=None
    )
    one = opened(given.bundle, threads=given.threads)
    x_NCHW = feed_of(one).prepare(read_pixels(first_image(given.images)))
    tensor = torch.from_numpy(x_NCHW)

    def eager() -> None:
        with torch.inference_mode():
            source.model(tensor)

    calls = {"eager": eager, "FP32 on ort-cpu": one.session.bind({one.input_name: x_NCHW})}
    kinds = {artifact.kind for artifact in read_manifest(given.bundle).artifacts}
    if "onnx-int8" in kinds:
        int8 = opened(given.bundle, "onnx-int8", threads=given.threads)
        calls["INT8 on ort-cpu"] = int8.session.bind({int8.input_name: x_NCHW})
    found = timed(calls, settings)
    fp32 = found["FP32 on ort-cpu"].p50_ms
    sys.stdout.write(f"FP32 is {found['eager'].p50_ms / fp32:.2f}x as fast as eager\n")
    if "INT8 on ort-cpu" in found:
        sys.stdout.write(f"INT8 is {fp32 / found['INT8 on ort-cpu'].p50_ms:.2f}x as fast as FP32\n")


def compare_nms(given: argparse.Namespace, settings: LatencySettings) -> None:
    """The whole way from the network's input to boxes, both times."""
    raw, nms = (opened(bundle, threads=given.threads) for bundle in (given.raw, given.nms))
    x_NCHW = feed_of(raw).prepare(read_pixels(first_image(given.images)))

    def boxes(one: OpenedArtifact) -> Callable[[], None]:
        rule = rule_of(one)
        return lambda: _ignore(find_boxes_fast(one.session.run({one.input_name: x_NCHW}), rule.detection, rule.decode))

    found = timed({"raw heads + numpy": boxes(raw), "suppressed in the graph": boxes(nms)}, settings)
    ratio = found["suppressed in the graph"].p50_ms / found["raw heads + numpy"].p50_ms
    sys.stdout.write(f"suppressing in the graph takes {ratio:.3f}x of raw heads + numpy ({100 * (ratio - 1):+.1f} %)\n")


def share_of_edge(given: argparse.Namespace, settings: LatencySettings) -> None:
    """What comes before and after the network."""
    one = opened(given.bundle, threads=given.threads)
    rule, feed, path = rule_of(one), feed_of(one), first_image(given.images)
    image: Path | npt.NDArray[np.uint8] = path if given.file else read_pixels(path)
    x_NCHW = feed.prepare(image)
    outputs = one.session.run({one.input_name: x_NCHW})
    calls: dict[str, Callable[[], None]] = {
        "network": lambda: _ignore(one.session.run({one.input_name: x_NCHW})),
        "preprocessing": lambda: _ignore(feed.prepare(image)),
        "decoding, suppression": lambda: _ignore(find_boxes_fast(outputs, rule.detection, rule.decode)),
    }
    found = timed(calls, settings)
    network, *others = (timing.p50_ms for timing in found.values())
    sys.stdout.write(f"before and after the network: {100 * sum(others) / network:.1f} % of its own time\n")


def _ignore(value: object) -> None:
    """What is timed is that it was made."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    kinds: dict[str, tuple[Callable[[argparse.Namespace, LatencySettings], None], tuple[str, ...]]] = {
        "engines": (compare_engines, ("cfg", "weights", "bundle", "images")),
        "nms": (compare_nms, ("raw", "nms", "images")),
        "edge": (share_of_edge, ("bundle", "images")),
    }
    for name, (run, paths) in kinds.items():
        one = commands.add_parser(name)
        for path in paths:
            one.add_argument(path, type=Path)
        one.add_argument("--threads", type=int, default=0, help="0: as many as the engine takes by itself")
        one.add_argument("--min-runs", type=int, default=30)
        one.add_argument("--seconds", type=float, default=2.0, help="timed, at least so long for each")
        one.add_argument("--wall", type=float, default=15.0, help="seconds for each, whatever was reached; 0: any")
        one.set_defaults(run=run)
    commands.choices["edge"].add_argument("--file", action="store_true", help="read the image from its file each time")
    given = parser.parse_args()
    given.run(given, LatencySettings(
        min_runs=given.min_runs, min_seconds=given.seconds, max_wall_seconds=given.wall,
        max_warmup_seconds=min(LatencySettings().max_warmup_seconds, given.seconds),
    ))  # fmt: skip


if __name__ == "__main__":
    main()
