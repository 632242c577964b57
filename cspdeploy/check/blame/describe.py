"""A node as the report shows it: exact errors of what it takes and makes, and what differs from its counterpart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

from cspdeploy.check.blame.counterparts import Pair, Side
from cspdeploy.check.blame.facts import attribute_facts, range_facts, weight_fact, weights_of
from cspdeploy.check.blame.finding import BlamedNode, TensorError
from cspdeploy.check.blame.judge import Suspect
from cspdeploy.check.blame.measure import collect, exact_distance
from cspdeploy.check.blame.reference import Origin
from cspdeploy.core.trace import TracedNode, TraceSource

__all__ = ["Describer"]

Array = npt.NDArray[Any]
Calls = Sequence[Mapping[str, Array]]


@dataclass(slots=True, kw_only=True)
class Describer:
    """Looks up what is known of both sides, and fetches the exact values of the few tensors that are shown."""

    source: TraceSource
    side: Side
    pairs: Mapping[str, Pair]
    origin: Origin
    reference: Side
    budgets: Mapping[str, float]
    calls: Calls
    reference_calls: Calls
    half: bool
    _exact: dict[str, float] = field(default_factory=dict)

    def describe(
        self, suspects: Sequence[Suspect], introduced: Mapping[str, float], *, outputs: Sequence[str]
    ) -> tuple[list[BlamedNode], tuple[TensorError, ...]]:
        """Each node with its exact errors, and the network's outputs with theirs. Both sides are run once more.

        What differs is told of the first node alone, which is the one that is explained.

        Raises:
            InputError: one of the sides cannot be run again.
        """
        nodes = [node for item in suspects for node in (item.node, *item.also)]
        self._fetch([*outputs, *(name for node in nodes for name in (*node.inputs, *node.outputs))])
        shown = tuple(self._tensor(name) for name in outputs if self.side.is_data(name))
        return [self._node(item, introduced, explained=item is suspects[0]) for item in suspects], shown

    def module(self, node: TracedNode) -> str:
        """Path of the torch module, by the node's own name or by that of its counterpart."""
        other = self._counterpart(node)
        return node.module or (other.module if other is not None else "")

    @staticmethod
    def nearest_output(outputs: Sequence[TensorError]) -> str:
        """The output that is nearest to its limit, in words."""
        known = [item for item in outputs if item.rel_l2 is not None and item.budget]
        if not known:
            return "no output could be compared"
        worst = max(known, key=lambda item: (item.rel_l2 or 0.0) / (item.budget or 1.0))
        return f"{worst.tensor}: relative L2 {worst.rel_l2:.1e}, limit {worst.budget:.1e}"

    def _node(self, suspect: Suspect, introduced: Mapping[str, float], *, explained: bool) -> BlamedNode:
        node = suspect.node
        other = self._counterpart(node)
        after = [name for item in (node, *suspect.also) for name in item.outputs]
        own = [introduced[name] for name in after if name in introduced]
        last = suspect.also[-1].outputs if suspect.also else ()
        return BlamedNode(
            node=node.name, operator=node.operator, module=self.module(node),
            reference_node=other.name if other else "", reference_operator=other.operator if other else "",
            inputs=tuple(self._tensor(name) for name in dict.fromkeys(node.inputs) if self.side.is_data(name)),
            outputs=tuple(self._tensor(name) for name in (*node.outputs, *last) if name in self.side.records),
            introduced=own[-1] if own else None, facts=tuple(self._facts(node, other)) if explained else (),
            also=tuple(item.name for item in suspect.also),
        )  # fmt: skip

    def _tensor(self, name: str) -> TensorError:
        record, pair = self.side.records[name], self.pairs.get(name)
        theirs = self.reference.records[pair.reference] if pair else None
        return TensorError(
            tensor=name, reference=pair.reference if pair else "", how=pair.how if pair else "",
            rel_l2=self._exact.get(name, pair.distance) if pair else None,
            budget=self.budgets[pair.reference] if pair else None, num_bad=record.num_bad, num_values=record.size,
            shape=record.shape, absmax=record.absmax, reference_absmax=theirs.absmax if theirs else None,
        )  # fmt: skip

    def _fetch(self, names: Sequence[str]) -> None:
        """Exact distances of those that have a counterpart of their size."""
        wanted = [
            name for name in dict.fromkeys(names) if name in self.pairs and name not in self._exact
            and self.side.records[name].size == self.reference.records[self.pairs[name].reference].size
        ]  # fmt: skip
        if not wanted:
            return
        ours = collect(self.source, self.calls, wanted)
        theirs = collect(self.origin.source, self.reference_calls, [self.pairs[name].reference for name in wanted])
        for name in wanted:
            found, expected = ours[name], theirs[self.pairs[name].reference]
            count = min(len(found), len(expected))
            bad = self.side.records[name].num_bad
            self._exact[name] = math.inf if bad else exact_distance(found[:count], expected[:count])

    def _counterpart(self, node: TracedNode) -> TracedNode | None:
        pair = next((self.pairs[name] for name in node.outputs if name in self.pairs), None)
        return self.reference.made_by.get(pair.reference) if pair else None

    def _facts(self, node: TracedNode, other: TracedNode | None) -> list[str]:
        found = attribute_facts(node, other) if other is not None else []
        found += filter(None, (self._weight(name, node, other) for name in weights_of(node, self.side.records)))
        quantised = getattr(self.source, "quantised", {})
        for name in node.outputs[:1]:
            if name in self.side.records:
                pair = self.pairs.get(name)
                theirs = self.reference.records[pair.reference] if pair else None
                of = quantised.get(name) or next((quantised[i] for i in node.inputs if i in quantised), None)
                found += range_facts(self.side.records[name], theirs, of, half=self.half)
        return found

    def _weight(self, name: str, node: TracedNode, other: TracedNode | None) -> str:
        """Against the weight at the same place of the counterpart, if that is the same operator; else its own pair."""
        theirs = weights_of(other, self.reference.records) if other and other.operator == node.operator else []
        own = weights_of(node, self.side.records)
        pair = self.pairs.get(name)
        reference = theirs[own.index(name)] if len(theirs) == len(own) else pair.reference if pair else ""
        if not reference:
            return ""
        ours = collect(self.source, self.calls[:1], [name])[name]
        expected = collect(self.origin.source, self.reference_calls[:1], [reference])[reference]
        limit = self.budgets.get(reference, 0.0)
        if not ours or not expected or exact_distance(ours[:1], expected[:1]) <= limit:
            return ""
        return weight_fact(name, ours[0], expected[0])
