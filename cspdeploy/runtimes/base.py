"""What a runtime is. Knows no engine; each engine is one file beside this one that defines `RUNTIMES`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cspdeploy.core.catalog import OUTPUT_NAME
from cspdeploy.core.spec import ModelSpec

__all__ = ["Feeds", "Outputs", "Runtime", "Session", "SessionRequest"]

Feeds = Mapping[str, npt.NDArray[np.generic]]
Outputs = dict[str, npt.NDArray[np.generic]]
"""By name, in the order in which the artifact gives them."""


class Session(Protocol):
    """An artifact, loaded and ready on its device."""

    placement: dict[str, int]
    """Nodes on each provider, after the engine's own optimisation; empty where the engine does not tell."""

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
        outputs: names of the outputs, which PyTorch modules do not carry.
        spec: needed for the eager network alone.
    """

    path: Path
    outputs: tuple[str, ...] = (OUTPUT_NAME,)
    spec: ModelSpec | None = None


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
        probe: computes something small on the device, to prove that it works; raises what goes wrong.
        open: opens a session.

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

    def reads(self, *, format_: str, precision: str) -> bool:
        """Whether it opens artifacts of that format and precision."""
        return format_ in self.formats and precision in self.precisions
