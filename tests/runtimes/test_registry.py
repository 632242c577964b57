from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import onnxruntime
import pytest

import cspdeploy.runtimes
from cspdeploy.core.errors import EXIT_NO_ENGINE, InputError, RuntimeUnavailableError
from cspdeploy.runtimes import all_runtimes, require_runtime
from cspdeploy.runtimes.ort import CUDA

NEW_ENGINE = """
from cspdeploy.runtimes.base import Runtime
RUNTIMES = (
    Runtime(
        name="abacus-cpu", device="cpu", formats=frozenset({"onnx"}), precisions=frozenset({"fp32"}), timed=False,
        notes={}, missing=lambda: ("no abacus here", "buy one"), probe=lambda: None, open=lambda request: None,
    ),
)
"""


@pytest.fixture
def fresh_registry() -> Iterator[None]:
    all_runtimes.cache_clear()
    yield
    all_runtimes.cache_clear()


def test_names_and_devices() -> None:
    assert set(all_runtimes()) == {
        "torch-cpu", "torch-cuda", "torchscript-cpu", "torchscript-cuda", "pt2-cpu", "pt2-cuda", "ort-cpu", "ort-cuda",
        "fp16-rounding", "onnx-fp64", "openvino", "ort-tensorrt",
    }  # fmt: skip
    for name, runtime in all_runtimes().items():
        assert runtime.name == name
        assert runtime.device == ("cuda" if name.endswith(("-cuda", "-tensorrt")) else "cpu")
    assert not all_runtimes()["fp16-rounding"].timed


def test_cpu_comes_first() -> None:
    devices = [runtime.device for runtime in all_runtimes().values()]
    assert devices == sorted(devices)


def test_every_file_with_an_engine_is_found() -> None:
    folder = Path(cspdeploy.runtimes.__file__).parent
    files = [path.stem for path in folder.glob("*.py") if "\nRUNTIMES = " in path.read_text()]
    assert sorted(files) == [
        "eager", "fp16_rounding", "onnx_fp64", "openvino", "ort", "ort_tensorrt", "pt2", "torchscript"
    ]  # fmt: skip
    defined = [runtime for name in files for runtime in importlib.import_module(f"cspdeploy.runtimes.{name}").RUNTIMES]
    assert len(defined) == len(all_runtimes())
    for runtime in defined:
        assert all_runtimes()[runtime.name] is runtime


@pytest.mark.usefixtures("fresh_registry")
def test_new_engine_is_one_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "abacus.py").write_text(NEW_ENGINE)
    monkeypatch.setattr(cspdeploy.runtimes, "__path__", [*cspdeploy.runtimes.__path__, str(tmp_path)])
    assert "abacus-cpu" in all_runtimes()
    assert "ort-cpu" in all_runtimes()
    with pytest.raises(RuntimeUnavailableError, match="--runtime abacus-cpu: no abacus here") as caught:
        require_runtime("abacus-cpu")
    assert caught.value.fix == "buy one"


@pytest.mark.usefixtures("fresh_registry")
def test_what_is_no_runtime_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device without that engine has the others."""
    (tmp_path / "helper.py").write_text("import an_engine_that_is_not_here\n# no RUNTIMES in it\n")
    (tmp_path / "abacus.py").write_text(NEW_ENGINE)
    monkeypatch.setattr(cspdeploy.runtimes, "__path__", [*cspdeploy.runtimes.__path__, str(tmp_path)])
    assert {"abacus-cpu", "ort-cpu"} <= all_runtimes().keys()


def test_unknown_runtime_suggests_the_nearest() -> None:
    with pytest.raises(InputError, match=r"--runtime ort-cpuu: unknown, expected one of .*ort-cpu") as caught:
        require_runtime("ort-cpuu")
    assert caught.value.fix == "--runtime ort-cpu"


def test_runtime_like_no_other_gets_the_list() -> None:
    with pytest.raises(InputError, match="torchscript-cpu") as caught:
        require_runtime("quantum")
    assert caught.value.fix == "cspdeploy doctor"


def test_device_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(RuntimeUnavailableError, match=f"--runtime ort-cuda: this onnxruntime has no {CUDA}") as caught:
        require_runtime("ort-cuda")
    assert caught.value.exit_code == EXIT_NO_ENGINE == 3
    assert "cspdeploy[gpu]" in caught.value.fix


def test_runtime_reads_its_own_formats_and_precisions() -> None:
    ort, rounding, eager = (all_runtimes()[name] for name in ("ort-cpu", "fp16-rounding", "torch-cpu"))
    assert ort.reads(format_="onnx", precision="fp32")
    assert ort.reads(format_="onnx", precision="fp16")
    assert not ort.reads(format_="torchscript", precision="fp32")
    assert not rounding.reads(format_="onnx", precision="fp32")
    assert not eager.reads(format_="onnx", precision="fp32")


@pytest.mark.usefixtures("fresh_registry")
@pytest.mark.parametrize("name", ["ort-cpu", "openvino", "torch-cpu", "fp16-rounding"])
def test_one_runtime_reads_no_other_file_where_its_name_tells(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cold start pays for every file that is read; "torch-cpu" is the one whose file is called otherwise."""
    read: list[str] = []
    defines = cspdeploy.runtimes._defines_runtimes
    monkeypatch.setattr(
        cspdeploy.runtimes, "_defines_runtimes", lambda module: (read.append(module), defines(module))[1]
    )
    assert require_runtime(name) is not None
    assert (len(read) == 1) is (name != "torch-cpu")
