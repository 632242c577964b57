"""Which tensor of the reference each tensor of an artifact should equal: by name, by structure, by value.

Names may lie ("11" of two files), values may be wrong (that is why one looks), and structure may have been rewritten
(folded, fused, split, quantised). So names count where they agree with operators or values throughout; a value counts
where the node did not merely hand its input on; and structure, the same operator after counterparts, tells the rest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cspdeploy.check.blame.operators import family, hands_on, plain_name, same_family
from cspdeploy.check.blame.sketch import Record, distance
from cspdeploy.core.trace import TracedNode

__all__ = ["NEAR", "Pair", "Side", "find_counterparts"]

NAMES_TRUSTED = 0.8
"""Share of equal names that must belong to the same operator or hold the same values. Names that were kept reach 1, or
lose a few to fusion; numbers in two files agree by chance, in a third of the cases at most."""
NEAR = 0.5
"""Relative L2 at which two tensors still look like the same thing computed wrongly; unrelated ones lie beyond 1."""
_CHAIN = 4
"""Operators that a rewrite may have folded into one: convolution, normalisation, scale, activation."""


class Side:
    """A traced graph: its nodes, and what was recorded of each tensor."""

    def __init__(self, nodes: Sequence[TracedNode], records: Mapping[str, Record]) -> None:
        self.nodes, self.records = nodes, records
        self.made_by = {name: node for node in nodes for name in node.outputs}
        self.takers: dict[str, list[TracedNode]] = defaultdict(list)
        for node in nodes:
            for name in dict.fromkeys(node.inputs):
                self.takers[name].append(node)

    def root(self, name: str) -> str:
        """The tensor whose values this one hands on."""
        node = self.made_by.get(name)
        while node is not None and node.inputs and hands_on(node.operator):
            name = node.inputs[0]
            node = self.made_by.get(name)
        return name

    def is_data(self, name: str) -> bool:
        """Whether it is recorded and depends on the input."""
        return name in self.records and not self.records[name].constant


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A tensor of the artifact and its counterpart. `distance` is relative L2, estimated; infinite if of other size."""

    tensor: str
    reference: str
    distance: float
    how: Literal["name", "structure", "value"]


class _Groups:
    """The reference's tensors by size, with their sketches in one matrix."""

    def __init__(self, records: Mapping[str, Record]) -> None:
        names: dict[tuple[int, bool], list[str]] = defaultdict(list)
        for name, record in records.items():
            if not record.num_bad and record.square > 0:
                names[record.size, record.constant].append(name)
        self._groups = {
            key: (same, np.stack([records[name].sketch for name in same]), np.array([records[n].norm for n in same]))
            for key, same in names.items()
        }

    def nearest(self, record: Record) -> list[tuple[float, str]]:
        """Tensors of that size, nearest first, with their distances."""
        group = self._groups.get((record.size, record.constant))
        if group is None or record.num_bad:
            return []
        names, sketches, norms = group
        gaps: npt.NDArray[Any] = np.linalg.norm(sketches - record.sketch, axis=1) / norms
        return sorted(zip(gaps.tolist(), names, strict=True))


def find_counterparts(artifact: Side, reference: Side, *, budgets: Mapping[str, float]) -> dict[str, Pair]:
    """The pair of each tensor of the artifact that has a counterpart, in graph order.

    Args:
        budgets: relative L2 within which a tensor equals that one of the reference.
    """
    return _Matcher(artifact, reference, budgets).find()


