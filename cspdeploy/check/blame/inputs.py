"""Which of a bundle's golden inputs are traced: those that an artifact does worst on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from cspdeploy.check.blame.detector import DetectorForm, in_golden_form
from cspdeploy.check.blame.open import Named
from cspdeploy.check.subject import Subject
from cspdeploy.core.trace import TraceSource

__all__ = ["output_errors", "worst_inputs"]

Array = npt.NDArray[Any]

MAX_PIXELS = 1 << 17
"""Of the inputs that are traced: 2 images at 256 px."""
MAX_INPUTS = 8
"""And no more than so many, however small: a fault of the graph shows on any of them, one of rounding or range on those
that come out worst, which are the ones taken."""


def output_errors(
    subject: Subject, source: TraceSource, named: Named, calls: list[list[Array]], *, form: DetectorForm
) -> npt.NDArray[np.float64]:
    """Of each golden input, the squared error of all outputs against the golden ones."""
    names = list(named.outputs)
    made: dict[str, list[Array]] = {}

    def keep(name: str, array: Array, _constant: bool) -> None:
        made.setdefault(name, []).append(np.array(array, np.float64))

    feeds = [named.feeds(values) for values in calls]
    final = getattr(source, "final_outputs", None)
    if final is not None:
        for outputs in final(feeds, optimise=False):
            for name in names:
                keep(name, outputs[name], False)
    else:
        source.trace(feeds[:1], lambda *_: None, wanted=())
        own = list(source.outputs)
        source.trace(feeds, keep, wanted=frozenset(own))
        made = {name: made[tensor] for name, tensor in zip(names, own, strict=True)}
    total = np.zeros(0)
    joined = {name: np.concatenate(made[name]) for name in names}
    for name, found in in_golden_form(joined, subject, form).items():
        exact = subject.outputs_fp64[name][: len(found)]
        with np.errstate(all="ignore"):
            off = np.square(found.reshape(len(found), -1) - exact.reshape(len(exact), -1)).sum(axis=1)
        error = np.nan_to_num(off / max(float(np.square(exact).sum()), 1e-300), nan=np.inf)
        total = error if not total.size else total + error
    return total


def worst_inputs(
    subject: Subject, feeds: Mapping[str, Array], errors: npt.NDArray[np.float64], batch: int | None
) -> dict[str, Array]:
    """The inputs that come out worst, as many as are traced, in their order."""
    first = next(iter(feeds.values()))
    pixels = int(np.prod(first.shape[2:])) if first.ndim > 2 else 1
    step = batch or 1
    count = min(
        len(errors), max(step, MAX_INPUTS // step * step), max(step, MAX_PIXELS // max(1, pixels) // step * step)
    )
    chosen = np.sort(np.argsort(-errors, kind="stable")[: max(1, count)])
    return {name: np.ascontiguousarray(array[chosen]) for name, array in subject.feeds.items()}
