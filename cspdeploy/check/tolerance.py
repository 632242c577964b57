"""How far an artifact may stray from the original, and why that far."""

from __future__ import annotations

from dataclasses import dataclass

from cspdeploy.core.catalog import FP16_LIMIT, FP32_FLOOR, FP32_NOISE_FACTOR
from cspdeploy.core.golden import Golden
from cspdeploy.core.metrics import relative_l2

__all__ = ["Tolerance", "noise_floors", "tolerance_for"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """Limit of the relative L2 distance to the FP64 reference, with its reason."""

    rel_l2: float
    why: str


def noise_floors(golden: Golden) -> dict[str, float]:
    """Relative L2 between the eager FP32 and FP64 values of each output: what float32 alone does to this network."""
    return {
        name: max(relative_l2(golden.outputs_fp32[name], exact), FP32_FLOOR)
        for name, exact in golden.outputs_fp64.items()
    }


def tolerance_for(precision: str, floor: float) -> Tolerance:
    """The limit for artifacts of `precision` on a network whose noise floor is `floor`."""
    if precision == "fp32":
        # Bounded, since a noisy or tampered reference would otherwise excuse anything.
        limit = min(FP32_NOISE_FACTOR * floor, FP16_LIMIT)
        return Tolerance(rel_l2=limit, why=f"{FP32_NOISE_FACTOR:g} x the noise floor {floor:.1e}")
    if precision != "fp16":
        raise ValueError(f"precision '{precision}' has no tolerance")
    return Tolerance(rel_l2=FP16_LIMIT, why="FP16 rounds each node's result by up to 4.9e-4")
