"""`python -m cspdeploy.edge`: selftest and predict on a device that has numpy and an engine, and nothing else."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cspdeploy
from cspdeploy.core.codec import to_json
from cspdeploy.core.errors import EXIT_CHECK_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE, CspDeployError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: without the program's name; None: those of this process.

    Returns:
        0: done and passed. 1: a check failed. 2: wrong use or bad input. 3: an engine or device is missing.
    """
    try:
        given = _parser().parse_args(arguments)
    except SystemExit as end:  # argparse has said what is wrong, or printed its help
        return int(end.code or 0)
    try:
        return _selftest(given) if given.command == "selftest" else _predict(given)
    except CspDeployError as error:
        _tell(error, json_=given.json)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cspdeploy.edge", description=__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"cspdeploy {cspdeploy.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    selftest = commands.add_parser(
        "selftest", allow_abbrev=False, help="prove a bundle on this device",
        description="Hashes, preprocessing, and every artifact against the golden images; latency against the recorded "
        "one. Exit code 0: passed, 1: a check failed, 2: bad input, 3: no engine.",
    )  # fmt: skip
    selftest.add_argument("bundle", type=Path, metavar="BUNDLE", help="a bundle's folder, or a package of one")
    selftest.add_argument(
        "--artifact", action="append", default=[], metavar="KIND", help="check this one alone; may be given again"
    )
    selftest.add_argument("--no-latency", action="store_true", help="do not measure how long it takes")
    selftest.add_argument("--key", type=Path, metavar="FILE", help="public key that must have signed the bundle")
    predict = commands.add_parser(
        "predict", allow_abbrev=False, help="classify image files", description="The likeliest classes of image files."
    )
    predict.add_argument("bundle", type=Path, metavar="BUNDLE", help="a bundle's folder, a package, or one ONNX file")
    predict.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    predict.add_argument("--top", type=int, default=5, metavar="N", help="classes of each image (default: 5)")
    predict.add_argument("--artifact", default="onnx", metavar="KIND", help="artifact of the bundle (default: onnx)")
    for command, default in ((selftest, ""), (predict, "ort-cpu")):
        command.add_argument(
            "--runtime", default=default, metavar="R", help="ort-cpu, ort-cuda, openvino, ... (default: ort-cpu)"
        )
        command.add_argument("--threads", type=int, default=0, metavar="N", help="of the engine (default: it chooses)")
        command.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _selftest(given: argparse.Namespace) -> int:
    from cspdeploy.core.archive import opened_bundle
    from cspdeploy.edge.selftest import SelftestRequest, run_selftest
    from cspdeploy.edge.selftest_report import render_selftest

    request = SelftestRequest(
        artifacts=tuple(given.artifact), runtime=given.runtime, latency=not given.no_latency, key=given.key,
        num_threads=given.threads,
    )  # fmt: skip
    with opened_bundle(given.bundle) as folder:
        report = run_selftest(folder, request)
    sys.stdout.write(_dump(to_json(report)) if given.json else render_selftest(report))
    return EXIT_OK if report.verdict == "pass" else EXIT_CHECK_FAILED


def _predict(given: argparse.Namespace) -> int:
    from cspdeploy.core.archive import opened_bundle
    from cspdeploy.edge.predictor import Predictor

    code = EXIT_OK
    found: list[dict[str, Any]] = []
    with (
        opened_bundle(given.bundle) as place,
        Predictor.open(place, artifact=given.artifact, runtime=given.runtime, num_threads=given.threads) as predictor,
    ):
        if predictor.untrained:
            sys.stderr.write("UNTRAINED: random weights, no answer of this model means anything\n")
        for item in predictor.stream(given.images, top=given.top):
            entry: dict[str, Any] = {"image": str(item.source), "untrained": predictor.untrained, "predictions": []}
            if item.result is None:
                code = EXIT_USAGE
                _tell(item.error or CspDeployError("no result"), json_=False)
                entry["error"] = item.error.message if item.error else ""
            else:
                entry["predictions"] = to_json(item.result.predictions)
                if not given.json:
                    _show(entry)
            found.append(entry)
    if given.json:
        sys.stdout.write(_dump(found))
    return code


def _show(entry: dict[str, Any]) -> None:
    sys.stdout.write(f"{entry['image']}\n")
    for one in entry["predictions"]:
        sys.stdout.write(f"  {100 * one['probability']:5.1f} %  {one['label']}\n")
    sys.stdout.flush()


def _tell(error: CspDeployError, *, json_: bool) -> None:
    """On stderr for a person; for a fleet on stdout, too, so that there is always one JSON document."""
    sys.stderr.write(f"error: {error.message}\n" + (f"fix: {error.fix}\n" if error.fix else ""))
    if json_:
        told = {"message": error.message, "fix": error.fix, "exit_code": error.exit_code}
        sys.stdout.write(_dump({"schema_version": 1, "verdict": "error", "error": told}))


def _dump(value: object) -> str:
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


if __name__ == "__main__":
    sys.exit(main())
