"""Two networks timed side by side in every regime, in turns. Shapes: N images a call.

Each side of each row is a process of its own. TF32, cuDNN's algorithm search, threads and the caches of `torch.compile`
are settings of a whole process, and a second batch in one of them is compiled with a free batch where a fresh one is
compiled for that batch: a row would depend on the rows before it. What a process held on the device goes with it, and
an engine that dies or finds no memory costs its row alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from cspdeploy.check.bound_call import BoundCall
from cspdeploy.check.latency import LatencySettings, gpu_settings, measure_rounds, noise_warning, summarise
from cspdeploy.check.machine import MachineWatch
from cspdeploy.check.stats import compare_rounds, percentile
from cspdeploy.check.worker import EngineError, Worker
from cspdeploy.core.catalog import EAGER, INPUT_NAME
from cspdeploy.core.errors import CspDeployError, DeviceMemoryError, InputError, RuntimeUnavailableError
from cspdeploy.core.gpu_watch import GpuWatch
from cspdeploy.core.results import Timing
from cspdeploy.pipeline.engines import describe_engine
from cspdeploy.pipeline.pair_sides import Prepared
from cspdeploy.pipeline.regimes import PairRegime, regime_name
from cspdeploy.runtimes.base import SessionRequest

__all__ = ["LatencyRow", "judge_pair", "time_pair"]

Progress = Callable[[str, int, int], None]
PAIR_SEED = 0
RUN_LIMIT_S = 120.0
COMPILE_LIMIT_S = 1200.0
"""For opening and for the first run, in which `torch.compile` works: max-autotune times candidates for every
convolution, which takes minutes for a network of 50 layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyRow:
    """Both sides in one regime at one batch, measured in turns. Ratios are B over A: below 1, B is faster.

    Attributes:
        variant: how the engine was set, a name of `cspdeploy.check.variants`; empty for the runtime as it is in use.
        note: what the variant changes.
        precision: in which it computes.
        tf32: whether float32 products may be rounded to TF32, on both sides alike; None on a CPU.
        engine: its name, version, device and threads.
        settings: what both engines say that they were opened with; empty where they do not tell.
        inputs: how they were rotated; empty where one input was used all the time.
        ratio: the median over the rounds of the interleaved run; near that of the medians, free of the machine's drift.
            Of the host's clock: what a caller waits for.
        ratio_low: with `ratio_high` its bootstrap 95 % interval.
        device_ratio: the same between events on the device's stream, without the host's wait for the end; None where
            there is none.
        a_device_ms: with `b_device_ms` the medians by that clock.
        verdict: of B. "not-measured" for the reason in `reason`.
    """

    runtime: str
    artifact: str
    precision: str
    batch: int
    engine: str
    verdict: Literal["faster", "slower", "indistinguishable", "not-measured"]
    variant: str = ""
    note: str = ""
    tf32: bool | None = None
    settings: dict[str, str] = field(default_factory=dict)
    inputs: str = ""
    reason: str = ""
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    device_ratio: float | None = None
    device_ratio_low: float | None = None
    device_ratio_high: float | None = None
    a_device_ms: float | None = None
    b_device_ms: float | None = None
    a: Timing | None = None
    b: Timing | None = None

    @property
    def regime(self) -> str:
        """Runtime, artifact and variant: all but the batch."""
        return regime_name(self.runtime, self.artifact, self.variant)


def time_pair(
    a: Prepared, b: Prepared, *, regimes: Sequence[PairRegime], batches: Mapping[str, tuple[int, ...]],
    settings: LatencySettings, asked: bool, progress: Progress,
) -> tuple[list[LatencyRow], list[str]]:  # fmt: skip
    """Time both in each regime and at each batch, in turns. Gives the rows, and warnings of noise.

    Args:
        batches: images a call, by runtime.
        asked: the runtimes were named by the user, so that one that does not take the work ends all.

    Raises:
        InputError: no regime.
        RuntimeUnavailableError: a runtime that was asked for did not take the work.
    """
    if not regimes:
        raise InputError("nothing to time: no runtime here reads what both sides have", fix="cspdeploy doctor")
    jobs = [(regime, batch) for regime in regimes for batch in batches[regime.runtime.name]]
    rows: list[LatencyRow] = []
    warnings: list[str] = []
    for i, (regime, batch) in enumerate(jobs):
        what = f"{regime.name}, batch {batch}"
        progress(what, i, len(jobs))
        with contextlib.ExitStack() as stack:
            watch = MachineWatch()
            gpu = stack.enter_context(GpuWatch(regime.device)) if regime.on_gpu else None
            row = _Pair(a, b, regime, batch, asked=asked).measure(settings)
        rows.append(row)
        if row.a and row.b:
            said = [noise_warning({"A": row.a, "B": row.b}, watch.findings()), *(gpu.findings() if gpu else ())]
            warnings += [f"{what}: {warning}" for warning in said if warning]
    return rows, warnings


