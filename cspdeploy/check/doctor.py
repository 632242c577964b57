"""What this machine can run. Every runtime that is installed is really opened; nothing is installed or changed."""

from __future__ import annotations

from dataclasses import dataclass

from cspdeploy.core.env import describe_environment, package_version
from cspdeploy.core.errors import CspDeployError
from cspdeploy.runtimes import all_runtimes
from cspdeploy.runtimes.base import Runtime

__all__ = ["Diagnosis", "RuntimeState", "diagnose"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeState:
    """Whether a runtime computed something here just now; if not, why, and what to do."""

    name: str
    works: bool
    reason: str = ""
    fix: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """`healthy`: at least one runtime works and nothing contradicts itself. `advice`: one line, with the command."""

    healthy: bool
    advice: str
    runtimes: tuple[RuntimeState, ...]
    environment: dict[str, str]


def diagnose() -> Diagnosis:
    """Open every runtime on a small graph."""
    states = tuple(_state(runtime) for runtime in all_runtimes().values())
    both = package_version("onnxruntime") and package_version("onnxruntime-gpu")
    if both:
        advice = (
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: "
            "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'cspdeploy[gpu]'"
        )
    elif not any(state.works for state in states):
        advice = "no runtime works here: pip install 'cspdeploy[cpu]'"
    else:
        working = ", ".join(state.name for state in states if state.works)
        advice = f"ready for {working}"
    healthy = not both and any(state.works for state in states)
    return Diagnosis(healthy=healthy, advice=advice, runtimes=states, environment=describe_environment())


def _state(runtime: Runtime) -> RuntimeState:
    try:
        missing = runtime.missing()
        if missing is not None:
            return RuntimeState(name=runtime.name, works=False, reason=missing[0], fix=missing[1])
        runtime.probe()
    except CspDeployError as error:
        return RuntimeState(name=runtime.name, works=False, reason=error.message, fix=error.fix)
    except Exception as error:  # a broken installation may raise anything, and that is what is being asked
        reason = str(error)[:200] or type(error).__name__
        return RuntimeState(name=runtime.name, works=False, reason=reason, fix="install it again")
    return RuntimeState(name=runtime.name, works=True)
