"""A run of a network seen from inside: every tensor on its way, whatever computes it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy.typing as npt

__all__ = ["Sink", "TraceSource", "TracedNode", "Values"]

Array = npt.NDArray[Any]
Values = Mapping[str, Sequence[Array]]
"""Tensors by name, one array for each call."""
Sink = Callable[[str, Array, bool], None]
"""Takes a tensor's name, its values, and whether it is a constant, which is given once and not with every call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedNode:
    """An operator that ran.

    Attributes:
        index: place in the order of the run.
        name: as the file has it; of a PyTorch operator, its place.
        operator: "Conv", or aten's name for it: "convolution".
        module: path of the torch module that it came from; empty where that is not known.
        inputs, outputs: names of tensors.
        attributes: those that are numbers, texts or sequences of them.
    """

    index: int
    name: str
    operator: str
    module: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)


class TraceSource(Protocol):
    """Something that computes and can be watched."""

    title: str
    """What runs on what, for the reader."""

    @property
    def nodes(self) -> Sequence[TracedNode]:
        """In the order of the run; known after `trace`."""
        ...

    @property
    def outputs(self) -> Sequence[str]:
        """Tensors that are the network's outputs, in their order; known after `trace`."""
        ...

    def trace(self, calls: Sequence[Mapping[str, Array]], sink: Sink, *, wanted: Collection[str] | None = None) -> None:
        """Run every call and give each floating-point tensor, or the wanted ones, to `sink` in the order of the run.

        8-bit tensors come as the real numbers that they stand for. The sink must not keep the arrays unless it copies
        them. Calls come one after the other for each tensor.

        Raises:
            InputError: it cannot be run.
        """
        ...

    def replay(
        self, calls: Sequence[Mapping[str, Array]], given: Values, targets: Sequence[str]
    ) -> dict[str, list[Array]]:
        """The targets, where every consumer of a tensor of `given` takes the values given instead.

        A target that is itself given is still computed: what its node makes of its given inputs.

        Raises:
            InputError: it cannot be run.
        """
        ...
