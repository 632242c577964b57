"""What speaks for and against a new bundle: what was weighed, and what `verify` found for each alone."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from cspdeploy.core.results import ParityRow, Regression

__all__ = ["SIZE_BUDGET", "Judgement", "judge_rows"]

# Names, metadata and the order of a graph move a file by a few hundred bytes, of 600 kB for the smallest network of the
# zoo: a thousandth. One layer that stays in FP32, or one that is no longer folded, moves it by more than this.
SIZE_BUDGET = 0.01


@dataclass(slots=True)
class Judgement:
    """What speaks for and against the new one."""

    worse: list[str] = field(default_factory=list)
    better: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def weigh(self, loss: float, *, budget: float, text: str) -> None:
        """Say `text` where the loss, or the gain, is beyond the budget."""
        if loss > budget:
            self.worse.append(text)
        elif loss < -budget:
            self.better.append(text)

    def apply(self, found: Regression) -> Regression:
        """The verdict, and all of it in one line."""
        verdict = "worse" if self.worse else "better" if self.better else "same"
        reason = "; ".join([*self.worse, *self.better, *self.remarks])
        return dataclasses.replace(found, verdict=verdict, reason=reason)  # type: ignore[arg-type]


def judge_rows(then: ParityRow, now: ParityRow, judgement: Judgement, *, accuracy_budget: float) -> None:
    """What verify found for each alone: verdict, accuracy, size."""
    if now.failed and not then.failed:
        judgement.worse.append(f"{now.verdict}, was {then.verdict}: {now.reason}")
    elif then.failed and not now.failed:
        judgement.better.append(f"{now.verdict}, was {then.verdict}")
    elif now.failed:
        judgement.remarks.append(f"fails as the old one does: {now.reason}")
    elif now.verdict != then.verdict:
        judgement.remarks.append(f"{now.verdict}, was {then.verdict}: {now.reason or then.reason}")
    if then.top1 is not None and now.top1 is not None:
        text = f"top-1 {100 * now.top1:.2f} %, was {100 * then.top1:.2f} %"
        judgement.weigh(then.top1 - now.top1, budget=accuracy_budget, text=text)
    if then.map50 is not None and now.map50 is not None:
        text = f"mAP50 {100 * now.map50:.2f} %, was {100 * then.map50:.2f} %"
        judgement.weigh(then.map50 - now.map50, budget=accuracy_budget, text=text)
    if then.num_bytes and now.num_bytes:
        growth = now.num_bytes / then.num_bytes - 1
        text = f"{now.num_bytes:,} bytes, was {then.num_bytes:,} ({100 * growth:+.1f} %)"
        judgement.weigh(growth, budget=SIZE_BUDGET, text=text)
