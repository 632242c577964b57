"""What the CUDA benchmark finds: one JSON file, valid after every stage, read back strictly, merged over several calls.

Every latency is in milliseconds a call, by the host's clock unless a name says `events`. A ratio is of times,
subject over against: below 1 the subject is the faster.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from cspdeploy.core.codec import from_json, to_json
from cspdeploy.core.errors import InputError
from cspdeploy.core.json_file import read_json, write_text

__all__ = [
    "SAME_MACHINE", "Comparison", "Figure", "Kernel", "Parity", "Profile", "Result", "Row", "Stage", "TestOutcome",
    "Verdict", "merge_results", "read_result", "write_result",
]  # fmt: skip

SCHEMA_VERSION = 1
Kind = Literal["cuda", "cpu"]
Verdict = Literal["holds", "does not hold", "undecided", "measured", "not measured"]
"""undecided: what is aimed at lies within the interval of what was measured. measured: nothing is aimed at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A part of the run and what became of it. `reason` says why it is not done."""

    name: str
    outcome: Literal["done", "not done"]
    seconds: float
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One network in one regime at one batch. Not measured where `reason` says why.

    Attributes:
        copies: inputs come from the host and outputs go back in every run.
        rotated: each run had another input than the one before, all of them together larger than the L2 cache.
        events_p50_ms: between two events on the session's stream, gaps between kernels in it; None: it gives none.
        spread: distance between the quartiles over the median.
        operators: nodes by provider and operator, as the engine placed them.
    """

    network: str
    batch: int
    regime: str
    runtime: str
    reason: str = ""
    copies: bool = False
    rotated: bool = False
    p50_ms: float | None = None
    ci_low_ms: float | None = None
    ci_high_ms: float | None = None
    p95_ms: float | None = None
    events_p50_ms: float | None = None
    num_runs: int = 0
    spread: float | None = None
    stable: bool = True
    num_copies: int | None = None
    placement: dict[str, int] = field(default_factory=dict)
    operators: dict[str, int] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two rows that were measured in turns. `low` to `high` is the bootstrap 95 % interval of the ratio."""

    batch: int
    subject: str
    """Network and regime: "cspdarknet53/ort-fp16"."""
    against: str
    ratio: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """Outputs against the original network in FP64. Not measured where `reason` says why.

    Attributes:
        limit: of `rel_l2`; None: shown without a verdict.
        num_different: of `num_runs` on the same input, whose output is not that of the first bit by bit.
        first_bad_run: number of the first run with a value that is not finite; 0: none.
        top1_agreement: share of `num_images` whose first class is that of the original; None where the weights are
            random and it means nothing.
    """

    network: str
    regime: str
    reason: str = ""
    limit: float | None = None
    rel_l2: float | None = None
    max_abs: float | None = None
    num_runs: int = 0
    num_different: int = 0
    first_bad_run: int = 0
    num_images: int = 0
    images: str = ""
    top1_agreement: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure that is aimed at."""

    figure: str
    verdict: Verdict
    detail: str
    speed: bool = True
    """A clock decides: it is reported and fails nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A kernel in one run, on average."""

    name: str
    ms: float
    num_calls: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """The longest kernels of one side of a figure that was missed, longest first. `busy_ms` is that of all kernels."""

    network: str
    batch: int
    regime: str
    busy_ms: float | None = None
    kernels: tuple[Kernel, ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TestOutcome:
    """A test of the marker `cuda`."""

    __test__ = False  # pytest takes the name for a class of tests

    name: str
    outcome: Literal["passed", "failed", "skipped"]
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The whole file. `facts` are of the machine and the versions, `watch` of the GPU during the timing."""

    kind: Kind
    commands: tuple[str, ...]
    size_px: int
    facts: dict[str, str]
    schema_version: int = SCHEMA_VERSION
    remarks: tuple[str, ...] = ()
    watch: dict[str, str] = field(default_factory=dict)
    stages: tuple[Stage, ...] = ()
    tests: tuple[TestOutcome, ...] = ()
    rows: tuple[Row, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    parity: tuple[Parity, ...] = ()
    figures: tuple[Figure, ...] = ()
    profiles: tuple[Profile, ...] = ()


def write_result(path: Path, result: Result) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(to_json(result), indent=1) + "\n")


def read_result(path: Path) -> Result:
    """Read it back.

    Raises:
        InputError: missing, no JSON, or not of this schema, with the path of the bad field.
    """
    data = read_json(path)
    if data.get("schema_version") != SCHEMA_VERSION:
        raise InputError(f"{path}: schema {data.get('schema_version')}, expected {SCHEMA_VERSION}", fix="measure anew")
    return from_json(Result, data)


SAME_MACHINE = ("gpu", "gpu_driver", "cpu", "python", "torch", "torch_cuda", "onnxruntime", "onnxruntime-gpu")
"""Facts that must agree before two results are one."""

Part = TypeVar("Part", Row, Parity, Profile)


def merge_results(first: Result, second: Result) -> Result:
    """One result of two calls: what the second measured takes the place of the first's. Figures are judged anew.

    Raises:
        InputError: another machine, other versions, another size.
    """
    for name in SAME_MACHINE:
        ours, theirs = first.facts.get(name, ""), second.facts.get(name, "")
        if ours != theirs:
            raise InputError(f"{name}: '{ours}' and '{theirs}', expected results of one machine and the same versions",
                             fix="measure all parts on one machine")  # fmt: skip
    if (first.kind, first.size_px) != (second.kind, second.size_px):
        raise InputError(f"{first.kind} at {first.size_px} px and {second.kind} at {second.size_px} px, "
                         "expected the same", fix="measure all parts alike")  # fmt: skip
    measured = {(one.network, one.batch) for one in second.rows if not one.reason}
    kept = tuple(
        one for one in first.comparisons
        if (one.subject.partition("/")[0], one.batch) not in measured
        and (one.against.partition("/")[0], one.batch) not in measured
    )  # fmt: skip
    return dataclasses.replace(
        second, commands=_each_once(first.commands + second.commands),
        remarks=_each_once(first.remarks + second.remarks), watch=first.watch | second.watch,
        stages=first.stages + second.stages, tests=second.tests or first.tests,
        rows=_merge_rows(first.rows, second.rows), comparisons=kept + second.comparisons,
        parity=_merge(first.parity, second.parity, lambda one: (one.network, one.regime)),
        profiles=_merge(first.profiles, second.profiles, lambda one: (one.network, one.batch, one.regime)),
        figures=(),
    )  # fmt: skip


def _each_once(lines: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(lines))


def _merge_rows(first: tuple[Row, ...], second: tuple[Row, ...]) -> tuple[Row, ...]:
    """Row by row, but of a network and a batch that were measured twice, the second time alone: rows that were not
    measured in turns with each other must not stand beside each other."""
    again = {(one.network, one.batch) for one in second if not one.reason}
    return _merge(
        tuple(one for one in first if one.reason or (one.network, one.batch) not in again),
        second, lambda one: (one.network, one.batch, one.regime, one.copies),
    )  # fmt: skip


def _merge(first: tuple[Part, ...], second: tuple[Part, ...], key: Callable[[Part], object]) -> tuple[Part, ...]:
    found = {key(one): one for one in first}
    for one in second:
        if not one.reason or found.get(key(one), one).reason:
            found[key(one)] = one
    return tuple(found.values())
