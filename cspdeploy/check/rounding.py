"""How far an engine that computes in FP16 is from the same FP16 file with every node's result rounded to FP16.

A file's distance to the original is mostly that of its rounded weights and results, which any engine has. What an
engine adds to it (sums kept in FP16, another order, a kernel that is wrong) is its distance from that reference.
"""

from __future__ import annotations

from collections.abc import Callable

from cspdeploy.check.opening import start_session
from cspdeploy.check.settings import VerifySettings
from cspdeploy.check.subject import Candidate
from cspdeploy.core.errors import CspDeployError
from cspdeploy.core.metrics import relative_l2
from cspdeploy.runtimes import all_runtimes
from cspdeploy.runtimes.base import Outputs, Runtime, SessionRequest

__all__ = ["ROUNDING_RUNTIME", "RoundingReference", "computes_half"]

ROUNDING_RUNTIME = "fp16-rounding"


def computes_half(runtime: Runtime, made: Candidate) -> bool:
    """Whether `runtime` computes that file in FP16, so that the reference says something of it.

    On a GPU; on a CPU where the runtime has no remark for FP16 files, which is that it computes them in FP32.
    """
    if made.precision != "fp16" or made.format != "onnx" or runtime.name == ROUNDING_RUNTIME:
        return False
    return runtime.device == "cuda" or not runtime.notes.get("fp16")


class RoundingReference:
    """Outputs of the reference for one file, the one that was asked for last: computed once, or taken from its rung.

    Attributes:
        wanted: artifacts of which they will be asked; of others none are kept, since those of a detector are large.
    """

    def __init__(self, settings: VerifySettings) -> None:
        self._settings = settings
        self.wanted: frozenset[str] = frozenset()
        self._artifact = ""
        self._outputs: Outputs | None = None
        self._problem = ""

    def keep(self, made: Candidate, outputs: Outputs) -> None:
        """Outputs that the rung of the reference has just given, where they will be asked for."""
        if made.artifact in self.wanted:
            self._artifact, self._outputs, self._problem = made.artifact, outputs, ""

    def distance(self, made: Candidate, outputs: Outputs, run: Callable[..., Outputs]) -> tuple[float | None, str]:
        """Relative L2 of the output that is farthest off; None and why where there is no reference.

        Args:
            outputs: of the engine, for all inputs.
            run: from an open session of the reference to its outputs for the same inputs.
        """
        if self._artifact != made.artifact:
            self._artifact = made.artifact
            self._outputs, self._problem = self._compute(made, run)
        exact = self._outputs
        if exact is None:
            return None, self._problem
        if set(exact) != set(outputs) or any(outputs[name].shape != array.shape for name, array in exact.items()):
            return None, "its outputs have other shapes"
        return max((relative_l2(outputs[name], array) for name, array in exact.items() if array.size), default=0.0), ""

    def _compute(self, made: Candidate, run: Callable[..., Outputs]) -> tuple[Outputs | None, str]:
        runtime = all_runtimes()[ROUNDING_RUNTIME]
        missing = runtime.missing()
        if missing is not None:
            return None, missing[0]
        request = SessionRequest(path=made.path, outputs=made.output_names)
        session = start_session(runtime, request, self._settings)
        try:
            session.wait()
            return run(session), ""
        except Exception as error:  # whatever the reference raises is no fault of the engine that is judged
            told = error.message if isinstance(error, CspDeployError) else str(error)
            return None, (told.splitlines() or [type(error).__name__])[0]
        finally:
            session.close()
