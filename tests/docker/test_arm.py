"""A bundle on 64-bit ARM: ONNX Runtime's aarch64 build under user-mode emulation, in an arm64 Debian.

Emulation tells of the numbers, which are those of the processor, and nothing of the time.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cspdeploy.core.golden import read_golden
from cspdeploy.core.metrics import relative_l2
from cspdeploy.edge import Predictor
from tests.docker.conftest import SUITE, call, debootstrap, require_tools

# Measured 3 minutes on two cores that others use; the first run makes the Debian, too.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
QEMU = "qemu-aarch64-static"
PYTHON = "3.13"  # of SUITE
KINDS = ("onnx", "onnx-fp16", "onnx-int8")

MAX_REL_L2 = {
    # Another order of the same float32 sums: measured 2.4e-7.
    "onnx": 1e-5,
    # ONNX Runtime computes in FP16 where the processor does (ARMv8.2, which is emulated), and in FP32 on x86. Measured
    # 1.6e-3: FP16 keeps 11 bits, 4.9e-4, through some ten layers.
    "onnx-fp16": 5e-3,
    # Sums of integers are equal on all processors; what lies between them is float, and may round to the next of 255
    # steps now and then. x86 without VNNI adds saturated pairs, too.
    "onnx-int8": 0.02,
}

SCRIPT = """
import sys
from pathlib import Path
import numpy as np
from cspdeploy.core.golden import read_golden
from cspdeploy.edge import Predictor
from cspdeploy.edge.__main__ import main

golden = read_golden(Path("/device/tiny/golden.npz"))
outputs = {
    kind: Predictor.open("/device/tiny", artifact=kind, num_threads=1).logits(*golden.images) for kind in sys.argv[1:]
}
np.savez("/device/outputs.npz", **outputs)
sys.exit(main(["selftest", "/device/tiny", "--json", "--no-latency", "--threads", "1"]))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Emulated:
    """What the emulated device found."""

    report: dict[str, Any]
    outputs: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def emulated(tiny_int8_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    require_tools("debootstrap", QEMU, "dpkg-deb")
    packages = ["python3-minimal", "libpython3-stdlib", "libstdc++6"]
    debian = debootstrap(SUITE, arch="arm64", include=packages, foreign=True)
    root = tmp_path_factory.mktemp("arm") / "root"
    call("cp", "-a", "--reflink=auto", debian, root)
    shutil.copy(str(shutil.which(QEMU)), root / "usr/bin" / QEMU)
    wheels = tmp_path_factory.mktemp("wheels")
    platforms = [part for glibc in ("2_27", "2_28") for part in ("--platform", f"manylinux_{glibc}_aarch64")]
    call(
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
        "--python-version", PYTHON, *platforms, "--dest", wheels,
        "--constraint", ROOT / "constraints.txt", "numpy", "onnxruntime", "pillow",
    )  # fmt: skip
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(root / "packages")
    shutil.copytree(ROOT / "cspdeploy", root / "packages/cspdeploy", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(tiny_int8_bundle, root / "device/tiny")
    # The emulator by name: nothing has to be registered with this machine's kernel.
    command = ["chroot", str(root), f"/usr/bin/{QEMU}", "-E", "PYTHONPATH=/packages", "/usr/bin/python3"]
    done = subprocess.run([*command, "-c", SCRIPT, *KINDS], capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr[-3000:]
    with np.load(root / "device/outputs.npz") as arrays:
        return Emulated(report=json.loads(done.stdout), outputs={kind: arrays[kind] for kind in KINDS})


def test_the_selftest_passes_on_aarch64(emulated: Emulated) -> None:
    assert emulated.report["environment"]["system"] == "Linux aarch64"
    assert emulated.report["verdict"] == "pass"
    verdicts = {row["artifact"]: row["verdict"] for row in emulated.report["checks"] if row["check"] == "golden"}
    assert verdicts == {"torchscript": "skip"} | dict.fromkeys(KINDS, "pass")


def test_images_become_the_same_input_on_aarch64(emulated: Emulated) -> None:
    row = next(row for row in emulated.report["checks"] if row["check"] == "preprocess")
    assert row["verdict"] == "pass"
    assert row["max_abs"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_an_artifact_answers_on_aarch64_as_it_does_here(
    emulated: Emulated, tiny_int8_bundle: Path, kind: str, tell: Callable[[str], None]
) -> None:
    images = read_golden(tiny_int8_bundle / "golden.npz").images
    here = Predictor.open(tiny_int8_bundle, artifact=kind, num_threads=1).logits(*images)
    there = emulated.outputs[kind]
    distance = relative_l2(there, here)
    same = float((there == here).mean())
    tell(f"{kind} on aarch64: relative L2 {distance:.1e} from {platform.machine()}, {100 * same:.0f} % of values equal")
    assert distance <= MAX_REL_L2[kind]
    if kind == "onnx":
        assert (there.argmax(axis=1) == here.argmax(axis=1)).all()
