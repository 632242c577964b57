from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from cspdeploy.cli.app import main
from cspdeploy.core.errors import EXIT_USAGE, InputError

Run = Callable[..., CompletedProcess[str]]
Refuse = Callable[..., str]

QUICK = ("--min-runs", 5, "--min-seconds", 0.1, "-r", "ort-cpu")


def test_two_networks_as_a_table(run: Run) -> None:
    done = run("compare", "cspdarknet53", "darknet53", "--no-latency")
    assert done.returncode == 0, done.stderr
    assert "27,642,184" in done.stdout
    assert "41,609,928" in done.stdout
    assert "compare: counting" in done.stderr


def test_two_networks_as_json(run: Run) -> None:
    done = run("compare", "cspresnet50", "resnet50", "--no-latency", "--json", "--size", "224x256")
    report = json.loads(done.stdout)  # nothing but the document
    assert report["regime"]["size_px"] == [224, 256]
    assert {quantity["name"] for quantity in report["quantities"]} == {
        "parameters", "conv weights", "MACs", "activations", "peak activation memory",
    }  # fmt: skip
    assert report["latency"] == []
    assert report["accuracy"].keys() == {"a", "b", "comparable", "reason"}


def test_models_here_with_latency_and_a_plot(run: Run, tiny_bundle: Path, bundle: Path, tmp_path: Path) -> None:
    plot = tmp_path / "out.svg"
    done = run("compare", tiny_bundle, bundle, *QUICK, "--batch", 1, "--batch", 2, "--plot", plot, "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["latency"]
    assert [(row["runtime"], row["artifact"], row["batch"]) for row in rows] == [
        ("ort-cpu", "onnx", 1), ("ort-cpu", "onnx", 2),
    ]  # fmt: skip
    assert rows[0]["verdict"] in ("faster", "slower", "indistinguishable")
    assert rows[0]["ratio_low"] <= rows[0]["ratio"] <= rows[0]["ratio_high"]
    assert rows[1]["verdict"] == "not-measured"
    assert "ort-cpu onnx, batch 1" in plot.read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("without_simplifier")
def test_model_folders_are_exported_with_a_free_batch(run: Run, tiny_models: Path) -> None:
    done = run("compare", "tiny", "tiny", "--models", tiny_models, *QUICK)
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert "ort-cpu onnx, batch 8" in text
    assert "not measured" not in text
    assert "onnx-fp16 file" in text


def test_paper(run: Run) -> None:
    done = run("compare", "--paper")
    assert done.returncode == 0, done.stderr  # that a claim does not hold is a finding
    assert "CSPResNet-50 against ResNet-50" in done.stdout
    assert "does not hold: " in done.stdout.splitlines()[-1]


def test_paper_as_json(run: Run) -> None:
    report = json.loads(run("compare", "--paper", "--json").stdout)
    assert {result["verdict"] for result in report["results"]} >= {"holds", "does not hold", "not measurable here"}
    assert all(result["claim"]["source"] for result in report["results"])


def test_plot_that_fails_at_the_end_does_not_lose_the_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def refuse(path: Path, report: object) -> None:
        raise InputError(f"--plot {path}: cannot be written (No space left on device)", fix="name another file")

    monkeypatch.setattr("cspdeploy.report.plot.write_plot", refuse)
    words = ["compare", "csdarknet53", "darknet53", "--no-latency", "--plot", str(tmp_path / "out.svg")]
    assert main(words) == EXIT_USAGE
    found = capsys.readouterr()
    assert "27,642,184" in found.out
    assert "No space left on device" in found.err


# --- wrong use ---


@pytest.mark.parametrize(
    ("words", "subject"),
    [
        ((), "got no name, expected two"),
        (("darknet53",), "got one name, expected two"),
        (("darknet35", "darknet53"), "'darknet35': neither a network"),
        (("darknet53", "darknet53", "--size", "big"), "--size big"),
        (("darknet53", "darknet53", "--size", "1"), "--size 1"),
        (("darknet53", "darknet53", "--batch", "0"), "--batch 0: expected 1"),
        (("darknet53", "darknet53", "--batch", "one"), "--batch"),
        (("darknet53", "darknet53", "-r", "ort-cpuu"), "--runtime ort-cpuu: unknown"),
        (("darknet53", "darknet53", "--plot", "out.jpg"), "--plot out.jpg"),
        (("darknet53", "darknet53", "--plot", "none/out.svg"), "--plot none/out.svg"),
        (("darknet53", "--paper"), "--paper: takes no A"),
        (("--paper", "--plot", "out.svg", "--size", "64"), "--paper: takes no --size, --plot"),
        (("--paper", "-r", "ort-cpu"), "--runtime: only for --paper with --latency"),
        (("--paper", "--batch", "1"), "--batch: only for --paper with --latency"),
        (("--paper", "--calib", "none"), "--calib: only for --paper with --latency"),
        (("--paper", "--regimes", "all"), "--regimes: only for --paper with --latency"),
        (("--paper", "--device", "0"), "--device: only for --paper with --latency"),
        (("--paper", "--latency", "-r", "ort-cpu", "--regimes", "cuda-graph"), "--regimes cuda-graph: none of the"),
        (("darknet53", "darknet53", "--regimes", "channel-last"), "--regimes channel-last: unknown"),
        (("darknet53", "darknet53", "--regimes", " , "), "--regimes: got no name"),
        (("darknet53", "darknet53", "--device", "-1"), "--device -1: expected the index of a GPU"),
        (("--paper", "--latency", "-r", "ort-cpuu"), "--runtime ort-cpuu: unknown"),
        (("--paper", "--latency", "--batch", "0"), "--batch 0: expected 1"),
        (("none.cfg", "darknet53", "--no-latency"), "none.cfg"),
    ],
)
def test_wrong_use_is_one_line(
    refuse: Refuse, words: tuple[str, ...], subject: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert subject in refuse("compare", *words)


def test_gpu_that_nothing_uses_is_an_engine_that_is_missing(refuse: Refuse) -> None:
    said = refuse("compare", "darknet53", "darknet53", "-r", "ort-cpu", "--device", "0", code=3)
    assert "--device 0: no CUDA runtime is timed here (timed: ort-cpu)" in said


@pytest.mark.slow
def test_regimes_of_a_cpu(run: Run, tiny_bundle: Path, bundle: Path) -> None:
    quick = ("--min-runs", 5, "--min-seconds", 0.1, "-r", "torch-cpu", "--batch", 1, "--json")
    done = run("compare", tiny_bundle, bundle, *quick, "--regimes", "plain, channels-last")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["latency"]
    assert [(row["variant"], row["verdict"] == "not-measured") for row in rows] == [
        ("", False),
        ("channels-last", False),
    ]
    assert [row["settings"].get("memory_format", "") for row in rows] == ["", "channels_last"]


def test_changed_bundle_fails(refuse: Refuse, bundle: Path) -> None:
    with (bundle / "tiny.onnx").open("ab") as file:
        file.write(b"\0")
    assert "tiny.onnx" in refuse("compare", bundle, "darknet53", code=1)


def test_same_name_twice_is_allowed(run: Run, tiny_models: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_models / "tiny", tmp_path / "tiny")
    done = run("compare", "tiny", tmp_path / "tiny", "--models", tiny_models, "--no-latency")
    assert done.returncode == 0, done.stderr
    assert "1.000" in done.stdout
