"""Which GPUs CUDA shows to this process, and in which order: nvidia-smi counts otherwise, and hides none."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cspdeploy.core.gpu_facts import Gpu, list_gpus
from cspdeploy.core.gpu_smi import find_smi, run_smi

__all__ = ["MigDevice", "VisibleGpus", "cuda_gpu", "mig_devices", "see_gpus", "visible_gpus"]

# "  MIG 1g.10gb     Device  0: (UUID: MIG-feb88891-0321-5fef-9c87-d4af3b54259e)", under the line of its GPU. Before
# driver 470 the UUID was "MIG-GPU-<of the GPU>/<GPU instance>/<compute instance>".
_LISTED_GPU = re.compile(r"GPU (\d+): .*\(UUID: (GPU-[0-9a-fA-F-]+)\)")
_LISTED_MIG = re.compile(r"MIG (\S+)\s+Device\s+\d+: \(UUID: (MIG-[\w/-]+)\)")


@dataclass(frozen=True, slots=True, kw_only=True)
class MigDevice:
    """A part of a GPU in MIG mode that computes on its own; a process uses one at a time.

    Attributes:
        profile: "1g.10gb": its share of the units, and its memory.
    """

    uuid: str
    profile: str
    gpu_uuid: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VisibleGpus:
    """What a process sees.

    Attributes:
        gpus: in CUDA's order; of a MIG device the whole GPU.
        setting: of CUDA_VISIBLE_DEVICES; None: it is not set.
        problem: why the setting does not name what it seems to; empty where it does.
        certain: False where CUDA's order cannot be told: it puts the fastest GPU first unless CUDA_DEVICE_ORDER is
            "PCI_BUS_ID", and GPUs of several kinds are here.
    """

    gpus: tuple[Gpu, ...] = ()
    setting: str | None = None
    problem: str = ""
    certain: bool = True


def mig_devices() -> tuple[MigDevice, ...]:
    """The MIG devices of all GPUs of this machine."""
    smi = find_smi()
    found, gpu_uuid = [], ""
    for line in run_smi(smi, "-L")[1].splitlines() if smi else ():
        if gpu := _LISTED_GPU.search(line):
            gpu_uuid = gpu[2]
        elif mig := _LISTED_MIG.search(line):
            found.append(MigDevice(uuid=mig[2], profile=mig[1], gpu_uuid=gpu_uuid))
    return tuple(found)


def cuda_gpu(index: int = 0) -> Gpu | None:
    """The GPU that CUDA's index `index` means in this process, or None where there is none."""
    seen = see_gpus().gpus
    return seen[index] if 0 <= index < len(seen) else None


def see_gpus() -> VisibleGpus:
    """The GPUs that CUDA shows to this process, in its order."""
    gpus = list_gpus()
    parts = mig_devices() if any(gpu.mig_mode == "Enabled" for gpu in gpus) else ()
    return visible_gpus(gpus, environment=os.environ, mig=parts)


def visible_gpus(gpus: Sequence[Gpu], *, environment: Mapping[str, str], mig: Sequence[MigDevice] = ()) -> VisibleGpus:
    """Those of `gpus` that CUDA shows, by the rules of the CUDA programming guide ("CUDA Environment Variables").

    Entries of CUDA_VISIBLE_DEVICES are indices, or starts of UUIDs of GPUs and MIG devices. The first that means
    nothing ends the list, and one that is named twice empties it.

    Args:
        environment: CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER are looked at.
        mig: of `mig_devices`.
    """
    setting = environment.get("CUDA_VISIBLE_DEVICES")
    by_bus = environment.get("CUDA_DEVICE_ORDER", "").upper() == "PCI_BUS_ID"
    alike = len({(gpu.name, gpu.memory_total_mib) for gpu in gpus}) < 2
    if setting is None:
        return VisibleGpus(gpus=tuple(gpus), certain=by_bus or alike)
    found: list[Gpu] = []
    named: list[str] = []
    problem = "hides every GPU" if not setting.strip() else ""
    for entry in (part.strip() for part in setting.split(",") if setting.strip()):
        uuid, gpu = _meant(entry, gpus, mig)
        if gpu is None:
            problem = _why(entry, gpus)
            break
        if uuid in named:
            found, problem = [], f"names {entry} twice, and CUDA then shows no GPU at all"
            break
        found.append(gpu)
        named.append(uuid)
    by_index = any(entry.strip().isdigit() for entry in setting.split(","))
    return VisibleGpus(gpus=tuple(found), setting=setting, problem=problem, certain=by_bus or alike or not by_index)


def _meant(entry: str, gpus: Sequence[Gpu], mig: Sequence[MigDevice]) -> tuple[str, Gpu | None]:
    """The full UUID, and the GPU of it."""
    if entry.isdigit():
        gpu = gpus[int(entry)] if int(entry) < len(gpus) else None
        return (gpu.uuid if gpu else ""), gpu
    if entry.startswith("MIG-"):
        part = next((one for one in mig if one.uuid.lower().startswith(entry.lower())), None)
        whole = next((gpu for gpu in gpus if part is not None and gpu.uuid == part.gpu_uuid), None)
        return (part.uuid if part else ""), whole
    matching = [gpu for gpu in gpus if entry.startswith("GPU-") and gpu.uuid.lower().startswith(entry.lower())]
    return (matching[0].uuid, matching[0]) if len(matching) == 1 else ("", None)


def _why(entry: str, gpus: Sequence[Gpu]) -> str:
    if entry.lstrip("-").isdigit():
        have = f"{len(gpus)} GPUs, 0 to {len(gpus) - 1}," if len(gpus) > 1 else "one GPU, 0," if gpus else "no GPU"
        hides = "hides all GPUs from there on" if entry.startswith("-") else "means none"
        return f"'{entry}' {hides}: {have} can be named here"
    if entry.startswith(("GPU-", "MIG-")):
        return f"'{entry}' is the start of no UUID here, or of several"
    return f"'{entry}' is neither an index nor a UUID (GPU-..., MIG-...)"
