"""The loss curve of one and of two workers, for two seeds: do they differ by more than the seeds do?

    python tests/benchmarks/train_workers.py --images 8192 --epochs 4
    python tests/benchmarks/train_workers.py --device cuda --epochs 14

Trains cspdarknet21 at 32x32 on Fashion-MNIST, or on its first images, with the recipe of `cspdeploy train`. With GPUs
each worker has one. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from cspdeploy.core.datasets import LabelledImages, open_dataset
from cspdeploy.nets.registry import find_network, spec_of
from cspdeploy.train.data import BatchLoader, measure_mean_std
from cspdeploy.train.loop import Recipe, train
from cspdeploy.train.workers import open_workers

NETWORK, SIDE_PX, NUM_TESTING = "cspdarknet21", 32, 2048


def first(data: LabelledImages, num: int) -> LabelledImages:
    if data.stored is None:
        raise SystemExit("expected images in memory")
    return dataclasses.replace(data, stored=data.stored[:num], classes=data.classes[:num])


def work(options: argparse.Namespace) -> None:
    """As one of the workers; the first one writes the curve."""
    with open_workers(options.device) as workers, tempfile.TemporaryDirectory() as folder:
        training = first(open_dataset("fashion-mnist", split="train"), options.images)
        testing = first(open_dataset("fashion-mnist", split="test"), NUM_TESTING)
        network = find_network(NETWORK)
        contract = dataclasses.replace(network.preprocess.with_size(SIDE_PX, SIDE_PX), crop_pct=1.0)
        mean, std = measure_mean_std(training, contract)
        contract = dataclasses.replace(contract, mean=mean, std=std)
        run = train(
            spec_of(network, num_classes=10, preprocess=contract),
            Recipe(epochs=options.epochs, batch=options.batch, seed=options.seed),
            training=BatchLoader(training, contract, batch=options.batch),
            testing=BatchLoader(testing, contract, batch=options.batch),
            checkpoint=Path(folder) / "c.pt", workers=workers,
        )  # fmt: skip
        if workers.is_first:
            curve = [dataclasses.asdict(record) for record in run.curve]
            options.out.write_text(json.dumps({"place": run.places[0], "curve": curve}))


def run(num: int, seed: int, words: list[str]) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "curve.json"
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // num))}
        subprocess.run([*launch, __file__, *words, "--seed", str(seed), "--out", str(out)], check=True, env=environment)
        return dict(json.loads(out.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.out is not None:
        work(options)
        return
    words = sys.argv[1:]
    found = {(num, seed): run(num, seed, words) for seed in (0, 1) for num in (1, options.workers)}
    write = sys.stdout.write
    write(f"{NETWORK}, {options.images} images, batch {options.batch}: {next(iter(found.values()))['place']}\n\n")
    write("| workers | seed | loss of each epoch | top-1 | seconds |\n|---|---|---|---|---|\n")
    losses = {}
    for (num, seed), row in found.items():
        curve: list[dict[str, float]] = row["curve"]  # type: ignore[assignment]
        losses[num, seed] = np.array([record["train_loss"] for record in curve])
        told = ", ".join(f"{loss:.4f}" for loss in losses[num, seed])
        write(f"| {num} | {seed} | {told} | {100 * curve[-1]['test_top1']:.2f} % | ")
        write(f"{sum(record['seconds'] for record in curve):.0f} |\n")
    between_seeds = np.abs(losses[1, 0] - losses[1, 1]).max()
    between_workers = max(np.abs(losses[1, seed] - losses[options.workers, seed]).max() for seed in (0, 1))
    write(f"\nlargest difference of the loss: between seeds {between_seeds:.4f}, ")
    write(f"between 1 and {options.workers} workers {between_workers:.4f}\n")


if __name__ == "__main__":
    main()
