"""What `bench` is asked, and what it answers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from cspdeploy.check.gpu_record import GpuRecord
from cspdeploy.check.latency import LatencySettings
from cspdeploy.check.profile import Profile
from cspdeploy.check.roofline import Peak, Roofline
from cspdeploy.check.rungs import Rung
from cspdeploy.check.stats import EventTime
from cspdeploy.check.subject import Array, Candidate, Subject
from cspdeploy.check.sweep import Copies, SweepCell
from cspdeploy.check.variants import Variant
from cspdeploy.core.errors import InputError
from cspdeploy.core.results import ColdStart, MemoryUse, Timing
from cspdeploy.runtimes.base import ConvSearch, CudaOptions, SessionRequest

__all__ = [
    "BENCH_SCHEMA_VERSION", "BenchReport", "BenchRow", "BenchSettings", "Job", "RowVerdict", "feeds_of_batch",
    "settings_record",
]  # fmt: skip

BENCH_SCHEMA_VERSION = 1
"""Of what `bench --json` prints; raised when a field goes or changes its meaning."""

RowVerdict = Literal["timed", "crash", "hang", "error", "not-checkable"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSettings:
    """What to measure.

    Attributes:
        runtimes: names; empty for all that are here.
        batch: images a call; 0: one, or what the artifact takes.
        num_threads: of each engine; 0: its default.
        latency: of rows that are timed in turns; if one of them is on a GPU, what `gpu_settings` makes of it.
        sweep, profile: measure these parts as well.
        time_limit_s: for opening a session, and for each run; where an engine compiles, longer.
        every_variant, variants, cuda_graph: rows beside the plain one; see `cspdeploy.check.variants`.
        device: index of the GPU; None: the first one, if there is any.
        conv_search: of cuDNN's algorithms.
        tf32: on a GPU, as in use: float32 products are rounded to TF32.
        rotate: on a GPU, inputs in turn, so that none is found in the cache.
    """

    runtimes: tuple[str, ...] = ()
    batch: int = 0
    num_threads: int = 0
    latency: LatencySettings = field(default_factory=LatencySettings)
    sweep: bool = False
    profile: bool = False
    time_limit_s: float = 120.0
    every_variant: bool = False
    variants: tuple[str, ...] = ()
    cuda_graph: bool = False
    device: int | None = None
    conv_search: ConvSearch = "heuristic"
    tf32: bool = True
    rotate: bool = True

    @property
    def cuda(self) -> CudaOptions:
        """Of the plain variant."""
        return CudaOptions(device=self.device or 0, conv_search=self.conv_search)


def settings_record(settings: BenchSettings) -> dict[str, Any]:
    """For JSON, by the names of the fields."""
    record: dict[str, Any] = {item.name: getattr(settings, item.name) for item in dataclasses.fields(settings)}
    lists = {"runtimes": list(settings.runtimes), "variants": list(settings.variants)}
    return record | lists | {"latency": dataclasses.asdict(settings.latency)}


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRow:
    """One artifact on one runtime, set in one way, against the first row of its group.

    Attributes:
        group: the bundle, or "files" for all loose files together.
        variant: how the runtime is set; empty: as in use. See `cspdeploy.check.variants`.
        settings: what the engine says that the session was opened with; empty where it does not tell.
        inputs: how they are rotated: "rotated: 134 sets, 105 MB", and "copied in before each run" where that is done;
            empty: one input all the time.
        cold, memory: of the first run in a fresh process; None where the row failed before. Memory is the host's.
        timing: of the host's clock, from the call to the device's end of the work.
        events: of the same runs between two events on the device's stream; None where there are none.
        rounds_ms, events_rounds_ms: raw samples by round of the interleaved run, in the order of time.
        stable: its warm-up ended since its times had settled.
    """

    group: str
    artifact: str
    runtime: str
    verdict: RowVerdict
    variant: str = ""
    reason: str = ""
    note: str = ""
    num_bytes: int = 0
    batch: int = 1
    inputs: str = ""
    placement: dict[str, int] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    cold: ColdStart | None = None
    memory: MemoryUse | None = None
    timing: Timing | None = None
    events: EventTime | None = None
    rounds_ms: tuple[tuple[float, ...], ...] = ()
    events_rounds_ms: tuple[tuple[float, ...], ...] = ()
    num_warmups: int = 0
    stable: bool = True

    @property
    def failed(self) -> bool:
        """Whether this row makes the bench fail."""
        return self.verdict in ("crash", "hang", "error")

    @property
    def runtime_name(self) -> str:
        """With its variant: "ort-cuda [cuda-graph]"."""
        return f"{self.runtime} [{self.variant}]" if self.variant else self.runtime

    @property
    def title(self) -> str:
        """Of the row: "onnx-fp16 on ort-cuda [cuda-graph]"."""
        return f"{self.artifact} on {self.runtime_name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchReport:
    """What `cspdeploy bench` found. `verdict`: "fail" where a row could not be measured that should have been.

    Attributes:
        gpus: what nvidia-smi told of each GPU that was used, while it was: clocks, power, temperature, and what held
            its clock. Empty where none was used, or where nothing tells.
    """

    schema_version: int = BENCH_SCHEMA_VERSION
    verdict: Literal["done", "fail"]
    rows: tuple[BenchRow, ...]
    sweep: tuple[SweepCell, ...] = ()
    copies: tuple[Copies, ...] = ()
    profiles: tuple[Profile, ...] = ()
    rooflines: tuple[Roofline, ...] = ()
    peaks: tuple[Peak, ...] = ()
    gpus: tuple[GpuRecord, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    untrained: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Job:
    """A rung of a subject, with what it is opened and called with. `time_limit_s`: for one answer of its engine."""

    subject: Subject
    rung: Rung
    variant: Variant
    request: SessionRequest
    feeds: dict[str, Array]
    batch: int
    time_limit_s: float

    @property
    def on_gpu(self) -> bool:
        """Whether its runtime computes on one."""
        return self.rung.runtime.device == "cuda"

    @property
    def precision(self) -> str:
        """Of its arithmetic: the artifact's, unless the variant computes in another one."""
        half = self.on_gpu and self.request.cuda.half
        return "fp16" if half else self.rung.candidate.precision


def feeds_of_batch(subject: Subject, candidate: Candidate, batch: int) -> dict[str, Array]:
    """Inputs of one call with that many images; 0: one image, or as many as the artifact takes.

    Raises:
        InputError: the artifact does not take so many.
    """
    feeds = subject.first_call(candidate)
    num_images = 1 if subject.one_call and candidate.batch is None else len(next(iter(feeds.values())))
    if batch in (0, num_images):
        return feeds
    if candidate.batch is not None:
        raise InputError(f"takes {candidate.batch} images a call, not {batch}", fix="export --dynamic-batch")
    if subject.one_call:
        fixed = [value.name for value in candidate.inputs if not value.shape or isinstance(value.shape[0], int)]
        if fixed or not candidate.inputs:
            raise InputError(f"the first axis of its input {', '.join(fixed)} is fixed", fix="leave out --batch")
    # The same images over again: time does not depend on what they show.
    return {name: np.ascontiguousarray(np.resize(array, (batch, *array.shape[1:]))) for name, array in feeds.items()}
