"""Programs named nvidia-smi that print what the real one prints on several machines, for a folder on PATH."""

from __future__ import annotations

from pathlib import Path

__all__ = ["A100_MIG", "GTX_470", "H100_580", "T4_535", "Machine", "install"]

UUID = "GPU-7fdaf0a5-179b-f636-d15d-daf243e3ff16"
OTHER = "GPU-0200523e-f473-3a45-9b4a-fbbe0e41ccf8"


class Machine:
    """Answers: cells by field, in each GPU's row; fields that are not there are refused, as a driver does."""

    def __init__(
        self, *gpus: dict[str, str], heading: str, apps: tuple[str, ...] = (), listed: str = "", tail: str = "",
        code: int = 0, stream: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self.gpus, self.heading, self.apps, self.listed, self.tail, self.code = gpus, heading, apps, listed, tail, code
        self.stream = stream


def _cells(text: str) -> dict[str, str]:
    return dict(line.split(" = ", 1) for line in text.strip().splitlines())


_COMMON = """\
memory.total = 81559
memory.used = 4
memory.free = 81077
compute_mode = Default
persistence_mode = Enabled
pstate = P0
clocks.sm = 345
clocks.mem = 2619
clocks.max.sm = 1980
clocks.max.mem = 2619
power.draw = 70.61
power.limit = 700.00
temperature.gpu = 29
utilization.gpu = 0
ecc.mode.current = Enabled
timestamp = 2026/11/02 10:20:30.400"""

H100_580 = Machine(
    {"index": "0", "uuid": UUID, "name": "NVIDIA H100 80GB HBM3", "driver_version": "580.65.06", "compute_cap": "9.0",
     "mig.mode.current": "Disabled", "clocks_event_reasons.active": "0x0000000000000001", **_cells(_COMMON)},
    heading="| NVIDIA-SMI 580.65.06              Driver Version: 580.65.06      CUDA Version: 13.0     |",
    apps=(f"4242, {UUID}, 61430, python3, train.py",),
)  # fmt: skip
# The mask has its name of before, and compute_cap is not known. GeForce cards tell little.
GTX_470 = Machine(
    {"index": "0", "uuid": OTHER, "name": "GeForce GTX 1080", "driver_version": "470.82.01",
     "mig.mode.current": "[N/A]", "clocks_throttle_reasons.active": "0x0000000000000004", **_cells(_COMMON),
     "power.draw": "[Not Supported]", "power.limit": "180,00", "utilization.gpu": "ERR!",
     "memory.total": "8116", "ecc.mode.current": "[N/A]"},
    heading="| NVIDIA-SMI 470.82.01    Driver Version: 470.82.01    CUDA Version: 11.4     |",
)  # fmt: skip
T4_535 = Machine(
    {"index": "0", "uuid": OTHER, "name": "Tesla T4", "driver_version": "535.54.03", "compute_cap": "7.5",
     "mig.mode.current": "[N/A]", "clocks_event_reasons.active": "0x0000000000000000", **_cells(_COMMON),
     "memory.total": "15360"},
    {"index": "1", "uuid": UUID, "name": "NVIDIA A100-SXM4-80GB", "driver_version": "535.54.03", "compute_cap": "8.0",
     "mig.mode.current": "Disabled", "clocks_event_reasons.active": "0x0000000000000024", **_cells(_COMMON)},
    heading="| NVIDIA-SMI 535.54.03              Driver Version: 535.54.03    CUDA Version: 12.2     |",
)  # fmt: skip
A100_MIG = Machine(
    {"index": "0", "uuid": UUID, "name": "NVIDIA A100-SXM4-80GB", "driver_version": "535.161.08", "compute_cap": "8.0",
     "mig.mode.current": "Enabled", "clocks_event_reasons.active": "0x0000000000000001", **_cells(_COMMON),
     "utilization.gpu": "[N/A]", "memory.total": "[Insufficient Permissions]",
     "memory.used": "[Insufficient Permissions]", "memory.free": "[Insufficient Permissions]"},
    heading="| NVIDIA-SMI 535.161.08             Driver Version: 535.161.08   CUDA Version: 12.2     |",
    listed=f"GPU 0: NVIDIA A100-SXM4-80GB (UUID: {UUID})\n"
    "  MIG 1g.10gb     Device  0: (UUID: MIG-feb88891-0321-5fef-9c87-d4af3b54259e)\n"
    "  MIG 2g.20gb     Device  1: (UUID: MIG-a25704ba-3a06-5299-a795-fd7cf4d13973)",
)  # fmt: skip


def install(folder: Path, machine: Machine | None = None, *, script: str = "") -> Path:
    """Write it; `script`: of a shell, in place of a machine that answers."""
    folder.mkdir(exist_ok=True)
    program = folder / "nvidia-smi"
    program.write_text("#!/bin/sh\n" + (script or _script(machine or H100_580, folder)))
    program.chmod(0o755)
    return program


def _script(machine: Machine, folder: Path) -> str:
    known = folder / "fields"
    known.mkdir(exist_ok=True)
    for field in {name for gpu in machine.gpus for name in gpu}:
        (known / field).write_text("\n".join(gpu.get(field, "[N/A]") for gpu in machine.gpus) + "\n")
    (folder / "apps").write_text("".join(f"{row}\n" for row in machine.apps))
    (folder / "listed").write_text(f"{machine.listed}\n")
    (folder / "heading").write_text(f"{machine.heading}\n")
    (folder / "stream").write_text("".join(f"{row}\n" for row in machine.stream))
    (folder / "tail").write_text(f"{machine.tail}\n" if machine.tail else "")
    return f"""\
cd {folder}
for one in "$@"; do case "$one" in
  -L) cat listed; exit 0 ;;
  -lms) if [ -s stream ]; then cat stream; fi; echo $$ >running; while :; do sleep 0.05; done ;;
  --query-compute-apps=*) cat apps; exit 0 ;;
  --query-gpu=*) wanted=${{one#--query-gpu=}} ;;
esac; done
if [ -z "$wanted" ]; then cat heading; exit 0; fi
IFS=,; set --
for field in $wanted; do
  [ -f "fields/$field" ] || {{ printf 'Field "%s" is not a valid field to query.\\n\\n' "$field"; exit 2; }}
  set -- "$@" "fields/$field"
done
paste -d '|' "$@" | sed 's/|/, /g'
cat tail
exit {machine.code}
"""
