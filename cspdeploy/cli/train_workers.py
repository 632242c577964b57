"""The workers of `cspdeploy train`: started, joined, and only one of them heard."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cspdeploy.cli.render import print_error, progress_bar
from cspdeploy.core.errors import EXIT_INTERRUPTED, CspDeployError, InputError, RuntimeUnavailableError

if TYPE_CHECKING:
    from cspdeploy.cli.render import Progress
    from cspdeploy.train.workers import Workers

__all__ = [
    "WorkerExit",
    "end_silently",
    "must_launch",
    "recorded_command",
    "require_one",
    "run_workers",
    "training_workers",
]

OTHERS_S = 5.0
"""That a worker waits for the first one to tell the same error. All read the same files, and are as far."""


class WorkerExit(Exception):  # noqa: N818  # it ends a worker whose error the first one tells
    """With that exit code, and without a word."""

    def __init__(self, code: int) -> None:
        super().__init__(str(code))
        self.code = code


def must_launch(num: int | None) -> bool:
    """Whether this process is to start `num` workers, not one of them itself.

    Raises:
        InputError: it is one of another number; the first of them says it.
        WorkerExit: and the others only end.
    """
    if "RANK" not in os.environ:
        return num is not None and num > 1
    world = os.environ.get("WORLD_SIZE", "1")
    if num is not None and str(num) != world:
        if os.environ["RANK"] != "0":
            raise WorkerExit(InputError.exit_code)
        raise InputError(
            f"--workers {num}: torchrun has started {world}",
            fix=f"leave out --workers, or torchrun --nproc-per-node {num}",
        )
    return False


def run_workers(num: int) -> int:
    """Start them with the words of this command; their exit code."""
    from cspdeploy.train.launch import launch_workers

    return end_silently(launch_workers("cspdeploy", sys.argv[1:], num=num))


def end_silently(code: int) -> int:
    """The code of a process that has nothing to say: another one has told the error."""
    if code == EXIT_INTERRUPTED:  # for which the root of the commands has a line
        raise SystemExit(code)
    return code


def recorded_command(command: str) -> str:
    """With the number of workers where torchrun gave it."""
    world = os.environ.get("WORLD_SIZE", "1") if "RANK" in os.environ else "1"
    return command if world == "1" or "--workers" in command else f"{command} --workers {world}"


def require_one(num: int | None, device: str | None) -> None:
    """Refuse more than one worker, and GPUs: fine-tuning for INT8 computes on the CPU what its file computes.

    Raises:
        InputError: they are asked for; of several that torchrun started the first one says it.
        WorkerExit: and the others only end.
    """
    world = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else num or 1
    if world > 1:
        if os.environ.get("RANK", "0") != "0":
            raise WorkerExit(InputError.exit_code)
        raise InputError(f"--qat: trains on one worker, got {world}", fix="start it without torchrun and --workers")
    if device == "cuda":
        raise InputError("--device cuda: --qat trains on the CPU", fix="leave out --device")


@contextlib.contextmanager
def training_workers(device: str | None) -> Iterator[tuple[Workers, Progress]]:
    """This process among the workers, and where progress goes: to stderr of the first one.

    Raises:
        WorkerExit: another worker, or whoever started them, tells the error.
        CspDeployError: as `cspdeploy.train.workers.open_workers`, and what the body raises.
    """
    from cspdeploy.train.workers import environment_share, open_workers

    share = environment_share()
    silent = share is not None and share.rank > 0
    store: Any = None
    try:
        with open_workers(device) as workers:
            store = workers.store
            with contextlib.nullcontext(_nothing) if silent else progress_bar("train") as progress:
                yield workers, progress
    except KeyboardInterrupt:
        if share is not None and share.num > 1:
            # It comes twice: from the terminal, and from whoever started the workers.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        if silent:
            raise WorkerExit(EXIT_INTERRUPTED) from None
        raise
    except CspDeployError as error:
        if share is not None and share.num > 1:
            _settle(error, store, rank=share.rank)
        raise


def _nothing(what: str, done: int, total: int) -> None:
    """No progress is told."""


def _settle(error: CspDeployError, store: Any, *, rank: int) -> None:
    """Let an error that all workers have be told once: by the first one, of whom the others hear that it did."""
    from cspdeploy.train.launch import was_launched

    if isinstance(error, RuntimeUnavailableError) and store is not None and was_launched():
        raise WorkerExit(error.exit_code) from error  # the one that ended is told by whoever started them
    if rank == 0:
        with contextlib.suppress(Exception):  # nobody may be there any more to hear it
            store.set("told", error.message)
        return
    if store is not None and _first_told(store, error.message):
        raise WorkerExit(error.exit_code) from error
    print_error(f"worker {rank}: {error.message}", error.fix)
    raise WorkerExit(error.exit_code) from error


def _first_told(store: Any, message: str) -> bool:
    from datetime import timedelta

    try:
        store.wait(["told"], timedelta(seconds=OTHERS_S))
        return bool(store.get("told").decode() == message)
    except Exception:  # whatever a store that is gone raises: then nobody told it
        return False
