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

__all__ = ["Feeds", "Outputs", "ProfiledNode", "Runtime", "Session", "SessionRequest"]

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


class Session(Protocol):
    """An artifact, loaded and ready on its device."""

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
        """Fix the inputs; the callable computes once and returns when the device is done."""
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
