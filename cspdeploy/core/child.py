"""Python processes that run a module of this package: for what may crash, hang, or must start afresh."""

from __future__ import annotations

import os
import signal
import sys

__all__ = ["child_command", "child_environment", "describe_exit"]


def child_command(module: str) -> list[str]:
    """The command that runs a module, such as "cspdeploy.check.doctor_child", with this very Python."""
    return [sys.executable, "-P", "-m", module]


def child_environment() -> dict[str, str]:
    """The child imports from where this process does, and never from the folder where it happens to be started."""
    folders = [folder if folder else os.getcwd() for folder in sys.path]  # noqa: PTH109  # "" is what Python calls it
    return {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}


def describe_exit(code: int) -> str:
    """How a process ended, from its exit status; by the signal's name where one ended it."""
    try:
        return f"crashes its process ({signal.Signals(-code).name})"
    except ValueError:
        return f"ends its process with {code}"