class _Pair:
    """Both sides in one regime at one batch. Nothing of them is left when `measure` returns."""

    def __init__(self, a: Prepared, b: Prepared, regime: PairRegime, batch: int, *, asked: bool) -> None:
        self._sides, self._regime, self._batch, self._asked = {"A": a, "B": b}, regime, batch, asked
        self._requests = {name: self._request(side) for name, side in self._sides.items()}
        self._settings: list[dict[str, str]] = []
        self._row = LatencyRow(
            runtime=regime.runtime.name, artifact=regime.kind, variant=regime.variant.name, note=regime.variant.note,
            precision=regime.precision, batch=batch, tf32=regime.tf32, engine=describe_engine(regime),
            verdict="not-measured",
        )  # fmt: skip

    def _request(self, side: Prepared) -> SessionRequest:
        """The same for both but for the file: neither can be set otherwise than the other."""
        spec, kind = side.manifest.spec, self._regime.kind
        if kind == EAGER:
            request = SessionRequest(path=side.weights, outputs=spec.outputs, spec=spec)
        else:
            request = SessionRequest(path=side.folder / side.artifacts()[kind].file, outputs=spec.outputs)
        cuda = dataclasses.replace(request.cuda, device=self._regime.device)
        return self._regime.variant.apply(dataclasses.replace(request, cuda=cuda, tf32=bool(self._regime.tf32)))

    def measure(self, settings: LatencySettings) -> LatencyRow:
        if problem := self._fixed_batch():
            return dataclasses.replace(self._row, reason=problem)
        try:
            with contextlib.ExitStack() as stack:
                calls = self._open(stack)
                found = measure_rounds(calls, gpu_settings(settings) if self._regime.on_gpu else settings)
        except RuntimeUnavailableError as error:
            # Without a compiler for torch.compile the device is there all the same, and the other rows are.
            if self._asked and not self._requests["A"].cuda.compile:
                raise
            return dataclasses.replace(self._row, reason=told(error))
        except CspDeployError as error:  # out of memory, an operator that the device lacks, a crash
            return dataclasses.replace(self._row, reason=told(error))
        timings = summarise(found)
        row = judge_pair(self._row, timings["A"], timings["B"])
        row = dataclasses.replace(row, settings=_common(self._settings), inputs=calls["A"].inputs)
        return judge_on_device(row, found["A"].device_rounds_ms, found["B"].device_rounds_ms)

    def _open(self, stack: contextlib.ExitStack) -> dict[str, BoundCall]:
        """One after the other, each up to its first result: autotuning side by side would time the neighbour too."""
        limit_s = COMPILE_LIMIT_S if self._requests["A"].cuda.compile else RUN_LIMIT_S
        calls: dict[str, BoundCall] = {}
        for name, request in self._requests.items():
            worker = stack.enter_context(Worker(self._regime.runtime.name, request, time_limit_s=limit_s))
            self._settings.append(worker.wait_opened().settings)
            if unmet := self._regime.unmet(self._settings[-1]):  # its time would stand under another's name
                raise EngineError(f"{name} was not opened as this regime asks: {unmet}")
            calls[name] = worker.bind({INPUT_NAME: self._images(name)}, rotate=self._regime.on_gpu)
            calls[name].burst(min_runs=1, min_seconds=0.0, max_runs=1, lead_in_seconds=0.0)
        return calls

    def _fixed_batch(self) -> str:
        if self._regime.kind == EAGER:
            return ""
        for name, side in self._sides.items():
            fixed = side.artifacts()[self._regime.kind].inputs[0].shape[0]
            if isinstance(fixed, int) and fixed != self._batch:
                return f"{name} is exported for a batch of {fixed}"
        return ""

    def _images(self, name: str) -> np.ndarray:
        """`[N, 3, H, W]` float32, as normalised pixels are."""
        preprocess = self._sides[name].manifest.spec.preprocess
        shape = (self._batch, 3, preprocess.height_px, preprocess.width_px)
        return np.random.default_rng(PAIR_SEED).standard_normal(shape, np.float32)


def judge_pair(row: LatencyRow, a: Timing, b: Timing) -> LatencyRow:
    """The row with both timings. `b.verdict` and `b.ratio` are against A, as speed; the row's ratios are of times."""
    verdict = "indistinguishable" if b.verdict == "reference" else b.verdict
    return dataclasses.replace(
        row, verdict=verdict, ratio=1 / b.ratio, ratio_low=1 / b.ratio_high, ratio_high=1 / b.ratio_low, a=a, b=b
    )


def judge_on_device(
    row: LatencyRow, a_rounds_ms: Sequence[Sequence[float]], b_rounds_ms: Sequence[Sequence[float]]
) -> LatencyRow:
    """The row with what the device's own clock says; as it is where one of the sides has no such clock."""
    if not a_rounds_ms or len(a_rounds_ms) != len(b_rounds_ms):
        return row
    speed = compare_rounds(a_rounds_ms, b_rounds_ms)
    a_ms, b_ms = (
        percentile([sample for found in rounds for sample in found], 50) for rounds in (a_rounds_ms, b_rounds_ms)
    )
    return dataclasses.replace(
        row, device_ratio=1 / speed.ratio, device_ratio_low=1 / speed.high, device_ratio_high=1 / speed.low,
        a_device_ms=a_ms, b_device_ms=b_ms,
    )  # fmt: skip


def told(error: CspDeployError) -> str:
    """Why a row was not measured, in one line; of what the user can mend, how."""
    words = " ".join(error.message.split())[:300]
    if "InvalidCxxCompiler" in words or "No working C++ compiler" in words:
        return "torch.compile needs a C++ compiler here and finds none (fix: apt-get install g++, or set CXX)"
    return f"{words} (fix: {error.fix})" if error.fix and isinstance(error, DeviceMemoryError) else words


def _common(settings: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """What both say alike; what they say differently is of the network, not of the regime."""
    first, second = settings
    return {key: first[key] for key in sorted(first) if second.get(key) == first[key]}
