"""A device has numpy, an engine, and perhaps Pillow; no home, nothing that may be written. Each in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cspdeploy
from tests.without import WITHOUT

ROOT = Path(cspdeploy.__file__).parents[1]
NOT_THERE = ("torch", "onnx", "onnxscript", "onnxsim", "safetensors", "typer", "rich", "click")

# As if not installed, and as if mounted read-only: whoever opens a file to write, or makes one, is told off.
DEVICE = (
    WITHOUT
    + """
import os
sys.dont_write_bytecode = True
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
CHANGES = {{"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
            "tempfile.mkdtemp", "tempfile.mkstemp"}}

def read_only(event, arguments):
    if event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES
                            and arguments[0] != os.devnull):
        raise OSError(30, f"Read-only file system: {{event}} {{arguments}}")

sys.addaudithook(read_only)
"""
)


def _device(code: str, *arguments: str, blocked: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "TMPDIR")}
    return subprocess.run(
        [sys.executable, "-c", DEVICE.format(blocked=blocked) + code, *arguments],
        env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip


MAIN = """
from cspdeploy.edge.__main__ import main
code = main(sys.argv[1:])
loaded = sorted({name.partition(".")[0] for name in sys.modules} & set(blocked))
sys.stderr.write(f"loaded {loaded}")
sys.exit(code)
"""

ARRAYS = """
import json
from pathlib import Path
import numpy as np
from cspdeploy.core.golden import read_golden
from cspdeploy.core.metrics import relative_l2
from cspdeploy.edge import Predictor

DETECTION = {"cspdeploy.core.detection." + name for name in ("boxes", "decode", "fast", "postprocess")}
DETECTION |= {"cspdeploy.edge.detecting"}
golden = read_golden(Path(sys.argv[1]) / "golden.npz")
with Predictor.open(sys.argv[1]) as predictor:
    distance = relative_l2(predictor.logits(*golden.images), golden.outputs_fp64["logits"])
    label = predictor(golden.images[0])[0].label
    streamed = [item.result[0].label for item in predictor.stream(list(golden.images[:3]))]
detection = sorted(name for name in sys.modules if name in DETECTION or name == "cspdeploy.edge.segmenting")
print(json.dumps({"distance": distance, "label": label, "streamed": streamed, "pillow": "PIL" in sys.modules,
                  "detection": detection}))
"""


def test_the_hook_bites() -> None:
    done = _device("open('/tmp/never-written', 'w')", blocked=())
    assert "Read-only file system" in done.stderr
    done = _device("import tempfile; tempfile.mkdtemp()", blocked=())
    assert "No usable temporary directory" in done.stderr


@pytest.mark.parametrize("without", [NOT_THERE, (*NOT_THERE, "PIL")])
def test_selftest(tiny_int8_bundle: Path, without: tuple[str, ...]) -> None:
    done = _device(MAIN, "selftest", str(tiny_int8_bundle), "--json", "--no-latency", blocked=without)
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith("loaded []")
    report = json.loads(done.stdout)
    rows = {row["artifact"]: row for row in report["checks"] if row["check"] == "golden"}
    assert {name: row["verdict"] for name, row in rows.items()} == {
        "torchscript": "skip", "onnx": "pass", "onnx-fp16": "pass", "onnx-int8": "pass",
    }  # fmt: skip
    assert "pip install" in rows["torchscript"]["reason"]


@pytest.mark.parametrize("without", [NOT_THERE, (*NOT_THERE, "PIL")])
def test_predictor(tiny_bundle: Path, without: tuple[str, ...]) -> None:
    done = _device(ARRAYS, str(tiny_bundle), blocked=without)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["distance"] < 1e-5
    assert found["streamed"][0] == found["label"]
    assert found["pillow"] is ("PIL" not in without)
    assert found["detection"] == [], "a classifier loads nothing of detectors and segmenters"


def test_no_engine(tiny_bundle: Path) -> None:
    done = _device(MAIN, "selftest", str(tiny_bundle), blocked=(*NOT_THERE, "onnxruntime", "openvino"))
    assert done.returncode == 3
    assert "pip install 'cspdeploy[cpu]'" in done.stderr
    done = _device(MAIN, "predict", str(tiny_bundle), "photo.png", blocked=(*NOT_THERE, "onnxruntime"))
    assert done.returncode == 3


def test_two_processes_at_once(tiny_bundle: Path) -> None:
    command = [sys.executable, "-c", DEVICE.format(blocked=NOT_THERE) + ARRAYS, str(tiny_bundle)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert answers[0] == answers[1]


IMPORTED = """
before = set(sys.modules)
import numpy, onnxruntime
engine = set(sys.modules)
import cspdeploy.edge
print(*sorted(set(sys.modules) - engine))
"""


def test_import_loads_little() -> None:
    """What costs is loaded when it is used: Pillow, other engines, the reading of graphs."""
    done = _device(IMPORTED, blocked=())
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.split()
    assert "cspdeploy.edge.predictor" in loaded
    late = {
        "PIL", "importlib.metadata", "argparse", "cspdeploy.core.env", "cspdeploy.core.onnx_graph",
        "cspdeploy.edge.selftest", "cspdeploy.runtimes.openvino", "cspdeploy.runtimes.ort",
        "cspdeploy.core.detection.boxes", "cspdeploy.core.detection.decode", "cspdeploy.core.detection.fast",
        "cspdeploy.core.detection.postprocess", "cspdeploy.edge.detecting", "cspdeploy.edge.segmenting",
    }  # fmt: skip
    assert late.isdisjoint(loaded)


OPEN = """
from cspdeploy.core.errors import RuntimeUnavailableError
from cspdeploy.edge import Predictor
try:
    Predictor.open(sys.argv[1], runtime=sys.argv[2]).close()
except RuntimeUnavailableError:  # no GPU here
    pass
print(" ".join(name for name in sys.modules if name.startswith("cspdeploy.runtimes.")))
"""


def test_a_device_without_gpu_loads_nothing_of_one(tiny_bundle: Path) -> None:
    found = {}
    for runtime in ("ort-cpu", "ort-cuda"):
        done = _device(OPEN, str(tiny_bundle), runtime, blocked=NOT_THERE)
        assert done.returncode == 0, done.stderr
        found[runtime] = {name.removeprefix("cspdeploy.runtimes.") for name in done.stdout.split()}
    assert found["ort-cpu"] <= {"base", "ort", "ort_open", "ort_placement", "ort_versions"}
    assert "ort_cuda" in found["ort-cuda"], "what is looked for would be seen"
