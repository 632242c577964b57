"""What nvidia-smi tells of each GPU, of its driver, and of the processes on it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cspdeploy.core.gpu_smi import REASONS, ask, find_smi, read_number, read_reasons, read_text, run_smi

__all__ = ["DriverFacts", "Gpu", "GpuProcess", "describe_gpus", "driver_facts", "gpu_processes", "list_gpus"]

# "CUDA UMD Version" and "KMD Version" since driver 610: of the user's and of the kernel's part.
_CUDA_VERSION = re.compile(r"CUDA(?: UMD)? Version\s*:\s*(\d+(?:\.\d+)+)")

_FIELDS = (
    "index", "uuid", "name", "driver_version", "compute_cap", "memory.total", "memory.used", "memory.free",
    "compute_mode", "mig.mode.current", "persistence_mode", "pstate", "clocks.sm", "clocks.mem", "clocks.max.sm",
    "clocks.max.mem", "power.draw", "power.limit", "temperature.gpu", "utilization.gpu", "ecc.mode.current", REASONS,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU at one moment. None and empty strings: it does not tell, or not to this user.

    Attributes:
        index: nvidia-smi's, by the place on the bus. CUDA counts otherwise: see `cspdeploy.core.gpu_visible`.
        cuda_version: the newest CUDA that the driver runs: "13.0".
        compute_capability: "9.0".
        memory_total_mib: in MiB; in MIG mode of the whole GPU.
        compute_mode: "Default", "Exclusive_Process" or "Prohibited".
        mig_mode: "Enabled", "Disabled", or empty on GPUs that cannot be parted.
        pstate: "P0" (highest) to "P15".
        sm_clock_mhz: at this moment; an idle GPU has clocked down.
        utilisation_percent: of time in which a kernel ran, in the last second or less.
        clock_limits: what holds the clocks at this moment: "power limit", "thermal limit", "idle", ...
    """

    index: int
    uuid: str
    name: str
    driver_version: str = ""
    cuda_version: str = ""
    compute_capability: str = ""
    memory_total_mib: float | None = None
    memory_used_mib: float | None = None
    memory_free_mib: float | None = None
    compute_mode: str = ""
    mig_mode: str = ""
    persistence_mode: str = ""
    pstate: str = ""
    sm_clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    max_sm_clock_mhz: float | None = None
    max_memory_clock_mhz: float | None = None
    power_draw_w: float | None = None
    power_limit_w: float | None = None
    temperature_c: float | None = None
    utilisation_percent: float | None = None
    ecc_mode: str = ""
    clock_limits: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuProcess:
    """A process that computes on a GPU.

    Attributes:
        pid: of the host's namespace: inside a container it is another's number, or nobody's.
        name: empty where nvidia-smi cannot see the process, as one in another container.
        memory_mib: on the GPU; None where the driver does not tell, as in MIG mode and on Windows.
    """

    pid: int
    gpu_uuid: str
    name: str = ""
    memory_mib: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverFacts:
    """All that nvidia-smi tells in one asking.

    Attributes:
        smi: path of nvidia-smi; empty where there is none, and then nothing else is known.
        problem: in its own words, why it lists no GPU: "NVIDIA-SMI has failed because it couldn't communicate ...".
        cuda_version: the newest CUDA that the driver runs; empty where its library libcuda is not here.
    """

    smi: str = ""
    problem: str = ""
    cuda_version: str = ""
    gpus: tuple[Gpu, ...] = ()


def list_gpus() -> tuple[Gpu, ...]:
    """All GPUs of this machine, those that CUDA_VISIBLE_DEVICES hides too; none where nvidia-smi fails or is absent."""
    return driver_facts().gpus


def driver_facts() -> DriverFacts:
    """The GPUs, the newest CUDA of their driver, and why there are none."""
    smi = find_smi()
    if not smi:
        return DriverFacts()
    answer = ask(_FIELDS)
    if not answer.rows:
        return DriverFacts(smi=smi, problem=answer.problem)
    told = _CUDA_VERSION.search(run_smi(smi)[1])  # no field of a query: it stands in the heading of the table alone
    cuda = told[1] if told else ""
    gpus = tuple(_gpu(row, cuda) for row in answer.rows)
    return DriverFacts(smi=smi, cuda_version=cuda, gpus=gpus)


