"""Run the doctor's tasks in child processes, until each one has an answer, crashed ones and hung ones too."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any

from cspdeploy.core.child import child_command, child_environment, describe_exit

__all__ = ["TIME_LIMIT_S", "run_trials"]

TIME_LIMIT_S = 240.0
"""For all tasks together. They take 3 s here; importing torch on a small board, and waking a GPU, 20 s each, and
TensorRT builds an engine for each thing that it is tried with, half a minute at its first."""
CHILD = tuple(child_command("cspdeploy.check.doctor_child"))

Answer = dict[str, Any]


def run_trials(command: Sequence[str] = CHILD, *, time_limit_s: float = TIME_LIMIT_S) -> dict[str, Answer]:
    """The answer to each task, by the task's name.

    A task during which the process dies or does not end is answered with that, and the rest goes on in a new one.
    """
    known: dict[str, Answer] = {}
    while True:
        before = len(known)
        code = _run(command, known, time_limit_s=time_limit_s)
        running = next((name for name, answer in known.items() if answer.get("started")), None)
        if running is not None:
            known[running] = {"works": False, "reason": _death(code, time_limit_s), "fix": ""}
        if running is None or len(known) == before:
            return known


def _run(command: Sequence[str], known: dict[str, Answer], *, time_limit_s: float) -> int | None:
    """Exit status, or None where it had to be killed. `known` gets the answers; "started" stands for want of one."""
    with tempfile.TemporaryFile("w+") as output:
        code: int | None
        try:
            done = subprocess.run(
                command, input=json.dumps(known), stdout=output, stderr=subprocess.DEVNULL, text=True,
                timeout=time_limit_s, check=False, env=child_environment(),
            )  # fmt: skip
            code = done.returncode
        except subprocess.TimeoutExpired:
            code = None
        output.seek(0)
        for line in output:
            _read(line, known)
    return code


def _read(line: str, known: dict[str, Answer]) -> None:
    """Engines write to stdout as they please."""
    try:
        said = json.loads(line)
    except ValueError:
        return
    if isinstance(said, dict) and "started" in said:
        known[said["started"]] = {"started": True}
    elif isinstance(said, dict) and "ended" in said:
        known[said["ended"]] = said["answer"]


def _death(code: int | None, time_limit_s: float) -> str:
    return f"does not answer within {time_limit_s:g} s" if code is None else describe_exit(code)
