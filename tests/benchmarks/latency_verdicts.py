"""Can the latency verdict be believed? One artifact measured twice as A and B, and one made 5 % slower on purpose.

    python tests/benchmarks/latency_verdicts.py [--tries 20] [--threads 0] [--min-seconds 2] [--max-seconds 6]

Each try is a comparison as `bench` makes it: both in fresh processes, interleaved. The slower artifact has 59 equal
convolutions where the other has 56, since not all of a run's time goes into them; by how much it really is slower is
measured first, in one long run. Expected: A and A "indistinguishable" in 19 of 20 tries, B "slower" in 18 of 20. Needs
an otherwise idle machine; up to 18 minutes on a noisy one, half of that with --min-seconds 1 --max-seconds 3.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx

from cspdeploy.check.latency import LatencySettings, measure_latency, noise_warning
from cspdeploy.check.machine import MachineWatch
from cspdeploy.check.worker import Worker
from cspdeploy.core.env import describe_environment
from cspdeploy.core.results import Timing
from cspdeploy.runtimes.base import SessionRequest

NUM_LAYERS, NUM_EXTRA = 56, 3
CHANNELS, SIDE = 48, 20
LONG_SECONDS = 20.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=20)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--min-seconds", type=float, default=2.0)
    parser.add_argument("--max-seconds", type=float, default=6.0)
    given = parser.parse_args()
    started = time.monotonic()
    watch = MachineWatch()
    with tempfile.TemporaryDirectory() as folder:
        usual, slower = (Path(folder) / f"{name}.onnx" for name in ("usual", "slower"))
        usual.write_bytes(_network(NUM_LAYERS))
        slower.write_bytes(_network(NUM_LAYERS + NUM_EXTRA))
        long = LatencySettings(min_seconds=LONG_SECONDS, max_runs=100_000)
        truth = _compare(usual, slower, long, given.threads)["B"]
        _say(f"{NUM_EXTRA} more layers than {NUM_LAYERS}: {truth.p50_ms:.2f} ms, "
             f"{100 * (1 / truth.ratio - 1):.1f} % slower ({100 * (1 / truth.ratio_high - 1):.1f} to "
             f"{100 * (1 / truth.ratio_low - 1):.1f} %) in a run of {2 * LONG_SECONDS:g} s")  # fmt: skip
        settings = [
            LatencySettings(min_runs=60, min_seconds=given.min_seconds, max_seconds=given.max_seconds, seed=seed)
            for seed in range(given.tries)
        ]
        same = _verdicts("A and A", usual, usual, settings, given.threads)
        worse = _verdicts("A and B", usual, slower, settings, given.threads)
    held = same["indistinguishable"] >= 0.95 * given.tries and worse["slower"] >= 0.9 * given.tries
    _say(f"A and A indistinguishable in {same['indistinguishable']} of {given.tries}, "
         f"B slower in {worse['slower']} of {given.tries}: {'as expected' if held else 'NOT as expected'}; "
         f"{time.monotonic() - started:.0f} s")  # fmt: skip
    _say("; ".join(watch.findings()) or "nothing disturbed the machine")
    known = describe_environment()
    _say(f"{known['cpu']}, {known['cpus']} CPUs, {given.threads or 'default'} threads, load {known['load_1min']}, "
         f"onnxruntime {known.get('onnxruntime', known.get('onnxruntime-gpu'))}")  # fmt: skip
    return 0 if held else 1


def _verdicts(name: str, a: Path, b: Path, settings: Sequence[LatencySettings], threads: int) -> Counter[str]:
    found: Counter[str] = Counter()
    for i, setting in enumerate(settings, 1):
        timings = _compare(a, b, setting, threads)
        timing = timings["B"]
        found[timing.verdict] += 1
        noisy = ", noisy" if noise_warning(timings) else ""
        _say(f"{name} {i:2}: {timing.ratio:.3f}x ({timing.ratio_low:.3f} to {timing.ratio_high:.3f}), "
             f"{timing.num_runs} runs{noisy}: {timing.verdict}")  # fmt: skip
    return found


def _compare(a: Path, b: Path, settings: LatencySettings, threads: int) -> dict[str, Timing]:
    feeds = {"x": np.random.default_rng(0).standard_normal((1, CHANNELS, SIDE, SIDE), np.float32)}
    with (
        Worker("ort-cpu", SessionRequest(path=a, num_threads=threads), time_limit_s=60) as first,
        Worker("ort-cpu", SessionRequest(path=b, num_threads=threads), time_limit_s=60) as second,
    ):
        return measure_latency({"A": first.bind(feeds), "B": second.bind(feeds)}, settings)


def _network(num_layers: int) -> bytes:
    """`num_layers` convolutions of one shape in a row. Each keeps the size of its values, so that none decays."""
    rng = np.random.default_rng(0)
    shape = (CHANNELS, CHANNELS, 3, 3)
    weights = [
        onnx.numpy_helper.from_array(
            (rng.standard_normal(shape, np.float32) / np.sqrt(9 * CHANNELS)).astype(np.float32), f"w{i}"
        )
        for i in range(num_layers)
    ]
    names = ["x", *(f"y{i}" for i in range(num_layers))]
    nodes = [
        onnx.helper.make_node("Conv", [names[i], f"w{i}"], [names[i + 1]], name=f"conv{i}", pads=[1, 1, 1, 1])
        for i in range(num_layers)
    ]
    values = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, (1, CHANNELS, SIDE, SIDE))
        for name in (names[0], names[-1])
    ]
    graph = onnx.helper.make_graph(nodes, "row", values[:1], values[1:], initializer=weights)
    model = onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 17)])
    return bytes(model.SerializeToString())


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
