"""The lower convex hull, and the order in which its segments are taken."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from gradprune.recovery.hull import Point, loss_at, lower_hull, steps_to

CURVES = st.lists(st.floats(0, 1, allow_subnormal=False), min_size=1, max_size=8)


def points(losses):
    """A layer that loses nothing whole, and these with one unit less each."""
    most = len(losses)
    return [Point(most, float(most), 0.0)] + [
        Point(most - at, float(most - at), loss) for at, loss in enumerate(losses, 1)
    ]


@given(CURVES)
def test_the_hull_is_convex_and_below_every_point(losses):
    hull = lower_hull(points(losses))
    assert hull[0].units == len(losses)
    assert hull[-1].units == 0
    slopes = [(b.loss - a.loss) / (a.cost - b.cost) for a, b in pairwise(hull)]
    assert all(a <= b + 1e-12 for a, b in pairwise(slopes))
    for point in points(losses):
        assert loss_at(hull, point.units) <= point.loss + 1e-12


@given(st.dictionaries(st.sampled_from("abc"), CURVES, min_size=1), st.floats(0, 20))
def test_steps_come_in_the_order_of_their_slopes_and_end_as_soon_as_the_cost_is_met(curves, most):
    hulls = {name: lower_hull(points(losses)) for name, losses in curves.items()}
    taken = steps_to(hulls, most)
    assert all(a.slope <= b.slope for a, b in pairwise(taken))
    cost = sum(hull[0].cost for hull in hulls.values())
    for at, step in enumerate(taken):
        assert cost > most, f"step {at} was not needed"
        cost -= step.start.cost - step.end.cost
    assert cost <= most or len(taken) == sum(len(hull) - 1 for hull in hulls.values())


def test_of_points_of_one_cost_the_best_counts():
    assert lower_hull([Point(2, 2.0, 0.0), Point(1, 1.0, 0.5), Point(0, 1.0, 0.2)]) == [
        Point(2, 2.0, 0.0),
        Point(0, 1.0, 0.2),
    ]
