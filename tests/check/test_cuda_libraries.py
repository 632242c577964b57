"""Which libraries of CUDA an engine needs, finds and loads: of real files, and of one made by hand."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

from cspdeploy.check.cuda_libraries import (
    bringing_packages,
    loaded_libraries,
    missing_libraries,
    needed_libraries,
)
from cspdeploy.runtimes import all_runtimes
from tests.check.cuda_machines import OK


def test_needed_libraries_of_a_real_file(tmp_path: Path) -> None:
    import onnxruntime

    (library,) = Path(onnxruntime.__file__).parent.glob("capi/onnxruntime_pybind11_state*.so")
    assert "libc.so.6" in needed_libraries(library)
    assert missing_libraries(library) == ()  # none of CUDA's
    broken = tmp_path / "half.so"
    broken.write_bytes(library.read_bytes()[:600])
    assert (
        needed_libraries(broken) == needed_libraries(Path(__file__)) == needed_libraries(tmp_path / "absent.so") == ()
    )
    assert missing_libraries(broken, also=["libcudnn_no_such.so.9"]) == ("libcudnn_no_such.so.9",)


def test_loaded_libraries_are_those_of_cuda(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    maps.write_text(
        "7f00-7f10 r--p 00000000 fe:00 12 /v/my files/libcudnn.so.9\n7f10-7f20 r-xp 00000000 fe:00 12 /v/my files/"
        "libcudnn.so.9\n7f20-7f30 r--p 00000000 fe:00 13 /usr/lib/libc.so.6\n7f30-7f40 rw-p 00000000 00:00 0 \n"
        "7f40-7f50 r--p 00000000 fe:00 14 /v/libcublasLt.so.13\n"
    )
    assert loaded_libraries(maps) == ("/v/libcublasLt.so.13", "/v/my files/libcudnn.so.9")
    assert loaded_libraries(tmp_path / "none") == ()


def test_packages_of_each_cuda() -> None:
    names = ["libcublasLt.so.12", "libcublas.so.12", "libcudnn.so.9", "libcufft.so.11", "libcuda.so.1", "libz.so.1"]
    assert bringing_packages(names, cuda="12.8") == (
        "nvidia-cublas-cu12==12.*", "nvidia-cudnn-cu12==9.*", "nvidia-cufft-cu12",
    )  # fmt: skip
    assert bringing_packages(["libnvinfer.so.10"], cuda="13.0") == ("tensorrt-cu13==10.*",)


def test_child_tells_of_a_providers_libraries(tmp_path: Path) -> None:
    """For real: a wheel whose provider needs what is not here. Its file is made by hand, without code."""
    capi = tmp_path / "onnxruntime/capi"
    capi.mkdir(parents=True)
    (capi / "__init__.py").write_text("")
    (capi / "build_and_package_info.py").write_text("cuda_version = '13.0'\n")
    (capi.parent / "__init__.py").write_text("__version__ = '1.31.1'\ndef get_available_providers(): return []\n")
    (capi / "libonnxruntime_providers_cuda.so").write_bytes(_shared_object("libcublasLt.so.97", "libc.so.6"))
    code = "import sys; sys.path.insert(0, sys.argv[1]); from cspdeploy.check.doctor_child import main; main()"
    tried = (
        *(f"runtime:{name}" for name in all_runtimes()),
        "engine:torch",
        "engine:openvino",
        "engine:onnx",
        "format",
    )
    known = json.dumps(dict.fromkeys(tried, OK))
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], input=known, capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    answers = {line["ended"]: line["answer"] for line in map(json.loads, done.stdout.splitlines()) if "ended" in line}
    missing = answers["libraries:CUDAExecutionProvider"]["missing"]
    assert missing[0] == "libcublasLt.so.97"
    assert "libc.so.6" not in missing
    assert "libraries:TensorrtExecutionProvider" not in answers


def _shared_object(*needed: str) -> bytes:
    names = b"\0" + b"".join(name.encode() + b"\0" for name in needed)
    places = [names.index(name.encode()) for name in needed]
    dynamic_at, base = 64 + 2 * 56, 0x1000
    dynamic_size = 16 * (len(needed) + 2)
    names_at = dynamic_at + dynamic_size
    entries = [(1, place) for place in places] + [(5, base + names_at), (0, 0)]
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack(
        "<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, 2, 64, 0, 0
    )
    size = names_at + len(names)
    load = struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 4096)
    dynamic = struct.pack("<IIQQQQQQ", 2, 6, dynamic_at, base + dynamic_at, 0, dynamic_size, dynamic_size, 8)
    return header + load + dynamic + b"".join(struct.pack("<qQ", *entry) for entry in entries) + names
