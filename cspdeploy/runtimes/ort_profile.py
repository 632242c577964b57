"""ONNX Runtime's own profile of its runs: a list of trace events, one for each node and run."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cspdeploy.core.errors import InputError
from cspdeploy.runtimes.base import ProfiledNode

__all__ = ["read_profile"]

WARM_UP_SHARE = 0.25
"""Of the runs, from the first on, that do not count: they find caches cold and allocate what later ones find."""

_SUFFIX = "_kernel_time"


def read_profile(path: Path) -> tuple[ProfiledNode, ...]:
    """Time of each node over the runs after warm-up, in the order in which they first ran.

    Raises:
        InputError: not a profile of ONNX Runtime, or one without a run.
    """
    try:
        events: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        runs = sorted(event["ts"] for event in events if event.get("name") == "model_run")
        nodes = [event for event in events if event.get("cat") == "Node" and event["name"].endswith(_SUFFIX)]
        if not runs or not nodes:
            raise InputError(f"{path.name}: holds no run", fix="run the session before its profile is read")
        kept = runs[int(WARM_UP_SHARE * len(runs)) :]
        return tuple(_merge((event for event in nodes if event["ts"] >= kept[0]), num_runs=len(kept)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path.name}: not a profile of ONNX Runtime ({error!r:.100})") from error


def _merge(events: Iterable[dict[str, Any]], *, num_runs: int) -> list[ProfiledNode]:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for event in sorted(events, key=lambda event: float(event["ts"])):
        # Nodes without a name all share one; their place in the graph tells them apart.
        groups.setdefault((event["name"], str(event["args"].get("node_index", ""))), []).append(event)
    return [
        ProfiledNode(
            node=name.removesuffix(_SUFFIX), operator=str(group[0]["args"]["op_name"]),
            provider=str(group[0]["args"].get("provider", "")), num_calls=len(group) / num_runs,
            ms=sum(float(event["dur"]) for event in group) / 1e3 / num_runs, moved_bytes=_moved(group[0]["args"]),
        )
        for (name, _), group in groups.items()
    ]  # fmt: skip


def _moved(args: dict[str, Any]) -> int:
    return sum(int(args.get(key, 0)) for key in ("activation_size", "parameter_size", "output_size"))
