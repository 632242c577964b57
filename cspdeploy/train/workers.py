"""Training on several workers: one process each, started by torchrun, with one slice of every batch each.

The recipe's batch is that of a step over all workers, so that steps, learning rate and schedule do not depend on how
many there are. Gradients are averaged by DistributedDataParallel: with nccl between GPUs, with gloo between CPUs.

Batch norm uses the statistics of a worker's own slice, and its running averages are those of the first worker; on GPUs
with less than `MIN_OWN_STATISTICS` images a slice, the statistics are those of the whole batch (SyncBatchNorm, which
PyTorch has on CUDA alone).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn

from cspdeploy.core.codec import JsonObject
from cspdeploy.core.errors import CspDeployError, InputError, RuntimeUnavailableError
from cspdeploy.train.share import Share

__all__ = ["NO_WORKERS", "Workers", "environment_share", "open_workers"]

MIN_OWN_STATISTICS = 16
"""Images a slice. Source: Wu and He, Group Normalization, arXiv 1803.08494, table 2: with batch norm, ResNet-50 makes
23.6 % errors at 32 and 23.7 % at 16 images a worker, 24.8 % at 8 and 27.3 % at 4."""
RENDEZVOUS_S = 120.0
"""Until all workers have found each other: the slowest of them imports PyTorch from a network disk."""
COLLECTIVE_S = 1800.0
"""How long a worker waits for the others in a step before it gives up. A process that ended is noticed at once by its
closed connection or by torchrun; this is for one that hangs. The first waits longest for others that decode a large
set which it has in its cache."""
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """This process among those that train together; as it stands, one on the CPU.

    Attributes:
        share: which one it is.
        device: where it computes.
        store: what all of them can write to, whatever becomes of the process group; None of a single one.
    """

    share: Share = field(default_factory=Share)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    store: Any = None

    @property
    def num(self) -> int:
        """How many there are."""
        return self.share.num

    @property
    def is_first(self) -> bool:
        """Whether it is the one that prints and writes."""
        return self.share.rank == 0

    def require_batch(self, batch: int, *, num_images: int) -> None:
        """Refuse a batch that cannot be divided.

        Args:
            batch: images a step, over all workers.
            num_images: of the training set; one smaller than the batch is one batch.

        Raises:
            InputError: not a multiple of the workers, or fewer than two images a worker.
        """
        whole, least = min(batch, num_images), 2 * self.num
        if self.num == 1 or (whole % self.num == 0 and whole >= least):
            return
        if num_images < least:
            raise InputError(
                f"{num_images} training images over {self.num} workers, expected two each", fix="train on one worker"
            )
        nearest = max(least, round(whole / self.num) * self.num)
        if nearest > num_images:
            nearest -= self.num
        raise InputError(
            f"--batch {batch}: {whole} images over {self.num} workers, expected a multiple of {self.num}, two each",
            fix=f"--batch {nearest}",
        )

    def each(self, batch: int) -> int:
        """Images of a batch that a worker has at a time; at least one."""
        return max(1, batch // self.num)

    def synchronises_statistics(self, batch: int) -> bool:
        """Whether batch norm takes the statistics of the whole batch."""
        return self.num > 1 and self.device.type == "cuda" and batch // self.num < MIN_OWN_STATISTICS

    def parallel(self, model: nn.Module, *, batch: int) -> nn.Module:
        """What computes `model`, whose parameters it shares, and averages their gradients; `model` of a single worker.

        Args:
            model: on `device`. Parameters and buffers become those of the first worker.
            batch: images a step, over all workers.
        """
        if self.num == 1:
            return model
        if self.synchronises_statistics(batch):
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return nn.parallel.DistributedDataParallel(
            model, device_ids=[self.device.index] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True, static_graph=True,  # every step goes through all of the network
        )  # fmt: skip

    def mean(self, value: Tensor) -> Tensor:
        """Over the workers, of a tensor on `device`, which is written to."""
        if self.num > 1:
            distributed.all_reduce(value)
            value /= self.num
        return value

    def sums(self, *counts: int) -> tuple[int, ...]:
        """Of whole numbers, over the workers: exact."""
        if self.num == 1:
            return counts
        total = torch.tensor(counts, dtype=torch.int64)  # on the CPU, where every group has gloo
        distributed.all_reduce(total)
        return tuple(total.tolist())

    def gather(self, items: Sequence[Any]) -> list[Any]:
        """Those of all workers on the first one, by worker; nothing on the others."""
        if self.num == 1:
            return list(items)
        parts: list[list[Any]] | None = [[] for _ in range(self.num)] if self.is_first else None
        distributed.gather_object(list(items), parts)
        return [item for part in parts or [] for item in part]

    def from_first(self, value: Any) -> Any:
        """What the first worker gives, on all of them."""
        if self.num == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box)
        return box[0]

    def copy_first(self, model: nn.Module) -> None:
        """Let parameters and buffers of `model` be those of the first worker."""
        if self.num > 1:
            for tensor in model.state_dict().values():
                distributed.broadcast(tensor, 0)

    def describe(self) -> JsonObject:
        """Device and number, as train.json keeps them."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return {"device": name, "workers": self.num, "torch": str(torch.__version__)}


