"""Calls of one opened artifact, of as many images each as it takes. Shapes: N images."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt

from cspdeploy.core.errors import CspDeployError, DeviceMemoryError, InputError
from cspdeploy.edge.opening import OpenedArtifact

__all__ = ["Calls"]

Array = npt.NDArray[Any]

MAX_BATCH = 8
"""Images a call where the artifact takes any number: a CPU gains nothing by more, and the memory for activations grows
with them."""
MAX_REASON = 240
"""Characters of an engine's own message that an error shows."""


class Calls:
    """May be used by several threads; on an engine that cannot, one waits for the other."""

    def __init__(self, opened: OpenedArtifact) -> None:
        self._opened: OpenedArtifact | None = opened
        self._model = opened.model
        self._turn = nullcontext() if opened.runtime.concurrent else threading.Lock()

    @property
    def opened(self) -> OpenedArtifact:
        """What is called.

        Raises:
            InputError: it was closed.
        """
        opened = self._opened
        if opened is None:
            raise InputError(f"{self._model}: the predictor is closed", fix="open it again, or close it later")
        return opened

    def close(self) -> None:
        """Let go of the session; calls that run keep theirs to the end."""
        self._opened = None

    def batched(self, parts: Iterable[Array]) -> Iterator[dict[str, Array]]:
        """Outputs `[n, ...]` by name, call by call, of images `[1, ...]` each.

        Images of another size, as a graph that resizes may be given, start a new call.
        """
        step = self.opened.batch or MAX_BATCH
        waiting: list[Array] = []
        for part in parts:
            if waiting and (len(waiting) == step or part.shape != waiting[0].shape):
                yield self.together(waiting)
                waiting = []
            waiting.append(part)
        if waiting:
            yield self.together(waiting)

    def together(self, parts: list[Array]) -> dict[str, Array]:
        """One call for images of one size. A fixed batch is filled up, and what is made of the filling is dropped."""
        missing = (self.opened.batch or 0) - len(parts)
        if missing <= 0:
            return self.once(parts[0] if len(parts) == 1 else np.concatenate(parts))
        found = self.once(np.concatenate(parts + parts[-1:] * missing))
        return {name: array[: len(parts)] for name, array in found.items()}

    def once(self, x: Array) -> dict[str, Array]:
        """The artifact's own input to its outputs, as the engine gives them.

        Raises:
            InputError: the engine gave up, the device has no room (`DeviceMemoryError`), or this was closed.
            RuntimeUnavailableError: the device was lost.
        """
        opened = self.opened
        try:
            with self._turn:
                return opened.session.run({opened.input_name: x})
        except CspDeployError:
            raise
        except Exception as error:  # engines' exceptions share no base class but this one
            known = _known(error, opened, num_images=len(x))
            if known is not None:
                raise known from error
            told = " ".join(str(error).split())[-MAX_REASON:]
            raise InputError(
                f"{opened.path}: {opened.runtime.name} cannot compute it ({told})",
                fix=f"python -m cspdeploy.edge selftest {opened.path.parent}",
            ) from error


def _known(error: Exception, opened: OpenedArtifact, *, num_images: int) -> CspDeployError | None:
    """What an error of a GPU says in one line: no room for so many images, or no device any more; else None."""
    if opened.runtime.device != "cuda":
        return None
    from cspdeploy.runtimes.cuda_errors import told  # what a device without a GPU does not need is not loaded

    found = told(error, doing=f"{opened.path.name} on {opened.runtime.name}", batch=num_images)
    if isinstance(found, DeviceMemoryError) and num_images > 1 and opened.batch is None:
        found.fix = f"give {num_images // 2} images at a time, or take another GPU: --device N"
    elif isinstance(found, DeviceMemoryError):
        found.fix = "nvidia-smi, to see what else holds it, or take another GPU: --device N"
        if num_images > 1:
            found.fix = f"an artifact of batch {num_images // 2}: cspdeploy export MODEL --dynamic-batch; {found.fix}"
    return found
