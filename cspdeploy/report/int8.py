"""The INT8 step in words, beside its one sentence: its images, what the engine made of it, what was left in float.

Reads the facts of the step's record. A fact that is not there has no line: each mode records its own.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["front_rows", "int8_lines", "tried_rows"]

MAX_NAMES = 6


def int8_lines(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What to say of the step: a name and a text each. Findings about the images go by their severity."""
    lines = [
        ("images", _images(facts)), ("engine", _engine(facts)), ("not proven", str(facts.get("unproven") or "")),
        ("in float on purpose", _floats(facts.get("float_layers") or ())), ("search", _search(facts)),
    ]  # fmt: skip
    if facts.get("fell_back"):
        lines.append(("warning", f"the engine computes in float: {_listed(facts['fell_back'])}"))
    lines += [(str(one["severity"]), str(one["text"])) for one in facts.get("findings") or ()]
    return [(name, text) for name, text in lines if text]


def tried_rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Each choice of ranges and repairs that was tried, and the signal to noise that it gave, best first."""
    tried = sorted(facts.get("tried") or (), key=lambda one: -math.inf if one["sqnr_db"] is None else one["sqnr_db"])
    return [(str(one["scheme"]), _db(one["sqnr_db"])) for one in reversed(tried)]


def _db(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.1f} dB"


def front_rows(facts: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """The Pareto front of a search, fastest first: scheme, signal to noise, latency, within the budget."""
    rows = []
    for point in (facts.get("search") or {}).get("front") or ():
        ratio = point.get("latency_of_fp32")
        latency = "" if ratio is None else f"{ratio:.2f}x"
        rows.append((str(point["scheme"]), _db(point["sqnr_db"]), latency, "yes" if point["meets"] else "no"))
    return rows


def _images(facts: Mapping[str, Any]) -> str:
    origin, digest = facts.get("images"), facts.get("images_sha256")
    parts = [str(origin)] if origin else []
    if facts.get("num_held_out"):
        parts.append(f"judged on {facts['num_held_out']} that nothing was fitted to")
    if facts.get("num_judged"):
        parts.append(f"judged on {facts['num_judged']} of them")
    return ", ".join(parts + ([f"SHA-256 {str(digest)[:12]}"] if digest else []))


def _engine(facts: Mapping[str, Any]) -> str:
    """What runs after the engine's own optimisation, most frequent first."""
    operators: Mapping[str, int] = facts.get("operators_on_engine") or {}
    ordered = sorted(operators.items(), key=lambda item: (-item[1], item[0]))
    listed = ", ".join(f"{count} {name}" for name, count in ordered)
    return f"{facts.get('runtime') or 'it'} runs {listed}" if listed else ""


def _floats(layers: Iterable[Mapping[str, str]]) -> str:
    """Layers by the reason for which they stay."""
    found: dict[str, list[str]] = {}
    for layer in layers:
        found.setdefault(layer["reason"], []).append(layer["node"])
    return "; ".join(f"{_listed(names)} ({reason})" for reason, names in found.items())


def _search(facts: Mapping[str, Any]) -> str:
    search = facts.get("search")
    if not search:
        return ""
    failures: Mapping[str, int] = search.get("failures") or {}
    failed = f"; {Counter(failures).total()} could not be judged: {_listed(failures)}" if failures else ""
    return f"{search['evaluations']} files judged, {search['stopped']}: {search['reason']}{failed}"


def _listed(names: Iterable[str]) -> str:
    found = list(names)
    more = len(found) - MAX_NAMES
    return ", ".join(found[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")