def gpu_processes() -> tuple[GpuProcess, ...]:
    """Processes that compute on a GPU, this one and its children too. A window system is none.

    Inside a container nvidia-smi lists none, or the host's numbers without a name: an empty answer says nothing there,
    and used memory that nobody seems to hold is another container's.
    """
    fields = ("pid", "gpu_uuid", "used_memory", "process_name")  # the name last: it may hold a comma
    return tuple(
        GpuProcess(
            pid=int(row["pid"]), gpu_uuid=read_text(row.get("gpu_uuid")), name=read_text(row.get("process_name")),
            memory_mib=read_number(row.get("used_memory")),
        )
        for row in ask(fields, about="compute-apps").rows
    )  # fmt: skip


def _gpu(row: Mapping[str, str], cuda_version: str) -> Gpu:
    def text(field: str) -> str:
        return read_text(row.get(field))

    def number(field: str) -> float | None:
        return read_number(row.get(field))

    return Gpu(
        index=int(row["index"]), uuid=text("uuid"), name=text("name"), driver_version=text("driver_version"),
        cuda_version=cuda_version, compute_capability=text("compute_cap"), memory_total_mib=number("memory.total"),
        memory_used_mib=number("memory.used"), memory_free_mib=number("memory.free"),
        compute_mode=text("compute_mode"), mig_mode=text("mig.mode.current"), persistence_mode=text("persistence_mode"),
        pstate=text("pstate"), sm_clock_mhz=number("clocks.sm"), memory_clock_mhz=number("clocks.mem"),
        max_sm_clock_mhz=number("clocks.max.sm"), max_memory_clock_mhz=number("clocks.max.mem"),
        power_draw_w=number("power.draw"), power_limit_w=number("power.limit"),
        temperature_c=number("temperature.gpu"), utilisation_percent=number("utilization.gpu"),
        ecc_mode=text("ecc.mode.current"), clock_limits=read_reasons(row.get(REASONS)),
    )  # fmt: skip


def describe_gpus(gpus: Sequence[Gpu]) -> dict[str, str]:
    """One flat record for reports, with a value for each GPU where they differ; empty where there are none."""
    facts: dict[str, list[str]] = {}
    for gpu in gpus:
        for key, value in _facts(gpu).items():
            facts.setdefault(key, []).append(value)
    return {key: _joined(values) for key, values in facts.items() if any(values)}


def _facts(gpu: Gpu) -> dict[str, str]:
    cuda = f" (CUDA {gpu.cuda_version})" if gpu.cuda_version else ""
    modes = (("compute", gpu.compute_mode), ("MIG", gpu.mig_mode), ("persistence", gpu.persistence_mode),
             ("ECC", gpu.ecc_mode))  # fmt: skip
    return {
        "gpu": gpu.name,
        "gpu_driver": f"{gpu.driver_version}{cuda}" if gpu.driver_version else "",
        "gpu_compute_capability": gpu.compute_capability,
        "gpu_memory": _of(gpu.memory_used_mib, gpu.memory_total_mib, "MiB used"),
        "gpu_clocks": ", ".join(filter(None, (
            _of(gpu.sm_clock_mhz, gpu.max_sm_clock_mhz, "MHz SM"),
            _of(gpu.memory_clock_mhz, gpu.max_memory_clock_mhz, "MHz memory"),
        ))),
        "gpu_power": _of(gpu.power_draw_w, None, "W"),
        "gpu_power_limit": _of(gpu.power_limit_w, None, "W"),
        "gpu_temperature": _of(gpu.temperature_c, None, "C"),
        "gpu_pstate": gpu.pstate,
        "gpu_clock_limits": " + ".join(gpu.clock_limits),
        "gpu_modes": ", ".join(f"{name} {value}" for name, value in modes if value),
    }  # fmt: skip


def _of(value: float | None, most: float | None, unit: str) -> str:
    if value is None:
        return ""
    return f"{value:g} {unit}" if most is None else f"{value:g} of {most:g} {unit}"


def _joined(values: Sequence[str]) -> str:
    distinct = dict.fromkeys(values)
    if len(distinct) == 1 and len(values) > 1 and values[0]:
        return f"{len(values)} x {values[0]}"
    return "; ".join(value or "not told" for value in values)
