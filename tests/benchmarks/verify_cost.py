"""Wall time and peak memory of `cspdeploy verify` on the demo bundle and of `cspdeploy blame` at 256x256.

    python tests/benchmarks/verify_cost.py [--rounds 3] [--photos FOLDER]

Exports what it needs into a temporary folder first: models/cspdarknet53 with --fp16, and, where a folder of photographs
is given, CSPDarknet53 with random weights at 256x256. Peak memory is that of all processes together. Also tells the
share of `verify` that goes into the comparison itself. Needs an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from export_cost import measure

CSPDEPLOY = [sys.executable, "-m", "cspdeploy.cli.app"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--photos", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        demo = f"{folder}/demo"
        export("cspdarknet53", "--fp16", "-o", demo)
        repeat("verify of the demo bundle", [*CSPDEPLOY, "verify", demo], arguments.rounds)
        shares(demo)
        if arguments.photos:
            large = f"{folder}/large"
            export("cspdarknet53", "--weights", "random", "--size", "256", "--fp16", "--calib", str(arguments.photos),
                   "--models", f"{folder}/no-models", "-o", large)  # fmt: skip
            for kind in ("", ".fp16"):
                path = f"{large}/cspdarknet53/cspdarknet53{kind}.onnx"
                repeat(f"blame of {Path(path).name} at 256x256", [*CSPDEPLOY, "blame", path], arguments.rounds)


def export(*options: str) -> None:
    subprocess.run([*CSPDEPLOY, "export", *options, "--no-verify"], check=True, stdout=subprocess.DEVNULL)


def repeat(what: str, command: list[str], rounds: int) -> None:
    found = [measure(command) for _ in range(rounds)]
    seconds = [took_s for took_s, _ in found]
    each = ", ".join(f"{value:.1f}" for value in seconds)
    peak_gb = max(peak for _, peak in found)
    sys.stdout.write(f"{what}: median {statistics.median(seconds):.1f} s ({each}), peak {peak_gb:.2f} GB\n")


def shares(bundle: str) -> None:
    told = subprocess.run([*CSPDEPLOY, "verify", bundle, "--json"], check=True, capture_output=True, text=True)
    seconds = json.loads(told.stdout)["settings"]["phase_seconds"]
    total = sum(seconds.values())
    each = ", ".join(f"{name} {value:.2f} s ({100 * value / total:.1f} %)" for name, value in seconds.items())
    sys.stdout.write(f"phases of verify: {each}\n")


if __name__ == "__main__":
    main()
