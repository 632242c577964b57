"""What an INT8 file may lose and how long it may take, what one does lose and take, and whether it earns its place."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from cspdeploy.core.detection.match import BoxMatch
from cspdeploy.core.errors import InputError
from cspdeploy.quant.box_agreement import JUDGED_SCORE

__all__ = ["Budget", "Judgement", "describe_boxes", "earns_its_place", "parse_budget"]

_NUMBER = r"(\d+(?:\.\d+)?|\.\d+)"
_LARGEST_POINTS = 100.0
_LARGEST_DB = 150.0
"""Where float32 itself ends: no other file has more."""
_ROUNDING = 1e-9
"""0.9305 - 0.93 is more than 0.0005 in binary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """None where nothing is asked.

    Attributes:
        max_drop_points: of labelled top-1 accuracy, in points of 100.
        max_changed_percent: of the decisions, against the FP32 file: a detector's boxes, else first classes.
        min_sqnr_db: of the outputs against the FP32 file on the same engine.
        max_latency_ms: median of one call.
        max_latency_ratio: of that, over that of the FP32 file in the same interleaved run.
    """

    max_drop_points: float | None = None
    max_changed_percent: float | None = None
    min_sqnr_db: float | None = None
    max_latency_ms: float | None = None
    max_latency_ratio: float | None = None

    @property
    def limits_accuracy(self) -> bool:
        """Points, decisions or SQNR are asked for."""
        return (self.max_drop_points, self.max_changed_percent, self.min_sqnr_db) != (None, None, None)

    @property
    def limits_latency(self) -> bool:
        """A latency is asked for."""
        return self.max_latency_ms is not None or self.max_latency_ratio is not None

    def __str__(self) -> str:
        """As a sentence has it: "within 0.5 points and 12 ms"."""
        asked = [
            (self.max_drop_points, "within {:g} points of top-1"),
            (self.max_changed_percent, "with at most {:g} % of the decisions changed"),
            (self.min_sqnr_db, "with at least {:g} dB"),
            (self.max_latency_ms, "within {:g} ms"), (self.max_latency_ratio, "within {:g}x of FP32's latency"),
        ]  # fmt: skip
        return " and ".join(text.format(value) for value, text in asked if value is not None)


def parse_budget(*, max_drop: str | None = None, max_latency: str | None = None) -> Budget:
    """Read `--max-drop` and `--max-latency`.

    The first is "0.5", points of top-1, or "3%", of the decisions, or "36dB", an SQNR; the second "12.5" ms or "0.5x"
    of FP32.

    Raises:
        InputError: neither of these forms, or out of range.
    """
    is_share = max_drop is not None and max_drop.rstrip().endswith("%")
    changed = _parse_percent(max_drop) if max_drop is not None and is_share else None
    points, sqnr_db = _parse("--max-drop", None if is_share else max_drop, unit="dB",
                             plain="points of top-1 accuracy, such as 0.5")  # fmt: skip
    ms, ratio = _parse("--max-latency", max_latency, unit="x", plain="milliseconds, such as 12.5")
    if points is not None and points > _LARGEST_POINTS:
        raise InputError(f"--max-drop {max_drop}: {points:g} points of top-1, expected at most 100",
                         fix="--max-drop 0.5, or an SQNR: --max-drop 36dB")  # fmt: skip
    if sqnr_db is not None and sqnr_db > _LARGEST_DB:
        raise InputError(f"--max-drop {max_drop}: no float32 file has an SQNR above {_LARGEST_DB:g} dB",
                         fix="--max-drop 36dB")  # fmt: skip
    if 0.0 in (ms, ratio):
        raise InputError(f"--max-latency {max_latency}: expected more than nothing", fix="--max-latency 0.5x")
    return Budget(
        max_drop_points=points, max_changed_percent=changed, min_sqnr_db=sqnr_db, max_latency_ms=ms,
        max_latency_ratio=ratio,
    )  # fmt: skip


