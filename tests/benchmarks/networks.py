"""What the networks cost before they compute anything: building each, loading Darknet weights, `compare` as a process.

python tests/benchmarks/networks.py [--rounds 5] [--cfg yolov4.cfg]

The weights are random ones of `--cfg`, or of the registry's csdarknet53 in Darknet's form, written to a temporary file.
Reading its bytes and loading it are interleaved.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from cspdeploy.nets.cspnet import CspNetConfig
from cspdeploy.nets.darknet.cfg import read_cfg
from cspdeploy.nets.darknet.form import native_to_cfg
from cspdeploy.nets.darknet.network import DarknetNet
from cspdeploy.nets.darknet.sections import DarknetConfig
from cspdeploy.nets.darknet.weights import read_darknet, write_darknet
from cspdeploy.nets.registry import NETWORKS, build, find_network, spec_of

PAIR = ("cspresnet50", "resnet50")


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def time_builds(rounds: int) -> None:
    """The median of each network, slowest first."""
    specs = {name: spec_of(network) for name, network in NETWORKS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in specs}
    for _ in range(rounds):
        for name, spec in specs.items():
            seconds[name].append(_seconds(lambda spec=spec: build(spec)))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name in sorted(medians, key=lambda name: -medians[name])[:5]:
        sys.stdout.write(f"build {name:20} median {medians[name]:.2f} s, worst {max(seconds[name]):.2f} s\n")


def time_loading(config: DarknetConfig, rounds: int) -> None:
    """Loading a `.weights` file against reading its bytes."""
    network = DarknetNet(config)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.weights"
        write_darknet(path, network)
        reading, loading = [], []
        for _ in range(rounds):
            reading.append(_seconds(path.read_bytes))
            loading.append(_seconds(lambda: read_darknet(path, network)))
        megabytes = path.stat().st_size / 1e6
    ratio = statistics.median(loading) / statistics.median(reading)
    sys.stdout.write(
        f"load .weights of {megabytes:.0f} MB: median {statistics.median(loading):.3f} s, "
        f"{ratio:.2f} times reading its bytes\n"
    )


def time_compare(rounds: int) -> None:
    """The whole process, imports and all."""
    code = f"import sys; from cspdeploy.cli.app import main; sys.exit(main({['compare', *PAIR, '--no-latency']!r}))"

    def run() -> None:
        subprocess.run(
            [sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )  # fmt: skip

    seconds = [_seconds(run) for _ in range(rounds)]
    sys.stdout.write(f"compare {' '.join(PAIR)} --no-latency: median {statistics.median(seconds):.1f} s\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cfg", type=Path, help="network whose weights are loaded")
    arguments = parser.parse_args()
    native = find_network("csdarknet53").config
    assert isinstance(native, CspNetConfig)
    config = read_cfg(arguments.cfg) if arguments.cfg else native_to_cfg(native, num_classes=1000)
    time_builds(arguments.rounds)
    time_loading(config, arguments.rounds)
    time_compare(min(3, arguments.rounds))


if __name__ == "__main__":
    main()
