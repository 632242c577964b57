"""What the programs of the edge print: predictions, errors, and with --json one JSON document whatever happens."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from cspdeploy.core.codec import to_json
from cspdeploy.core.errors import EXIT_OK, EXIT_USAGE, CspDeployError, InputError, InterruptedRunError
from cspdeploy.core.text import one_line
from cspdeploy.edge.results import Detections, Result

if TYPE_CHECKING:
    from cspdeploy.edge.predictor import Predictor

__all__ = ["Parser", "add_box_options", "answer", "box_options", "dump", "fix_for_a_device", "guarded"]

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


def add_box_options(parser: argparse.ArgumentParser) -> None:
    """What `answer` takes of a detector."""
    parser.add_argument(
        "--score-threshold", type=float, metavar="S", help="boxes score more than that (default: as exported)"
    )
    parser.add_argument(
        "--iou-threshold", type=float, metavar="I", help="overlap at which a box goes (default: as exported)"
    )
    parser.add_argument(
        "--max-detections", type=int, metavar="N", help="boxes of an image, at most (default: as exported)"
    )


def box_options(given: argparse.Namespace) -> dict[str, Any]:
    """Of what `add_box_options` has added, that which was given, as `Predictor` calls it."""
    found = {"score": given.score_threshold, "iou": given.iou_threshold, "max_detections": given.max_detections}
    return {name: value for name, value in found.items() if value is not None}


def answer(
    predictor: Predictor, images: Sequence[str], *, json_: bool, top: int = 5, boxes: Mapping[str, Any] | None = None,
    use: Callable[[int, Detections], None] | None = None,
) -> int:  # fmt: skip
    """Print the likeliest classes of image files, or their boxes, each as soon as it is known; JSON at the end.

    An image that cannot be read does not stop the others.

    Args:
        json_: one list for all images, and no lines.
        boxes: "score", "iou", "max_detections" of a detector, where they are given.
        use: is given the number of an image and its boxes; what it raises belongs to that image.

    Returns:
        0, or 2 where an image could not be read.

    Raises:
        InputError: the artifact gives neither classes nor boxes, or an option is out of range.
    """
    code = EXIT_OK
    found: list[dict[str, Any]] = []
    detects = predictor.task == "detect"
    if predictor.untrained:
        sys.stderr.write("UNTRAINED: random weights, no answer of this model means anything\n")
    if predictor.note:
        sys.stderr.write(f"warning: {one_line(predictor.note)}\n")
    for number, item in enumerate(predictor.stream(images, top=top, **(boxes or {}))):
        entry: dict[str, Any] = {"image": str(item.source), "untrained": predictor.untrained}
        entry |= {"boxes" if detects else "predictions": []}
        found.append(entry)
        result = item.result
        try:
            if result is None:
                raise item.error or InputError(f"{entry['image']}: no result")
            if use is not None and isinstance(result, Detections):
                use(number, result)
        except InputError as error:
            code, entry["error"] = EXIT_USAGE, error.message
            _tell(error)
        if result is None:
            continue
        entry["boxes" if detects else "predictions"] = [to_json(one) for one in result]
        if not json_:
            lines = (
                _box_lines(result, predictor, boxes or {}) if isinstance(result, Detections) else _class_lines(result)
            )
            sys.stdout.write("\n".join([one_line(entry["image"]), *lines]) + "\n")
            sys.stdout.flush()
    if json_:
        sys.stdout.write(dump(found))
    return code


def _class_lines(result: Result) -> list[str]:
    return [f"  {100 * one.probability:5.1f} %  {one_line(one.label)}" for one in result]


def _box_lines(result: Detections, predictor: Predictor, options: Mapping[str, Any]) -> list[str]:
    """A score, a label, and left, top, right, bottom in whole pixels of the picture."""
    if not result:
        own = predictor.suppression.score_threshold if predictor.suppression is not None else 0.0
        return [f"  no box above {options.get('score', own):g}"]
    return [
        f"  {box.score:.3f}  {one_line(box.label)}  {box.left:.0f},{box.top:.0f},{box.right:.0f},{box.bottom:.0f}"
        for box in result
    ]


def dump(value: object) -> str:
    """A JSON document, as text."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def _tell(error: CspDeployError) -> None:
    lines = [f"error: {error.message}", *([f"fix: {error.fix}"] if error.fix else [])]
    sys.stderr.writelines(f"{one_line(line)}\n" for line in lines)
