"""What the doctor says of one thing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Finding", "Severity"]

Severity = Literal["problem", "note"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that contradicts itself or does not work (problem), or that is good to know (note)."""

    severity: Severity
    text: str
    command: str = ""
    """That mends it; empty where there is none."""
