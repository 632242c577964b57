"""How long an engine may be silent before it counts as hung."""

from __future__ import annotations

from cspdeploy.runtimes.base import Runtime, SessionRequest

__all__ = ["COMPILE_LIMIT_S", "time_limit_of"]

COMPILE_LIMIT_S = 900.0
"""torch.compile with max-autotune times every layer's candidates in the first run, and TensorRT every layer's tactics
when a session opens: both take minutes, where other engines that are silent for two hang."""


def time_limit_of(runtime: Runtime, request: SessionRequest, seconds: float) -> float:
    """Seconds for one answer of a session: those given, or as many as a compiler takes."""
    compiles = bool(request.cuda.compile) or runtime.name == "ort-tensorrt"
    return max(seconds, COMPILE_LIMIT_S) if compiles else seconds
