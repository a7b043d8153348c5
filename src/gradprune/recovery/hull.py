"""How do layers share a cost so that the losses add up to the least (chapter 6)?

Each layer has a curve, loss over cost, of which only the lower convex hull can be part of a best answer at some price
of cost. Its segments, from all layers, are taken in the order of their slopes, loss per cost saved, until the cost is
met: the slope of the last is the Lagrange multiplier, and of the last segment only a part is taken. Where a layer can
stop anywhere on its hull, the result is the least loss; where it can stop only in whole units, it is above the least by
no more than one unit of the last layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple


class Point(NamedTuple):
    """A layer that keeps `units` of its units: what it costs, and what it loses."""

    units: int
    cost: float
    loss: float


class Segment(NamedTuple):
    """A step along one layer's hull, from more units to fewer."""

    slope: float  # loss per cost saved
    name: str
    start: Point
    end: Point


def lower_hull(points: Sequence[Point]) -> list[Point]:
    """Return the points of the lower convex hull of loss over cost, from the highest cost to the lowest.

    Of points of one cost the one of least loss counts. The hull starts at the highest cost, and a point that loses no
    more at a lower cost takes the place of those before it.

    Example:
        >>> [p.units for p in lower_hull([Point(4, 4.0, 0.0), Point(2, 2.0, 3.0), Point(1, 1.0, 3.0)])]
        [4, 1]
    """
    best: dict[float, Point] = {}
    for point in points:
        if point.cost not in best or point.loss < best[point.cost].loss:
            best[point.cost] = point
    hull: list[Point] = []
    for point in sorted(best.values(), key=lambda p: -p.cost):
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def steps_to(hulls: Mapping[str, Sequence[Point]], most: float) -> list[Segment]:
    """Return the segments, in the order of their slopes, that are taken until all costs add up to at most `most`."""
    cost = sum(hull[0].cost for hull in hulls.values())
    every = [Segment(_slope(a, b), name, a, b) for name, hull in hulls.items() for a, b in pairwise(hull)]
    taken = []
    for segment in sorted(every, key=lambda s: s.slope):
        if cost <= most:
            break
        taken.append(segment)
        cost += segment.end.cost - segment.start.cost
    return taken


def loss_at(hull: Sequence[Point], units: int) -> float:
    """Return the loss on the hull at a number of units, between two points in proportion."""
    for a, b in pairwise(hull):
        if b.units <= units <= a.units:
            return a.loss + (b.loss - a.loss) * (a.units - units) / (a.units - b.units)
    return hull[0].loss if units >= hull[0].units else hull[-1].loss


def _slope(a: Point, b: Point) -> float:
    """Loss per cost saved, from a point to a cheaper one."""
    return (b.loss - a.loss) / (a.cost - b.cost)
