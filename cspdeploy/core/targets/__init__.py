"""Runtimes that a file may be meant for: what each takes, and the source that says so. A closed table."""

from __future__ import annotations

from cspdeploy.core.errors import InputError, did_you_mean
from cspdeploy.core.targets.model import DtypeRule, PatternRule, Rule, Severity, Target
from cspdeploy.core.targets.operators import COMPOSITES, OPERATOR_SINCE
from cspdeploy.core.targets.table import TARGETS

__all__ = [
    "COMPOSITES", "OPERATOR_SINCE", "TARGETS", "DtypeRule", "PatternRule", "Rule", "Severity", "Target", "find_target",
]  # fmt: skip


def find_target(name: str) -> Target:
    """The target of that name or alias, in upper or lower case.

    Raises:
        InputError: unknown; the nearest name is offered.
    """
    spelled = name.strip().lower()
    for target in TARGETS.values():
        if spelled in (target.name, *target.aliases):
            return target
    names = [spelling for target in TARGETS.values() for spelling in (target.name, *target.aliases)]
    raise InputError(
        f"target '{name}': unknown, expected one of {', '.join(TARGETS)}",
        fix=f"{did_you_mean(name, names)}cspdeploy check --help",
    )
