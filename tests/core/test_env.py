from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cspdeploy
from cspdeploy.core import env
from cspdeploy.core.env import (
    available_bytes,
    clock_mhz,
    cpu_flags,
    cpu_governor,
    describe_environment,
    num_usable_cpus,
    package_version,
    throttled_seconds,
    tool_versions,
)  # fmt: skip


def test_version_of_a_package() -> None:
    assert package_version("numpy") == np.__version__
    assert package_version("no-such-package-anywhere") is None


def test_tools_name_python_and_only_what_is_installed() -> None:
    versions = tool_versions()
    assert versions["python"] == platform.python_version()
    assert versions["numpy"] == np.__version__
    assert all(versions.values())


def test_environment_is_a_flat_record_of_text() -> None:
    record = describe_environment()
    assert {
        "system", "kernel", "virtual_machine", "cpu", "cpu_flags", "cpus", "cpu_affinity", "cpu_quota", "cpu_governor",
        "clock_mhz", "load_1min", "python", "numpy",
    } <= set(record)  # fmt: skip
    assert all(isinstance(value, str) for value in record.values())
    assert record["cpu"]
    assert record["cpu_flags"].split() == list(cpu_flags())
    assert int(record["cpus"]) == num_usable_cpus() >= 1


def test_describing_the_machine_loads_no_engine() -> None:
    code = (
        "import sys; from cspdeploy.core.env import describe_environment; describe_environment();"
        "print(sorted({'torch', 'onnx', 'onnxruntime'} & set(sys.modules)))"
    )
    root = Path(cspdeploy.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What the system's files hold; all others are absent."""
    content: dict[str, str] = {}
    monkeypatch.setattr(env, "_read", lambda path: content.get(str(path), ""))
    return content


def test_affinity_is_written_in_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3, 8, 10, 11}, raising=False)
    assert describe_environment()["cpu_affinity"] == "0-3 8 10-11"


def test_clock_and_governor_of_the_first_usable_cpu(files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3, 5}, raising=False)
    assert (clock_mhz(), cpu_governor()) == (None, "")
    files["/proc/cpuinfo"] = "processor : 0\ncpu MHz : 2600.125\n"
    assert clock_mhz() == 2600.125
    folder = "/sys/devices/system/cpu/cpu3/cpufreq"
    files |= {f"{folder}/scaling_cur_freq": "3400000\n", f"{folder}/scaling_governor": "powersave\n"}
    assert (clock_mhz(), cpu_governor()) == (3400.0, "powersave")


def test_quota_of_a_container(files: dict[str, str]) -> None:
    assert (describe_environment()["cpu_quota"], throttled_seconds()) == ("none", 0.0)
    files["/sys/fs/cgroup/cpu.max"] = "150000 100000\n"
    files["/sys/fs/cgroup/cpu.stat"] = "usage_usec 5\nnr_throttled 3\nthrottled_usec 2500000\n"
    assert (describe_environment()["cpu_quota"], throttled_seconds()) == ("1.5", 2.5)
    files["/sys/fs/cgroup/cpu.max"] = "max 100000\n"
    assert describe_environment()["cpu_quota"] == "none"


def test_memory_and_virtual_machine(files: dict[str, str]) -> None:
    assert available_bytes() is None
    files["/proc/meminfo"] = "MemTotal: 8000 kB\nMemAvailable: 5000 kB\n"
    assert available_bytes() == 5_120_000
    assert describe_environment()["virtual_machine"] == "not seen"
    files["/proc/cpuinfo"] = "flags : fpu hypervisor\n"
    assert describe_environment()["virtual_machine"] == "yes"
