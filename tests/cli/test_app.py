from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import typer

import cspdeploy
from cspdeploy.cli import info
from cspdeploy.cli.app import app
from cspdeploy.core.catalog import DEFAULT_OPSET, MAX_OPSET, MIN_OPSET

Run = Callable[..., CompletedProcess[str]]
ROOT = Path(cspdeploy.__file__).parents[1]
COMMANDS = dict(typer.main.get_command(app).commands.items())  # type: ignore[attr-defined]
GOLDEN_HELP = Path(__file__).parents[1] / "golden" / "help"


def _python(code: str, *arguments: object) -> CompletedProcess[str]:
    """`code` in a process of its own, as a user's shell would see it."""
    environment = {key: value for key, value in os.environ.items() if key != "CSPDEPLOY_DEBUG"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


MAIN = "import sys; from cspdeploy.cli.app import main; sys.exit(main(sys.argv[1:]))"


# --- help ---


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_the_golden_one(run: Run, check_golden: Callable[[str, str], None], command: str) -> None:
    done = run(*command.split(), "--help")
    assert (done.returncode, done.stderr) == (0, "")
    check_golden(f"help/{command or 'cspdeploy'}.txt", done.stdout)


def test_no_golden_help_without_a_command() -> None:
    assert {path.stem for path in GOLDEN_HELP.iterdir()} == {"cspdeploy", *COMMANDS}


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_argument_and_option_has_a_help_text(command: str) -> None:
    assert COMMANDS[command].help
    for parameter in COMMANDS[command].params:
        assert getattr(parameter, "help", None), f"{command}: {parameter.name}"


@pytest.mark.parametrize("command", [*COMMANDS])
def test_every_command_has_json(command: str) -> None:
    assert "--json" in {name for parameter in COMMANDS[command].params for name in parameter.opts}


def test_bounds_in_the_help_are_those_of_the_catalog(run: Run) -> None:
    text = " ".join(run("export", "--help").stdout.split())
    assert f"ONNX opset, {MIN_OPSET} to {MAX_OPSET}; by default {DEFAULT_OPSET}," in text


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_goes_to_stdout(run: Run, option: str) -> None:
    assert run("verify", option).stdout.startswith("Usage: cspdeploy verify")


def test_without_a_command_help_is_shown_as_help(run: Run) -> None:
    """And not as an error in one long line."""
    done = run()
    assert done.returncode in (0, 2)
    assert "error:" not in done.stderr
    assert "\nCommands:\n" in done.stdout + done.stderr


def test_version(run: Run) -> None:
    assert run("--version").stdout == f"cspdeploy {cspdeploy.__version__}\n"


def test_the_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cspdeploy.cli.app", "--version"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"cspdeploy {cspdeploy.__version__}\n")


# --- errors ---


@pytest.mark.parametrize(
    ("arguments", "subject"),
    [
        (["exprot"], "No such command 'exprot'"),
        (["verify", "--jsn"], "--jsn"),
        (["export"], "model"),
        (["export", "tiny", "--opset", "x"], "--opset"),
        (["export", "tiny", "--opset"], "--opset"),
        (["bench", "--min-runs", "1"], "--min-runs"),
        (["bench", "--min-seconds", "banana"], "--min-seconds"),
        (["predict", "a", "b", "--top", "0"], "--top"),
        (["predict", "a"], "images"),
        (["train", "cspdarknet53"], "--data"),
        (["list", "too", "many"], "too"),
    ],
)
def test_wrong_use(refuse: Callable[..., str], arguments: list[str], subject: str) -> None:
    assert subject in refuse(*arguments)


def test_near_command_is_suggested(refuse: Callable[..., str]) -> None:
    assert "'export'" in refuse("exprot")


def test_debug_shows_the_traceback() -> None:
    plain, debug = (_python(MAIN, *options, "verify", "nowhere") for options in ([], ["--debug"]))
    assert "Traceback" not in plain.stderr
    assert plain.stderr.splitlines()[0].startswith("error: nowhere: no such folder")
    assert "Traceback" in debug.stderr
    assert "InputError: nowhere: no such folder" in debug.stderr
    assert (plain.returncode, debug.returncode) == (2, 2)  # 1 would say that a check has failed


def test_interrupt_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(path: Path, *, precision: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cspdeploy.check.inspect.inspect_onnx", interrupt)
    done = run("inspect", "a.onnx")
    assert done.returncode == 130
    assert done.stderr == "error: interrupted; nothing half-written was left\n"


def test_fault_in_the_program_is_not_dressed_up_as_wrong_use(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(value: object) -> None:
        raise AttributeError("a bug")

    monkeypatch.setattr(info, "print_json", fail)
    with pytest.raises(AttributeError, match="a bug"):
        run("doctor", "--json")
