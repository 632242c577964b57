"""Outputs in every regime against the network in FP64, and against themselves over several runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from cuda_networks import Network
from cuda_regimes import Regime
from cuda_result import Parity
from cuda_sessions import Sessions

from cspdeploy.check.worker import Worker
from cspdeploy.core.catalog import INPUT_NAME
from cspdeploy.core.errors import CspDeployError
from cspdeploy.core.metrics import max_abs_difference, relative_l2

__all__ = ["NUM_RUNS", "check_agreement", "check_parity"]

Array = npt.NDArray[np.generic]
NUM_RUNS = 10
"""On one input. FP16 that is right once and then NaN is a known fault: microsoft/onnxruntime#22723."""
CHUNK = 500
"""Images a call where decisions are counted."""


def check_parity(network: Network, regime: Regime, batch: int, sessions: Sessions) -> Parity:
    """One network in one regime, on its golden images; where a session holds for one batch, in batches of that."""
    found = Parity(network=network.name, regime=regime.name, limit=regime.limit)
    golden = network.golden
    if golden is None:
        return dataclasses.replace(found, reason="no golden images")
    size = batch if regime.one_batch or network.batch else len(golden.x_NCHW)
    try:
        sessions.start(network, regime, batch)
        worker = sessions.get(network, regime, batch)
        runs = [_run(worker, golden.x_NCHW, size) for _ in range(NUM_RUNS)]
    except CspDeployError as error:
        return dataclasses.replace(found, reason=error.message)
    reference = next(iter(golden.outputs_fp64.values()))
    agreement = float((runs[0].argmax(1) == reference.argmax(1)).mean()) if network.trained else None
    return dataclasses.replace(
        found, rel_l2=max(relative_l2(run, reference) for run in runs),
        max_abs=max(max_abs_difference(run, reference) for run in runs), num_runs=len(runs),
        num_different=sum(not np.array_equal(run, runs[0], equal_nan=True) for run in runs[1:]),
        first_bad_run=next((index for index, run in enumerate(runs, 1) if not np.isfinite(run).all()), 0),
        num_images=len(golden.x_NCHW), images="golden images", top1_agreement=agreement,
    )  # fmt: skip


def check_agreement(
    network: Network, regimes: Sequence[Regime], reference: Regime, x_NCHW: npt.NDArray[np.float32], images: str,
    sessions: Sessions,
) -> list[Parity]:  # fmt: skip
    """First classes of a trained network on many images, against those of the network in FP32 without TF32.

    Args:
        reference: the regime that decides what is right.
        images: what they are, in words.
    """
    try:
        sessions.start(network, reference, 0)
        expected = _run(sessions.get(network, reference, 0), x_NCHW, CHUNK)
    except CspDeployError as error:
        return [Parity(network=network.name, regime=regime.name, reason=error.message) for regime in regimes]
    return [_agreement(network, regime, expected, x_NCHW, images, sessions) for regime in regimes]


def _agreement(
    network: Network, regime: Regime, expected: Array, x_NCHW: npt.NDArray[np.float32], images: str, sessions: Sessions
) -> Parity:
    found = Parity(network=network.name, regime=regime.name, images=images, num_images=len(x_NCHW))
    try:
        sessions.start(network, regime, 0)
        got = _run(sessions.get(network, regime, 0), x_NCHW, CHUNK)
    except CspDeployError as error:
        return dataclasses.replace(found, reason=error.message)
    return dataclasses.replace(
        found, rel_l2=relative_l2(got, expected), max_abs=max_abs_difference(got, expected), num_runs=1,
        first_bad_run=0 if np.isfinite(got).all() else 1,
        top1_agreement=float((got.argmax(1) == expected.argmax(1)).mean()),
    )  # fmt: skip


def _run(worker: Worker, x_NCHW: npt.NDArray[np.float32], size: int) -> Array:
    """`[N, classes]`. The last part is filled up with the first images where a session takes whole batches alone."""
    parts: list[Array] = []
    for start in range(0, len(x_NCHW), size):
        part = x_NCHW[start : start + size]
        full = np.resize(part, (size, *part.shape[1:])) if size < len(x_NCHW) or len(part) < size else part
        outputs = worker.run({INPUT_NAME: np.ascontiguousarray(full)})
        parts.append(next(iter(outputs.values()))[: len(part)])
    return np.concatenate(parts)
