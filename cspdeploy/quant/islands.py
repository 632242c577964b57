"""Groups of layers that a search may leave in float, and what they cost there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cspdeploy.quant.sensitivity import LayerDamage

__all__ = ["CONVERSION_MACS", "Forecast", "Island", "Step", "float_cost", "list_islands", "rank_islands"]

CONVERSION_MACS = 16
"""Multiply-accumulates in whose time one value is converted between float and INT8 at the border of an island. On x86
with AVX-512 a core makes 32 to 64 float MACs a cycle and converts some 2 to 4 values; which islands are tried first
hangs on it, their latency is then measured."""
_MAX_RIVALS, _MAX_STEPS = 48, 24
"""Of a ranking: islands that help most by themselves, and how many of them are taken. Each pair asks for a forecast,
which takes a few milliseconds."""
_WORTH = 0.05
"""Share of the noise left that an island must take away, while some island does: else the many small ones that cost
next to nothing, and help as little, would come first."""
_EDGE_LAYERS = 4
"""At either end of the network islands of 2 to so many layers are tried even where the modules do not say that they
belong together: first and last layers are where INT8 hurts most (M. Nagel et al., arXiv 2106.08295, section 3.7)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Island:
    """Layers by their first outputs; `name` is what a user calls them."""

    name: str
    nodes: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What is known before a file is made. Both take the layers left in float, by first output.

    Attributes:
        noise: relative noise of the outputs; its SQNR is -10 log10.
        cost: of leaving them in float, in any unit.
    """

    noise: Callable[[frozenset[str]], float]
    cost: Callable[[frozenset[str]], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A link of the ranking: layers in float up to here, those that it has added, and the noise predicted then."""

    floats: frozenset[str]
    added: frozenset[str]
    noise: float


def list_islands(layers: Sequence[LayerDamage]) -> tuple[Island, ...]:
    """Single layers, modules ("stages.3", "stages.3.blocks.1", ...), and both ends of the network.

    Each set of layers once, by the first of its names; none holds all layers. Without modules to go by, windows of 2,
    4, 8, ... layers in graph order stand in.
    """
    found: dict[frozenset[str], str] = {}
    for name, nodes in (*_singles(layers), *_modules(layers), *_ends(layers)):
        if 0 < len(nodes) < len(layers):
            found.setdefault(nodes, name)
    return tuple(Island(name=name, nodes=nodes) for nodes, name in found.items())


def _singles(layers: Sequence[LayerDamage]) -> Iterable[tuple[str, frozenset[str]]]:
    return [(_title(layer), frozenset({layer.node})) for layer in layers]


def _modules(layers: Sequence[LayerDamage]) -> Iterable[tuple[str, frozenset[str]]]:
    members: dict[str, set[str]] = {}
    for layer in layers:
        parts = layer.module.split(".") if layer.module else []
        for depth in range(1, len(parts) + 1):
            members.setdefault(".".join(parts[:depth]), set()).add(layer.node)
    if members:
        return [(name, frozenset(nodes)) for name, nodes in members.items()]
    windows = []
    size = 2
    while size < len(layers):
        for start in range(0, len(layers), size):
            windows.append(_window(layers[start : start + size]))
        size *= 2
    return windows


def _ends(layers: Sequence[LayerDamage]) -> Iterable[tuple[str, frozenset[str]]]:
    sizes = range(2, _EDGE_LAYERS + 1)
    return [_window(part) for size in sizes for part in (layers[:size], layers[-size:])]


def _window(layers: Sequence[LayerDamage]) -> tuple[str, frozenset[str]]:
    return f"{_title(layers[0])} to {_title(layers[-1])}", frozenset(layer.node for layer in layers)


def _title(layer: LayerDamage) -> str:
    return layer.module or layer.name or layer.node


def float_cost(layers: Sequence[LayerDamage], floats: frozenset[str]) -> float:
    """What leaving these layers in float costs, in MACs: their own, and the conversions wherever float meets INT8."""
    values = {layer.node: layer.num_values for layer in layers}
    own = sum(layer.macs for layer in layers if layer.node in floats)
    borders = sum(
        values.get(made, 0)
        for layer in layers
        for made in layer.takes_from
        if (made in floats) != (layer.node in floats)
    )
    return float(own + CONVERSION_MACS * borders)


def rank_islands(islands: Sequence[Island], forecast: Forecast, *, start: frozenset[str]) -> tuple[Step, ...]:
    """Islands in the order in which to add them: each time the one that takes away most noise for what it costs.

    Ends where none takes any away. Some layer always stays in INT8.

    Args:
        start: layers that are in float already.
    """
    every = frozenset[str]().union(*(island.nodes for island in islands)) if islands else frozenset[str]()
    noise, floats = forecast.noise(start), start
    alone = {island: noise - forecast.noise(start | island.nodes) for island in islands}
    rivals = sorted((island for island in islands if alone[island] > 0), key=lambda one: -alone[one])[:_MAX_RIVALS]
    steps: list[Step] = []
    while len(steps) < _MAX_STEPS:
        # What is tried from here: whether it is worth its while, noise taken away for its price, the earlier one first.
        found: dict[tuple[bool, float, int], Step] = {}
        for place, island in enumerate(rivals):
            together = floats | island.nodes
            if together in (floats, every):
                continue
            step = Step(floats=together, added=together - floats, noise=forecast.noise(together))
            price = max(1.0, forecast.cost(together) - forecast.cost(floats))  # closing a gap may cost less than none
            if (gain := noise - step.noise) > 0:
                found[gain >= _WORTH * noise, gain / price, -place] = step
        if not found:
            break
        steps.append(found[max(found)])
        floats, noise = steps[-1].floats, steps[-1].noise
    return tuple(steps)
