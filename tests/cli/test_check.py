from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image

Run = Callable[..., CompletedProcess[str]]
Refuse = Callable[..., str]

ROW_KEYS = {"artifact", "runtime", "verdict", "rel_l2", "max_abs", "top1_agreement", "p50_ms", "p95_ms"}
RUNGS = [
    ("preprocess", "shared"), ("eager", "torch-cpu"), ("torchscript", "torchscript-cpu"), ("onnx", "ort-cpu"),
    ("onnx-fp16", "ort-cpu"), ("onnx-fp16", "fp16-rounding"),
]  # fmt: skip


def _cpu_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that every machine has."""
    return [row for row in report["rows"] if not row["runtime"].endswith("-cuda")]


# --- verify ---


@pytest.mark.usefixtures("quick_latency")
def test_verify_as_json(run: Run, tiny_bundle: Path) -> None:
    done = run("verify", tiny_bundle, "--json")
    assert done.returncode == 0, done.stdout
    report = json.loads(done.stdout)
    assert (report["verdict"], report["first_break"], report["untrained"]) == ("pass", "", [])
    rows = _cpu_rows(report)
    assert sorted((row["artifact"], row["runtime"]) for row in rows) == sorted(RUNGS)
    for row in rows:
        assert row.keys() >= ROW_KEYS
        assert row["verdict"] == "pass"
        assert row["bundle"] == str(tiny_bundle)
        if row["artifact"] == "preprocess":
            continue
        assert row["rel_l2"] <= row["limit"] <= 1e-2
        assert row["rel_l2"] < (1e-2 if row["artifact"] == "onnx-fp16" else 1e-5)
        assert row["max_abs"] >= 0
        assert 0 <= row["top1_agreement"] <= 1
        timed = row["runtime"] != "fp16-rounding"
        assert (row["p50_ms"] is not None and row["p50_ms"] <= row["p95_ms"]) == timed
    assert report["noise_floor"].keys() == {str(tiny_bundle)}
    assert report["environment"]["cpu"]


def test_what_is_printed_beside_json_is_progress_on_stderr(run: Run, tiny_bundle: Path) -> None:
    done = run("verify", tiny_bundle, "--json", "--no-latency", "-r", "ort-cpu")
    report = json.loads(done.stdout)  # nothing but the document
    assert [(row["artifact"], row["p50_ms"]) for row in report["rows"]] == [
        ("preprocess", None), ("onnx", None), ("onnx-fp16", None),
    ]  # fmt: skip
    assert "verify: " in done.stderr


def test_fp16_on_a_cpu_says_that_it_proves_nothing_of_fp16(run: Run, tiny_bundle: Path) -> None:
    done = run("verify", tiny_bundle, "--no-latency", "-r", "ort-cpu", "-r", "fp16-rounding")
    assert done.returncode == 0
    text = " ".join(done.stdout.split())
    assert "onnx-fp16 on ort-cpu: computed in FP32 on the CPU" in text
    assert "PASS: 4 of 4 rows hold" in text


def test_verify_finds_all_bundles_of_a_folder(run: Run, bundle: Path) -> None:
    shutil.copytree(bundle, bundle.with_name("second"))
    done = run("verify", bundle.parent, "--no-latency", "--json", "-r", "ort-cpu")
    found = {row["bundle"] for row in json.loads(done.stdout)["rows"]}
    assert found == {str(bundle), str(bundle.with_name("second"))}


def test_verify_without_a_folder_takes_exported(run: Run, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bundle.parents[1])
    done = run("verify", "--no-latency", "-r", "ort-cpu", "--json")
    assert {row["bundle"] for row in json.loads(done.stdout)["rows"]} == {"exported/tiny"}


def test_accuracy_of_labelled_images(run: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for label in range(10):
        (tmp_path / "data" / f"label {label}").mkdir(parents=True)
        for i in range(10):
            pixels = rng.integers(0, 256, (8, 8), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / f"label {label}" / f"{i}.png")
    done = run("verify", tiny_bundle, "--no-latency", "--json", "-r", "ort-cpu", "--accuracy", tmp_path / "data")
    assert done.returncode == 0
    for row in json.loads(done.stdout)["rows"][1:]:
        assert row["accuracy_images"] == 10  # every tenth image is for testing
        assert 0 <= row["top1"] <= row["top5"] <= 1
    text = run("verify", tiny_bundle, "--no-latency", "-r", "ort-cpu", "--accuracy", tmp_path / "data").stdout
    assert "accuracy" in text


@pytest.mark.parametrize("kind", ["missing", "empty", "one class", "file"])
def test_accuracy_on_what_is_no_data(refuse: Refuse, tiny_bundle: Path, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "data"
    if kind == "file":
        folder.write_bytes(b"")
    elif kind != "missing":
        folder.mkdir()
    if kind == "one class":
        (folder / "only").mkdir()
    assert str(folder) in refuse("verify", tiny_bundle, "--no-latency", "--accuracy", folder)


def test_limit_that_is_passed_fails_and_names_the_rung(
    run: Run, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cspdeploy.check.tolerance.FP16_LIMIT", 1e-9)
    done = run("verify", tiny_bundle, "--no-latency", "-r", "ort-cpu", "-r", "fp16-rounding")
    assert done.returncode == 1
    assert "FAIL: first broken rung" in done.stdout
    assert "onnx-fp16 on ort-cpu" in " ".join(done.stdout.split())
    report = json.loads(run("verify", tiny_bundle, "--no-latency", "-r", "ort-cpu", "--json").stdout)
    assert report["verdict"] == "fail"
    assert {row["artifact"]: row["verdict"] for row in report["rows"]}["onnx-fp16"] == "numeric"


# --- bundles that are not what they say ---


@pytest.mark.parametrize("file", ["tiny.onnx", "tiny.fp16.onnx", "tiny.torchscript.pt", "golden.npz", "labels.txt"])
def test_changed_byte_is_named(refuse: Refuse, bundle: Path, file: str) -> None:
    content = bytearray((bundle / file).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / file).write_bytes(content)
    lines = refuse("verify", bundle, code=1)
    assert f"{file}: not the file of the manifest" in lines
    assert "bench" not in lines


def test_changed_byte_stops_bench_too(refuse: Refuse, bundle: Path) -> None:
    with (bundle / "tiny.onnx").open("ab") as file:
        file.write(b"\0")
    assert "tiny.onnx" in refuse("bench", bundle, code=1)


def _edit(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = bundle / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def _unknown_key(data: dict[str, Any]) -> None:
    data["spec"]["preprocess"]["gamma"] = 2.2


def _leave_the_folder(data: dict[str, Any]) -> None:
    data["artifacts"][1]["file"] = "../tiny.onnx"


def _wrong_type(data: dict[str, Any]) -> None:
    data["artifacts"][0]["num_bytes"] = "many"


def _newer(data: dict[str, Any]) -> None:
    data["schema_version"] = 99


@pytest.mark.parametrize(
    ("change", "subject"),
    [
        (_unknown_key, "$.spec.preprocess.gamma: unknown key"),
        (_leave_the_folder, "'../tiny.onnx' leaves the bundle's folder"),
        (_wrong_type, "$.artifacts[0].num_bytes"),
        (_newer, "schema_version 99"),
    ],
)
def test_manifest_that_is_wrong(
    refuse: Refuse, bundle: Path, change: Callable[[dict[str, Any]], None], subject: str
) -> None:
    shutil.copy(bundle / "tiny.onnx", bundle.parent)  # so that it is there to be found
    _edit(bundle, change)
    lines = refuse("verify", bundle)
    assert f"{bundle}/manifest.json: " in lines
    assert subject in lines


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"text"'])
def test_manifest_that_is_none(refuse: Refuse, bundle: Path, content: str) -> None:
    (bundle / "manifest.json").write_text(content)
    assert "manifest.json" in refuse("verify", bundle)


def test_missing_file_is_named(refuse: Refuse, bundle: Path) -> None:
    (bundle / "tiny.onnx").unlink()
    assert "tiny.onnx: missing" in refuse("verify", bundle)


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_folder_without_a_bundle(refuse: Refuse, tmp_path: Path, command: str) -> None:
    lines = refuse(command, tmp_path)
    assert "holds no bundle" in lines
    assert "fix: cspdeploy export" in lines


def test_folder_that_is_not_there(refuse: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no such folder" in refuse("verify", tmp_path / "none")
    monkeypatch.chdir(tmp_path)
    assert "exported: no such folder" in refuse("verify")


# --- runtimes ---


def test_runtime_that_is_missing_here(refuse: Refuse, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    for command in ("verify", "bench"):
        lines = refuse(command, tiny_bundle, "--runtime", "ort-cuda", code=3)
        assert "--runtime ort-cuda: this onnxruntime has no CUDAExecutionProvider" in lines
        assert "cspdeploy[gpu]" in lines


def test_unknown_runtime_suggests_the_nearest(refuse: Refuse, tiny_bundle: Path) -> None:
    lines = refuse("verify", tiny_bundle, "--runtime", "ort-cpuu")
    assert "--runtime ort-cpuu: unknown" in lines
    assert "fix: --runtime ort-cpu" in lines


def test_runtime_that_reads_nothing_of_it_is_no_pass(refuse: Refuse, bundle: Path) -> None:
    _edit(bundle, lambda data: data.update(artifacts=data["artifacts"][:2]))
    assert "nothing could be checked" in refuse("verify", bundle, "--no-latency", "-r", "fp16-rounding")


# --- bench ---


def test_bench(run: Run, tiny_bundle: Path) -> None:
    options = ("--min-runs", 5, "--min-seconds", 0.1, "-r", "ort-cpu", "-r", "torchscript-cpu")
    done = run("bench", tiny_bundle, *options, "--json")
    assert done.returncode == 0
    rows = json.loads(done.stdout)["rows"]
    assert [row["artifact"] for row in rows] == ["torchscript", "onnx", "onnx-fp16"]
    assert rows[0]["timing"]["verdict"] == "reference"
    for row in rows:
        timing = row["timing"]
        assert timing["num_runs"] == len(timing["samples_ms"]) >= 5
        assert 0 < timing["ci_low_ms"] <= timing["p50_ms"] <= timing["ci_high_ms"]
        assert row["rel_l2"] is None  # parity is not its matter
        assert timing["verdict"] in ("reference", "faster", "slower", "indistinguishable")


@pytest.mark.usefixtures("quick_latency")
def test_bench_as_a_table(run: Run, tiny_bundle: Path) -> None:
    done = run("bench", tiny_bundle, "-r", "ort-cpu", "--min-runs", 5, "--min-seconds", 0.1)
    assert done.returncode == 0
    assert "(speed against onnx on ort-cpu)" in " ".join(done.stdout.split())
    assert all(word in done.stdout for word in ("p50 ms", "p95 ms", "95 % interval", "1.00x"))
