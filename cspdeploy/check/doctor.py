"""What this machine can run. Every runtime and provider that is here is really opened; nothing is installed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cspdeploy.check.cpu_features import CpuFeature, explain_cpu
from cspdeploy.check.doctor_facts import CudaMachine, look_for_cuda
from cspdeploy.check.finding import Finding
from cspdeploy.check.installation import check_packages
from cspdeploy.check.trials import run_trials
from cspdeploy.core.env import cpu_flags, describe_environment

__all__ = ["Diagnosis", "RuntimeState", "diagnose", "judge"]

Answer = Mapping[str, Any]

# Half of the CPUs busy with something else: timed runs then wait for each other.
BUSY_SHARE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeState:
    """Whether a runtime or provider computed something here just now; if not, why, and what to do."""

    name: str
    works: bool
    reason: str = ""
    fix: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What was found.

    Attributes:
        healthy: at least one runtime works and nothing contradicts itself.
        advice: the verdict in one line.
        command: that mends what it says; empty where nothing is to be mended.
        providers: execution providers that this build of ONNX Runtime offers.
        cuda: what there is of an NVIDIA GPU, layer by layer: on the bus, in the kernel, to nvidia-smi, to CUDA.
    """

    healthy: bool
    advice: str
    command: str
    runtimes: tuple[RuntimeState, ...]
    providers: tuple[RuntimeState, ...]
    cpu: tuple[CpuFeature, ...]
    findings: tuple[Finding, ...]
    environment: dict[str, str]
    cuda: CudaMachine


def diagnose() -> Diagnosis:
    """Try everything, in child processes. The GPU is looked at before they use it: what is seen on it is others'."""
    environment, machine = describe_environment(), look_for_cuda()
    return judge(run_trials(), environment=environment, flags=cpu_flags(), machine=machine)


def judge(
    trials: Mapping[str, Answer], *, environment: dict[str, str], flags: tuple[str, ...], machine: CudaMachine
) -> Diagnosis:
    """The diagnosis that the answers of `cspdeploy.check.trials.run_trials` amount to."""
    findings = [*check_packages(trials, machine=machine), *_check_load(environment)]
    problem = next((found for found in findings if found.severity == "problem"), None)
    runtimes = _states(trials, kind="runtime")
    working = ", ".join(state.name for state in runtimes if state.works)
    if problem is not None:
        advice, command = problem.text, problem.command
    elif working:
        advice, command = f"ready for {working}", ""
    else:
        advice, command = "no runtime works here", "pip install 'cspdeploy[cpu]'"
    return Diagnosis(
        healthy=bool(working) and problem is None, advice=advice, command=command, runtimes=runtimes,
        providers=_states(trials, kind="provider"), cpu=explain_cpu(flags), findings=tuple(findings),
        environment=environment, cuda=machine,
    )  # fmt: skip


def _states(trials: Mapping[str, Answer], *, kind: str) -> tuple[RuntimeState, ...]:
    found = []
    for task, answer in trials.items():
        if task.startswith(f"{kind}:"):
            name, works = task.partition(":")[2], bool(answer["works"])
            reason, fix = str(answer.get("reason", "")), str(answer.get("fix", ""))
            if not works and not fix and kind == "runtime":
                fix = "install its engine again"
            found.append(RuntimeState(name=name, works=works, reason=reason, fix=fix))
    return tuple(found)


def _check_load(environment: Mapping[str, str]) -> list[Finding]:
    """What makes timings here less true."""
    found = []
    try:
        load, cpus = float(environment.get("load_1min", "")), int(environment.get("cpus", ""))
    except ValueError:
        load, cpus = 0.0, 1
    if load > BUSY_SHARE * cpus:
        text = f"busy: a load of {load:.1f} on {cpus} CPUs; wait until it is idle before timing anything"
        found.append(Finding(severity="note", text=text))
    if environment.get("cpu_governor") == "powersave":
        text = "the CPU's governor is 'powersave': clocks change during a run, and timings with them"
        found.append(Finding(severity="note", text=text))
    return found
