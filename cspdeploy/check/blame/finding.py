"""What blame found. All distances are relative L2 against the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["BLAME_SCHEMA_VERSION", "BlameReport", "BlamedNode", "TensorError"]

BLAME_SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorError:
    """A tensor of the artifact against its counterpart.

    Attributes:
        reference: the counterpart's name; empty where there is none.
        how: by what it was found: "name", "structure" or "value".
        rel_l2: exact, over all inputs; None where there is no counterpart, infinite where the tensor is not finite or
            has another shape.
        budget: of that distance; None where there is no counterpart.
        num_bad: NaN and infinite values.
        absmax, reference_absmax: largest finite magnitudes.
    """

    tensor: str
    reference: str
    how: str
    rel_l2: float | None
    budget: float | None
    num_bad: int
    num_values: int
    shape: tuple[int, ...]
    absmax: float
    reference_absmax: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BlamedNode:
    """A node with the errors of what it takes and makes.

    Attributes:
        module: path of the torch module; empty where neither side tells.
        introduced: error of its first output when it is fed the reference's own tensors; None where that cannot be.
        facts: what differs between it and its counterpart, in sentences.
        also: names of further nodes between it and the next tensor that could be compared: the fault is in one of them.
    """

    node: str
    operator: str
    module: str
    reference_node: str
    reference_operator: str
    inputs: tuple[TensorError, ...]
    outputs: tuple[TensorError, ...]
    introduced: float | None
    facts: tuple[str, ...] = ()
    also: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BlameReport:
    """The answer.

    Attributes:
        verdict: "within": the outputs are within their limits, and nothing is blamed. "introduced": `blamed` makes the
            error by itself. "accumulated": no single node does; `blamed` is where the sum first passes its budget.
        summary: one sentence.
        outputs: of the network.
        blamed: None for "within".
        worst: nodes with the largest error against their budget; of an INT8 file, that introduce most.
        num_compared, num_tensors: tensors with a counterpart, and all.
        optimised: the fault shows only after the engine's own rewrites, whose graph is the one blamed.
        notes: what the reader must know besides.
    """

    schema_version: int = BLAME_SCHEMA_VERSION
    verdict: Literal["within", "introduced", "accumulated"]
    summary: str
    artifact: str
    runtime: str
    against: str
    precision: str
    num_inputs: int
    outputs: tuple[TensorError, ...]
    blamed: BlamedNode | None
    worst: tuple[BlamedNode, ...]
    num_compared: int
    num_tensors: int
    optimised: bool = False
    notes: tuple[str, ...] = ()
