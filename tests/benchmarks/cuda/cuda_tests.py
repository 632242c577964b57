"""The tests of the marker `cuda`, run in a child, and what became of each."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from cuda_facts import TEST_PACKAGES, missing_packages
from cuda_networks import child_paths
from cuda_result import TestOutcome

from cspdeploy.core.errors import RuntimeUnavailableError

__all__ = ["marked_files", "read_junit", "run_tests"]

ROOT = Path(__file__).parents[3]
_MARKED = re.compile(
    r"^pytestmark = pytest\.mark\.cuda|^\s*@pytest\.mark\.cuda|^pytestmark = \[.*mark\.cuda", re.MULTILINE
)
_TOLD_CHARACTERS = 300
_ENDING_S = 10.0


def marked_files(root: Path = ROOT) -> list[Path]:
    """Files with tests of the marker: no other is imported, since a GPU machine may not have all that they import."""
    return [path for path in sorted((root / "tests").rglob("test_*.py")) if _MARKED.search(path.read_text("utf-8"))]


def run_tests(seconds: float, *, root: Path = ROOT) -> tuple[list[TestOutcome], str]:
    """All of them, within so many seconds; and why some of them did not run, or an empty string.

    Raises:
        RuntimeUnavailableError: pytest, or a package that the tests import, is missing.
    """
    missing = missing_packages(TEST_PACKAGES)
    if missing:
        names = ", ".join(one.name for one in missing)
        raise RuntimeUnavailableError(f"not run: {names} is missing", fix="pip install 'cspdeploy[dev,export]'")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        # Versions are those of the machine, not the pinned ones: what they warn of is no failure there.
        command = [
            sys.executable, "-m", "pytest", "-m", "cuda", "-q", "-W", "default", "-p", "no:cacheprovider",
            f"--junitxml={report}", *(str(path) for path in marked_files(root)),
        ]  # fmt: skip
        process = subprocess.Popen(command, cwd=root, env=child_paths(), stdout=sys.stderr)
        try:
            process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_ENDING_S)
            process.kill()
            process.wait()
            return _read(report), f"not run to the end: out of time after {seconds:.0f} s"
        found = _read(report)
        if process.returncode not in (0, 1) or not found:
            return found, f"pytest ended with {process.returncode} and {len(found)} tests"
        return found, ""


def _read(report: Path) -> list[TestOutcome]:
    return read_junit(report.read_text(encoding="utf-8")) if report.is_file() else []


def read_junit(text: str) -> list[TestOutcome]:
    """The cases of a JUnit report."""
    found = []
    for case in ElementTree.fromstring(text).iter("testcase"):  # noqa: S314  # what pytest wrote a moment ago
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name', '')}"
        bad = next((child for child in case if child.tag in ("failure", "error")), None)
        left = next((child for child in case if child.tag == "skipped"), None)
        told = bad if bad is not None else left
        detail = " ".join((told.get("message") or "").split())[:_TOLD_CHARACTERS] if told is not None else ""
        outcome = "failed" if bad is not None else "skipped" if left is not None else "passed"
        found.append(TestOutcome(name=name, outcome=outcome, detail=detail))  # type: ignore[arg-type]
    return found
