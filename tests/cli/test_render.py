from __future__ import annotations

import json

import pytest

from cspdeploy.cli.render import print_error, print_json, print_renderable, progress_bar


def test_error_is_one_line_whatever_is_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    print_error("first\nsecond\r\n  third", "do\nthis")
    assert capsys.readouterr().err == "error: first second third\nfix: do this\n"


def test_error_holds_nothing_that_a_terminal_obeys(capsys: pytest.CaptureFixture[str]) -> None:
    """Names in a file of unknown origin may."""
    print_error("input '\x1b[2Jx\x07'", "")
    assert capsys.readouterr().err == "error: input '\ufffd[2Jx\ufffd'\n"


def test_no_empty_fix(capsys: pytest.CaptureFixture[str]) -> None:
    print_error("it broke", "")
    assert capsys.readouterr().err == "error: it broke\n"


def test_json_is_one_document_and_knows_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": float("nan"), "b": (1, 2)})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {"a": "nan", "b": [1, 2]}


def test_text_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    print_renderable("a line")
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("a line\n", "")


def test_brackets_in_text_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    """Names of folders and labels come from outside."""
    print_renderable("exported/[red]x[/] [/oops]")
    assert capsys.readouterr().out == "exported/[red]x[/] [/oops]\n"


def test_progress_without_a_terminal_is_a_line_for_each_name(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("export") as progress:
        for what, done in (("ONNX", 1), ("latency, round 1", 2), ("latency, round 2", 3), ("FP16", 4)):
            progress(what, done, 4)
    printed = capsys.readouterr()
    assert printed.err == "export: ONNX\nexport: latency, round 1\nexport: FP16\n"
    assert printed.out == ""


def test_progress_on_a_terminal_goes_to_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress_bar("export") as progress:
        progress("ONNX", 1, 2)
        progress("counting", 0, 0)
    assert capsys.readouterr().out == ""
