"""What nvidia-smi of several drivers prints, printed by a real program on PATH."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cspdeploy.core.env import describe_environment
from cspdeploy.core.gpu import GpuProcess, cuda_gpu, driver_facts, gpu_processes, list_gpus
from cspdeploy.core.gpu_facts import describe_gpus
from cspdeploy.core.gpu_smi import read_number, read_reasons, read_text, run_smi, split_row
from cspdeploy.core.gpu_visible import MigDevice, mig_devices, visible_gpus
from tests.core import smi


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is first on PATH."""
    folder = tmp_path / "bin"
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return folder


def test_nothing_where_there_is_no_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not [key for key in describe_environment() if key.startswith("gpu")]
    monkeypatch.setattr(subprocess, "Popen", None)  # no process is started
    assert (list_gpus(), gpu_processes(), mig_devices(), cuda_gpu()) == ((), (), (), None)
    assert driver_facts().problem == ""


def test_all_facts_of_a_gpu(path: Path) -> None:
    smi.install(path, smi.H100_580)
    (gpu,) = list_gpus()
    assert (gpu.index, gpu.uuid, gpu.name) == (0, smi.UUID, "NVIDIA H100 80GB HBM3")
    assert (gpu.driver_version, gpu.cuda_version, gpu.compute_capability) == ("580.65.06", "13.0", "9.0")
    assert (gpu.memory_total_mib, gpu.memory_used_mib, gpu.memory_free_mib) == (81559.0, 4.0, 81077.0)
    assert (gpu.compute_mode, gpu.mig_mode, gpu.persistence_mode, gpu.pstate) == (
        "Default",
        "Disabled",
        "Enabled",
        "P0",
    )
    assert (gpu.sm_clock_mhz, gpu.max_sm_clock_mhz, gpu.memory_clock_mhz, gpu.max_memory_clock_mhz) == (
        345.0, 1980.0, 2619.0, 2619.0,
    )  # fmt: skip
    assert (gpu.power_draw_w, gpu.power_limit_w, gpu.temperature_c, gpu.utilisation_percent) == (
        70.61,
        700.0,
        29.0,
        0.0,
    )
    assert (gpu.ecc_mode, gpu.clock_limits) == ("Enabled", ("idle",))
    assert gpu_processes() == (
        GpuProcess(pid=4242, gpu_uuid=smi.UUID, name="python3, train.py", memory_mib=61430.0),
    )  # fmt: skip


def test_older_driver_that_knows_other_names_and_an_old_card_that_tells_little(path: Path) -> None:
    smi.install(path, smi.GTX_470)
    (gpu,) = list_gpus()
    assert (gpu.driver_version, gpu.cuda_version, gpu.compute_capability) == ("470.82.01", "11.4", "")
    assert gpu.clock_limits == ("power limit",)
    assert (gpu.power_draw_w, gpu.power_limit_w, gpu.utilisation_percent) == (None, 180.0, None)
    assert (gpu.mig_mode, gpu.ecc_mode, gpu.memory_total_mib) == ("", "", 8116.0)


def test_two_gpus_and_a_warning_below_them(path: Path) -> None:
    told = smi.Machine(*smi.T4_535.gpus, heading=smi.T4_535.heading, code=14,
                       tail="WARNING: infoROM is corrupted at gpu 0000:00:1E.0")  # fmt: skip
    smi.install(path, told)
    first, second = list_gpus()
    assert (first.name, second.name, second.index) == ("Tesla T4", "NVIDIA A100-SXM4-80GB", 1)
    assert second.clock_limits == ("power limit", "thermal limit")
    assert driver_facts().problem == ""


def test_gpu_in_parts(path: Path) -> None:
    smi.install(path, smi.A100_MIG)
    (gpu,) = list_gpus()
    assert (gpu.mig_mode, gpu.memory_total_mib, gpu.utilisation_percent) == ("Enabled", None, None)
    parts = mig_devices()
    assert [(part.profile, part.gpu_uuid) for part in parts] == [("1g.10gb", smi.UUID), ("2g.20gb", smi.UUID)]
    assert parts[0].uuid == "MIG-feb88891-0321-5fef-9c87-d4af3b54259e"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest "
         "NVIDIA driver is installed and running.", 9),
        ("Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 580.173", 18),
        ("No devices were found", 6),
        ("Unable to determine the device handle for GPU 0000:01:00.0: GPU is lost.  Reboot the system to recover this "
         "GPU", 15),
        ("", 255),
    ],
)  # fmt: skip
def test_failure_is_told_in_its_own_words(path: Path, text: str, code: int) -> None:
    smi.install(path, script=f"cat <<'END'\n{text}\nEND\nexit {code}\n")
    facts = driver_facts()
    assert facts.gpus == ()
    assert facts.smi.endswith("nvidia-smi")
    assert facts.problem == (" ".join(text.split()) or f"nvidia-smi ends with {code}")
    assert gpu_processes() == ()


def test_answer_that_does_not_come_is_given_up(path: Path) -> None:
    program = smi.install(path, script="exec sleep 100\n")
    assert run_smi(str(program), time_limit_s=0.1) == (124, "nvidia-smi does not answer within 0.1 s")
    program.write_text("no program")
    assert run_smi(str(program))[0] == 127


