from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import numpy as np

import cspdeploy
from cspdeploy.core.env import cpu_flags, describe_environment, num_usable_cpus, package_version, tool_versions


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
    assert {"system", "cpu", "cpu_flags", "cpus", "load_1min", "python", "numpy"} <= set(record)
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
