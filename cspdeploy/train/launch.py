"""Starts the workers of one machine, as `torchrun --standalone` does, and tells in one line which of them failed."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import uuid
from collections.abc import Sequence

from cspdeploy.core.child import child_environment, describe_exit
from cspdeploy.core.env import num_usable_cpus
from cspdeploy.core.errors import EXIT_INTERRUPTED, EXIT_OK, InputError, RuntimeUnavailableError

__all__ = ["launch_workers", "was_launched"]

RUN_PREFIX = "cspdeploy-"


def was_launched() -> bool:
    """Whether `launch_workers` started this worker, and tells itself which one failed."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "").startswith(RUN_PREFIX)


def launch_workers(module: str, arguments: Sequence[str], *, num: int) -> int:
    """Run `python -m module arguments` in `num` processes that can train together; their exit code.

    Where one fails the others are ended. Signals go on to all of them.

    Args:
        module: such as "cspdeploy".
        num: at least 2.

    Raises:
        InputError: PyTorch is built without what starts them.
        RuntimeUnavailableError: a worker was killed from outside.
    """
    try:
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    except ImportError as error:
        raise InputError(
            f"--workers {num}: this PyTorch has no torchrun ({error})", fix="leave out --workers, or install torch anew"
        ) from error
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # pages of it; below is one line
    os.environ.update(PYTHONPATH=child_environment()["PYTHONPATH"], OMP_NUM_THREADS=_threads_each(num))
    with tempfile.TemporaryDirectory(prefix=RUN_PREFIX) as logs:
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=num, run_id=f"{RUN_PREFIX}{uuid.uuid4().hex}",
            rdzv_backend="c10d", rdzv_endpoint="localhost:0", local_addr="localhost", max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=os.path.join(logs, "logs")),  # noqa: PTH118  # it takes no Path
        )  # fmt: skip
        try:
            elastic_launch(config, sys.executable)("-P", "-m", module, *arguments)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            return _finish(rank, failure.exitcode)
        except (KeyboardInterrupt, SignalException):
            return EXIT_INTERRUPTED
    return EXIT_OK


def _threads_each(num: int) -> str:
    """Of each worker on CPUs: all cores, shared. What the user has set stays."""
    return os.environ.get("OMP_NUM_THREADS") or str(max(1, num_usable_cpus() // num))


def _finish(rank: int, code: int) -> int:
    """Of the first that failed: what it told stands on stderr, unless it could not."""
    if code >= 0:
        return code
    raise RuntimeUnavailableError(
        f"worker {rank}: {describe_exit(code)}; the others were ended, finished epochs are kept",
        fix="see whether memory ran out (dmesg), then the same command with --resume",
    )
