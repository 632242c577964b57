from __future__ import annotations

import dataclasses
import json
import shutil
import xml.etree.ElementTree as ET  # the file is our own
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import onnxruntime
import pytest
import typer
from PIL import Image

from cspdeploy.check import settings
from cspdeploy.cli import check
from cspdeploy.cli.app import app
from cspdeploy.core.bundle import file_record
from cspdeploy.core.errors import InputError
from cspdeploy.core.golden import read_golden, write_golden
from cspdeploy.pipeline import publish

Run = Callable[..., CompletedProcess[str]]
Refuse = Callable[..., str]

ROW_KEYS = {"artifact", "runtime", "verdict", "rel_l2", "max_abs", "top1_agreement", "p50_ms", "p95_ms"}
RUNGS = [
    ("preprocess", "shared"), ("eager", "torch-cpu"), ("torchscript", "torchscript-cpu"), ("onnx", "ort-cpu"),
    ("onnx-fp16", "ort-cpu"), ("onnx-fp16", "fp16-rounding"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def in_this_process(request: pytest.FixtureRequest) -> None:
    """One test has its sessions in children, as a user has."""
    if "as_a_user" not in request.fixturenames:
        request.getfixturevalue("sessions_here")


@pytest.fixture
def as_a_user() -> None:
    """With the defaults of the command line."""


def _cpu_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that every machine has."""
    return [row for row in report["rows"] if not row["runtime"].endswith("-cuda")]


# --- verify ---


@pytest.mark.usefixtures("quick_latency", "as_a_user")
def test_each_session_has_a_process_of_its_own(run: Run, tiny_bundle: Path) -> None:
    done = run("verify", tiny_bundle, "--json", "-r", "ort-cpu")
    assert done.returncode == 0, done.stdout
    report = json.loads(done.stdout)
    assert report["settings"]["isolate"]
    for row in report["rows"][1:]:
        assert row["cold"]["open_ms"] > 0
        assert row["memory"]["peak_bytes"] > 0
        assert row["audit"]["problem"] == ""


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
        assert (row["p50_ms"] is not None) == timed
    assert report["noise_floor"].keys() == {str(tiny_bundle)}
    assert report["environment"]["cpu"]
    assert report["schema_version"] >= 1
    assert report["settings"]["phase_seconds"]["latency"] > 0


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
            (tmp_path / "data" / f"label {label}" / f"{i}.txt").write_text("a caption, and no box")
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


def test_limit_that_is_passed_fails_and_names_the_rung(run: Run, tiny_bundle: Path) -> None:
    given = ("--tolerance", "onnx-fp16=1e-9")
    done = run("verify", tiny_bundle, "--no-latency", "-r", "ort-cpu", "-r", "fp16-rounding", *given)
    assert done.returncode == 1
    assert "FAIL: first broken rung" in done.stdout
    assert "onnx-fp16 on ort-cpu" in " ".join(done.stdout.split())
    report = json.loads(run("verify", tiny_bundle, "--no-latency", "-r", "ort-cpu", "--json", *given).stdout)
    assert report["verdict"] == "fail"
    assert report["settings"]["tolerances"] == {"onnx-fp16": 1e-9}
    assert {row["artifact"]: row["verdict"] for row in report["rows"]}["onnx-fp16"] == "numeric"


# --- bundles that are not what they say ---


@pytest.mark.parametrize("file", ["tiny.onnx", "tiny.fp16.onnx", "tiny.torchscript.pt", "golden.npz", "labels.txt"])
def test_changed_byte_is_named(refuse: Refuse, bundle: Path, file: str) -> None:
    content = bytearray((bundle / file).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / file).write_bytes(content)
    lines = refuse("verify", bundle, code=1)
    assert f"{file}: not the file of the manifest" in lines


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


def test_folder_without_a_bundle(refuse: Refuse, tmp_path: Path) -> None:
    lines = refuse("verify", tmp_path)
    assert "holds no bundle" in lines
    assert "fix: cspdeploy export" in lines


def test_folder_that_is_not_there(refuse: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no such folder" in refuse("verify", tmp_path / "none")
    monkeypatch.chdir(tmp_path)
    assert "exported: no such folder" in refuse("verify")


# --- runtimes ---


def test_runtime_that_is_missing_here(refuse: Refuse, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    lines = refuse("verify", tiny_bundle, "--runtime", "ort-cuda", code=3)
    assert "--runtime ort-cuda: this onnxruntime has no CUDAExecutionProvider" in lines
    assert "cspdeploy[gpu]" in lines


def test_gpu_that_was_asked_for_says_what_is_missing(
    refuse: Refuse, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CSPDEPLOY_RUNTIMES", "ort-cpu,ort-cuda")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    lines = refuse("verify", tiny_bundle, "--device", "0", code=3)
    assert "--device 0: no runtime on CUDA can be used here (ort-cuda: this onnxruntime has no CUDA" in lines
    assert "cspdeploy[gpu]" in lines
    assert "--device 0: ort-cpu runs on no GPU" in refuse("verify", tiny_bundle, "--device", "0", "-r", "ort-cpu")
    assert "--device -1: expected the index of a GPU" in refuse("verify", tiny_bundle, "--device", "-1")


def test_repeats_are_told(run: Run, refuse: Refuse, tiny_bundle: Path) -> None:
    done = run("verify", tiny_bundle, "--no-latency", "-r", "ort-cpu", "--repeats", "4", "--explain")
    assert done.returncode == 0
    assert "onnx on ort-cpu: 4 runs of one input give the same bits" in " ".join(done.stdout.split())
    done = run("verify", tiny_bundle, "--no-latency", "-r", "ort-cpu", "--repeats", "4", "--json")
    found = [row["repeats"] for row in json.loads(done.stdout)["rows"] if row["artifact"] == "onnx"]
    assert found == [{"num_runs": 4, "num_different": 0, "max_rel_l2": 0.0, "first_bad_run": 0}]
    for number in ("1", "1001"):
        assert f"--repeats {number}: expected 0, or 2 to 1000" in refuse("verify", tiny_bundle, "--repeats", number)


def test_unknown_runtime_suggests_the_nearest(refuse: Refuse, tiny_bundle: Path) -> None:
    lines = refuse("verify", tiny_bundle, "--runtime", "ort-cpuu")
    assert "--runtime ort-cpuu: unknown" in lines
    assert "fix: --runtime ort-cpu" in lines


def test_runtime_that_reads_nothing_of_it_is_no_pass(refuse: Refuse, bundle: Path) -> None:
    _edit(bundle, lambda data: data.update(artifacts=data["artifacts"][:2]))
    (bundle / "tiny.fp16.onnx").unlink()
    assert "nothing could be checked" in refuse("verify", bundle, "--no-latency", "-r", "fp16-rounding")


# --- limits ---


def test_explain_tells_how_each_limit_came_about(run: Run, tiny_bundle: Path) -> None:
    done = run("verify", tiny_bundle, "--no-latency", "-r", "ort-cpu", "--explain")
    text = " ".join(done.stdout.split())
    assert "onnx, logits: " in text
    assert "16 x the noise floor" in text
    assert "noise_floor " in text
    assert "% of the limit" in text
    assert text.index("limits of") < text.index("PASS: ")


def test_given_tolerance_is_told_everywhere(run: Run, tiny_bundle: Path) -> None:
    given = ("--tolerance", "onnx-fp16=0.05", "--no-latency", "-r", "ort-cpu")
    done = run("verify", tiny_bundle, *given)
    assert done.returncode == 0
    assert "5.0e-02*" in done.stdout
    assert "1 judged by limits given with --tolerance" in " ".join(done.stdout.split())
    rows = json.loads(run("verify", tiny_bundle, *given, "--json").stdout)["rows"]
    assert [limit["overridden"] for row in rows for limit in row["limits"]] == [False, True]


@pytest.mark.parametrize("text", ["0", "onnx=-1", "onnx=x", "nan"])
def test_tolerance_that_is_none(refuse: Refuse, tiny_bundle: Path, text: str) -> None:
    assert f"--tolerance {text}: expected" in refuse("verify", tiny_bundle, "--no-latency", "--tolerance", text)


def test_tolerance_for_what_is_not_there(refuse: Refuse, tiny_bundle: Path) -> None:
    lines = refuse("verify", tiny_bundle, "--no-latency", "--tolerance", "onnx-fp61=0.1")
    assert "did you mean 'onnx-fp16'?" in lines


# --- an older bundle ---


@pytest.mark.usefixtures("quick_latency")
def test_against_the_same_bundle_nothing_is_worse(run: Run, tiny_bundle: Path, bundle: Path) -> None:
    done = run("verify", tiny_bundle, "--against", bundle, "--no-latency", "-r", "ort-cpu", "--json")
    assert done.returncode == 0, done.stdout
    report = json.loads(done.stdout)
    assert report["against"] == str(bundle)
    assert {(found["artifact"], found["verdict"]) for found in report["regressions"]} == {
        ("onnx", "same"), ("onnx-fp16", "same"),
    }  # fmt: skip


def test_artifact_that_is_gone_fails(run: Run, tiny_bundle: Path, bundle: Path) -> None:
    _edit(bundle, lambda data: data.update(artifacts=data["artifacts"][:2]))
    (bundle / "tiny.fp16.onnx").unlink()
    done = run("verify", bundle, "--against", tiny_bundle, "--no-latency", "-r", "ort-cpu")
    assert done.returncode == 1
    assert "onnx-fp16 on ort-cpu is gone" in " ".join(done.stdout.split())


def test_against_needs_one_thing_to_compare_with(refuse: Refuse, tiny_bundle: Path, bundle: Path) -> None:
    assert "got 2 things" in refuse("verify", tiny_bundle, bundle, "--against", bundle)
    file = bundle / "tiny.onnx"
    assert "expected an ONNX file" in refuse("verify", file, "--against", bundle)
    for old, reason in ((bundle / "none", "no such folder"), (file, "expected a bundle")):
        assert reason in refuse("verify", bundle, "--against", old, "--no-latency")


def test_old_bundle_that_cannot_be_compared_is_refused_before_the_new_one_is_verified(
    run: Run, tiny_bundle: Path, bundle: Path
) -> None:
    _edit(bundle, lambda data: data["labels"].__setitem__(0, "cat"))
    done = run("verify", tiny_bundle, "--against", bundle, "--no-latency")
    assert done.returncode == 2
    assert "'cat' there" in done.stderr
    assert "verify:" not in done.stderr  # no progress: nothing was computed


# --- one file ---


@pytest.mark.usefixtures("references_here")
def test_file_from_anywhere_is_judged_by_the_one_it_was_made_from(run: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    for name in ("tiny.onnx", "tiny.fp16.onnx"):
        shutil.copy(tiny_bundle / name, tmp_path / name)
    done = run("verify", tmp_path / "tiny.fp16.onnx", "--against", tmp_path / "tiny.onnx", "--no-latency", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0, report["first_break"]
    assert {row["bundle"] for row in report["rows"]} == {str(tmp_path / "tiny.fp16.onnx")}
    assert any("random numbers" in warning for warning in report["warnings"])


def test_images_and_contract_are_not_for_a_bundle(refuse: Refuse, tiny_bundle: Path, tmp_path: Path) -> None:
    assert "a bundle has its own images" in refuse("verify", tiny_bundle, "--images", tmp_path)
    assert "a bundle has its own images" in refuse("verify", tiny_bundle, "--preprocess", "imagenet")


@pytest.mark.parametrize("value", ["inf", "nan"])
def test_time_limit_that_is_no_time(refuse: Refuse, tiny_bundle: Path, value: str) -> None:
    assert "--time-limit" in refuse("verify", tiny_bundle, "--no-latency", "--time-limit", value)


@pytest.mark.usefixtures("references_here")
def test_suffix_may_be_written_large(run: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_bundle / "tiny.onnx", tmp_path / "TINY.ONNX")
    done = run("verify", tmp_path / "TINY.ONNX", "--no-latency")
    assert done.returncode == 0, done.stderr
    assert "reference: TINY.ONNX in FP64" in done.stdout
    assert "warning: " in done.stdout  # of the random inputs
    assert not any("in FP64" in line for line in done.stdout.splitlines() if line.startswith("warning"))


# --- reports for others ---


def test_junit_file_has_a_case_a_row(run: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "verify.xml"
    done = run("verify", tiny_bundle, "--no-latency", "-r", "ort-cpu", "--junit", file, "--tolerance", "onnx=1e-12")
    assert done.returncode == 1
    cases = ET.parse(file).getroot().iter("testcase")  # noqa: S314  # written a moment ago
    failed = {case.get("name"): case.find("failure") is not None for case in cases}
    assert sorted(failed.values()) == [False, False, True]


def test_junit_file_that_is_a_folder(refuse: Refuse, tiny_bundle: Path, tmp_path: Path) -> None:
    assert "is a folder, expected a file" in refuse("verify", tiny_bundle, "--no-latency", "--junit", tmp_path)


def test_file_that_cannot_be_written_does_not_hide_the_verdict(
    run: Run, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse_to_write(path: Path, *arguments: Any, **more: Any) -> int:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_text", refuse_to_write)
    command = ("verify", bundle, "--no-latency", "-r", "ort-cpu", "--junit", tmp_path / "verify.xml")
    done = run(*command)
    assert done.returncode == 2
    assert "PASS" in done.stdout
    assert "No space left on device" in done.stderr
    done = run(*command, "--tolerance", "1e-12")
    assert done.returncode == 1  # the verdict is the graver news
    assert "FAIL" in done.stdout


def test_report_that_cannot_be_written_does_not_hide_the_verdict(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: Any, **more: Any) -> Path:
        raise InputError("exported: cannot be written: No space left on device", fix="free some space")

    monkeypatch.setattr(publish, "publish_report", full)
    monkeypatch.setattr(check, "_latency", lambda: None)
    assert check.finish_verify(bundle, json_=False) == 2
    printed = capsys.readouterr()
    assert "PASS" in printed.out
    assert "error: exported: cannot be written: No space left on device\nfix: free some space\n" in printed.err


def test_junit_file_in_no_folder(refuse: Refuse, tiny_bundle: Path, tmp_path: Path) -> None:
    """Said before the work is done, not after."""
    lines = refuse("verify", tiny_bundle, "--no-latency", "--junit", tmp_path / "none" / "verify.xml")
    assert "none" in lines


def test_time_limit_of_the_help_is_that_of_the_check() -> None:
    """Written twice, so that --help need not import the check."""
    command = typer.main.get_command(app).commands["verify"]  # type: ignore[attr-defined]
    option = next(option for option in command.params if option.name == "time_limit")
    assert option.default == settings.DEFAULT_TIME_LIMIT_S


def test_exit_codes_are_in_the_help(run: Run) -> None:
    text = " ".join(run("verify", "--help").stdout.split())
    assert "Exit codes: 0 all that could be checked holds; 1 a check failed" in text


# --- bundles with more or less than they should hold ---


def test_unlisted_file_is_refused_and_named(refuse: Refuse, bundle: Path) -> None:
    (bundle / "weights.bin").write_bytes(b"")
    assert "weights.bin: in the folder, but not in its manifest.json" in refuse("verify", bundle)


def test_blank_images_are_refused(refuse: Refuse, bundle: Path) -> None:
    golden = read_golden(bundle / "golden.npz")
    write_golden(bundle / "golden.npz", dataclasses.replace(golden, images=np.zeros_like(golden.images)))
    record = file_record(bundle / "golden.npz")

    def change(data: dict[str, Any]) -> None:
        entry = next(entry for entry in data["files"] if entry["file"] == "golden.npz")
        entry.update(sha256=record.sha256, num_bytes=record.num_bytes)

    _edit(bundle, change)
    assert "is of one colour, expected real images" in refuse("verify", bundle)
