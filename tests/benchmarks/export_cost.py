"""Wall time and peak memory of `cspdeploy export cspdarknet53 --fp16 --no-verify` against the bare script, in turns.

    python tests/benchmarks/export_cost.py [--rounds 5]

Peak memory is that of all processes together (proportional set size, sampled every 20 ms). Needs models/cspdarknet53
and an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import re
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
    peak_kb = 0
    while process.poll() is None:
        peak_kb = max(peak_kb, memory_kb(process.pid))
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"failed with {process.returncode}: {' '.join(command)}")
    return time.perf_counter() - started, peak_kb / 1e6


def memory_kb(session: int) -> int:
    """Proportional set size of all processes of a session."""
    total = 0
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(status.read_text().rpartition(")")[2].split()[3]) == session:
                found = re.search(r"^Pss:\s+(\d+)", (status.parent / "smaps_rollup").read_text(), re.MULTILINE)
                total += int(found[1]) if found else 0
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
