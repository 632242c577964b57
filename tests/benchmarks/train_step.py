"""A training step of CSPDarknet53 with and without convolution by matrix product, in turns.

python tests/benchmarks/train_step.py [--size 32] [--batch 128] [--steps 6]
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time

import torch
from torch import nn

from cspdeploy.nets.registry import build, find_network, spec_of
from cspdeploy.train.gemm_conv import use_gemm_convolutions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=6)
    arguments = parser.parse_args()
    spec = dataclasses.replace(spec_of(find_network("cspdarknet53")), num_classes=10)
    models = {name: build(spec).to(memory_format=torch.channels_last) for name in ("plain", "matrix product")}
    use_gemm_convolutions(models["matrix product"])
    shape = (arguments.batch, 3, arguments.size, arguments.size)
    x_NCHW = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    classes = torch.randint(0, 10, (arguments.batch,))
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for step in range(arguments.steps + 1):
        for name, model in models.items():
            started = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(x_NCHW)
            nn.functional.cross_entropy(logits.float(), classes).backward()
            model.zero_grad()
            if step:  # the first one warms up
                seconds[name].append(time.perf_counter() - started)
    plain, product = (statistics.median(values) for values in seconds.values())
    sys.stdout.write(f"plain {plain:.2f} s, matrix product {product:.2f} s: {plain / product:.2f}x as fast\n")


if __name__ == "__main__":
    main()
