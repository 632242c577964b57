"""The regimes that a pair of networks is timed in: one runtime, one kind of artifact, one way to set the engine.

What is claimed of a time holds in one regime and not in the next, so that a time without its regime says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cspdeploy.check.variants import PLAIN, Variant, graph_variant, variants_of
from cspdeploy.core.catalog import EAGER
from cspdeploy.core.errors import InputError, RuntimeUnavailableError, did_you_mean
from cspdeploy.core.gpu_visible import cuda_gpu
from cspdeploy.pipeline.pair_sides import Prepared
from cspdeploy.runtimes import all_runtimes, require_runtime
from cspdeploy.runtimes.base import Runtime, SessionRequest

__all__ = [
    "ALL_REGIMES", "GPU_COMMAND", "PLAIN_REGIME", "PairRegime", "check_device", "check_regimes", "common_regimes",
    "default_batches", "regime_name", "timed_runtimes",
]  # fmt: skip

ALL_REGIMES, PLAIN_REGIME = "all", "plain"
"""What stands in `--regimes` for every variant, and for the one that has no name."""
GPU_COMMAND = "cspdeploy compare --paper --latency --runtime torch-cuda --runtime ort-cuda"
"""Measures the claims on GPUs, on a machine that has one."""
_BATCHES = {"cpu": (1, 8), "cuda": (1, 32)}
"""Where none were asked for: one image, as a caller waits for it, and as many as the device is loaded with."""
_ANY = SessionRequest(path=Path())
"""What a variant is tried on, to see what it sets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRegime:
    """What both sides are opened with. `device`: index of the GPU; without meaning on a CPU."""

    runtime: Runtime
    kind: str
    artifact_precision: str
    variant: Variant
    device: int = 0

    @property
    def name(self) -> str:
        """As tables have it."""
        return regime_name(self.runtime.name, self.kind, self.variant.name)

    @property
    def on_gpu(self) -> bool:
        """Whether it computes on a GPU."""
        return self.runtime.device == "cuda"

    @property
    def precision(self) -> str:
        """In which it computes: the eager network has FP32 weights, and is made FP16 by its variant."""
        return "fp16" if self.variant.apply(_ANY).cuda.half else self.artifact_precision

    @property
    def tf32(self) -> bool | None:
        """Whether float32 products may be rounded to TF32, on both sides alike; None where there is no such thing.

        On, as convolutions have it by default in both engines, and so as it is in use; a verdict on numbers is without.
        """
        return True if self.on_gpu else None

    def unmet(self, settings: Mapping[str, str]) -> str:
        """Which of its settings an open session does not have; empty where it has them all.

        Args:
            settings: what the session says that it was opened with. What ONNX Runtime does not tell is not asked for.
        """
        request = self.variant.apply(_ANY)
        asked: dict[str, str] = {}
        if self.tf32 is not None:
            asked |= {key: "1" for key in ("use_tf32", "use_tf32_cudnn") if key in settings}
        if self.kind == EAGER:
            asked["memory_format"] = "channels_last" if request.cuda.channels_last else ""
            asked["dtype"] = "float16" if request.cuda.half else ""
            asked["compile"] = request.cuda.compile
        elif "enable_cuda_graph" in settings:
            asked["enable_cuda_graph"] = str(int(request.cuda_graph))
        wrong = [name for name, value in asked.items() if settings.get(name, "") != value]
        return ", ".join(f"{name} {asked[name] or 'unset'}, it has {settings.get(name) or 'none'}" for name in wrong)


def regime_name(runtime: str, kind: str, variant: str) -> str:
    """Such as "torch-cuda eager fp16 channels-last"."""
    return f"{runtime} {kind} {variant}".rstrip()


def timed_runtimes(names: Sequence[str], *, device: str = "") -> list[Runtime]:
    """Those that were asked for, or all that are here, if their time means anything.

    Args:
        names: empty for all that are here.
        device: "cuda" or "cpu": of these the ones on that device; empty for any.

    Raises:
        InputError: unknown runtime.
        RuntimeUnavailableError: a runtime that was asked for is missing.
    """
    found = [require_runtime(name) for name in names] or [one for one in all_runtimes().values() if not one.missing()]
    return [one for one in found if one.timed and device in ("", one.device)]


def default_batches(runtimes: Sequence[Runtime], asked: tuple[int, ...] | None) -> dict[str, tuple[int, ...]]:
    """Images a call by runtime: as asked, each once, else what its device is used with."""
    return {one.name: tuple(dict.fromkeys(asked or _BATCHES.get(one.device, _BATCHES["cpu"]))) for one in runtimes}


