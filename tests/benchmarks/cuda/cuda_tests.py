"""The tests of the marker `cuda`, run in a child, and what became of each."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import cuda_outcomes
from cuda_facts import TEST_PACKAGES, missing_packages
from cuda_networks import child_paths
from cuda_outcomes import OUTCOMES_VARIABLE, read_outcomes
from cuda_result import TestOutcome

from cspdeploy.core.errors import RuntimeUnavailableError

__all__ = ["MARKER", "marked_files", "run_tests"]

ROOT = Path(__file__).parents[3]
_MARKED = re.compile(
    r"^pytestmark = pytest\.mark\.cuda|^\s*@pytest\.mark\.cuda|^pytestmark = \[.*mark\.cuda", re.MULTILINE
)
MARKER = "cuda and not slow"
"""Those that are slow compile networks for minutes, which does not fit into a call: pytest -m 'cuda and slow'."""
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
        return _run(marked_files(root), seconds, root, Path(folder) / "outcomes.jsonl")


def _run(files: Sequence[Path], seconds: float, root: Path, outcomes: Path) -> tuple[list[TestOutcome], str]:
    # Versions are those of the machine, not the pinned ones: what they warn of is no failure there.
    command = [
        sys.executable, "-m", "pytest", "-m", MARKER, "-q", "-W", "default", "-p", "no:cacheprovider",
        "-p", cuda_outcomes.__name__, *(str(path) for path in files),
    ]  # fmt: skip
    environment = {**child_paths(), OUTCOMES_VARIABLE: str(outcomes)}
    # A session of its own: what it has started is ended with it, and holds the GPU no longer when latency is measured.
    process = subprocess.Popen(command, cwd=root, env=environment, stdout=sys.stderr, start_new_session=True)
    code, problem = -1, ""
    try:
        code = process.wait(max(1.0, seconds))
    except subprocess.TimeoutExpired:
        problem = f"not run to the end: out of time after {seconds:.0f} s"
    finally:
        _end(process)
    found, running = read_outcomes(outcomes)
    if problem:
        return found, problem + (f", in {running}" if running else "")
    if code not in (0, 1) or running or not found:
        return found, f"pytest ended with {code} and {len(found)} tests" + (f", in {running}" if running else "")
    return found, ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """All of its session: at first politely, so that engines give their memory back."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_ENDING_S)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
