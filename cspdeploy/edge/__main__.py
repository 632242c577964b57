"""`python -m cspdeploy.edge`: selftest and predict on a device that has numpy and an engine, and nothing else."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import cspdeploy
from cspdeploy.core.codec import to_json
from cspdeploy.core.errors import EXIT_CHECK_FAILED, EXIT_OK
from cspdeploy.edge.console import Parser, add_box_options, answer, box_options, dump, guarded

__all__ = ["add_selftest_options", "main", "selftest"]

PROGRAM_SUFFIX = ".pyz"
SELFTEST = (
    "Hashes, preprocessing, and every artifact against the golden images; latency against the recorded one. "
    "Exit code 0: passed, 1: a check failed, 2: bad input, 3: no engine."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: without the program's name; None: those of this process.

    Returns:
        0: done and passed. 1: a check failed. 2: wrong use or bad input. 3: an engine or device is missing.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)

    def command() -> int:
        given = _parser().parse_args(words)
        return selftest(given) if given.command == "selftest" else _predict(given)

    return guarded(command, json_="--json" in words)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m cspdeploy.edge", description=__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"cspdeploy {cspdeploy.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    check = commands.add_parser(
        "selftest", allow_abbrev=False, help="prove a bundle on this device", description=SELFTEST
    )
    check.add_argument("bundle", type=Path, metavar="BUNDLE", help="a bundle's folder, or a package of one")
    add_selftest_options(check)
    predict = commands.add_parser(
        "predict", allow_abbrev=False, help="classes or boxes of image files",
        description="The likeliest classes of image files; of a detector, their boxes: score, label, and left, top, "
        "right, bottom in pixels of the picture.",
    )  # fmt: skip
    predict.add_argument("bundle", type=Path, metavar="BUNDLE", help="a bundle's folder, a package, or one ONNX file")
    predict.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    predict.add_argument("--top", type=int, default=5, metavar="N", help="classes of each image (default: 5)")
    predict.add_argument("--artifact", default="onnx", metavar="KIND", help="artifact of the bundle (default: onnx)")
    predict.add_argument("--key", type=Path, metavar="FILE", help="public key that must have signed the bundle")
    add_box_options(predict)
    _add_common(predict, runtime="ort-cpu")
    return parser


def add_selftest_options(parser: argparse.ArgumentParser) -> None:
    """The options of `selftest`; whoever has no BUNDLE among its arguments sets it in what was parsed."""
    parser.add_argument(
        "--artifact", action="append", default=[], metavar="KIND", help="check this one alone; may be given again"
    )
    parser.add_argument("--no-latency", action="store_true", help="do not measure how long it takes")
    parser.add_argument(
        "--key", type=Path, metavar="FILE",
        help="public key that must have signed the bundle; the program around it, in a .pyz, is not in that signature",
    )  # fmt: skip
    _add_common(parser, runtime="")


def _add_common(parser: argparse.ArgumentParser, *, runtime: str) -> None:
    parser.add_argument(
        "--runtime", default=runtime, metavar="R", help="ort-cpu, ort-cuda, openvino, ... (default: ort-cpu)"
    )
    parser.add_argument("--device", type=int, metavar="N", help="GPU to run on, with --runtime ort-cuda (default: 0)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="of the engine (default: it chooses)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def selftest(given: argparse.Namespace) -> int:
    """Check `given.bundle`, print what was found, and give the exit code.

    Raises:
        CspDeployError: as `run_selftest`, or the package cannot be opened.
    """
    from cspdeploy.core.archive import opened_bundle
    from cspdeploy.edge.selftest import SelftestRequest, run_selftest
    from cspdeploy.edge.selftest_report import render_selftest, told_of

    request = SelftestRequest(
        artifacts=tuple(given.artifact), runtime=given.runtime, latency=not given.no_latency, key=given.key,
        num_threads=given.threads, device=given.device,
    )  # fmt: skip
    remark = ""
    if given.key is not None and given.bundle.suffix.lower() == PROGRAM_SUFFIX:
        remark = (
            f"the signature covers the model, not the program in {given.bundle.name}: that has one of its own, "
            f"{given.bundle.name}.sig, and is checked with openssl or from an installed cspdeploy, never by itself"
        )
    with opened_bundle(given.bundle) as folder:
        report = told_of(run_selftest(folder, request), folder=folder, given=given.bundle, remark=remark)
    sys.stdout.write(dump(to_json(report)) if given.json else render_selftest(report))
    return EXIT_OK if report.verdict == "pass" else EXIT_CHECK_FAILED


def _predict(given: argparse.Namespace) -> int:
    from cspdeploy.core.archive import opened_bundle
    from cspdeploy.edge.predictor import Predictor

    with opened_bundle(given.bundle) as place:
        opened = Predictor.open(
            place, artifact=given.artifact, runtime=given.runtime, num_threads=given.threads, key=given.key,
            device=given.device,
        )  # fmt: skip
        with opened as predictor:
            return answer(predictor, given.images, top=given.top, json_=given.json, boxes=box_options(given))


if __name__ == "__main__":
    sys.exit(main())
