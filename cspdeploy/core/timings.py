"""timings.json of a bundle: how long each artifact took where it was verified, and how near it came to the original.

For a device to compare itself with. It has no hash, since no second run repeats it; so it can excuse nothing: an error
far above the recorded one fails a check that it would have passed, and never the other way round. What is wrong with it
is a remark.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cspdeploy.core.bundle import TIMINGS_FILE
from cspdeploy.core.codec import from_json, to_json
from cspdeploy.core.errors import InputError
from cspdeploy.core.json_file import write_text
from cspdeploy.core.results import ParityRow

__all__ = ["RecordedTiming", "Timings", "read_timings", "timings_of", "write_timings"]

TIMINGS_SCHEMA_VERSION = 1
MAX_TIMINGS_BYTES = 1 << 20
"""A row takes 120 bytes, and a bundle has some tens of them."""
MAX_MACHINE = 200
"""Characters of a machine's name that are shown: the longest CPU names have half of that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedTiming:
    """What was measured of one artifact on one runtime.

    Attributes:
        p50_ms: median of calls of `batch` images, with `threads` CPUs to use; None where nothing was timed.
        rel_l2: relative L2 of its outputs on the golden images, against FP64; None where that is not known.
    """

    artifact: str
    runtime: str
    p50_ms: float | None = None
    batch: int = 1
    threads: int
    rel_l2: float | None = None

    def __post_init__(self) -> None:
        if self.p50_ms is not None and not (math.isfinite(self.p50_ms) and self.p50_ms > 0):
            raise ValueError(f"p50_ms: got {self.p50_ms}, expected a number above 0")
        if self.rel_l2 is not None and not (math.isfinite(self.rel_l2) and self.rel_l2 >= 0):
            raise ValueError(f"rel_l2: got {self.rel_l2}, expected a number from 0 up")


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """All of a bundle. `machine`: the CPU as it names itself."""

    schema_version: int = TIMINGS_SCHEMA_VERSION
    machine: str
    rows: tuple[RecordedTiming, ...]

    def find(self, artifact: str, runtime: str) -> RecordedTiming | None:
        """The row of that artifact on that runtime."""
        return next((row for row in self.rows if (row.artifact, row.runtime) == (artifact, runtime)), None)


def timings_of(
    rows: Sequence[ParityRow], *, environment: Mapping[str, str], batches: Mapping[str, int]
) -> Timings | None:
    """What `verify` measured of one bundle; None where it measured neither latency nor error.

    Args:
        environment: of `cspdeploy.core.env.describe_environment`, there and then.
        batches: images a call by artifact, where that is not 1.
    """
    threads = environment.get("cpus", "")
    found = tuple(
        RecordedTiming(
            artifact=row.artifact, runtime=row.runtime, p50_ms=row.p50_ms, batch=batches.get(row.artifact, 1),
            threads=int(threads) if threads.isdigit() else 0, rel_l2=row.rel_l2,
        )
        for row in rows
        if not row.failed and (row.p50_ms or (row.rel_l2 is not None and math.isfinite(row.rel_l2)))
    )  # fmt: skip
    return Timings(machine=environment.get("cpu", "unknown"), rows=found) if found else None


def write_timings(folder: Path, timings: Timings | None) -> None:
    """Write timings.json; None takes away what an earlier run has left there, which may be of other files."""
    path = folder / TIMINGS_FILE
    if timings is None:
        path.unlink(missing_ok=True)
    else:
        write_text(path, json.dumps(to_json(timings), indent=2) + "\n")


def read_timings(folder: Path) -> tuple[Timings | None, str]:
    """What was recorded, and why it cannot be used where it cannot; nothing of either where there is no such file."""
    path = folder / TIMINGS_FILE
    if path.is_symlink():
        return None, f"{TIMINGS_FILE}: is a link, expected a file"
    try:
        if path.stat().st_size > MAX_TIMINGS_BYTES:
            return None, f"{TIMINGS_FILE}: {path.stat().st_size} bytes, expected at most {MAX_TIMINGS_BYTES}"
        data = json.loads(path.read_text(encoding="utf-8"))
        found = from_json(Timings, data)
    except FileNotFoundError:
        return None, ""
    except InputError as error:
        return None, f"{TIMINGS_FILE}: {error.message}"
    except (OSError, ValueError, RecursionError) as error:
        return None, f"{TIMINGS_FILE}: cannot be read ({' '.join(str(error).split())[:MAX_MACHINE]})"
    if found.schema_version != TIMINGS_SCHEMA_VERSION:
        return None, f"{TIMINGS_FILE}: schema_version {found.schema_version}, expected {TIMINGS_SCHEMA_VERSION}"
    machine = "".join(letter if letter.isprintable() else "?" for letter in found.machine[:MAX_MACHINE])
    return Timings(machine=machine, rows=found.rows), ""
