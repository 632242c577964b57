"""Engines with real faults: they kill their process, never answer, or say something before they die."""

from __future__ import annotations

import functools
import os
import re
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from cspdeploy.runtimes.base import Feeds, Outputs, Runtime, SessionRequest


def _abort() -> NoReturn:
    sys.stdout.write("the last words of an engine\n\n")
    sys.stdout.flush()
    os.abort()


def _sleep() -> None:
    time.sleep(3600)


def _hold_interpreter() -> None:
    """Native code that never lets another Python thread, nor a signal handler, run."""
    re.match(r"(a+)+$", "a" * 64 + "b")


def _raise() -> NoReturn:
    raise RuntimeError("device lost\nand much more of it")


def _leave() -> NoReturn:
    sys.stderr.write("cannot find my library\n")
    os._exit(3)


class _Session:
    def __init__(self, fault: Callable[[], None]) -> None:
        self.placement: dict[str, int] = {}
        self.nodes = ()
        self._fault = fault

    def run(self, feeds: Feeds) -> Outputs:
        if "safe" not in feeds:
            self._fault()
        return {name: array + array for name, array in feeds.items()}  # type: ignore[operator]

    def bind(self, feeds: Feeds) -> Callable[[], None]:
        return lambda: (self.run(feeds), None)[1]


def _open(fault: Callable[[], None], when: str, request: SessionRequest) -> _Session:
    if when == "open":
        fault()
    return _Session(fault)


RUNTIMES = tuple(
    Runtime(
        name=f"{name}-{when}", device="cpu", formats=frozenset({"onnx"}), precisions=frozenset({"fp32"}), timed=True,
        notes={}, missing=lambda: None, probe=lambda: None, open=functools.partial(_open, fault, when),
    )
    for name, fault in (
        ("abort", _abort), ("sleep", _sleep), ("hold", _hold_interpreter), ("raise", _raise), ("leave", _leave),
        ("slow", functools.partial(time.sleep, 0.4)),
    )
    for when in ("open", "run")
)  # fmt: skip
