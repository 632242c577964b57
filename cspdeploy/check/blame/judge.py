"""Which node is to blame: the first, in graph order, whose output is wrong while nothing shows that it is right."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence

from cspdeploy.check.blame.counterparts import Pair, Side
from cspdeploy.core.trace import TracedNode

__all__ = ["Suspect", "find_outlier", "find_suspect", "sound_tensors"]

# Introduced error of quantised nodes, as signal to noise in dB. Measured on CSPDarknet53 (Fashion-MNIST, QDQ by ONNX
# Runtime, u8s8, per tensor and per channel): 176 activations have a median of 39 dB, a robust sigma of 2.7 dB, and an
# honest minimum 14 dB below the median, at the wide tails of linear convolutions. A scale that is 10 times too wide
# costs 20 dB, one that cuts the tails off more.
OUTLIER_DB = 18.0
OUTLIER_SPREADS = 4.0
_MAD_TO_SIGMA = 1.4826  # of a normal distribution
FEW = 4
"""Nodes of a kind below which there is no telling what is usual."""
_Kind = tuple[str, bool, bool]


class Suspect:
    """A node, and those between it and the first tensor that could be compared."""

    def __init__(self, node: TracedNode, also: Sequence[TracedNode] = ()) -> None:
        self.node, self.also = node, tuple(also)


def sound_tensors(side: Side, pairs: Mapping[str, Pair], budgets: Mapping[str, float]) -> set[str]:
    """Tensors within their budget, and those that something sound was computed from.

    The latter is how a tensor without a counterpart (folded, fused, split, quantised) is known to be right, and one
    whose counterpart was found by a name that means something else.
    """
    sound = {name for name, pair in pairs.items() if pair.distance <= budgets[pair.reference]}
    for node in reversed(side.nodes):
        for name in node.outputs:
            takers = [taker for taker in side.takers.get(name, ()) if any(out in side.records for out in taker.outputs)]
            if name not in side.records or name in sound or not takers:
                continue
            right = [any(out in sound for out in taker.outputs) for taker in takers]
            if (all(right) or (name not in pairs and any(right))) and not side.records[name].num_bad:
                sound.add(name)
    return sound


def find_suspect(
    side: Side, pairs: Mapping[str, Pair], sound: Collection[str], *, outputs: Sequence[str]
) -> Suspect | None:
    """The first node that makes a wrong tensor; without one, the first that makes a tensor that cannot be compared."""
    wrong = [name for name in side.records if name in side.made_by and name not in sound]
    bad = [name for name in wrong if name in pairs or side.records[name].num_bad]
    if bad:
        node = side.made_by[bad[0]]
        before = list(_before(side, node, set(wrong) - set(bad)))
        return Suspect(before[0], [*before[1:], node]) if before else Suspect(node)
    reaching = _reaching(side, outputs)
    open_ = [side.made_by[name] for name in wrong if side.made_by[name].index in reaching]
    return Suspect(open_[0], open_[1:4]) if open_ else None


def _before(side: Side, node: TracedNode, unknown: Collection[str]) -> list[TracedNode]:
    """Nodes that lead to it by tensors of which nothing is known, in graph order."""
    found: dict[int, TracedNode] = {}
    waiting = [name for name in node.inputs if name in unknown]
    while waiting:
        maker = side.made_by[waiting.pop()]
        if maker.index not in found:
            found[maker.index] = maker
            waiting += [name for name in maker.inputs if name in unknown]
    return [found[index] for index in sorted(found)]


def _reaching(side: Side, outputs: Sequence[str]) -> set[int]:
    """Nodes that the network's outputs come from."""
    found: set[int] = set()
    waiting = list(outputs)
    while waiting:
        node = side.made_by.get(waiting.pop())
        if node is not None and node.index not in found:
            found.add(node.index)
            waiting += node.inputs
    return found


def find_outlier(side: Side, introduced: Mapping[str, float]) -> str | None:
    """The first tensor, in graph order, that far more error is introduced into than into others of its kind.

    Kinds are by operator and by whether the tensor is an activation, a weight or a bias, whose roundings differ.
    """
    kinds: dict[_Kind, list[float]] = {}
    for name, error in introduced.items():
        kinds.setdefault(_kind(side, name), []).append(_decibels(error))
    for name, error in introduced.items():
        usual = kinds[_kind(side, name)]
        if len(usual) < FEW:
            usual = [value for kind, values in kinds.items() for value in values if kind[1:] == _kind(side, name)[1:]]
        median = statistics.median(usual)
        spread = _MAD_TO_SIGMA * statistics.median(abs(value - median) for value in usual)
        if len(usual) >= FEW and _decibels(error) < median - max(OUTLIER_DB, OUTLIER_SPREADS * spread):
            return name
    return None


def _kind(side: Side, name: str) -> _Kind:
    record = side.records[name]
    return side.made_by[name].operator, record.constant, len(record.shape) > 1


def _decibels(error: float) -> float:
    """Signal to noise; bounded, so that an exact node is one more value and not infinity."""
    return -20 * math.log10(min(max(error, 1e-8), 1e8))
