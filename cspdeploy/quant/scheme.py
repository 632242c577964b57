"""The choices that a plan is made by."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Scheme"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """What one candidate file differs in from another.

    Attributes:
        method: how ranges are chosen, of `ranges.METHODS`.
        exponent: of channel equalisation; 0 for none.
        bias: biases are corrected on real activations.
        rounded: weights are rounded for the outputs' sake, not each to its nearest step.
        mixed: each tensor's range by the method that moves the outputs least, as found with `method` for all.
        floats: layers that stay in float, by first output.
    """

    method: str
    exponent: float
    bias: bool = False
    rounded: bool = False
    mixed: bool = False
    floats: frozenset[str] = frozenset()

    def __str__(self) -> str:
        """As a report has it: "through, equalised 0.75, biases corrected"."""
        parts = [self.method]
        if self.exponent:
            parts.append(f"equalised {self.exponent:g}")
        if self.mixed:
            parts.append("tensor by tensor")
        if self.bias:
            parts.append("biases corrected")
        if self.rounded:
            parts.append("weights rounded for the outputs")
        if self.floats:
            parts.append(f"{len(self.floats)} layers in float")
        return ", ".join(parts)
