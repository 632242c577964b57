"""The `cspdeploy` command: its root, its exit codes, its one place where errors become lines.

Nothing here imports numpy or an engine: `--help` must answer at once.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated

import typer

from cspdeploy import __version__
from cspdeploy.cli import bench, blame, build, check, compare, fetch, info, lint, package, reproduce, train
from cspdeploy.cli.render import print_error
from cspdeploy.core.errors import EXIT_INTERRUPTED, EXIT_NO_ENGINE, EXIT_OK, EXIT_USAGE, CspDeployError

__all__ = ["app", "main"]

app = typer.Typer(
    name="cspdeploy", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]}, rich_markup_mode=None,
    help="From the weights of a CSPNet-family model to TorchScript and ONNX files that are proven and timed.",
)  # fmt: skip
for module in (build, train, fetch, check, bench, blame, lint, compare, reproduce, package, info):
    module.register(app)


def _print_version(value: bool) -> None:
    if value:
        sys.stdout.write(f"cspdeploy {__version__}\n")
        raise typer.Exit(EXIT_OK)


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if debug:
        os.environ["CSPDEPLOY_DEBUG"] = "1"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 a check failed, 2 wrong use, 3 engine missing."""
    try:
        code = app(args=arguments, prog_name="cspdeploy", standalone_mode=False)
    except CspDeployError as error:
        _print_traceback()
        print_error(error.message, error.fix)
        return error.exit_code
    except ImportError as error:
        _print_traceback()
        return _missing_package(error)
    except OSError as error:  # a file that cannot be read or written, wherever that shows
        _print_traceback()
        print_error(f"{error.filename or 'file'}: {error.strerror or error}", "check the path and its permissions")
        return EXIT_USAGE
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        return _wrong_use(error.format_message())  # click's usage errors, which typer re-exports under changing names
    if code == EXIT_INTERRUPTED:  # typer turns Ctrl-C into this code
        print_error("interrupted; nothing half-written was left", "")
    return code if isinstance(code, int) else EXIT_OK


def _wrong_use(message: str) -> int:
    if message.startswith("Usage:"):  # no command at all: the help is the answer
        sys.stderr.write(f"{message}\n")
    else:
        print_error(message, "cspdeploy --help")
    return EXIT_USAGE


def _print_traceback() -> None:
    if os.environ.get("CSPDEPLOY_DEBUG"):
        traceback.print_exc()


def _missing_package(error: ImportError) -> int:
    package = (error.name or "").partition(".")[0]
    extras = {"onnxruntime": "cpu", "openvino": "openvino", "huggingface_hub": "hub"}
    if package in {"torch", "onnx", "onnxscript", "onnxsim", "safetensors", *extras}:
        print_error(f"this command needs the package '{package}', which is not installed",
                    f"pip install 'cspdeploy[{extras.get(package, 'export')}]'")  # fmt: skip
        return EXIT_NO_ENGINE
    raise error


def entry_point() -> None:
    """Of the installed script."""
    sys.exit(main())


if __name__ == "__main__":
    entry_point()
