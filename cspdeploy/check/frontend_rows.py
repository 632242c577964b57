"""What is asked of files with preprocessing in their graph, beyond what their network has to give.

Shapes: N images, C classes.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cspdeploy.check.opening import start_session
from cspdeploy.check.settings import VerifySettings
from cspdeploy.check.subject import Candidate, Subject
from cspdeploy.core.catalog import IMAGE_INPUT, NORMALISED_NODE
from cspdeploy.core.errors import CspDeployError
from cspdeploy.core.graph_images import in_order, pixels_for, with_pixel_change
from cspdeploy.core.onnx_edit import cut_part
from cspdeploy.core.onnx_graph import read_onnx
from cspdeploy.core.results import Limit, ParityRow
from cspdeploy.core.spec import Preprocess
from cspdeploy.core.types import Frontend
from cspdeploy.runtimes import all_runtimes
from cspdeploy.runtimes.base import Outputs, SessionRequest

__all__ = ["frontend_row", "network_outputs", "on_images", "pixels_of", "with_pixels"]

Array = npt.NDArray[np.generic]

RUNTIME = "ort-cpu"
# Without a resize both are the same product and the same sum in float32, so that any difference is a fault; engines may
# fuse them into one rounding, half a unit in the last place of the product, which is 6e-8 of a value of some units.
NORMALISE_LIMIT = 1e-5


def network_outputs(outputs: Outputs, made: Candidate) -> dict[str, Array]:
    """Those of the network itself, without what top-k adds, in the engine's order."""
    added = set(made.output_names) - set(made.network_names)
    return {name: array for name, array in outputs.items() if name not in added}


def pixels_of(made: Candidate) -> Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.uint8]] | None:
    """From RGB images at the contract's size to what a file with preprocessing in its graph takes; None for others."""
    frontend = made.frontend
    if frontend is None:
        return None
    return functools.partial(in_order, frontend=frontend)


def on_images(subject: Subject, stored: npt.NDArray[np.uint8], x_NCHW: Array) -> Subject:
    """A subject on other images: as stored, and as inputs of the network."""
    candidates = subject.candidates
    if subject.manifest is not None:
        contract = subject.manifest.spec.preprocess
        candidates = tuple(
            made if made.frontend is None
            else dataclasses.replace(made, pixels=pixels_for(made.frontend, stored, contract))
            for made in candidates
        )  # fmt: skip
    return dataclasses.replace(subject, feeds=dict.fromkeys(subject.feeds, x_NCHW), candidates=candidates)


def with_pixels(limits: Mapping[str, Limit], made: Candidate) -> dict[str, Limit]:
    """The limits of a file that resizes by itself."""
    return with_pixel_change(limits, made.pixel_change if made.frontend is not None else 0.0)


def frontend_row(base: ParityRow, subject: Subject, made: Candidate, settings: VerifySettings) -> ParityRow:
    """The preprocessing that a file has in its graph, alone, against the stored inputs of its network.

    Args:
        base: a row that says whose it is.
    """
    golden, manifest = subject.golden, subject.manifest
    if golden is None or manifest is None or made.frontend is None:
        return base
    limit = _limit(made.frontend, manifest.spec.preprocess)
    base = dataclasses.replace(base, limit=limit, num_images=len(golden.x_NCHW), note=_note(made.frontend))
    runtime = all_runtimes().get(RUNTIME)
    missing = runtime.missing() if runtime is not None else ("it is not part of this installation", "")
    if runtime is None or missing is not None:
        return dataclasses.replace(base, verdict="not-checkable", reason=f"{RUNTIME}: {(missing or ('',))[0]}")
    data, tensor = _front_part(made.path)
    if not tensor:
        return dataclasses.replace(
            base, verdict="error", reason=f"has no node '{NORMALISED_NODE}' that makes its input"
        )
    with tempfile.TemporaryDirectory(prefix="cspdeploy-") as folder:
        path = Path(folder) / made.path.name
        path.write_bytes(data)
        session = start_session(runtime, SessionRequest(path=path, outputs=(tensor,)), settings)
        try:
            session.wait()
            calls = list(subject.calls(made))
            parts = [session.run(feeds)[tensor][:count] for feeds, count in calls]
        except Exception as error:  # an engine may raise anything; the other rows must still be checked
            text = error.message if isinstance(error, CspDeployError) else str(error) or type(error).__name__
            return dataclasses.replace(base, verdict="error", reason=text.splitlines()[0][:300])
        finally:
            session.close()
    return _judged(base, parts, golden.x_NCHW, limit)


def _front_part(path: Path) -> tuple[bytes, str]:
    """The file down to the float input of its network, and that tensor's name."""
    model = read_onnx(path)
    node = next((node for node in model.graph.nodes if node.name == NORMALISED_NODE), None)
    if node is None or [value.name for value in model.graph.inputs] != [IMAGE_INPUT]:
        return b"", ""
    data, _, names = cut_part(path.read_bytes(), model.graph, targets=node.outputs, given={IMAGE_INPUT: "uint8"})
    return data, names[node.outputs[0]]


def _judged(base: ParityRow, parts: Sequence[Array], x_NCHW: npt.NDArray[np.float32], limit: float) -> ParityRow:
    made = np.concatenate(parts)
    if made.shape != x_NCHW.shape:
        reason = f"makes {list(made.shape)}, the golden inputs are {list(x_NCHW.shape)}"
        return dataclasses.replace(base, verdict="shape", reason=reason)
    if made.dtype != np.float32:
        return dataclasses.replace(base, verdict="dtype", reason=f"makes {made.dtype}, expected float32")
    off = float(np.abs(made.astype(np.float64) - x_NCHW).max())
    row = dataclasses.replace(base, verdict="pass", max_abs=off)
    if off <= limit:
        return row
    reason = f"its graph makes another input of the golden images than the shared preprocessing, by up to {off:.1e}"
    return dataclasses.replace(row, verdict="numeric", reason=f"{reason}; limit {limit:.1e}")


def _limit(frontend: Frontend, contract: Preprocess) -> float:
    """Steps of 255 in units of the network's input, of the channel where a step is largest."""
    return NORMALISE_LIMIT + frontend.max_difference / (255.0 * min(contract.std))


def _note(frontend: Frontend) -> str:
    if not frontend.resize:
        return ""
    if not frontend.max_difference:
        return "its resize gives Pillow's pixels on the golden images"
    steps = f"{frontend.max_difference:g} step{'s' if frontend.max_difference != 1 else ''}"
    return f"its resize is up to {steps} of 255 from Pillow's on the golden images, as measured at export"
