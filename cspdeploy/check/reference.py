"""What the outputs of a loose ONNX file are judged by: a file in FP64, or as near to it as this machine comes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cspdeploy.check.subject import Candidate, Subject
from cspdeploy.check.worker import Worker
from cspdeploy.core.catalog import FP32_FLOOR
from cspdeploy.core.errors import CspDeployError, InputError, RuntimeUnavailableError
from cspdeploy.core.metrics import relative_l2
from cspdeploy.runtimes import all_runtimes
from cspdeploy.runtimes.base import Feeds, SessionRequest

__all__ = ["Reference", "reference_of", "run_contained"]

Array = npt.NDArray[np.generic]

FP64_RUNTIME, PLAIN_RUNTIME = "onnx-fp64", "ort-cpu"
TIME_LIMIT_S = 300.0
"""For opening, and for each call: CSPDarknet53 at 256 px takes a second an image in FP64; a hang is not that."""
HALF_ULP = 2.0**-24
"""Rounding to float32 moves a number by at most this share of it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reference:
    """Outputs by name, the noise floor of each, and a sentence on how they came about, `in_fp64` or not.

    `outputs_plain` are those of the same file in its own precision, not optimised, as the engine gave them.
    """

    outputs_fp64: Mapping[str, npt.NDArray[np.float64]]
    outputs_plain: Mapping[str, Array]
    floors: Mapping[str, float]
    note: str
    in_fp64: bool


def reference_of(subject: Subject, *, need_fp64: bool = False) -> Reference:
    """The outputs of the subject's first candidate for all its inputs.

    In FP64, and the floor is the distance of the same file in its own precision, not optimised. Where that cannot be
    (torch or onnx are not installed, or the reference does not know an operator), the file itself, not optimised; the
    floor is then how far its outputs move when each input is moved by half a unit in the last place.

    Args:
        need_fp64: raise where there is no FP64.

    Raises:
        InputError: the engine refuses the file, dies on it or does not answer; outputs that are no numbers, or not
            finite.
    """
    candidate = subject.candidates[0]
    plain = _run(PLAIN_RUNTIME, subject, candidate)
    numbers = _numbers(plain, candidate)
    runtime = all_runtimes().get(FP64_RUNTIME)
    missing = runtime.missing() if runtime is not None else ("it is not part of this installation", "")
    why = missing[0] if missing else ""
    if not why:
        try:
            exact = _numbers(_run(FP64_RUNTIME, subject, candidate), candidate)
        except InputError as error:
            why = error.message
        else:
            note = f"reference: {candidate.artifact} in FP64"
            return Reference(
                outputs_fp64=exact, outputs_plain=plain, floors=_floors(numbers, exact), note=note, in_fp64=True
            )
    if need_fp64:
        raise InputError(f"{candidate.path}: no reference outputs in FP64: {why}",
                         fix=f"verify it by itself: cspdeploy verify {candidate.path}")  # fmt: skip
    moved = _numbers(_run(PLAIN_RUNTIME, subject, candidate, moved=True), candidate)
    note = f"reference: {candidate.artifact} as it is, not optimised; no FP64 here: {why}"
    return Reference(
        outputs_fp64=numbers, outputs_plain=plain, floors=_floors(moved, numbers), note=note, in_fp64=False
    )


def _floors(
    plain: Mapping[str, npt.NDArray[np.float64]], exact: Mapping[str, npt.NDArray[np.float64]]
) -> dict[str, float]:
    return {name: max(relative_l2(plain[name], array), FP32_FLOOR) for name, array in exact.items()}


def _moved(array: Array, rng: np.random.Generator) -> Array:
    if array.dtype.kind != "f":
        return array
    factors = 1.0 + HALF_ULP * rng.uniform(-1.0, 1.0, array.shape)
    return np.asarray(array.astype(np.float64) * factors).astype(array.dtype)


def _run(runtime: str, subject: Subject, candidate: Candidate, *, moved: bool = False) -> dict[str, Array]:
    """All inputs of the subject, in as many calls as it takes; outputs joined along the first axis."""
    calls = list(subject.calls(candidate))
    rng = np.random.default_rng(0)
    feeds = [{name: _moved(array, rng) if moved else array for name, array in call.items()} for call, _ in calls]
    request = SessionRequest(path=candidate.path, outputs=candidate.output_names, optimise=False)
    found = run_contained(runtime, request, feeds)
    for given, outputs, (_, count) in zip(feeds, found, calls, strict=True):
        if count is not None:
            _require_rows(outputs, len(next(iter(given.values()))), candidate)
    parts = [
        outputs if count is None else {name: array[:count] for name, array in outputs.items()}
        for outputs, (_, count) in zip(found, calls, strict=True)
    ]
    return parts[0] if len(parts) == 1 else {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _require_rows(outputs: Mapping[str, Any], num_rows: int, candidate: Candidate) -> None:
    for name, array in outputs.items():
        shape = list(np.shape(array))
        if shape[:1] != [num_rows]:
            raise InputError(
                f"{candidate.path}: output '{name}' is {shape} for {num_rows} images, expected [{num_rows}, ...]",
                fix="leave out --images",
            )


def run_contained(runtime: str, request: SessionRequest, calls: Iterable[Feeds]) -> list[dict[str, Array]]:
    """Open and run in a process of its own: a file of unknown origin may bring its engine down.

    Raises:
        InputError: the runtime refuses the file, dies on it, does not answer, or cannot compute it.
        RuntimeUnavailableError: the runtime is not here.
    """
    try:
        with Worker(runtime, request, time_limit_s=TIME_LIMIT_S) as worker:
            worker.wait_opened()
            return [dict(worker.run(feeds)) for feeds in calls]
    except (InputError, RuntimeUnavailableError):
        raise
    except CspDeployError as error:
        fix = error.fix or "name a file that ONNX Runtime runs"
        raise InputError(f"{request.path}: {runtime} cannot run it: {error.message}", fix=fix) from error


def _numbers(outputs: Mapping[str, Array], candidate: Candidate) -> dict[str, npt.NDArray[np.float64]]:
    found = {}
    values: Mapping[str, Any] = outputs  # an engine may give sequences and maps as well
    for name, array in values.items():
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub" or not array.size:
            raise InputError(f"{candidate.path}: output '{name}' is no array of numbers", fix="name another file")
        found[name] = array.astype(np.float64)
        if not np.isfinite(found[name]).all():
            raise InputError(
                f"{candidate.path}: output '{name}' is NaN or infinite by itself on these inputs",
                fix="--images DIR --preprocess CONTRACT, for inputs that the network was made for",
            )
    return found
