"""What `verify` is asked to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cspdeploy.check.latency import LatencySettings
from cspdeploy.core.datasets import LabelledImages
from cspdeploy.core.detection.labelled import LabelledBoxes
from cspdeploy.core.errors import InputError
from cspdeploy.core.tolerance import ALL_ARTIFACTS

__all__ = ["DEFAULT_TIME_LIMIT_S", "MAX_REPEATS", "VERIFY_WALL_SECONDS", "Progress", "VerifySettings"]

Progress = Callable[[str, int, int], None]
"""What is done now, how much of it is done, and how much there is."""

DEFAULT_TIME_LIMIT_S = 120.0
"""For one answer of an engine: opening a file, or a run of at most 16 images. YOLOv4 at 608x608 takes about 50 s for
those on a small ARM board; an engine that is silent for twice that is taken to hang."""


VERIFY_WALL_SECONDS = 4.0
"""For timing each artifact: verdicts of a few percent are what `bench` is for, and of a noisy machine no patience makes
a quiet one. Two seconds are usual for CSPDarknet53 at 32 px on two cores."""

MAX_REPEATS = 1000
"""Runs of one input. A fault that shows in one run of 300 is then found in 96 % of all cases; a network of 50 ms takes
under a minute for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifySettings:
    """What to check.

    Attributes:
        runtimes: names; empty for all that are here.
        latency: None: parity alone, without cold start and memory.
        accuracy: labelled images to measure, with a class or with boxes each, or None.
        tolerances: relative L2 by artifact, in place of the models' limits; `ALL_ARTIFACTS` for all others.
        strict_placement: a node on another provider than the one asked for, or a copy between devices, fails its row.
        audit: read from each ONNX file in which precision it really computes; a file that is not what it is listed as
            fails then.
        isolate: each session in a process of its own, so that one that crashes or hangs is a row and no more. False:
            in this process, for a caller that can bear that; then there is no time limit, cold start or memory.
        time_limit_s: for one answer of an engine.
        repeats: runs of one input in each session, all of which must give what the first one gave; 0: none beside those
            that parity needs; None: ten on a GPU, none on a CPU, whose sums have an order.
        device: index of the GPU that all runtimes on CUDA use; None: the first one, where there is one.

    Raises:
        InputError: a number of repeats that proves nothing, or no number of a device.
    """

    runtimes: tuple[str, ...] = ()
    latency: LatencySettings | None = field(
        default_factory=lambda: LatencySettings(max_wall_seconds=VERIFY_WALL_SECONDS)
    )
    accuracy: LabelledImages | LabelledBoxes | None = None
    tolerances: Mapping[str, float] = field(default_factory=dict)
    strict_placement: bool = False
    audit: bool = True
    isolate: bool = True
    time_limit_s: float = DEFAULT_TIME_LIMIT_S
    repeats: int | None = None
    device: int | None = None

    def __post_init__(self) -> None:
        if self.repeats is not None and (self.repeats == 1 or not 0 <= self.repeats <= MAX_REPEATS):
            raise InputError(
                f"--repeats {self.repeats}: expected 0, or 2 to {MAX_REPEATS} runs, of which the first is what the "
                "others are held against",
                fix="--repeats 10",
            )
        if self.device is not None and self.device < 0:
            raise InputError(f"--device {self.device}: expected the index of a GPU, from 0", fix="--device 0")

    def tolerance(self, artifact: str) -> float | None:
        """What the user gave for that artifact, or None."""
        return self.tolerances.get(artifact, self.tolerances.get(ALL_ARTIFACTS))
