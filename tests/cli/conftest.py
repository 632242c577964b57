"""The command line, run in this process: what it prints, what it answers, and what it leaves behind."""

from __future__ import annotations

import functools
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from cspdeploy.check import latency, settings
from cspdeploy.cli.app import main
from cspdeploy.export import simplify


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., CompletedProcess[str]]:
    """`run("verify", folder)`: exit code, stdout and stderr."""
    monkeypatch.delenv("CSPDEPLOY_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["cspdeploy"])

    def call(*arguments: object) -> CompletedProcess[str]:
        given = [str(argument) for argument in arguments]
        code = main(given)
        printed = capsys.readouterr()
        return CompletedProcess(given, code, printed.out, printed.err)

    return call


@pytest.fixture
def refuse(run: Callable[..., CompletedProcess[str]]) -> Callable[..., str]:
    """`refuse("verify", folder, code=1)`: it ends with one line of error and one that says what to do; both lines."""

    def call(*arguments: object, code: int = 2) -> str:
        done = run(*arguments)
        assert done.returncode == code, done.stderr
        assert done.stdout == ""
        lines = done.stderr.splitlines()
        assert [line.partition(" ")[0] for line in lines[-2:]] == ["error:", "fix:"], done.stderr
        assert all(len(line.split()) > 1 for line in lines[-2:]), done.stderr
        assert not any(line.startswith(("error:", "fix:", "Traceback")) for line in lines[:-2]), done.stderr
        return "\n".join(lines[-2:])

    return call


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle that a test may change."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "exported" / "tiny"))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "exported"


@pytest.fixture
def export(tiny_models: Path, output: Path) -> list[object]:
    """The words of an export that works; a later option of the same name wins."""
    return ["export", "tiny", "--models", tiny_models, "-o", output, "--no-verify"]


@pytest.fixture
def without_simplifier(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports keep the unsimplified graph, in no time: onnxsim takes longer to import than all else together."""
    monkeypatch.setattr(simplify, "_CHILD", ["false"])


@pytest.fixture
def quick_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five runs of each artifact: the numbers mean nothing here."""
    quick = functools.partial(
        latency.LatencySettings, min_runs=5, min_seconds=0.0, min_rounds=1, warmup_runs=1, warmup_seconds=0.0,
        max_warmup_seconds=0.0, lead_in_seconds=0.0,
    )  # fmt: skip
    monkeypatch.setattr(latency, "LatencySettings", quick)


@pytest.fixture
def sessions_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verification opens its sessions in this process, in a fraction of the time, and without the audit."""
    quick = functools.partial(settings.VerifySettings, isolate=False, audit=False)
    monkeypatch.setattr(settings, "VerifySettings", quick)
