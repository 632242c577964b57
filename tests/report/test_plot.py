from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import cspdeploy
from cspdeploy.core.errors import InputError
from cspdeploy.report.plot import PLOT_SUFFIXES, check_plot, write_plot

MAGIC = {".svg": b"<?xml", ".png": b"\x89PNG", ".pdf": b"%PDF"}


def _report(*, with_latency: bool = True, given: str = "csp_net") -> Any:
    quantities = [SimpleNamespace(name="parameters", ratio=1.5), SimpleNamespace(name="nothing", ratio=None)]
    timed = SimpleNamespace(
        runtime="ort-cpu",
        regime="ort-cpu onnx",
        batch=8,
        ratio=0.8,
        ratio_low=0.75,
        ratio_high=0.9,
        verdict="faster",
        engine="onnxruntime 1.31.1, 2 threads",
    )
    untimed = SimpleNamespace(
        runtime="ort-cuda", artifact="onnx", batch=8, ratio=None, verdict="not-measured", engine="none"
    )
    return SimpleNamespace(
        a=SimpleNamespace(given=given, untrained=False),
        b=SimpleNamespace(given="base$1$", untrained=with_latency), quantities=quantities,
        latency=[timed, untimed] if with_latency else [],
        regime=SimpleNamespace(size_px=(256, 192), layout="NCHW", environment={"cpu": "a CPU"}),
    )  # fmt: skip


def _words(path: Path) -> str:
    return " ".join(text.strip() for text in ET.parse(path).getroot().itertext())  # noqa: S314 (our own file)


@pytest.mark.parametrize("suffix", PLOT_SUFFIXES)
def test_format_follows_the_suffix_and_bytes_the_report(suffix: str, tmp_path: Path) -> None:
    first, second = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    write_plot(first, _report())
    write_plot(second, _report())
    assert first.read_bytes().startswith(MAGIC[suffix])
    assert first.read_bytes() == second.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"a{suffix}", f"b{suffix}"]
    write_plot(second, _report(with_latency=False))
    assert first.read_bytes() != second.read_bytes()


def test_words_are_text(tmp_path: Path) -> None:
    write_plot(tmp_path / "out.SVG", _report())
    words = _words(tmp_path / "out.SVG")
    for word in ("parameters", "ort-cpu onnx, batch 8", "A csp_net, B base$1$, 256x192 px", "95 % interval"):
        assert word in words
    assert "nothing" not in words  # there is no ratio to draw
    assert "ort-cuda" not in words
    assert "20" not in ET.tostring(ET.parse(tmp_path / "out.SVG").getroot()[0], encoding="unicode")[-200:]  # noqa: S314


def test_picture_says_what_its_latencies_hold_for(tmp_path: Path) -> None:
    write_plot(tmp_path / "out.svg", _report())
    words = _words(tmp_path / "out.svg")
    for word in ("ort-cpu: onnxruntime 1.31.1, 2 threads", "NCHW, a CPU", "B base$1$ is UNTRAINED"):
        assert word in words
    assert "A csp_net is UNTRAINED" not in words
    write_plot(tmp_path / "out.svg", _report(with_latency=False))
    for word in ("NCHW", "latency", "UNTRAINED"):
        assert word not in _words(tmp_path / "out.svg")


def test_longest_name_that_a_disk_takes(tmp_path: Path) -> None:
    path = tmp_path / f"{'a' * 251}.svg"
    write_plot(path, _report())
    assert list(tmp_path.iterdir()) == [path]


def test_folder_that_is_gone_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(OSError(28, "No space left")))
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(InputError, match="No space left"):
        write_plot(tmp_path / "out.svg", _report())


@pytest.mark.parametrize("name", ["out.jpg", "out", "out.svg.gz", "svg"])
def test_other_suffix_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected \.svg, \.png, \.pdf") as caught:
        check_plot(tmp_path / name)
    assert caught.value.fix == "--plot out.svg"


def test_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.svg").mkdir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "none" / "out.svg", tmp_path / "folder.svg", tmp_path / "file" / "out.svg"):
        with pytest.raises(InputError, match="cannot be written"):
            write_plot(path, _report())
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(InputError, match="cannot be written"):
        check_plot(tmp_path / "out.svg")


def test_full_disk_leaves_the_old_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.svg"
    path.write_text("old")

    def refuse(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(InputError, match="No space left on device"):
        write_plot(path, _report())
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("out.svg", "old")]


WITHOUT = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "matplotlib" else super().find_spec(name, path, target)

sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
from pathlib import Path
from cspdeploy.core.errors import MissingExtraError
from cspdeploy.report.plot import check_plot

try:
    check_plot(Path(sys.argv[1]))
except MissingExtraError as error:
    print(error.exit_code, error)
"""


def test_missing_matplotlib_names_its_extra(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(cspdeploy.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(tmp_path / "out.svg")], env=environment, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stdout.startswith("3 --plot needs the package 'matplotlib'")
    assert "pip install 'cspdeploy[report]'" in done.stdout
