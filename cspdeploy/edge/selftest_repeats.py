"""The same images again on the same session: a first run that is right says nothing of the second.

Known of FP16 networks on ONNX Runtime's CUDA provider: microsoft/onnxruntime#22723, right once and NaN from then on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from cspdeploy.core.golden import Golden
from cspdeploy.core.metrics import max_abs_difference
from cspdeploy.edge.calls import Calls
from cspdeploy.edge.images import Feed
from cspdeploy.edge.opening import OpenedArtifact
from cspdeploy.edge.selftest_report import CheckRow

__all__ = ["NUM_RUNS", "check_repeats"]

Array = npt.NDArray[Any]

NUM_RUNS = 3
"""The run that allocates, the first that reuses what was allocated, and one that reuses what was reused."""


def check_repeats(row: CheckRow, opened: OpenedArtifact, golden: Golden) -> CheckRow:
    """The row of the golden check with what further runs gave: all images on a GPU, one elsewhere, where it is cheap.

    Args:
        row: of this artifact; one that failed stays as it is, for its fault is known.

    Returns:
        The row, failed as "nan" where a run gives NaN or infinity, and as "shape" where it gives other outputs.
    """
    if row.verdict == "fail":
        return row
    calls, first, largest = Calls(opened), None, 0.0
    for number in range(1, NUM_RUNS + 1):
        found = _outputs(calls, _inputs(opened, golden))
        broken = [name for name, array in found.items() if not _is_finite(array)]
        if broken:
            reason = f"run {number} of {NUM_RUNS} on one session: NaN or infinity in {', '.join(broken)}"
            return dataclasses.replace(row, verdict="fail", finding="nan", reason=reason, num_runs=number)
        first = first or found
        if {name: array.shape for name, array in found.items()} != {name: one.shape for name, one in first.items()}:
            if opened.detection is not None:  # as many boxes as there are: one on the threshold may come and go
                continue
            reason = f"run {number} of {NUM_RUNS} on one session: outputs of other shapes than the first run's"
            return dataclasses.replace(row, verdict="fail", finding="shape", reason=reason, num_runs=number)
        largest = max(largest, *(max_abs_difference(array, first[name]) for name, array in found.items() if array.size))
    return dataclasses.replace(row, num_runs=NUM_RUNS, run_difference=largest)


def _inputs(opened: OpenedArtifact, golden: Golden) -> Iterator[Array]:
    num = len(golden.images) if opened.runtime.device == "cuda" else 1
    if opened.frontend is None:
        return (x[None] for x in golden.x_NCHW[:num])
    feed = Feed(contract=opened.contract, frontend=opened.frontend)
    return (feed.prepare(image) for image in golden.images[:num])


def _outputs(calls: Calls, inputs: Iterator[Array]) -> Mapping[str, Array]:
    parts = list(calls.batched(inputs))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _is_finite(array: Array) -> bool:
    return not np.issubdtype(array.dtype, np.floating) or bool(np.isfinite(array).all())
