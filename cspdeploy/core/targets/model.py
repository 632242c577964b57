"""What a target is: caps, operators, and rules for single operators, each with the source that says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from cspdeploy.core.targets.operators import COMPOSITES

__all__ = ["DtypeRule", "FreeDims", "PatternKind", "PatternRule", "Rule", "RuleKind", "Severity", "Target"]

Severity = Literal["violation", "warning"]
"""violation: the target does not load the file, or computes something else. warning: it runs, but slowly, in part on
another device, or with other types."""

RuleKind = Literal[
    "constant",
    "spatial",
    "rank",
    "attribute",
    "unused-output",
    "zero-point",
    "zero-point-dtype",
    "form",
    "element-type",
]
"""constant: inputs that must be known before it runs. spatial: how many spatial dimensions. rank: of the first input.
attribute: must have one of some values. unused-output: an output that nobody may use. zero-point: must be zero.
zero-point-dtype: integer type of the quantised values. form: the operator as some opsets define it is not taken.
element-type: of inputs."""

PatternKind = Literal[
    "scale",
    "channel-axis",
    "pair",
    "half-quantised",
    "activation",
    "residual",
    "concat",
    "grid-kept",
    "output",
    "quantised-product",
]
"""Of quantised graphs. scale: constant and positive. channel-axis: of scales for each channel. pair: QuantizeLinear,
and DequantizeLinear right behind it. half-quantised: a product with one input on a grid and the other not. activation:
a pair between a product and its activation. residual: an Add whose pairs are on the wrong branches. concat: inputs on
several grids. grid-kept: a node that only moves values, between two grids. output: a rounded output of the network.
quantised-product: a product between pairs, where the target has none in integers."""

FreeDims = Literal["any", "batch", "none"]
"""Dimensions of the inputs that may be left open: any, the first one alone, none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A demand on the nodes of some operators.

    Attributes:
        values: what is allowed, where the kind compares something.
        positions: of the inputs or outputs that are meant.
        attribute: the attribute that is compared; of "form": that must be there for the rule to apply. `default` is its
            value where the node has none.
        opsets: first and last opset of files that the rule is about.
        takes: what the target takes, in words.
        fix: what to do about it.
        source: where that is written.
    """

    kind: RuleKind
    operators: tuple[str, ...]
    takes: str
    fix: str
    source: str
    values: tuple[int | str, ...] = ()
    positions: tuple[int, ...] = ()
    attribute: str = ""
    default: int | str | None = None
    opsets: tuple[int, int] = (1, 10_000)
    severity: Severity = "violation"
    only_if: tuple[str, int | str] | None = None
    """An attribute and its value, without which the rule says nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PatternRule:
    """A demand on how QuantizeLinear, DequantizeLinear and the nodes around them lie in a graph. Fields as `Rule`'s."""

    kind: PatternKind
    takes: str
    fix: str
    source: str
    severity: Severity = "violation"


@dataclass(frozen=True, slots=True, kw_only=True)
class DtypeRule:
    """Element types that the target does not take as they are. `where` "inputs": of the graph's inputs alone."""

    dtypes: frozenset[str]
    takes: str
    fix: str
    source: str
    where: Literal["everywhere", "inputs"] = "everywhere"
    severity: Severity = "violation"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A runtime at a version, as a closed description of what it takes.

    Attributes:
        name: as `--target` takes it; `aliases` are other spellings.
        summary: one line for lists.
        min_opset: 1 where its documentation gives none.
        max_ir: highest IR version; None where its documentation gives none.
        operators: those of the default domain that it has; None: all that its opset defines.
        operators_source: where that list is.
        accelerator: it takes what it can and leaves the other nodes to the CPU: an operator that it lacks is a warning.
        domains: operators of other domains, by domain; None: all of that domain.
        left: of an accelerator, what becomes of an operator that it lacks.
        functions: whether it reads functions that the file defines itself.
        patterns: of quantised graphs.
    """

    name: str
    summary: str
    min_opset: int
    max_opset: int
    max_ir: int | None
    caps_source: str
    operators: frozenset[str] | None
    operators_source: str
    free_dims: FreeDims
    free_dims_source: str
    free_dims_severity: Severity = "violation"
    aliases: tuple[str, ...] = ()
    accelerator: bool = False
    left: str = "no such operator, the CPU runs it"
    domains: Mapping[str, frozenset[str] | None] = field(default_factory=dict)
    functions: bool = False
    dtypes: tuple[DtypeRule, ...] = ()
    rules: tuple[Rule, ...] = ()
    patterns: tuple[PatternRule, ...] = ()

    @property
    def dynamic_batch(self) -> bool:
        """Whether the batch may be left free."""
        return self.free_dims != "none"

    @property
    def decompose(self) -> frozenset[str]:
        """Operators made of simpler ones that must be written as these: the target has them not, or not yet."""
        return frozenset(
            name
            for name, composite in COMPOSITES.items()
            if composite.since > self.max_opset or (self.operators is not None and name not in self.operators)
        )