def _parse_percent(text: str) -> float:
    found = re.fullmatch(rf"\s*{_NUMBER}\s*%\s*", text, re.ASCII)
    if found is None or float(found[1]) > _LARGEST_POINTS:
        raise InputError(f"--max-drop {text!r}: expected a share of boxes or of first classes, 0% to 100%",
                         fix="--max-drop 3%")  # fmt: skip
    return float(found[1])


def _parse(option: str, text: str | None, *, unit: str, plain: str) -> tuple[float | None, float | None]:
    """The value without a unit, and that with the unit; one of them, or neither for no text."""
    if text is None:
        return None, None
    found = re.fullmatch(rf"\s*{_NUMBER}\s*({unit})?\s*", text, re.IGNORECASE | re.ASCII)
    if found is None:
        example = "36dB" if unit == "dB" else "0.5x"
        raise InputError(f"{option} {text!r}: expected {plain}, or {example}", fix=f"{option} {example}")
    value = float(found[1])
    return (None, value) if found[2] else (value, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """An INT8 file against the FP32 file that it is made from, on one engine. None where nothing was measured.

    Attributes:
        runtime: on which both ran; empty where no runtime here stands for the target, and a simulation was judged.
        sqnr_db: of all outputs, the worst of them; minus infinity for outputs that are not finite. Of a detector: of
            its scores, and of the sides of the boxes that score.
        agreement: share of images in [0, 1] whose first class is FP32's; of classifiers.
        boxes: those of FP32 that it finds again, and those that it adds; of detectors.
        top1, top1_fp32: labelled accuracy in [0, 1].
        latency_ms, fp32_latency_ms: medians of one call, interleaved.
        speed: FP32's latency over that of this file, above 1 is faster; `speed_low` to `speed_high`: 95 %.
        verdict: of the latency, against FP32; empty where nothing was timed.
        operators: of the graph as the engine runs it, with their numbers.
        warning: why the latency cannot be trusted, or empty.
    """

    runtime: str = ""
    sqnr_db: float
    num_images: int
    agreement: float | None = None
    boxes: BoxMatch | None = None
    top1: float | None = None
    top1_fp32: float | None = None
    num_labelled: int = 0
    latency_ms: float | None = None
    fp32_latency_ms: float | None = None
    speed: float | None = None
    speed_low: float | None = None
    speed_high: float | None = None
    verdict: Literal["", "faster", "slower", "indistinguishable"] = ""
    operators: Mapping[str, int] = field(default_factory=dict)
    warning: str = ""

    @property
    def top1_drop_points(self) -> float | None:
        """Points of 100 that FP32 is ahead; negative where this file is."""
        return None if self.top1 is None or self.top1_fp32 is None else 100 * (self.top1_fp32 - self.top1)

    @property
    def changed_percent(self) -> float | None:
        """Decisions that are not FP32's: boxes, the worse of lost and added ones, or first classes."""
        if self.boxes is not None:
            return 100 * (1 - min(self.boxes.recall, self.boxes.precision))
        return None if self.agreement is None else 100 * (1 - self.agreement)

    @property
    def ratio_to_fp32(self) -> float | None:
        """Latency over FP32's: below 1 is faster."""
        return None if self.speed is None else 1 / self.speed

    def accuracy_shortfall(self, budget: Budget) -> str:
        """Why it is not accurate enough, or empty.

        Raises:
            InputError: points are asked for, and it was not judged on labelled images.
        """
        if not self.sqnr_db > -math.inf:  # NaN included
            return "its outputs are not finite"
        if budget.min_sqnr_db is not None and self.sqnr_db < budget.min_sqnr_db:
            return (
                f"its outputs have an SQNR of {self.sqnr_db:.1f} dB, at least {budget.min_sqnr_db:g} dB were asked for"
            )
        if budget.max_changed_percent is not None:
            return self._changed_too_much(budget.max_changed_percent)
        if budget.max_drop_points is None:
            return ""
        drop = self.top1_drop_points
        if drop is None:
            raise InputError(f"--max-drop {budget.max_drop_points:g}: points of top-1 need labelled images",
                             fix="--labelled DATA, or an SQNR: --max-drop 36dB")  # fmt: skip
        if drop > budget.max_drop_points + _ROUNDING:
            return f"it loses {drop:.2f} points of top-1, {budget.max_drop_points:g} may be lost"
        return ""

    def _changed_too_much(self, most: float) -> str:
        changed, what = self.changed_percent, "boxes" if self.boxes is not None else "first classes"
        if changed is None:
            raise InputError(f"--max-drop {most:g}%: the network gives neither boxes nor classes to count",
                             fix="an SQNR: --max-drop 36dB")  # fmt: skip
        if self.boxes is not None and not self.boxes.expected and not self.boxes.found:
            raise InputError(
                f"--max-drop {most:g}%: no box above {JUDGED_SCORE:g} in {self.num_images} held-out images, so that "
                "none can be lost",
                fix="images of what it finds, trained weights, or an SQNR: --max-drop 36dB",
            )
        return f"{changed:.2f} % of its {what} are not FP32's, {most:g} % may be" if changed > most + _ROUNDING else ""

    def latency_shortfall(self, budget: Budget) -> str:
        """Why it is not fast enough, or empty; never slower than FP32. What was not timed cannot fall short."""
        ratio = self.ratio_to_fp32
        if self.verdict == "slower" and self.speed is not None:
            return f"it is slower than FP32 on {self.runtime}: {self.speed:.2f}x its speed"
        if (
            budget.max_latency_ms is not None
            and self.latency_ms is not None
            and self.latency_ms > budget.max_latency_ms
        ):
            return f"it takes {self.latency_ms:.3g} ms on {self.runtime}, at most {budget.max_latency_ms:g} ms"
        if budget.max_latency_ratio is not None and ratio is not None and ratio > budget.max_latency_ratio:
            return f"it takes {ratio:.2f}x of FP32's latency on {self.runtime}, at most {budget.max_latency_ratio:g}x"
        return ""

    def meets(self, budget: Budget) -> bool:
        """Accurate enough, and fast enough."""
        return not self.accuracy_shortfall(budget) and not self.latency_shortfall(budget)

    def __str__(self) -> str:
        """Its figures in one line."""
        parts = [f"{self.sqnr_db:.1f} dB"]
        if self.top1_drop_points is not None:
            parts.append(f"top-1 {-self.top1_drop_points:+.2f} points")
        elif self.boxes is not None:
            parts.append(describe_boxes(self.boxes))
        elif self.agreement is not None:
            parts.append(f"{100 * self.agreement:.2f} % agreement")
        if self.speed is not None:
            parts.append(f"{self.speed:.2f}x FP32's speed on {self.runtime}")
        return ", ".join(parts)


def describe_boxes(boxes: BoxMatch) -> str:
    """Such as "97.9 % of 1,003 boxes matched, 0.8 % added"."""
    if not boxes.expected:
        return f"no boxes to match, {boxes.found:,} added" if boxes.found else "no boxes to match"
    return f"{100 * boxes.recall:.1f} % of {boxes.expected:,} boxes matched, {100 * (1 - boxes.precision):.1f} % added"


def earns_its_place(judgement: Judgement, budget: Budget) -> tuple[bool, str]:
    """Whether the file is worth shipping beside FP32, and one sentence why.

    It is not where it is slower than FP32 on its runtime, or outside the budget. A latency that cannot be told from
    FP32's is no reason against it: the file is a quarter of the size, and the sentence says so.

    Raises:
        InputError: the budget is in points, and the file was not judged on labelled images.
    """
    shortfall = judgement.accuracy_shortfall(budget) or judgement.latency_shortfall(budget)
    if shortfall:
        return False, f"{shortfall} ({judgement})"
    if judgement.verdict == "indistinguishable":
        return True, f"no faster than FP32 on {judgement.runtime}, but smaller ({judgement})"
    return True, str(judgement)
