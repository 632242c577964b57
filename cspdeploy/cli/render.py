"""Where output goes: results to stdout, progress and errors to stderr."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cspdeploy.core.errors import InputError
from cspdeploy.core.text import one_line

__all__ = ["is_onnx", "print_error", "print_json", "print_renderable", "progress_bar", "require_finite"]

Progress = Callable[[str, int, int], None]
NARROWEST_TABLE = 140
"""Columns where output is not a terminal, so that a log keeps its tables whole."""


def print_json(value: object) -> None:
    """One JSON document on stdout."""
    from cspdeploy.core.codec import to_json

    sys.stdout.write(json.dumps(to_json(value), indent=2) + "\n")


def print_renderable(renderable: Any) -> None:
    """A table or text on stdout."""
    from rich.console import Console

    # No markup: paths and extras such as cspdeploy[gpu] hold brackets of their own.
    width = None if sys.stdout.isatty() else NARROWEST_TABLE
    Console(width=width, markup=False, emoji=False, highlight=False).print(renderable)


def print_error(message: str, fix: str) -> None:
    """`error:` and, where there is one, `fix:`, a line each, on stderr."""
    sys.stderr.write(f"error: {one_line(message)}\n")
    if fix:
        sys.stderr.write(f"fix: {one_line(fix)}\n")


def is_onnx(place: Path) -> bool:
    """Whether an argument that may be a bundle or an ONNX file is the file: told by its name."""
    return place.suffix.lower() == ".onnx"


def require_finite(option: str, seconds: float) -> None:
    """Refuse "inf" and "nan", which are numbers to Python and pass every minimum.

    Raises:
        InputError: it is one of them.
    """
    if not math.isfinite(seconds):
        raise InputError(f"{option} {seconds}: expected a number of seconds", fix=f"{option} 3600")


@contextmanager
def progress_bar(command: str) -> Iterator[Progress]:
    """A bar on stderr that says what is done now; plain lines where stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield _PlainProgress(command)
        return
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(command, total=None)
        yield lambda what, done, total: bar.update(
            task, description=f"{command}: {what}", completed=done, total=total or None
        )


class _PlainProgress:
    """A line whenever the work changes its name, not one a step."""

    def __init__(self, command: str) -> None:
        self._command = command
        self._last = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        name = what.partition(",")[0]
        if name != self._last:
            self._last = name
            sys.stderr.write(f"{self._command}: {what}\n")
            sys.stderr.flush()
