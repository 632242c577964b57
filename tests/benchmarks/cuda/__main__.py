"""CUDA tests and the CUDA benchmark, within a budget of seconds, into one JSON file and one Markdown table.

    python tests/benchmarks/cuda [--budget 420] [--only cspdarknet53] [--part latency] [--merge build/cuda/cuda.json]

Needs a GPU (else exit 3), and nothing beyond the checkout and the packages that are installed. Exit 1 where a test
fails or outputs are too far from the original; a figure of speed is reported, and fails nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cuda_device import EXIT_NO_GPU, gpu_problem

if TYPE_CHECKING:
    from cuda_result import Result

EXIT_FAILED, EXIT_USAGE = 1, 2
MIN_PYTHON = (3, 11)
BUDGET_S = 420.0
"""Of the eight minutes that a run may take; the rest is for starting, and for the last stage to end."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=BUDGET_S, metavar="S", help="seconds in all [420]")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NETWORK",
        help="a network, a model folder or a bundle; two given together are compared; may be repeated",
    )
    parser.add_argument("--part", action="append", default=[], help="tests, agreement, latency, parity, int8, profile")
    parser.add_argument("--regime", action="append", default=[], help="of those of the table; may be repeated")
    parser.add_argument("--batch", action="append", type=int, default=[], help="may be repeated [1, 32, 8]")
    parser.add_argument("--size", type=int, default=256, help="side of the input in pixels [256]")
    parser.add_argument("--output", type=Path, default=Path("build/cuda"), help="folder of cuda.json and cuda.md")
    parser.add_argument("--merge", type=Path, metavar="JSON", help="an earlier cuda.json that this call adds to")
    # For a look at the benchmark itself where there is no GPU: real CPU runtimes, a real result, no figure of CUDA's.
    parser.add_argument("--device-kind", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """0: all that was asked for passed; 1: a test or a parity failed; 2: wrong use; 3: no GPU, or a package misses."""
    given = parse(arguments)
    if sys.version_info < MIN_PYTHON:
        told = ".".join(str(part) for part in sys.version_info[:3])
        return _refuse(f"Python {told}, expected 3.11 or later", "make test-cuda PYTHON_CUDA=python3.11", EXIT_USAGE)
    if given.device_kind == "cuda" and (problem := gpu_problem()) is not None:
        return _refuse(*problem, EXIT_NO_GPU)
    sys.path.insert(0, str(Path(__file__).parents[3]))
    from cuda_facts import PACKAGES, missing_packages

    missing = [one.name for one in missing_packages(PACKAGES) if one.needed]
    if missing:
        names = ", ".join(missing)
        return _refuse(f"not installed: {names}", f"pip install {' '.join(missing)}, or make test-cuda", EXIT_NO_GPU)
    from cspdeploy.core.errors import CspDeployError

    try:
        return _run(given)
    except CspDeployError as error:
        return _refuse(error.message, error.fix, error.exit_code)


def _refuse(message: str, fix: str, code: int) -> int:
    sys.stderr.write(f"error: {message}" + (f"; fix: {fix}\n" if fix else "\n"))
    return code


def _run(given: argparse.Namespace) -> int:
    from cuda_budget import Budget
    from cuda_facts import describe_run, remarks
    from cuda_figures import judge
    from cuda_latency import QUICK, TIMING
    from cuda_regimes import NETWORK_PAIRS, find_regimes
    from cuda_result import Result, merge_results, read_result, write_result
    from cuda_run import PARTS, Plan, Run
    from cuda_table import markdown

    from cspdeploy.core.errors import InputError
    from cspdeploy.core.json_file import write_text

    for part in given.part:
        if part not in PARTS:
            raise InputError(f"--part {part}: unknown, expected one of {', '.join(PARTS)}")
    if not 0 < given.budget < float("inf") or any(batch < 1 for batch in given.batch):
        raise InputError("--budget and --batch: expected numbers above 0")
    earlier = read_result(given.merge) if given.merge is not None else None

    def keep(result: Result) -> Result:
        if earlier is not None:
            result = merge_results(earlier, result)
            result = dataclasses.replace(result, figures=judge(result))
        write_result(given.output / "cuda.json", result)
        write_text(given.output / "cuda.md", markdown(result))
        return result

    plan = Plan(
        kind=given.device_kind, groups=_groups(given.only, NETWORK_PAIRS),
        batches=tuple(given.batch) or (1, 32, 8), regimes=find_regimes(given.device_kind, tuple(given.regime)),
        parts=tuple(given.part) or PARTS, settings=QUICK if given.quick else TIMING, size_px=given.size,
    )  # fmt: skip
    result = Result(
        kind=given.device_kind, commands=(shlex.join(["python", "tests/benchmarks/cuda", *sys.argv[1:]]),),
        size_px=given.size, facts=describe_run(), remarks=tuple(remarks(given.device_kind)),
    )  # fmt: skip
    for remark in result.remarks:
        sys.stderr.write(f"remark: {remark}\n")
    found = keep(Run(plan, result, Budget(given.budget), keep).run())
    return _tell(found, given.output)


def _groups(only: list[str], pairs: tuple[tuple[str, str], ...]) -> tuple[tuple[str, ...], ...]:
    """Pairs of which both sides are wanted stay together; folders are taken in the order given, two by two."""
    if not only:
        return pairs
    groups = [tuple(name for name in pair if name in only) for pair in pairs]
    others = [name for name in only if not any(name in pair for pair in pairs)]
    groups += [tuple(others[start : start + 2]) for start in range(0, len(others), 2)]
    return tuple(group for group in groups if group)


def _tell(result: Result, output: Path) -> int:
    for figure in result.figures:
        sys.stdout.write(f"{figure.verdict:14} {figure.figure}: {figure.detail}\n")
    failed = [one for one in result.tests if one.outcome not in ("passed", "skipped")]
    left = [one for one in result.tests if one.outcome == "skipped"]
    num_passed = len(result.tests) - len(failed) - len(left)
    bad = [one for one in result.figures if not one.speed and one.verdict == "does not hold"]
    for test in failed:
        sys.stdout.write(f"{'failed':14} {test.name}: {test.detail}\n")
    for test in left:  # of what is not installed: no fault, and never silent
        sys.stdout.write(f"{'not run':14} {test.name}: {test.detail}\n")
    undone = [one for one in result.stages if one.outcome == "not done"]
    for stage in undone:
        sys.stdout.write(f"{'not done':14} {stage.name}: {stage.reason}\n")
    sys.stdout.write(f"{output / 'cuda.json'}, {output / 'cuda.md'}: {num_passed} of "
                     f"{len(result.tests)} tests passed, {len(left)} not run, "
                     f"{sum(not row.reason for row in result.rows)} of {len(result.rows)} rows measured\n")  # fmt: skip
    # A run in which nothing ran must not look like one in which all was well.
    bad_tests = bool(failed) or (bool(left) and not num_passed)
    return EXIT_FAILED if bad_tests or bad or any(one.name == "tests" for one in undone) else 0


if __name__ == "__main__":
    sys.exit(main())
