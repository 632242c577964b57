"""INT8 files of cspdeploy and of its peers, made from the same images and judged in one run: accuracy, latency, cost.

    python tests/benchmarks/int8.py [--model cspdarknet53] [--models models] [--json int8.json]
    python tests/benchmarks/int8.py --part accuracy --part latency       # again, with the files of the last run
    python tests/benchmarks/int8.py --skip-ours --file research=my.onnx  # a file from elsewhere beside the peers'

Parts, each some minutes on two idle cores; all by default, results of several runs meet in the --json file:

- quantise-time: every method `--rounds` times in turn, whole processes from FP32 ONNX to INT8 file, imports counted,
  with their peak memory. cspdeploy twice: `export MODEL` (TorchScript, ONNX, simplification and all) and `export
  MODEL.onnx`, which does what the peers do.
- memory: peak of `export MODEL --int8` with 64, 1,024 and 4,096 calibration images.
- accuracy: logits over `--images` test images, one at a time, on ONNX Runtime and OpenVINO (f32 hint): SQNR against the
  FP32 ONNX on ONNX Runtime, agreement of top-1, top-1 and its fall.
- latency: at `--size`, every file on both engines in turn, each in a process of its own; ratios: medians over rounds.
  "x U8S8": in parts of ONNX Runtime's U8S8 per-channel min-max file; "x NNCF": of NNCF's file on OpenVINO.

Peers live in a virtual environment of their own, installed on first use into --peers-venv. It needs Fashion-MNIST
(Debian's dataset-fashion-mnist) and a trained model. Other networks are trained for it, shortly but really, with

    python tests/benchmarks/int8_train.py cspresnet50 /tmp/models
    python tests/benchmarks/int8_train.py cspresnext50 /tmp/models
    python tests/benchmarks/int8.py --model cspresnet50 --models /tmp/models --json cspresnet50.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from int8_files import (
    OURS,
    OURS_FROM_ONNX,
    PEER_METHODS,
    ChildFailedError,
    Maker,
    cspdeploy,
    measure_costs,
    measure_memory,
    prepare_peers,
    run_child,
    write_pngs,
)
from int8_measure import (
    Subject,
    accuracy_of,
    convolutions,
    engines_of,
    logits_of,
    measure_latency,
    node_counts,
    ratio,
)

from cspdeploy.core.bundle import read_manifest
from cspdeploy.core.datasets import LabelledImages, open_dataset
from cspdeploy.core.env import describe_environment
from cspdeploy.core.preprocess import preprocess
from cspdeploy.core.spec import ModelSpec

PARTS = ("quantise-time", "memory", "accuracy", "latency")
MEMORY_COUNTS = (64, 1024, 4096)
FP32, EAGER = "fp32", "eager"
U8S8, NNCF = "ort-u8s8-minmax", "nncf-openvino"
Results = dict[str, Any]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    temporary = Path(tempfile.gettempdir())
    parser.add_argument("--part", action="append", choices=PARTS)
    parser.add_argument("--model", default="cspdarknet53")
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--target", help="of cspdeploy's export")
    parser.add_argument("--ours", action="append", default=[], metavar="ARGUMENT", help="one more for the export")
    parser.add_argument("--skip-ours", action="store_true")
    parser.add_argument("--skip-peers", action="store_true")
    parser.add_argument("--file", action="append", default=[], metavar="NAME=PATH", help="one more INT8 file")
    parser.add_argument("--peers-venv", type=Path, default=temporary / "cspdeploy-int8-peers")
    parser.add_argument("--work", type=Path, help="keeps the files; by default a folder of the model's name in temp")
    parser.add_argument("--calib", type=int, default=256, help="calibration images")
    parser.add_argument("--images", type=int, default=10_000, help="test images")
    parser.add_argument("--size", type=int, default=256, help="side for the latency, in pixels")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="of quantise-time")
    parser.add_argument("--latency-rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=4, help="timed calls a round")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def prepare(arguments: argparse.Namespace) -> tuple[Maker, ModelSpec]:
    """The FP32 bundle, the calibration images in both forms, and the peers."""
    work = arguments.work or Path(tempfile.gettempdir()) / f"cspdeploy-int8-{arguments.model}"
    bundle = work / "fp32" / arguments.model
    if not bundle.is_dir():
        command = cspdeploy("export", arguments.model, "--models", arguments.models, "--no-verify", "-o", work / "fp32")
        run_child(command)
    spec = read_manifest(bundle).spec
    with np.load(arguments.models / arguments.model / "calibration.npz") as file:
        stored = file[file.files[0]]
    stored = stored[np.linspace(0, len(stored) - 1, arguments.calib).astype(np.int64)]
    write_pngs(stored, work / "calibration")
    np.save(work / "calibration.npy", preprocess(list(stored), spec.preprocess))
    return Maker(
        model=arguments.model, models=arguments.models, work=work, float_onnx=bundle / f"{arguments.model}.onnx",
        calibration_npy=work / "calibration.npy", calibration_folder=work / "calibration",
        peers=Path(sys.executable) if arguments.skip_peers else prepare_peers(arguments.peers_venv),
        target=arguments.target, extra=tuple(arguments.ours),
    ), spec  # fmt: skip


def methods_of(arguments: argparse.Namespace) -> tuple[str, ...]:
    ours = () if arguments.skip_ours else (OURS, OURS_FROM_ONNX)
    return ours + (() if arguments.skip_peers else PEER_METHODS)


def files_of(maker: Maker, arguments: argparse.Namespace) -> dict[str, Path]:
    """Every file to judge by name, made if it is not there from the last run."""
    files = {FP32: maker.float_onnx}
    folder = maker.work / "files"
    for method in methods_of(arguments):
        if method == OURS_FROM_ONNX:
            continue  # the same file by another way
        if not maker.path(method, folder).is_file():
            sys.stderr.write(f"making {method}\n")
            try:
                maker.make(method, folder)
            except ChildFailedError as error:
                sys.stderr.write(f"{method}: {error}\n")
                if method == OURS:
                    raise SystemExit(1) from error  # without it there is nothing to judge
                continue
        files[method] = maker.path(method, folder)
    for given in arguments.file:
        name, _, path = given.partition("=")
        files[name] = Path(path)
    return files


def judge_accuracy(
    subjects: list[Subject], testing: LabelledImages, spec: ModelSpec, *, count: int
) -> dict[str, dict[str, float]]:
    """By `name/engine`, against the first subject."""
    images = preprocess([testing.source(index) for index in range(count)], spec.preprocess)
    found: dict[str, dict[str, float]] = {}
    reference = logits_of(subjects[0], images)
    for subject in subjects:
        key = f"{subject.name}/{subject.engine}"
        try:
            found[key] = accuracy_of(logits_of(subject, images), reference, testing.classes[:count])
        except Exception as error:  # of any engine: a file that one cannot run is a result too
            sys.stderr.write(f"accuracy: {key}: {error}\n")
            continue
        sys.stderr.write(f"accuracy: {key} {found[key]['sqnr_db']:.1f} dB, {found[key]['agreement']:.2%}\n")
    return found


def judge_latency(subjects: list[Subject], arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """By `name/engine`: milliseconds of each round, their median, and the ratios."""
    samples = measure_latency(
        subjects, models=arguments.models, size_px=arguments.size, threads=arguments.threads,
        rounds=arguments.latency_rounds, calls=arguments.calls,
    )  # fmt: skip
    by_key = {f"{subject.name}/{subject.engine}": values for subject, values in samples.items()}
    bases = {
        "of_fp32": f"{FP32}/ort",
        "of_eager": f"{EAGER}/eager",
        "of_u8s8": f"{U8S8}/ort",
        "of_nncf": f"{NNCF}/openvino",
    }
    found: dict[str, dict[str, Any]] = {}
    for key, values in by_key.items():
        ratios = {name: ratio(values, by_key[base]) for name, base in bases.items() if base in by_key}
        found[key] = {"median_ms": float(np.median(values)), **ratios, "rounds_ms": values}
    return found


def _cell(facts: Results, key: str, form: Callable[[float], str]) -> str:
    return form(facts[key]) if key in facts else ""


def table(results: Results) -> str:
    """Markdown, one row for each file on each engine."""
    lines = [
        "| file | engine | SQNR dB | agreement | top-1 | fall, points | ms | eager | FP32 ort | x U8S8 | x NNCF "
        "| conv int/float | quantise s | peak MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    accuracy, latency = results.get("accuracy", {}), results.get("latency", {})
    nodes, costs = results.get("nodes", {}), results.get("quantise-time", {})
    for key in dict.fromkeys([*accuracy, *latency]):
        name, _, engine = key.partition("/")
        exact, timed = accuracy.get(key, {}), latency.get(key, {})
        spent = costs.get(name, {})
        cells = [
            _cell(exact, "sqnr_db", lambda v: "" if v > 150 else f"{v:.1f}"),
            _cell(exact, "agreement", lambda v: f"{v:.2%}"),
            _cell(exact, "top1", lambda v: f"{v:.2%}"),
            _cell(exact, "top1_drop_points", lambda v: f"{v:+.2f}"),
            _cell(timed, "median_ms", lambda v: f"{v:.1f}"),
            _cell(timed, "of_eager", lambda v: f"{1 / v:.2f}x faster"),
            _cell(timed, "of_fp32", lambda v: f"{1 / v:.2f}x faster"),
            _cell(timed, "of_u8s8", lambda v: f"{v:.3f}"),
            _cell(timed, "of_nncf", lambda v: f"{v:.3f}"),
            "/".join(map(str, nodes[key]["convolutions"])) if key in nodes else "",
            _cell(spent, "median_seconds", lambda v: f"{v:.1f}"),
            _cell(spent, "peak_mib", lambda v: f"{v:.0f}"),
        ]
        lines.append(f"| {name} | {engine} | {' | '.join(cells)} |")
    if OURS_FROM_ONNX in costs:
        spent = costs[OURS_FROM_ONNX]
        lines.append(f"\n{OURS_FROM_ONNX}: {spent['median_seconds']:.1f} s, peak {spent['peak_mib']:.0f} MiB")
    lines += [
        f"\n{count} calibration images: peak {cost['peak_mib']:.0f} MiB, {cost['seconds']:.1f} s"
        for count, cost in results.get("memory", {}).items()
    ]
    return "\n".join(lines)


def run_parts(parts: tuple[str, ...], arguments: argparse.Namespace, results: Results) -> None:
    """The measured children come first: this process loads its engines after them."""
    maker, spec = prepare(arguments)
    if "quantise-time" in parts:
        costs = measure_costs(maker, methods_of(arguments), rounds=arguments.rounds)
        results["quantise-time"] = {
            method: {
                "median_seconds": float(np.median([cost.seconds for cost in found])),
                "peak_mib": max(cost.peak_mib for cost in found),
                "rounds": [asdict(cost) for cost in found],
            }
            for method, found in costs.items()
        }
    if "memory" in parts and not arguments.skip_ours:
        training = open_dataset("fashion-mnist", split="train")
        if training.stored is not None:
            found = measure_memory(maker, training.stored, MEMORY_COUNTS)
            results["memory"] = {str(count): asdict(cost) for count, cost in found.items()}
    if not {"accuracy", "latency"} & set(parts):
        return
    files = files_of(maker, arguments)
    subjects = [Subject(name, engine, path) for name, path in files.items() for engine in engines_of(path)]
    subjects.sort(key=lambda subject: (subject.engine != "ort", subject.name != FP32))
    if "accuracy" in parts:
        testing = open_dataset("fashion-mnist", split="test")
        count = min(arguments.images, len(testing))
        results.setdefault("accuracy", {}).update(judge_accuracy(subjects, testing, spec, count=count))
        for subject in subjects:
            counts = node_counts(subject)
            results.setdefault("nodes", {})[f"{subject.name}/{subject.engine}"] = {
                "convolutions": convolutions(counts), "all": counts,
            }  # fmt: skip
    if "latency" in parts:
        eager = Subject(EAGER, "eager", Path(arguments.model))
        results.setdefault("latency", {}).update(judge_latency([eager, *subjects], arguments))


def main() -> None:
    arguments = parse_arguments()
    parts = tuple(arguments.part or PARTS)
    results: Results = {}
    if arguments.json and arguments.json.is_file():
        results = json.loads(arguments.json.read_text())
    results["machine"] = describe_environment()
    results["settings"] = {key: str(value) for key, value in vars(arguments).items()}
    run_parts(parts, arguments, results)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    known = results["machine"]
    sys.stdout.write(
        f"{arguments.model}: {known['cpu']}, {arguments.threads} threads, load {known['load_1min']} before\n\n"
    )
    sys.stdout.write(table(results) + "\n")


if __name__ == "__main__":
    main()
