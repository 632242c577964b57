"""What a GPU's engine makes of the pairs of an INT8 network: a word for its row."""

from __future__ import annotations

from collections.abc import Iterable

from cspdeploy.core.placed import count_integer_work
from cspdeploy.core.types import PlacedNode
from cspdeploy.runtimes.base import Runtime

__all__ = ["integer_note"]

_CUDA = "CUDAExecutionProvider"
_REWRITING = frozenset({"TensorrtExecutionProvider"})
"""It makes one node of all that it takes, whose inside the record does not tell."""


def integer_note(runtime: Runtime, precision: str, nodes: Iterable[PlacedNode]) -> str:
    """How little of it is computed in INT8, by the engine's own record; empty where it tells nothing, or all is.

    Args:
        precision: of the artifact; others than "int8" have no note.
        nodes: of the session.
    """
    known = tuple(nodes)
    providers = {node.provider for node in known}
    if precision != "int8" or runtime.device != "cuda" or _CUDA not in providers or providers & _REWRITING:
        return ""
    work = count_integer_work(known)
    if work is None or not work.num_float or not work.num_pairs:
        return ""
    return (
        f"{work.num_integer} of {work.num_integer + work.num_float} convolutions and matrix products in INT8 on CUDA: "
        "Q/DQ pairs are computed around float ones; FP16 is the format there"
    )