def check_regimes(names: Sequence[str], runtimes: Sequence[Runtime]) -> None:
    """Before anything is exported: whether each regime is known, and some of the runtimes has it.

    Args:
        runtimes: those that will be timed.

    Raises:
        InputError: no runtime knows it, or none that is timed.
    """
    here = {name for one in runtimes for name in _names_of(one)}
    anywhere = {name: one.name for one in all_runtimes().values() if one.timed for name in _names_of(one)}
    for name in names:
        if name == ALL_REGIMES or name in here:
            continue
        if name not in anywhere:
            raise InputError(
                f"--regimes {name}: unknown, expected {ALL_REGIMES} or some of {', '.join(sorted(anywhere))}",
                fix=f"{did_you_mean(name, [ALL_REGIMES, *anywhere])}cspdeploy compare --regimes {ALL_REGIMES}",
            )
        timed = ", ".join(one.name for one in runtimes) or "none"
        raise InputError(
            f"--regimes {name}: none of the runtimes that are timed has it ({timed})",
            fix=f"--runtime {anywhere[name]}, or --regimes {ALL_REGIMES}",
        )


def check_device(device: int | None, runtimes: Sequence[Runtime]) -> None:
    """Whether a GPU was named where one is used, and one that is there. Without nvidia-smi its engine tells that.

    Raises:
        InputError: no GPU has that index.
        RuntimeUnavailableError: nothing that is timed computes on a GPU.
    """
    if device is None:
        return
    if device < 0:
        raise InputError(f"--device {device}: expected the index of a GPU, from 0 up", fix="--device 0")
    if not any(one.device == "cuda" for one in runtimes):
        timed = ", ".join(one.name for one in runtimes) or "nothing"
        raise RuntimeUnavailableError(
            f"--device {device}: no CUDA runtime is timed here (timed: {timed})",
            fix="cspdeploy doctor says what is missing for CUDA; without a GPU leave out --device",
        )
    if cuda_gpu(0) is not None and cuda_gpu(device) is None:
        last = next(index for index in range(device) if cuda_gpu(index + 1) is None)
        have = "one GPU, 0" if last == 0 else f"{last + 1} GPUs, 0 to {last}"
        raise InputError(f"--device {device}: there is no such GPU, CUDA shows {have}", fix=f"--device {last}")


def common_regimes(
    a: Prepared, b: Prepared, runtimes: Sequence[Runtime], *, names: Sequence[str], all_on_gpu: bool = False,
    device: int = 0,
) -> list[PairRegime]:  # fmt: skip
    """Every regime that both sides can be timed in, in the order of the runtimes.

    Args:
        names: "all", "plain", names of variants; empty for the plain ones.
        all_on_gpu: with no names: every variant of runtimes on a GPU.
    """
    return [
        PairRegime(runtime=runtime, kind=kind, artifact_precision=precision, variant=variant, device=device)
        for runtime in runtimes
        for kind, precision in _common_kinds(a, b, runtime)
        for variant in _chosen(runtime, names, every=all_on_gpu and not names and runtime.device == "cuda")
    ]


def _chosen(runtime: Runtime, names: Sequence[str], *, every: bool) -> list[Variant]:
    every = every or ALL_REGIMES in names
    wanted = {PLAIN if name == PLAIN_REGIME else name for name in names or (PLAIN_REGIME,)}
    # Every variant of the table; the CUDA graph of a runtime that has none there is for whoever names it.
    return [one for one in _variants(runtime) if one.name in wanted or (every and one in variants_of(runtime.name))]


def _variants(runtime: Runtime) -> list[Variant]:
    graph = graph_variant(runtime.name)
    found = [*variants_of(runtime.name), *([graph] if graph else [])]
    return list({one.name: one for one in found}.values())


def _names_of(runtime: Runtime) -> list[str]:
    return [one.name or PLAIN_REGIME for one in _variants(runtime)]


def _common_kinds(a: Prepared, b: Prepared, runtime: Runtime) -> list[tuple[str, str]]:
    """What the runtime reads of both, with its precision, in which it computes.

    A runtime that has a remark on a precision does not compute in it, and its time says nothing of it.
    """
    if runtime.reads(format_=EAGER, precision="fp32"):
        return [(EAGER, "fp32")]
    ours, theirs = a.artifacts(), b.artifacts()
    return [
        (kind, artifact.precision)
        for kind, artifact in ours.items()
        if kind in theirs
        and artifact.frontend is None  # their input is another one
        and runtime.reads(format_=artifact.format, precision=artifact.precision)
        and artifact.precision not in runtime.notes
    ]
