"""Which of several points nothing else beats in both respects."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["pareto_front"]


def pareto_front(points: Sequence[tuple[float, float]]) -> tuple[int, ...]:
    """Places of the points that are not dominated, cheapest first.

    A point is dominated where another has at least its quality at no more than its cost, and is better in one of them.
    Of equal points the first is kept. A point with a coordinate that is not a number is never on the front.

    Args:
        points: (quality, the more the better; cost, the less the better).
    """
    known = [i for i, (quality, cost) in enumerate(points) if not math.isnan(quality) and not math.isnan(cost)]
    front: list[int] = []
    for i in sorted(known, key=lambda i: (points[i][1], -points[i][0], i)):
        if not front or points[i][0] > points[front[-1]][0]:
            front.append(i)
    return tuple(front)
