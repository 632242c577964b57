"""What the programs of the edge print: predictions, errors, and with --json one JSON document whatever happens."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from cspdeploy.core.codec import to_json
from cspdeploy.core.errors import EXIT_OK, EXIT_USAGE, CspDeployError, InputError, InterruptedRunError
from cspdeploy.core.text import one_line

if TYPE_CHECKING:
    from cspdeploy.edge.predictor import Predictor

__all__ = ["Parser", "answer", "dump", "fix_for_a_device", "guarded"]

# Extras of cspdeploy, and the package of each that a device needs.
_EXTRAS = {"cpu": "onnxruntime", "gpu": "onnxruntime-gpu", "openvino": "openvino", "export": "torch",
           "sign": "cryptography"}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments as everything else here does: `error:` and `fix:`, exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse.

        Raises:
            InputError: always.
        """
        raise InputError(message, fix=f"{self.prog} --help")


def guarded(command: Callable[[], int], *, json_: bool, alone: bool = False) -> int:
    """Carry out a command, and make lines and an exit code of what it raises.

    Args:
        json_: errors are told on stdout, too, so that there is always one JSON document.
        alone: there is no command `cspdeploy` here, and no fix names it.
    """
    try:
        code = command()
        sys.stdout.flush()  # what is piped into `head` is told now, and not after the end
        return code
    except CspDeployError as error:
        found = error
    except BrokenPipeError:
        # Whoever read has what it wanted. The interpreter flushes once more at its end, and must find somewhere to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        found = InputError(f"{where}{error.strerror or error}", fix="see that it can be read, and that memory is left")
    except KeyboardInterrupt:
        found = InterruptedRunError("interrupted")
    except SystemExit as end:  # argparse has printed its help
        return int(end.code or 0)
    found.fix = fix_for_a_device(found.fix) if alone else found.fix
    _tell(found)
    if json_:
        told = {"message": found.message, "fix": found.fix, "exit_code": found.exit_code}
        sys.stdout.write(dump({"schema_version": 1, "verdict": "error", "error": told, **found.facts}))
    return found.exit_code


def fix_for_a_device(fix: str) -> str:
    """The same advice where a program runs by itself, and cspdeploy is not installed."""
    if fix == "cspdeploy doctor":
        return "leave --runtime away, or name another"
    fix = re.sub(r"'cspdeploy\[(\w+)\]'", lambda found: _EXTRAS.get(found[1], "cspdeploy"), fix)
    return f"where the package was made: {fix}" if fix.startswith("cspdeploy ") else fix


def answer(predictor: Predictor, images: Sequence[str], *, top: int, json_: bool) -> int:
    """Print the likeliest classes of image files, each as soon as it is known; with `json_` one list at the end.

    An image that cannot be read does not stop the others.

    Returns:
        0, or 2 where an image could not be read.

    Raises:
        InputError: the artifact gives no classes, or `top` is below 1.
    """
    code = EXIT_OK
    found: list[dict[str, Any]] = []
    if predictor.untrained:
        sys.stderr.write("UNTRAINED: random weights, no answer of this model means anything\n")
    if predictor.note:
        sys.stderr.write(f"warning: {one_line(predictor.note)}\n")
    for item in predictor.stream(images, top=top):
        entry: dict[str, Any] = {"image": str(item.source), "untrained": predictor.untrained, "predictions": []}
        found.append(entry)
        if item.result is None:
            error = item.error or InputError(f"{entry['image']}: no result")
            code, entry["error"] = EXIT_USAGE, error.message
            _tell(error)
            continue
        entry["predictions"] = to_json(item.result.predictions)
        if not json_:
            lines = [f"  {100 * one.probability:5.1f} %  {one_line(one.label)}" for one in item.result.predictions]
            sys.stdout.write("\n".join([one_line(entry["image"]), *lines]) + "\n")
            sys.stdout.flush()
    if json_:
        sys.stdout.write(dump(found))
    return code


def dump(value: object) -> str:
    """A JSON document, as text."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def _tell(error: CspDeployError) -> None:
    lines = [f"error: {error.message}", *([f"fix: {error.fix}"] if error.fix else [])]
    sys.stderr.writelines(f"{one_line(line)}\n" for line in lines)
