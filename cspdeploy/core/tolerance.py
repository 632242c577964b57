"""How far an artifact may stray from the original, and why that far. Every limit carries the numbers it was made of."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from cspdeploy.core.catalog import (
    FP16_LIMIT,
    FP16_NOISE_FACTOR,
    FP16_NOISE_RATIO,
    FP32_FLOOR,
    FP32_NOISE_FACTOR,
    INT8_AGREEMENT,
    INT8_CREST,
    INT8_LIMIT,
    INT8_STEPS,
)
from cspdeploy.core.errors import InputError, did_you_mean
from cspdeploy.core.golden import Golden
from cspdeploy.core.metrics import relative_l2
from cspdeploy.core.results import Limit

__all__ = [
    "ALL_ARTIFACTS",
    "PREPROCESS_LIMIT",
    "allowed_flips",
    "limits_for",
    "noise_floors",
    "override",
    "parse_tolerances",
    "require_known",
    "tolerance_for",
]

PREPROCESS_LIMIT = 1e-5
"""Largest difference of the network's input, made again from the golden images. The arithmetic is two float32 roundings
of the same numbers everywhere; a resized pixel that differs by one step of 255 moves the input by 0.004 / std, a
thousand times this."""
ALL_ARTIFACTS = ""
"""Key of a tolerance that was given without an artifact's name."""


def noise_floors(golden: Golden) -> dict[str, float]:
    """Relative L2 between the eager FP32 and FP64 values of each output: what float32 alone does to this network."""
    return {
        name: max(relative_l2(golden.outputs_fp32[name], exact), FP32_FLOOR)
        for name, exact in golden.outputs_fp64.items()
    }


def tolerance_for(precision: str, floor: float, *, output: str = "", num_quantised: int = 0) -> Limit:
    """The limit for an artifact of `precision`, of relative L2 against the FP64 reference.

    Args:
        floor: noise floor of this output, relative L2.
        output: its name.
        num_quantised: of an INT8 graph, tensors that are stored in 8 bits: see `cspdeploy.core.quantised`.

    Raises:
        ValueError: a precision that has no model.
    """
    models = {"fp32": _fp32, "fp16": _fp16}
    if precision == "int8":
        return dataclasses.replace(_int8(max(floor, FP32_FLOOR), num_quantised), output=output)
    if precision not in models:
        raise ValueError(f"precision '{precision}' has no tolerance")
    return dataclasses.replace(models[precision](max(floor, FP32_FLOOR)), output=output)


def _fp32(floor: float) -> Limit:
    # Bounded, since a noisy or tampered reference would otherwise excuse anything.
    limit = min(FP32_NOISE_FACTOR * floor, FP16_LIMIT)
    capped = f", at most {FP16_LIMIT:g}" if limit == FP16_LIMIT else ""
    return Limit(
        output="", rel_l2=limit, why=f"{FP32_NOISE_FACTOR:g} x the noise floor {floor:.1e}{capped}",
        terms={"noise_floor": floor, "factor": FP32_NOISE_FACTOR, "cap": FP16_LIMIT},
    )  # fmt: skip


def _fp16(floor: float) -> Limit:
    expected = FP16_NOISE_RATIO * floor
    limit = min(FP16_NOISE_FACTOR * expected, FP16_LIMIT)
    capped = f", at most {FP16_LIMIT:g}" if limit == FP16_LIMIT else ""
    return Limit(
        output="", rel_l2=limit,
        why=f"{FP16_NOISE_FACTOR:g} x {FP16_NOISE_RATIO:g} (FP16 rounds as much coarser than FP32) x the noise floor "
        f"{floor:.1e}{capped}",
        terms={"noise_floor": floor, "ratio": FP16_NOISE_RATIO, "expected": expected, "factor": FP16_NOISE_FACTOR,
               "cap": FP16_LIMIT},
    )  # fmt: skip


def _int8(floor: float, num_quantised: int) -> Limit:
    one = INT8_CREST / (INT8_STEPS * math.sqrt(12))
    undamped = one * math.sqrt(max(1, num_quantised))
    # Never tighter than an FP16 graph: what is not quantised may be FP16.
    limit = min(max(undamped, _fp16(floor).rel_l2), INT8_LIMIT)
    capped = f", at most {INT8_LIMIT:g}" if limit == INT8_LIMIT else ""
    return Limit(
        output="", rel_l2=limit,
        why=f"sqrt({num_quantised} tensors in 8 bits) x {one:.1e} of noise each{capped}",
        terms={"noise_floor": floor, "num_quantised": float(num_quantised), "crest": INT8_CREST,
               "noise_per_tensor": one, "undamped": undamped, "cap": INT8_LIMIT},
    )  # fmt: skip


def allowed_flips(precision: str, num_images: int) -> int | None:
    """Golden images whose first class may change, clear or not; None where near ties may change without number."""
    if precision != "int8":
        return None
    return max(1, math.floor((1 - INT8_AGREEMENT) * num_images + 1e-9))


def limits_for(
    precision: str, floors: Mapping[str, float], *, num_quantised: int = 0, tolerance: float | None = None
) -> dict[str, Limit]:
    """The limit of each output of an artifact.

    Args:
        tolerance: given by the user in place of the model, or None.
    """
    limits = {
        name: tolerance_for(precision, floor, output=name, num_quantised=num_quantised)
        for name, floor in floors.items()
    }
    if tolerance is None:
        return limits
    return {name: override(limit, tolerance) for name, limit in limits.items()}


def override(limit: Limit, rel_l2: float) -> Limit:
    """The same output under a limit that the user gave."""
    return dataclasses.replace(
        limit, rel_l2=rel_l2, overridden=True, terms={**limit.terms, "model": limit.rel_l2},
        why=f"given with --tolerance; the model says {limit.rel_l2:.1e}: {limit.why}",
    )  # fmt: skip


def parse_tolerances(given: list[str]) -> dict[str, float]:
    """`[ARTIFACT=]REL_L2` as written on the command line, by artifact; `ALL_ARTIFACTS` for one without a name.

    Raises:
        InputError: not a number above 0, or the same artifact twice.
    """
    found: dict[str, float] = {}
    for text in given:
        name, _, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value > 0):
            raise InputError(
                f"--tolerance {text}: expected [ARTIFACT=]REL_L2, a relative L2 above 0",
                fix="--tolerance onnx-fp16=0.02",
            )
        if name in found:
            raise InputError(f"--tolerance {text}: given twice for {name or 'all artifacts'}", fix="give it once")
        found[name] = value
    return found


def require_known(tolerances: Mapping[str, float], artifacts: list[str]) -> None:
    """Refuse a tolerance for an artifact that is not checked: a typo would leave the model's limit in place unseen.

    Raises:
        InputError: unknown name.
    """
    for name in tolerances:
        if name != ALL_ARTIFACTS and name not in artifacts:
            raise InputError(
                f"--tolerance {name}: no such artifact here, expected one of {', '.join(artifacts)}",
                fix=f"{did_you_mean(name, artifacts)}--tolerance {artifacts[0] if artifacts else ''}=...",
            )
