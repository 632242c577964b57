"""Whether the names of a graph make sense, and in which order its nodes can be computed."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from cspdeploy.core.errors import InputError
from cspdeploy.core.onnx_wire import printable

__all__ = ["NodeNames", "check_captured", "order_nodes"]

_FIX = "export it again"

NodeNames = tuple[str, Sequence[str], Sequence[str]]
"""What an error calls a node, the tensors that it and its subgraphs take, and those that it makes."""


def order_nodes(
    nodes: Sequence[NodeNames], *, given: Iterable[str], outputs: Iterable[str], path: Path
) -> tuple[list[int], tuple[str, ...]]:
    """Indices of the nodes, each after those that it needs, and as they were where that is so already.

    Args:
        given: names of inputs and initializers, each once.
        outputs: of the graph.

    Returns:
        The order, and the names that are used but not made here: those of the graph around this one.

    Raises:
        InputError: a name that two tensors have, or nodes that need each other.
    """
    maker = _find_makers(nodes, given=given, path=path)
    needs = [{maker[name] for name in takes if maker.get(name, -1) >= 0} for _, takes, _ in nodes]
    wanted = dict.fromkeys(name for _, takes, _ in nodes for name in takes if name)
    wanted.update(dict.fromkeys(outputs))
    captured = tuple(name for name in wanted if name not in maker)
    if all(other < index for index, found in enumerate(needs) for other in found):
        return list(range(len(nodes))), captured
    order = _sort(needs)
    if len(order) < len(nodes):
        cycle = " -> ".join(f"'{printable(nodes[index][0])}'" for index in _find_cycle(needs, done=set(order)))
        raise InputError(f"{path}: cyclic graph, {cycle}", fix=_FIX)
    return order, captured


def check_captured(captured: Sequence[str], *, nodes: Sequence[NodeNames], path: Path) -> None:
    """Refuse a main graph that uses what nothing makes: around it there is none.

    Raises:
        InputError: naming the tensor and who wants it.
    """
    if captured:
        name = captured[0]
        user = next((f"node '{printable(label)}'" for label, takes, _ in nodes if name in takes), "the graph's output")
        raise InputError(f"{path}: nothing makes the tensor '{printable(name)}', which {user} takes", fix=_FIX)


def _find_makers(nodes: Sequence[NodeNames], *, given: Iterable[str], path: Path) -> dict[str, int]:
    """The node that makes each tensor; -1 for what is given."""
    maker: dict[str, int] = {}
    for name in given:
        if name in maker:
            raise InputError(f"{path}: two inputs or two initializers are called '{printable(name)}'", fix=_FIX)
        maker[name] = -1
    for index, (label, _, makes) in enumerate(nodes):
        for name in filter(None, makes):
            if name in maker:
                other = f"node '{printable(nodes[maker[name]][0])}'" if maker[name] >= 0 else "an input or initializer"
                both = f"of {other}, of node '{printable(label)}'"
                raise InputError(f"{path}: two tensors are called '{printable(name)}': {both}", fix=_FIX)
            maker[name] = index
    return maker


def _sort(needs: Sequence[set[int]]) -> list[int]:
    """Kahn's algorithm, the earliest node first; shorter than `needs` where there is a cycle."""
    users: dict[int, list[int]] = defaultdict(list)
    for index, found in enumerate(needs):
        for other in found:
            users[other].append(index)
    missing = [len(found) for found in needs]
    ready = [index for index, count in enumerate(missing) if not count]
    order: list[int] = []
    while ready:
        index = heapq.heappop(ready)
        order.append(index)
        for user in users[index]:
            missing[user] -= 1
            if not missing[user]:
                heapq.heappush(ready, user)
    return order


def _find_cycle(needs: Sequence[set[int]], *, done: set[int]) -> list[int]:
    """Nodes of one cycle, in the order of the data, the first one again at the end."""
    walked: list[int] = [min(set(range(len(needs))) - done)]
    while walked.count(walked[-1]) < 2:
        walked.append(min(needs[walked[-1]] - done))  # what is not done waits for something not done
    return walked[walked.index(walked[-1]) :][::-1]
