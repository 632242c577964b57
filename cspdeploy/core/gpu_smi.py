"""Questions to nvidia-smi, and its answers as text. Nothing is set, and no library of the driver is loaded."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

__all__ = [
    "REASONS", "THROTTLE_REASONS", "TIME_LIMIT_S", "SmiAnswer", "ask", "find_smi", "read_number", "read_reasons",
    "read_text", "run_smi", "smi_environment", "split_row",
]  # fmt: skip

TIME_LIMIT_S = 30.0
"""For one answer. Without persistence mode the driver wakes each GPU first, 1 to 3 s of each, and servers have 8."""

MAX_PROBLEM = 300
"""Characters of its own words that are passed on."""
REASONS = "clocks_event_reasons.active"
_OLDER_NAMES = {REASONS: "clocks_throttle_reasons.active"}  # before driver 535
_REFUSED = re.compile(r'Field "([\w.]+)" is not a valid field to query')
_ROW_START = re.compile(r"\d[\d/:. ]*")  # an index, a process, a time
_NUMBER = re.compile(r"-?\d+(?:[.,]\d+)?")

# Bits of nvmlClocksEventReasons in nvml.h. 1 is "idle": nothing to compute, so no limit.
IDLE_BIT = 0x1
THROTTLE_REASONS: Mapping[int, str] = {
    IDLE_BIT: "idle", 0x2: "application clocks", 0x4: "power limit", 0x8: "hardware slowdown", 0x10: "sync boost",
    0x20: "thermal limit", 0x40: "thermal slowdown by hardware", 0x80: "power brake by hardware",
    0x100: "display clocks",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class SmiAnswer:
    """What nvidia-smi said.

    Attributes:
        rows: a mapping from field to text of each GPU, or process; a field that this driver does not know is absent.
        problem: in its own words, why there are none; empty where there is no nvidia-smi.
        spelt: the fields that this driver knows, each with its name for it.
    """

    rows: tuple[Mapping[str, str], ...] = ()
    problem: str = ""
    spelt: Mapping[str, str] = field(default_factory=dict)


def find_smi() -> str:
    """The path of nvidia-smi, or an empty string: all that a machine without a GPU pays."""
    return shutil.which("nvidia-smi") or ""


def ask(fields: Sequence[str], *, about: Literal["gpu", "compute-apps"] = "gpu") -> SmiAnswer:
    """Ask for fields by the names that the newest driver has; the first one must be a number in every row.

    A driver refuses the whole question for one field that it does not know: it is asked again with the field's older
    name, or without.
    """
    smi = find_smi()
    asked = {name: name for name in fields}
    while smi and asked:
        code, text = run_smi(smi, f"--query-{about}={','.join(asked.values())}", "--format=csv,noheader,nounits")
        refused = _REFUSED.search(text)
        if refused is None or refused[1] not in asked.values():
            rows = [split_row(line, list(asked)) for line in text.splitlines()]
            found = tuple(row for row in rows if row)
            # With rows, a code is a warning: 14 tells of a damaged infoROM.
            told = _in_one_line(text) if not found and (code or about == "gpu") else ""
            silent = f"nvidia-smi ends with {code}" if code and not found else ""
            return SmiAnswer(rows=found, problem=told or silent, spelt=asked)
        name = next(name for name, spelt in asked.items() if spelt == refused[1])
        older = _OLDER_NAMES.get(name)
        if older and asked[name] != older:
            asked[name] = older
        else:
            del asked[name]
    return SmiAnswer()


def run_smi(smi: str, *arguments: str, time_limit_s: float = TIME_LIMIT_S) -> tuple[int, str]:
    """Exit status and all that it printed; 124 where it did not answer in time, 127 where it did not start."""
    try:
        process = subprocess.Popen(
            [smi, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", env=smi_environment(),
        )  # fmt: skip
    except OSError as error:
        return 127, f"nvidia-smi does not start: {error.strerror}"
    try:
        text, _ = process.communicate(timeout=time_limit_s)
    except BaseException as error:
        # Of a GPU that fell off the bus the call hangs in the kernel, where no signal ends it: it is not waited for.
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1.0)
        if process.stdout is not None:
            process.stdout.close()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        return 124, f"nvidia-smi does not answer within {time_limit_s:g} s"
    return process.returncode, text


def smi_environment() -> dict[str, str]:
    """In which it writes numbers with a point."""
    return {**os.environ, "LC_ALL": "C"}


def split_row(line: str, fields: Sequence[str]) -> dict[str, str]:
    """The texts of a row by field; empty for a line that is none: a warning, an error, a heading.

    Cells are parted by a comma and a space; a comma alone is a decimal one. The last may hold any text.
    """
    cells = [cell.strip() for cell in line.strip().split(", ", len(fields) - 1)]
    if len(cells) != len(fields) or not _ROW_START.fullmatch(cells[0]):
        return {}
    return dict(zip(fields, cells, strict=True))


def read_text(value: str | None) -> str:
    """A cell; empty where nvidia-smi has none: "[N/A]", "[Not Supported]", "[Insufficient Permissions]", "ERR!"."""
    text = (value or "").strip()
    absent = text.startswith("[") or text in ("N/A", "ERR!", "Unknown Error")
    return "" if absent else text


def read_number(value: str | None) -> float | None:
    """A cell that is a number, with or without its unit, or None."""
    found = _NUMBER.match(read_text(value))
    return float(found[0].replace(",", ".")) if found else None


def read_reasons(value: str | None) -> tuple[str, ...]:
    """What holds the clocks at this moment, in words, from the mask of bits; empty where nothing does or none is told.

    A bit that has no name yet is given as it is.
    """
    text = read_text(value)
    try:
        mask = int(text, 16)
    except ValueError:
        return ()
    bits = [1 << place for place in range(mask.bit_length()) if mask >> place & 1]
    return tuple(THROTTLE_REASONS.get(bit, f"reason {bit:#x}") for bit in bits)


def _in_one_line(text: str) -> str:
    """Of an answer that is none, in one line: the sentence may go on in the next ones."""
    return " ".join(text.split())[:MAX_PROBLEM]
