from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import onnx
import pytest

from cspdeploy.check import roofline
from cspdeploy.core.errors import EXIT_NO_ENGINE
from cspdeploy.runtimes import all_runtimes

Run = Callable[..., CompletedProcess[str]]
QUICK = ("-r", "ort-cpu", "--min-runs", 5, "--min-seconds", 0.1, "--max-seconds", 0)


@pytest.fixture(autouse=True)
def small_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's peak by a product of a moment: its value means nothing here."""
    monkeypatch.setattr(roofline, "PRODUCT_SIDE", {"cpu": 64})
    monkeypatch.setattr(roofline, "STREAM_VALUES", 1 << 20)


def _write(path: Path, operator: str = "Add") -> Path:
    text = f'<ir_version: 8, opset_import: ["" : 17]> g (float[1, 4] x) => (float[1, 4] y) {{ y = {operator}(x, x) }}'
    path.write_bytes(onnx.parser.parse_model(text).SerializeToString())
    return path


def test_bundle_as_a_table(run: Run, tiny_bundle: Path) -> None:
    done = run("bench", tiny_bundle, *QUICK)
    assert done.returncode == 0, done.stderr
    for part in ("onnx-fp16", "p50 ms", "95 % interval", "cold start", "memory", "peak", "outputs were not compared"):
        assert part in " ".join(done.stdout.split())
    assert "bench:" in done.stderr


def test_files_as_json_with_raw_samples(run: Run, tmp_path: Path) -> None:
    done = run("bench", _write(tmp_path / "a.onnx"), _write(tmp_path / "b.onnx"), "--json", "--profile", *QUICK)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["schema_version"] == 1
    assert [row["artifact"] for row in report["rows"]] == ["a.onnx", "b.onnx"]
    assert all(len(row["rounds_ms"]) >= 6 for row in report["rows"])
    assert all(row["cold"]["open_ms"] > 0 and row["memory"]["peak_bytes"] >= 0 for row in report["rows"])
    assert [profile["artifact"] for profile in report["profiles"]] == ["a.onnx", "b.onnx"]
    assert {"cpu", "cpu_governor", "cpu_affinity", "load_1min", "clock_mhz"} <= set(report["environment"])


def test_row_that_fails_is_exit_1(run: Run, tmp_path: Path) -> None:
    done = run("bench", _write(tmp_path / "a.onnx"), _write(tmp_path / "b.onnx", "Frobnicate"), *QUICK)
    assert done.returncode == 1
    assert "b.onnx on ort-cpu: error:" in " ".join(done.stdout.split())


def test_wrong_use(refuse: Callable[..., str], tmp_path: Path) -> None:
    assert "unknown" in refuse("bench", _write(tmp_path / "a.onnx"), "-r", "abacus")
    refuse("bench", tmp_path / "none.onnx")
    (tmp_path / "noise.onnx").write_bytes(b"no model")
    refuse("bench", tmp_path / "noise.onnx")
    refuse("bench", tmp_path / "no-such-folder")


def test_threads_that_would_starve_the_machine(refuse: Callable[..., str], tmp_path: Path) -> None:
    assert "--threads 100000: expected at most" in refuse("bench", _write(tmp_path / "a.onnx"), "--threads", 100_000)


def test_seconds_that_are_no_time(refuse: Callable[..., str], tmp_path: Path) -> None:
    assert "--max-seconds inf" in refuse("bench", _write(tmp_path / "a.onnx"), "--max-seconds", "inf")


def test_gpu_options_on_a_machine_without_one(run: Run, refuse: Callable[..., str], tmp_path: Path) -> None:
    model = _write(tmp_path / "a.onnx")
    assert "--device 3: got ort-cpu" in refuse("bench", model, "-r", "ort-cpu", "--device", 3)
    assert "--cuda-graph: got ort-cpu" in refuse("bench", model, "-r", "ort-cpu", "--cuda-graph")
    assert "--variant nhcw: unknown" in refuse("bench", model, "-r", "ort-cpu", "--variant", "nhcw")
    refuse("bench", model, "--device", -1)
    refuse("bench", model, "--conv-search", "fastest")
    if all(one.missing() for one in all_runtimes().values() if one.device == "cuda"):
        done = run("bench", model, "--device", 0)
        assert done.returncode == EXIT_NO_ENGINE
        assert done.stdout == ""
        assert "no runtime here computes on a GPU" in done.stderr


def test_variants_that_a_runtime_has_not_change_nothing(run: Run, tmp_path: Path) -> None:
    done = run("bench", _write(tmp_path / "a.onnx"), "--variants", "--json", *QUICK)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [(row["runtime"], row["variant"], row["events"], row["inputs"]) for row in report["rows"]] == [
        ("ort-cpu", "", None, "")
    ]  # fmt: skip
    assert report["gpus"] == []
