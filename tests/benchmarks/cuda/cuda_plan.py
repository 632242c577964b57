"""What one call of the benchmark is to do, and the words for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from cuda_figures import TEST_IMAGES
from cuda_regimes import FIGURE_BATCHES, Regime
from cuda_result import Row

from cspdeploy.check.latency import LatencySettings
from cspdeploy.core.datasets import FASHION_MNIST, open_dataset
from cspdeploy.core.errors import InputError
from cspdeploy.core.gpu_watch import GpuSummary
from cspdeploy.core.model_folder import CALIBRATION_FILE, read_calibration

__all__ = ["AGREEMENT_MODEL", "Job", "Plan", "agreement_images", "describe_watch", "num_rows", "title_of", "unmeasured"]

ROOT = Path(__file__).parents[3]
AGREEMENT_MODEL = ROOT / "models" / "cspdarknet53"
Job = tuple[int, tuple[str, ...]]
"""Batch, and the networks of a group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be run. `groups`: a network and its baseline, or one alone, in order."""

    kind: str
    groups: tuple[tuple[str, ...], ...]
    batches: tuple[int, ...]
    regimes: tuple[Regime, ...]
    parts: tuple[str, ...]
    settings: LatencySettings
    size_px: int

    @property
    def first_batches(self) -> tuple[int, ...]:
        """Those that figures are of, which come first and are compiled for; all where there is none of them."""
        return tuple(one for one in self.batches if one in FIGURE_BATCHES) or self.batches

    def possible(self, batch: int) -> tuple[Regime, ...]:
        """All regimes but what is compiled, if it is not compiled for that batch."""
        return tuple(one for one in self.regimes if not one.compiled or batch in self.first_batches)

    def needed(self, batch: int) -> tuple[Regime, ...]:
        """Those that a figure needs."""
        possible = self.possible(batch)
        return tuple(dataclasses.replace(one, with_copies=False) for one in possible if not one.extra)


def num_rows(regimes: Sequence[Regime]) -> int:
    """Of one network and one batch."""
    return sum(1 + one.with_copies for one in regimes)


def title_of(names: Sequence[str], batch: int) -> str:
    """Of a group at one batch."""
    return f"{' and '.join(Path(one).name for one in names)}, batch {batch}"


def unmeasured(network: str, batch: int, regimes: Sequence[Regime], reason: str) -> list[Row]:
    """A row for each, with the reason."""
    return [
        Row(network=network, batch=batch, regime=one.name, runtime=one.runtime, reason=reason) for one in regimes
    ]  # fmt: skip


def describe_watch(summary: GpuSummary) -> dict[str, str]:
    """Clocks, power and temperature while things were timed; empty without a GPU."""
    found = {
        "SM clock, MHz": summary.sm_clock_mhz, "memory clock, MHz": summary.memory_clock_mhz,
        "power, W": summary.power_w, "temperature, C": summary.temperature_c,
    }  # fmt: skip
    told = {name: ", ".join(f"{part:g}" for part in value) for name, value in found.items() if value is not None}
    return told | ({"clocks held by": ", ".join(summary.reasons)} if summary.reasons else {})


def agreement_images() -> tuple[npt.NDArray[np.uint8], str]:
    """As stored, and what they are in words: the test images where they are installed."""
    try:
        stored = open_dataset(FASHION_MNIST, split="test").stored
    except InputError:
        stored = None
    if stored is not None:
        return stored, TEST_IMAGES
    return read_calibration(AGREEMENT_MODEL / CALIBRATION_FILE), "calibration images"
