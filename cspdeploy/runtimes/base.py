"""What a runtime is. Knows no engine; each engine is one file beside this one that defines `RUNTIMES`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from cspdeploy.core.catalog import OUTPUT_NAME
from cspdeploy.core.spec import ModelSpec
from cspdeploy.core.types import PlacedNode

__all__ = [
    "ConvSearch", "CudaOptions", "DeviceCall", "Feeds", "Outputs", "ProfiledNode", "Runtime", "Session",
    "SessionRequest",
]  # fmt: skip

Feeds = Mapping[str, npt.NDArray[np.generic]]
Outputs = dict[str, npt.NDArray[np.generic]]
"""By name, in the order in which the artifact gives them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfiledNode:
    """Where the time of a run goes, by the engine's own clock. Of an engine that fuses nodes, the fused ones.

    Attributes:
        node: its name as the engine has it; the operator's where nodes carry none.
        provider: on which it ran, or empty.
        num_calls: in one run, on average.
        ms: of all its calls in one run, on average, without those of the nodes inside it.
        moved_bytes: inputs, weights and outputs of one call; 0 where the engine does not tell.
    """

    node: str
    operator: str
    provider: str
    num_calls: float
    ms: float
    moved_bytes: int = 0


ConvSearch = Literal["heuristic", "exhaustive", "default"]
"""How cuDNN's algorithm of each convolution is found: by its own estimate, the same each time; by timing all of them
when a session first runs, which need not end the same twice; or the first that exists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaOptions:
    """How a session on an NVIDIA GPU is set: on purpose, not by what its engine does by default.

    Attributes:
        device: index of the GPU among those that CUDA shows to this process (CUDA_VISIBLE_DEVICES counts).
        conv_search: of ONNX Runtime's and PyTorch's convolutions. PyTorch knows "heuristic" (cuDNN's benchmark mode
            off) and "exhaustive" (on).
        channels_last: compute in NHWC inside: ONNX Runtime's `prefer_nhwc`, PyTorch's memory format. Inputs and outputs
            stay NCHW.
        half: of the eager network: weights and inputs in float16; its outputs are float32 again.
        compile: of the eager network: mode of `torch.compile`, such as "max-autotune"; empty: not compiled.
        memory_limit_bytes: of ONNX Runtime's arena; 0: all that is free.
        cache: folder for engines that TensorRT has built; None: built anew for every session.
    """

    device: int = 0
    conv_search: ConvSearch = "heuristic"
    channels_last: bool = False
    half: bool = False
    compile: str = ""
    memory_limit_bytes: int = 0
    cache: Path | None = None


class DeviceCall(Protocol):
    """What `Session.bind` gives on a device that has a clock of its own.

    Attributes:
        device_ms: milliseconds of the last run between two events on its stream, without the copies. The stream is idle
            when the first is queued, which happens at once, and the last follows the last kernel: so the gaps between
            kernels, in which the GPU waits for the host, are in it, and what the host's clock has beyond it is waiting
            for the end and waking up. None before the first run, and where the events would tell something else.

    It may also have `prepare()`, which brings the next run's inputs to where they must lie. A call does it where it has
    not been done; who times a call does it before the clock is read. `copies_in`: it copies inputs before each run.
    """

    device_ms: float | None

    def __call__(self) -> None:
        """Compute once, and return when the device is done."""
        ...


class Session(Protocol):
    """An artifact, loaded and ready on its device.

    A session may also have `settings`, a mapping of strings: what it was opened with, read back from the engine; and
    `num_copies`, `end_profile()`, `bind_sets(sets)`: as `bind`, but each run takes the next of several inputs, which
    lie on the device at addresses of their own (or, under a CUDA graph, are copied into the captured one before the
    run and outside of what is timed).
    """

    @property
    def placement(self) -> Mapping[str, int]:
        """Nodes on each provider, after the engine's own optimisation; empty where the engine does not tell."""
        ...

    @property
    def nodes(self) -> tuple[PlacedNode, ...]:
        """The same node by node, with the copies between devices that the engine inserted. May take time to find."""
        ...

    def run(self, feeds: Feeds) -> Outputs:
        """Compute once: host arrays in, host arrays out."""
        ...

    def bind(self, feeds: Feeds) -> Callable[[], None]:
        """Fix the inputs; the callable computes once and returns when the device is done. See `DeviceCall`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRequest:
    """What to open.

    Attributes:
        path: the artifact, or the weights file for the eager network.
        data: its content where it is no file of its own but lies in an archive, for engines that take bytes.
        outputs: names of the outputs, which PyTorch modules do not carry.
        spec: needed for the eager network alone.
        tf32: on CUDA, let float32 products be rounded to TF32: for speed runs, never for a verdict.
        num_threads: of the engine inside one run; 0 for as many as it takes by itself.
        optimise: let the engine rewrite the graph.
        profile: folder for the engine's own profile of every run, or None; the session then has `end_profile()`, which
            gives a tuple of `ProfiledNode`, if its engine has a profile at all.
        cuda_graph: on CUDA, capture the run once and replay it.
    """

    path: Path
    data: bytes | None = None
    outputs: tuple[str, ...] = (OUTPUT_NAME,)
    spec: ModelSpec | None = None
    tf32: bool = False
    num_threads: int = 0
    optimise: bool = True
    profile: Path | None = None
    cuda_graph: bool = False
    cuda: CudaOptions = CudaOptions()
    """Of sessions on CUDA; others do not look at it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """An engine on a device.

    Attributes:
        name: as options, tables and JSON spell it: "ort-cpu".
        formats: artifact formats it opens; "eager" for the network itself.
        precisions: of the artifacts it opens.
        timed: whether its latency means anything to a user.
        notes: by precision, said in every row of such an artifact on this runtime.
        missing: why it cannot be used here, with the fix, or None. Cheap; opens nothing.
        modules: what a program imports before it can open a session; a cold start counts their import.
        probe: computes something small on the device, to prove that it works; raises what goes wrong.
        open: opens a session.
        takes_bytes: it opens what has no path of its own (`SessionRequest.data`).
        concurrent: `run` of one session may be called by several threads at once.

    `open` raises `InputError` for an artifact that it cannot read and `RuntimeUnavailableError` where the device
    asked for did not take the work.
    """

    name: str
    device: str
    formats: frozenset[str]
    precisions: frozenset[str]
    timed: bool
    notes: Mapping[str, str]
    missing: Callable[[], tuple[str, str] | None]
    probe: Callable[[], None]
    open: Callable[[SessionRequest], Session]
    role: Literal["engine", "reference"] = "engine"
    """engine: a rung of the ladder. reference: computes what others are judged by, and is no rung itself."""
    modules: tuple[str, ...] = ()
    takes_bytes: bool = False
    concurrent: bool = False
    optional: bool = False
    """Of an engine that few have: where it is not installed nothing is said of it unless it is asked for."""

    def reads(self, *, format_: str, precision: str) -> bool:
        """Whether it opens artifacts of that format and precision."""
        return format_ in self.formats and precision in self.precisions
