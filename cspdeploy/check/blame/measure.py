"""The second pass: exact errors of a few tensors, and the error that a node introduces by itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cspdeploy.check.blame.counterparts import Pair, Side
from cspdeploy.core.trace import TraceSource

__all__ = ["collect", "exact_distance", "introduced_errors"]

Array = npt.NDArray[Any]
Calls = Sequence[Mapping[str, Array]]

INTRODUCED_BUDGET_BYTES = 1 << 29
"""Of the reference's tensors that are held at once, as float32."""


def collect(source: TraceSource, calls: Calls, names: Collection[str], *, dtype: Any = None) -> dict[str, list[Array]]:
    """Copies of tensors, one array a call; constants have one.

    Raises:
        InputError: the source cannot be run.
    """
    found: dict[str, list[Array]] = {name: [] for name in names}

    def keep(name: str, values: Array, _constant: bool) -> None:
        found[name].append(np.array(values, dtype or values.dtype))

    source.trace(calls, keep, wanted=frozenset(names))
    return found


def exact_distance(actual: Sequence[Array], reference: Sequence[Array]) -> float:
    """||actual - reference|| / ||reference|| over all calls, in float64, shapes aside.

    Infinite where `actual` is not finite, sizes differ, or the reference is all zero and it is not.
    """
    gap = norm = 0.0
    if len(actual) != len(reference):
        return math.inf
    for a, r in zip(actual, reference, strict=True):
        if a.size != r.size:
            return math.inf
        expected = r.reshape(-1).astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):  # infinities are judged below
            off = a.reshape(-1).astype(np.float64) - expected
            gap += float(off @ off)
        norm += float(expected @ expected)
    if not math.isfinite(gap):
        return math.inf
    if norm == 0:
        return 0.0 if gap == 0 else math.inf
    return math.sqrt(gap / norm)


def introduced_errors(
    artifact: TraceSource,
    reference: TraceSource,
    calls: Calls,
    *,
    reference_calls: Calls,
    sides: tuple[Side, Side],
    pairs: Mapping[str, Pair],
    targets: Sequence[str],
    budget_bytes: int = INTRODUCED_BUDGET_BYTES,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> dict[str, float]:
    """Error of each target when every tensor that has a counterpart is replaced by it on the way there.

    What is left is made by the node itself, and by those without a counterpart before it.

    Args:
        reference_calls: the same inputs under the reference's names.
        sides: of the artifact and of the reference.
        targets: tensors of the artifact with a counterpart of their own size that depend on the input.

    Raises:
        InputError: the artifact cannot be run.
    """
    ours, theirs = sides
    found: dict[str, float] = {}
    usable = {
        name: pair for name, pair in pairs.items()
        if ours.records[name].size == theirs.records[pair.reference].size
        and (not ours.records[name].constant or name in ours.made_by)
    }  # fmt: skip
    done = 0
    for chunk in _chunks(ours, usable, targets, budget_bytes):
        given = dict.fromkeys(name for target in chunk for name in _given_to(ours, usable, target))
        names = {usable[name].reference for name in (*given, *chunk)}
        values = collect(reference, reference_calls, names, dtype=np.float32 if len(targets) > len(chunk) else None)
        shaped = {
            name: _as_calls(values[usable[name].reference], ours.records[name].shape, len(calls)) for name in given
        }
        replayed = artifact.replay(calls, shaped, chunk)
        for target, made in replayed.items():
            found[target] = exact_distance(made, _repeated(values[usable[target].reference], len(calls)))
        done += len(chunk)
        progress(done, len(targets))
    return found


def _given_to(side: Side, usable: Mapping[str, Pair], target: str) -> Iterator[str]:
    """The nearest tensors before a target that have a counterpart."""
    seen: set[str] = set()
    waiting = list(side.made_by[target].inputs)
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in usable:
            yield name
        elif name in side.made_by:
            waiting += side.made_by[name].inputs


def _chunks(side: Side, usable: Mapping[str, Pair], targets: Sequence[str], budget_bytes: int) -> Iterator[list[str]]:
    chunk: list[str] = []
    held: set[str] = set()
    for target in targets:
        needed = {target, *_given_to(side, usable, target)}
        total = sum(4 * side.records[name].size for name in held | needed)
        if chunk and total > budget_bytes:
            yield chunk
            chunk, held = [], set()
        chunk.append(target)
        held |= needed
    if chunk:
        yield chunk


def _as_calls(values: Sequence[Array], shape: tuple[int, ...], num_calls: int) -> list[Array]:
    """In the artifact's own shape: the reference may have the same values flat."""
    return [array.reshape(shape) for array in _repeated(values, num_calls)]


def _repeated(values: Sequence[Array], num_calls: int) -> list[Array]:
    """A constant is the same in every call."""
    return list(values) if len(values) == num_calls else [values[0]] * num_calls