class _Matcher:
    def __init__(self, artifact: Side, reference: Side, budgets: Mapping[str, float]) -> None:
        self._a, self._r, self._budgets = artifact, reference, budgets
        self._groups = _Groups(reference.records)
        self._pairs: dict[str, Pair] = {}
        self._named: dict[str, list[str]] = defaultdict(list)
        for name in reference.records:
            self._named[plain_name(name)].append(name)
        self._after: dict[str, list[TracedNode]] = defaultdict(list)
        for node in reference.nodes:
            for root in dict.fromkeys(reference.root(name) for name in node.inputs):
                self._after[root].append(node)
        self._trusts_names = self._names_agree()

    def find(self) -> dict[str, Pair]:
        for name, record in self._a.records.items():
            pair = self._pair(name, record)
            if pair is not None:
                self._pairs[name] = pair
        return self._pairs

    def _pair(self, name: str, record: Record) -> Pair | None:
        if self._trusts_names or name not in self._a.made_by:
            named = self._by_name(name, record)
            if named is not None and (self._trusts_names or self._fits(named)):
                return named
        followed = self._by_structure(name, record)
        if followed is not None and self._fits(followed):
            return followed
        near = [(gap, other) for gap, other in self._groups.nearest(record) if self._plausible(name, other)]
        within = [(gap, other) for gap, other in near if gap <= self._budgets[other]]
        if within:
            gap, other = min(within, key=lambda item: (not self._same_operator(name, item[1]), item[0]))
            return Pair(tensor=name, reference=other, distance=gap, how="value")
        if followed is not None:
            return followed
        if near and near[0][0] < NEAR:
            return Pair(tensor=name, reference=near[0][1], distance=near[0][0], how="value")
        return None

    def _fits(self, pair: Pair) -> bool:
        return pair.distance <= self._budgets[pair.reference]

    def _by_name(self, name: str, record: Record) -> Pair | None:
        plain = plain_name(name)
        found = [other for other in self._named.get(plain, ()) if self._r.records[other].constant == record.constant]
        alike = [other for other in found if self._r.records[other].size == record.size]
        if not alike and (plain != name or not found):  # a part of a split tensor has another size, and says so
            return None
        best = min(alike or found, key=lambda other: distance(record, self._r.records[other]))
        gap = distance(record, self._r.records[best])
        return Pair(tensor=name, reference=best, distance=gap, how="name")

    def _by_structure(self, name: str, record: Record) -> Pair | None:
        """What the same operator makes of the counterparts of the inputs, or what that becomes a few nodes later."""
        node = self._a.made_by.get(name)
        if node is None or record.constant:
            return None
        roots = {self._r.root(pair.reference) for value in node.inputs if (pair := self._known(value)) is not None}
        place = node.outputs.index(name)
        alike = [
            other for root in roots for other in self._after[root]
            if same_family(other.operator, node.operator) and self._fed_by(other, roots) and place < len(other.outputs)
        ]  # fmt: skip
        found = [end for other in alike for end in self._chain(other, place)]
        known = [end for end in found if end in self._r.records and self._plausible(name, end)]
        if not known:
            return None
        taken = {pair.reference for pair in self._pairs.values()}
        best = min(known, key=lambda end: (distance(record, self._r.records[end]), end in taken))
        gap = distance(record, self._r.records[best])
        if gap == float("inf"):
            best = known[0]
        return Pair(tensor=name, reference=best, distance=gap, how="structure")

    def _known(self, name: str) -> Pair | None:
        """The pair of a tensor, or of what it hands on."""
        if not self._a.is_data(name):
            return None
        return self._pairs.get(name) or self._pairs.get(self._a.root(name))

    def _fed_by(self, node: TracedNode, roots: set[str]) -> bool:
        """Whether all that it computes on is among the counterparts of the other node's inputs."""
        data = [self._r.root(name) for name in node.inputs if self._r.is_data(name)]
        return bool(data) and roots.issuperset(data)

    def _chain(self, node: TracedNode, place: int) -> list[str]:
        """Its output, and those of the operators that alone follow it and may have been folded into it."""
        ends = [node.outputs[place]]
        for _ in range(_CHAIN):
            takers = self._r.takers.get(ends[-1], [])
            if len(takers) != 1 or not takers[0].outputs:
                break
            data = [name for name in takers[0].inputs if self._r.is_data(name)]
            if len(data) != 1 or family(takers[0].operator) in ("convolution", "matrix product"):
                break
            ends.append(takers[0].outputs[0])
        return ends

    def _plausible(self, name: str, other: str) -> bool:
        """Not the counterpart of its own input, unless the node hands that on: a lost operator must not pass."""
        node = self._a.made_by.get(name)
        if node is None or hands_on(node.operator):
            return True
        inputs = [pair for value in node.inputs if (pair := self._known(value)) is not None]
        return self._r.root(other) not in {self._r.root(pair.reference) for pair in inputs}

    def _same_operator(self, name: str, other: str) -> bool:
        ours, theirs = self._a.made_by.get(name), self._r.made_by.get(other)
        return ours is not None and theirs is not None and same_family(ours.operator, theirs.operator)

    def _names_agree(self) -> bool:
        agreed = []
        for name, record in self._a.records.items():
            pair = self._by_name(name, record) if self._a.is_data(name) and name in self._a.made_by else None
            if pair is None or pair.reference not in self._r.made_by:
                continue
            ours, theirs = self._a.made_by[name].operator, self._r.made_by[pair.reference].operator
            alike = same_family(ours, theirs) or ours.startswith(("Fused", "NhwcFused")) or hands_on(ours)
            agreed.append(alike or self._fits(pair))
        return bool(agreed) and sum(agreed) >= NAMES_TRUSTED * len(agreed)
