"""What became of each test, written as it comes: a plugin of pytest (`-p cuda_outcomes`), and what reads its lines.

A report that is written at the end is lost with the run that had to be ended.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from cuda_result import TestOutcome

if TYPE_CHECKING:  # the benchmark runs without it, and says that the tests did not
    import pytest

__all__ = ["OUTCOMES_VARIABLE", "read_outcomes"]

OUTCOMES_VARIABLE = "CSPDEPLOY_CUDA_OUTCOMES"
"""Names the file, to which the plugin appends a line of JSON when a test begins and one when it has ended."""
_TOLD_CHARACTERS = 300


def pytest_runtest_logstart(nodeid: str) -> None:
    """A test begins."""
    _append({"name": _name(nodeid), "outcome": "running"})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A part of it has ended: a failure of any part is the test's, else the call decides, or a skip before it."""
    if report.failed or report.skipped or report.when == "call":
        outcome = "failed" if report.failed else "skipped" if report.skipped else "passed"
        _append({"name": _name(report.nodeid), "outcome": outcome, "detail": _detail(report)})


def read_outcomes(path: Path) -> tuple[list[TestOutcome], str]:
    """Tests that have ended, and the name of the one that had not, or an empty string."""
    found: dict[str, TestOutcome] = {}
    running = ""
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            one = json.loads(line)
        except json.JSONDecodeError:  # the last line of a process that was killed
            continue
        if one["outcome"] == "running":
            running = one["name"]
            continue
        running = ""
        if found.get(one["name"], TestOutcome(name="", outcome="passed")).outcome != "failed":
            found[one["name"]] = TestOutcome(**one)
    return list(found.values()), running


def _append(line: dict[str, str]) -> None:
    with Path(os.environ[OUTCOMES_VARIABLE]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _name(nodeid: str) -> str:
    """Such as "test_cuda_parity::test_fp32[cspdarknet53]"."""
    path, _, test = nodeid.partition("::")
    return f"{Path(path).stem}::{test}"


def _detail(report: pytest.TestReport) -> str:
    """Why a test failed or was skipped, in one line."""
    if report.passed:
        return ""
    told = report.longrepr
    crash = getattr(told, "reprcrash", None)
    message = crash.message if crash is not None else told[2] if isinstance(told, tuple) else str(told)
    return " ".join(message.split())[:_TOLD_CHARACTERS]
