"""What is known about a set of calibration images before any range is taken from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cspdeploy.core.spec import Preprocess

__all__ = ["CalibrationAudit", "CalibrationFinding", "ChannelStatistics"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationFinding:
    """One thing that a user should know about the images, in one line."""

    severity: Literal["error", "warning", "note"]
    """error: no shipped artifact may be made from these. warning: ranges may be wrong. note: worth knowing."""
    text: str
    fix: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelStatistics:
    """All pixels of a set after preprocessing, for each channel in the contract's order."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    low: tuple[float, float, float]
    """Smallest value that occurs."""
    high: tuple[float, float, float]
    black_share: float
    """Of all channel values, those that are 0 in the image, in [0, 1]."""
    white_share: float
    """Those that are 255."""
    grey_share: float
    """Of all images, those without colour."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationAudit:
    """A set of calibration images, looked at in one pass."""

    origin: str
    content_sha256: str
    contract: Preprocess
    """By which the images were prepared: always the model's own."""
    num_images: int
    num_copies: int
    """Images with exactly the pixels of an earlier one."""
    num_near_copies: int
    """Other images that show what an earlier one shows: encoded again, resized, or the next frame of a burst."""
    num_constant: int
    """Images of one colour."""
    num_noise: int
    """Images whose neighbouring pixels know nothing of each other, at full size or reduced."""
    num_sizes: int
    """Different sizes of the images before preprocessing."""
    num_reshaped: int
    """Images whose ratio costs more than half: cut away, squeezed, or filled with grey, as the contract has it."""
    num_enlarged: int
    """Images that were enlarged more than twofold."""
    num_ignored_files: int
    """Files of the folder that are no images."""
    allowed_low: tuple[float, float, float]
    """What the contract makes of 0, for each channel."""
    allowed_high: tuple[float, float, float]
    """What it makes of 255."""
    channels: ChannelStatistics
    seen: ChannelStatistics | None = None
    """Of images that the model is known to have met; None where there are none to compare with."""
    seen_distance: float | None = None
    """Earth mover's distance between the pixels of the two sets, in standard deviations of the seen ones, for the
    channel where it is largest."""
    findings: tuple[CalibrationFinding, ...] = ()

    @property
    def num_distinct(self) -> int:
        """Images that are no copy, exact or near, of an earlier one."""
        return self.num_images - self.num_copies - self.num_near_copies

    @property
    def errors(self) -> tuple[CalibrationFinding, ...]:
        """The findings for which the set is refused."""
        return tuple(finding for finding in self.findings if finding.severity == "error")