NO_WORKERS = Workers()
"""A single process on the CPU."""


def environment_share(environment: Mapping[str, str] = os.environ) -> Share | None:
    """Which worker torchrun has made of this process; None where it was not started by it.

    Raises:
        InputError: only some of the variables are there, or they are no numbers.
    """
    if "RANK" not in environment and environment.get("WORLD_SIZE", "1") == "1":
        return None
    alone = environment.get("RANK") == "0" and environment.get("WORLD_SIZE") == "1"
    if alone and not environment.get("LOCAL_RANK"):  # as operators of clusters set it in a job of one replica
        return None
    if missing := [name for name in VARIABLES if not environment.get(name)]:
        raise InputError(
            f"one of several workers, but {', '.join(missing)} is not set in its environment",
            fix="start them with torchrun --nproc-per-node N, or with cspdeploy train --workers N",
        )
    try:
        return Share(int(environment["RANK"]), int(environment["WORLD_SIZE"]))
    except ValueError as error:
        raise InputError(
            f"RANK={environment['RANK']} WORLD_SIZE={environment['WORLD_SIZE']}: expected 0 <= RANK < WORLD_SIZE",
            fix="start the workers with torchrun",
        ) from error


@contextlib.contextmanager
def open_workers(
    device: str | None = None, *, rendezvous_s: float = RENDEZVOUS_S, collective_s: float = COLLECTIVE_S
) -> Iterator[Workers]:
    """This process and those that torchrun started with it, joined; a single one where it was not started by it.

    Args:
        device: "cpu" or "cuda"; None: a GPU for each worker where this machine has any, else the CPU.
        rendezvous_s: seconds until all must have come.
        collective_s: seconds that one waits for the others in a step.

    Raises:
        InputError: more workers than GPUs, or half an environment of torchrun.
        RuntimeUnavailableError: no GPU though one was asked for; not all workers came; PyTorch without them.
    """
    share = environment_share() or Share()
    place = _choose_device(device, share)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if share.num == 1:
        yield Workers(device=place)
        return
    store = _join(share, place, rendezvous_s=rendezvous_s, collective_s=collective_s)
    yield Workers(share=share, device=place, store=store)
    # After an error it is left to the end of the process: to take leave of workers that are gone can take for ever.
    distributed.destroy_process_group()


def _choose_device(device: str | None, share: Share) -> torch.device:
    num_gpus = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
    if device == "cuda" and not num_gpus:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise RuntimeUnavailableError(
            f"--device cuda: this PyTorch is {built} and finds no GPU", fix="cspdeploy doctor, or --device cpu"
        )
    if not num_gpus:
        return torch.device("cpu")
    return torch.device("cuda", _own_gpu(os.environ, num_gpus) if share.num > 1 else torch.cuda.current_device())


def _own_gpu(environment: Mapping[str, str], num_gpus: int) -> int:
    """Index of the GPU of one of several workers, of `num_gpus` that it can see.

    How many workers are on this machine only torchrun tells. Without it (srun) a worker may see its own GPU alone.

    Raises:
        InputError: none is left for it.
    """
    rank, here = int(environment["LOCAL_RANK"]), environment.get("LOCAL_WORLD_SIZE")
    if here is None and num_gpus == 1:
        return 0
    num_here = rank + 1 if here is None else int(here)
    if num_here > num_gpus:
        least = "at least " if here is None else ""
        raise InputError(
            f"{least}{num_here} workers on this machine, and {num_gpus} GPU{'s' if num_gpus > 1 else ''}: "
            "expected one each", fix=f"--workers {num_gpus}, or --device cpu",
        )  # fmt: skip
    return rank


def _join(share: Share, device: torch.device, *, rendezvous_s: float, collective_s: float) -> Any:
    """The process group; gives its store."""
    if not distributed.is_available():
        raise RuntimeUnavailableError(
            "this PyTorch is built without torch.distributed", fix="train on one worker, or install torch's own wheel"
        )
    from torch.distributed.rendezvous import rendezvous

    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        found = rendezvous("env://", share.rank, share.num, timeout=timedelta(seconds=rendezvous_s))
        store, rank, num = next(found)
        distributed.init_process_group(
            # Figures and boxes travel on the CPU, gradients on the GPU.
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=num,
            timeout=timedelta(seconds=collective_s),
        )  # fmt: skip
        distributed.all_reduce(torch.zeros((), device=device))  # nccl connects at the first one, and here it may fail
    except (RuntimeError, ValueError) as error:
        raise lost_workers(error, share, doing=f"joining at {place}") from error
    return store


def lost_workers(error: Exception, share: Share, *, doing: str) -> CspDeployError:
    """That the others could not be reached, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = lines[0][:200] if lines else type(error).__name__
    return RuntimeUnavailableError(
        f"worker {share.rank} of {share.num}: {doing}: another worker ended, hangs or was not started ({told})",
        fix="see what the others say; all must be started at once, by torchrun; finished epochs are kept: --resume",
    )