@pytest.mark.parametrize(
    ("heading", "version"),
    [
        ("| NVIDIA-SMI 610.57.04              KMD Version: 610.57.04     CUDA UMD Version: 13.3     |", "13.3"),
        ("| NVIDIA-SMI 535.54.03    Driver Version: 535.54.03    CUDA Version: N/A      |", ""),
        ("| NVIDIA-SMI 535.54.03    Driver Version: 535.54.03    CUDA Version: ERR!     |", ""),
    ],
)
def test_cuda_that_the_driver_runs(path: Path, heading: str, version: str) -> None:
    smi.install(path, smi.Machine(*smi.H100_580.gpus, heading=heading))
    assert driver_facts().cuda_version == version


def test_cells() -> None:
    assert [read_number(text) for text in ("70.61", "250,00", "12 MiB", "[N/A]", "ERR!", "", None, "[Not Found]")] == [
        70.61, 250.0, 12.0, None, None, None, None, None,
    ]  # fmt: skip
    assert [read_text(text) for text in (" a ", "[Unknown Error]", "N/A", None)] == ["a", "", "", ""]
    assert read_reasons("0x0000000000000048") == ("hardware slowdown", "thermal slowdown by hardware")
    assert read_reasons("0x0000000000000400") == ("reason 0x400",)
    assert read_reasons("[Not Supported]") == read_reasons("0x0") == ()
    assert split_row("index, name", ["index", "name"]) == split_row("1", ["index", "name"]) == {}


# --- what CUDA shows ---


def _names(setting: str | None, machine: smi.Machine, path: Path, order: str = "") -> tuple[list[str], str, bool]:
    smi.install(path, machine)
    environment = {"CUDA_DEVICE_ORDER": order} | ({} if setting is None else {"CUDA_VISIBLE_DEVICES": setting})
    found = visible_gpus(list_gpus(), environment=environment, mig=mig_devices())
    return [gpu.name.split()[-1][:4] for gpu in found.gpus], found.problem, found.certain


@pytest.mark.parametrize(
    ("setting", "names", "problem"),
    [
        (None, ["T4", "A100"], ""),
        ("1", ["A100"], ""),
        ("1,0", ["A100", "T4"], ""),
        ("GPU-7fda", ["A100"], ""),
        ("0, GPU-7fda", ["T4", "A100"], ""),
        ("", [], "hides every GPU"),
        ("-1", [], "hides all GPUs from there on"),
        ("0,-1,1", ["T4"], "hides all GPUs from there on"),
        ("2", [], "'2' means none: 2 GPUs, 0 to 1, can be named here"),
        ("1,1", [], "names 1 twice"),
        ("cuda:0", [], "'cuda:0' is neither an index nor a UUID"),
        ("GPU-", [], "'GPU-' is the start of no UUID here, or of several"),
    ],
)
def test_visible_devices(path: Path, setting: str | None, names: list[str], problem: str) -> None:
    found, told, _ = _names(setting, smi.T4_535, path, order="PCI_BUS_ID")
    assert found == names
    assert problem in told
    assert bool(told) is bool(problem)


def test_order_of_unlike_gpus_is_cudas_own(path: Path) -> None:
    assert _names("0", smi.T4_535, path)[2] is False
    assert _names(None, smi.T4_535, path)[2] is False
    assert _names("GPU-7fda", smi.T4_535, path)[2] is True
    assert _names("0", smi.T4_535, path, order="PCI_BUS_ID")[2] is True
    assert _names("0", smi.H100_580, path)[2] is True


def test_part_of_a_gpu_is_visible(path: Path) -> None:
    assert _names("MIG-a257", smi.A100_MIG, path)[:2] == (["A100"], "")
    assert _names("MIG-0000", smi.A100_MIG, path)[0] == []
    older = MigDevice(uuid=f"MIG-{smi.UUID}/7/0", profile="1g.5gb", gpu_uuid=smi.UUID)
    environment = {"CUDA_VISIBLE_DEVICES": older.uuid}
    assert len(visible_gpus(list_gpus(), environment=environment, mig=[older]).gpus) == 1


def test_cudas_index_in_this_process(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi.install(path, smi.T4_535)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    gpu = cuda_gpu(0)
    assert gpu is not None
    assert gpu.index == 1
    assert cuda_gpu(1) is None
    assert cuda_gpu(-1) is None


# --- the record of a report ---


def test_environment_has_the_gpu_that_cuda_shows(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi.install(path, smi.H100_580)
    record = describe_environment()
    assert {key: record[key] for key in record if key.startswith("gpu")} == {
        "gpu": "NVIDIA H100 80GB HBM3", "gpu_driver": "580.65.06 (CUDA 13.0)", "gpu_compute_capability": "9.0",
        "gpu_memory": "4 of 81559 MiB used", "gpu_clocks": "345 of 1980 MHz SM, 2619 of 2619 MHz memory",
        "gpu_power": "70.61 W", "gpu_power_limit": "700 W", "gpu_temperature": "29 C", "gpu_pstate": "P0",
        "gpu_clock_limits": "idle",
        "gpu_modes": "compute Default, MIG Disabled, persistence Enabled, ECC Enabled",
    }  # fmt: skip
    smi.install(path, smi.T4_535)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    record = describe_environment()
    assert (record["gpu"], record["gpu_visible"]) == ("NVIDIA A100-SXM4-80GB", "1")


def test_record_of_several_gpus(path: Path) -> None:
    smi.install(path, smi.T4_535)
    facts = describe_gpus(list_gpus())
    assert facts["gpu"] == "Tesla T4; NVIDIA A100-SXM4-80GB"
    assert facts["gpu_power_limit"] == "2 x 700 W"
    assert facts["gpu_clock_limits"] == "not told; power limit + thermal limit"


def test_import_starts_no_process_and_loads_no_engine() -> None:
    code = (
        "import subprocess, sys; subprocess.Popen = None; import cspdeploy.core.gpu;"
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
