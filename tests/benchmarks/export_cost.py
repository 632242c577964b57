"""Wall time and peak memory of `cspdeploy export cspdarknet53 --fp16 --no-verify` against the bare script, in turns.

    python tests/benchmarks/export_cost.py [--rounds 5]

Peak memory is that of all processes together (resident, sampled every 50 ms). Needs models/cspdarknet53
and an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BARE = [sys.executable, str(Path(__file__).with_name("bare_export.py")), "models/cspdarknet53"]
OURS = [sys.executable, "-m", "cspdeploy.cli.app", "export", "cspdarknet53", "--fp16", "--no-verify", "-o"]


def measure(command: list[str]) -> tuple[float, float]:
    """Seconds, and the peak of memory in GB."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, memory_bytes(process.pid))
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"failed with {process.returncode}: {' '.join(command)}")
    return time.perf_counter() - started, peak / 1e9


def memory_bytes(session: int) -> int:
    """Resident memory of all processes of a session; pages that they share count in each, so this is an upper bound."""
    total = 0
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(status.read_text().rpartition(")")[2].split()[3]) == session:
                total += int((status.parent / "statm").read_text().split()[1]) * resource.getpagesize()
        except (OSError, IndexError):  # the process ended while it was looked at
            continue
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {"bare script": [], "cspdeploy": []}
    peaks: dict[str, list[float]] = {"bare script": [], "cspdeploy": []}
    for _ in range(arguments.rounds):
        for name, command in (("bare script", BARE), ("cspdeploy", OURS)):
            with tempfile.TemporaryDirectory() as output:
                took_s, peak_gb = measure([*command, output])
            seconds[name].append(took_s)
            peaks[name].append(peak_gb)
    for name, values in seconds.items():
        each = ", ".join(f"{value:.1f}" for value in values)
        sys.stdout.write(
            f"{name:12} median {statistics.median(values):.1f} s ({each}), peak {max(peaks[name]):.2f} GB\n"
        )
    ratio = statistics.median(seconds["cspdeploy"]) / statistics.median(seconds["bare script"])
    sys.stdout.write(f"cspdeploy takes {ratio:.2f}x the time of the bare script\n")


if __name__ == "__main__":
    main()
