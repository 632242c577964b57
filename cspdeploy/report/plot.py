"""A comparison as a picture: the ratio B / A of every quantity, latencies with their interval."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from pathlib import Path
from typing import Any

from cspdeploy.core.errors import InputError, MissingExtraError

__all__ = ["PLOT_SUFFIXES", "check_plot", "write_plot"]

PLOT_SUFFIXES = (".svg", ".png", ".pdf")
# What the formats would write of the moment and the machine: the same report gives the same bytes.
_NO_METADATA: dict[str, dict[str, None]] = {
    ".svg": {"Date": None},
    ".png": {"Software": None},
    ".pdf": {"CreationDate": None, "ModDate": None},
}
_HASH_SALT = "cspdeploy"  # of the ids inside an SVG, which are random without one
_COLOURS = {"faster": "tab:green", "slower": "tab:red", "indistinguishable": "tab:gray"}
_ROW_INCHES = 0.3


def check_plot(path: Path) -> None:
    """Before the measuring starts: whether a plot can be written there.

    Raises:
        InputError: another suffix, or no such folder.
        MissingExtraError: matplotlib is not installed.
    """
    if path.suffix.lower() not in PLOT_SUFFIXES:
        raise InputError(
            f"--plot {path}: got suffix '{path.suffix}', expected {', '.join(PLOT_SUFFIXES)}", fix="--plot out.svg"
        )
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"--plot {path}: cannot be written there", fix="name a file in a folder that you may write to")
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", extra="report", needed_for="--plot")


def write_plot(path: Path, report: Any) -> None:
    """Draw a `CompareReport`, written beside and renamed. The format follows from the suffix.

    Raises:
        InputError: another suffix than those of `PLOT_SUFFIXES`, or it cannot be written.
        MissingExtraError: matplotlib is not installed.
    """
    check_plot(path)
    suffix = path.suffix.lower()
    beside = path.with_name(f".plot-{os.getpid()}{suffix}")  # no longer than any name that the user gives
    try:
        _draw(report, beside, suffix)
        beside.replace(path)
    except OSError as error:
        raise InputError(
            f"--plot {path}: cannot be written ({error.strerror or error})", fix="name another file"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # the folder may be gone; the first error is the one to tell
            beside.unlink()


def _draw(report: Any, path: Path, suffix: str) -> None:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = [quantity for quantity in report.quantities if quantity.ratio is not None]
    timed = [row for row in report.latency if row.ratio is not None]
    names = [quantity.name for quantity in counts]
    names += [f"{row.regime}, batch {row.batch}" for row in timed]
    # No text as paths: a search and a screen reader find the words.
    with matplotlib.rc_context({"svg.hashsalt": _HASH_SALT, "svg.fonttype": "none", "text.parse_math": False}):
        figure = Figure(figsize=(8, 1.5 + _ROW_INCHES * len(names)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.barh(range(len(counts)), [quantity.ratio for quantity in counts], color="tab:blue", height=0.6)
        for i, row in enumerate(timed, start=len(counts)):
            arms = [[row.ratio - row.ratio_low], [row.ratio_high - row.ratio]]
            axes.errorbar(
                [row.ratio], [i], xerr=[[max(0.0, arm[0])] for arm in arms], fmt="o", capsize=4,
                color=_COLOURS[row.verdict],
            )  # fmt: skip
        axes.axvline(1.0, color="black", linewidth=1)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(left=0)
        size = "x".join(map(str, report.regime.size_px))
        points = (
            " Points: median latency with its 95 % interval,\n"
            "green where B is faster, red where it is slower, grey where they cannot be told apart"
        )
        axes.set_xlabel(f"B / A. Bars: counts and sizes.{points if timed else ''}")
        axes.set_title("\n".join([f"A {report.a.given}, B {report.b.given}, {size} px", *_regime(report)]),
                       loc="left", fontsize="small")  # fmt: skip
        figure.savefig(path, format=suffix[1:], metadata=_NO_METADATA[suffix])


def _regime(report: Any) -> list[str]:
    """What the latencies hold for, as a picture travels without its table; and which side is untrained."""
    lines = [
        f"{label} {side.given} is UNTRAINED" for label, side in (("A", report.a), ("B", report.b)) if side.untrained
    ]
    engines = dict.fromkeys(f"{row.runtime}: {row.engine}" for row in report.latency if row.ratio is not None)
    if engines:
        lines += [*engines, f"{report.regime.layout}, {report.regime.environment.get('cpu', '')}"]
    return lines
