"""onnxsim, not trusted.

It runs in a child process with a time limit, and what it made is compared on real and random inputs. After a crash, a
hang or a difference the graph that went in is kept, and the record says so.
onnxsim is native code under heavy development; its tracker knows segmentation faults, hangs and wrong results.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cspdeploy.core.catalog import FP32_FLOOR, FP32_NOISE_FACTOR
from cspdeploy.core.child import child_command, child_environment
from cspdeploy.core.metrics import relative_l2
from cspdeploy.core.types import StepRecord
from cspdeploy.export.rewrite import count_operators_of
from cspdeploy.runtimes.ort import OrtSession, open_cpu_session

__all__ = ["SimplifyJob", "start_simplify"]

TIME_LIMIT_S = 300.0
"""Simplifying CSPDarknet53 takes 1 to 2 s; a hang is not a matter of seconds."""

# Constant folding may change the order of a sum, nothing else. 16 units in the last place, times ten for a deep net.
LIMIT = 10 * FP32_NOISE_FACTOR * FP32_FLOOR

NUM_COMPARED = 4
"""Real images that are compared; a wrong fold shows on the first."""

_CHILD = child_command("cspdeploy.export.simplify_child")


class SimplifyJob:
    """A running child. It works while the parent does other things; `finish` waits for it."""

    def __init__(self, process: subprocess.Popen[str], source: Path, target: Path, time_limit_s: float) -> None:
        self._process, self._source, self._target = process, source, target
        self._time_limit_s = time_limit_s

    def finish(self, x_NCHW: npt.NDArray[np.float32], *, batch: int) -> StepRecord:
        """Wait, compare on the real inputs `x_NCHW` and on noise of their range, and leave the better file.

        Args:
            x_NCHW: real inputs, at least one.
            batch: images a call that the graph takes.
        """
        reason = self._wait() or self._compare(x_NCHW, batch)
        if reason:
            shutil.copyfile(self._source, self._target)
            return StepRecord(name="simplify", outcome="kept", detail=f"unsimplified graph kept: {reason}")
        before, after = count_operators_of(self._source), count_operators_of(self._target)
        num_before, num_after = sum(before.values()), sum(after.values())
        facts = {
            "nodes_before": num_before, "nodes_after": num_after, "limit": LIMIT, "operators_before": before,
            "operators_after": after,
        }  # fmt: skip
        detail = f"{num_before} -> {num_after} nodes, equal on real and random inputs"
        return StepRecord(name="simplify", outcome="done", detail=detail, facts=facts)

    def stop(self) -> None:
        """End the child, if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()

    def _wait(self) -> str:
        try:
            _, errors = self._process.communicate(timeout=self._time_limit_s)
        except subprocess.TimeoutExpired:
            self.stop()
            return f"onnxsim did not end within {self._time_limit_s:g} s"
        if self._process.returncode < 0:
            return f"onnxsim crashed (signal {-self._process.returncode})"
        if self._process.returncode or not self._target.is_file():
            last = (errors.strip().splitlines() or ["no message"])[-1]
            return f"onnxsim failed: {last[:200]}"
        return ""

    def _compare(self, x_NCHW: npt.NDArray[np.float32], batch: int) -> str:
        rng = np.random.default_rng(0)
        noise = rng.uniform(x_NCHW.min(), x_NCHW.max(), (batch, *x_NCHW.shape[1:])).astype(np.float32)
        real = [("real", x_NCHW[at : at + batch]) for at in range(0, min(len(x_NCHW), NUM_COMPARED), batch)]
        before = open_cpu_session(self._source)
        try:
            after = open_cpu_session(self._target)
            if before.inputs != after.inputs or before.outputs != after.outputs:
                return "the simplified graph has other inputs or outputs"
            for what, x in (*real, ("random", noise)):
                if difference := _difference(before, after, x):
                    return f"outputs differ on {what} inputs ({difference})"
        except Exception as error:  # whatever the engine says of the simplified file, the other one is kept
            return f"the simplified graph does not run ({error})"
        return ""


def start_simplify(source: Path, target: Path, *, time_limit_s: float = TIME_LIMIT_S) -> SimplifyJob:
    """Start simplifying `source` into `target` in a child process."""
    process = subprocess.Popen(
        [*_CHILD, str(source), str(target)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, env=child_environment(),
    )  # fmt: skip
    return SimplifyJob(process, source, target, time_limit_s)


def _difference(before: OrtSession, after: OrtSession, x_NCHW: npt.NDArray[np.float32]) -> str:
    """What differs between the outputs of two sessions; empty where nothing does."""
    feeds = {next(iter(before.inputs)): x_NCHW}
    expected, got = before.run(feeds), after.run(feeds)
    for name, reference in expected.items():
        if (got[name].dtype, got[name].shape) != (reference.dtype, reference.shape):
            return f"{got[name].dtype} {list(got[name].shape)} for {reference.dtype} {list(reference.shape)}"
        distance = relative_l2(got[name], reference)
        if not distance <= LIMIT:
            return f"relative L2 {distance:.1e}, limit {LIMIT:.1e}"
    return ""
