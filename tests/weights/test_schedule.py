"""Each schedule is the formula of its paper, changing only when it says it does."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

import gradprune as gp


def test_one_shot_jumps_once():
    assert [gp.OneShot(0.7, at=2)(t) for t in range(4)] == [0.0, 0.0, 0.7, 0.7]
    assert gp.OneShot(0.7)(0) == 0.7


def test_linear_goes_straight_from_initial_to_final():
    values = [gp.Linear(0.8, 10, 50, every=10, initial=0.2)(t) for t in (9, 10, 19, 20, 30, 40, 50, 99)]
    assert values == pytest.approx([0.0, 0.2, 0.2, 0.35, 0.5, 0.65, 0.8, 0.8])


def test_cubic_is_equation_1_of_zhu_and_gupta():
    begin, end, every, initial, final = 4, 44, 8, 0.1, 0.9
    schedule = gp.Cubic(final, begin, end, every, initial)
    for n in range(6):  # t = t0 + n dt
        t = begin + n * every
        assert schedule(t) == pytest.approx(final + (initial - final) * (1 - (t - begin) / (end - begin)) ** 3)
        assert schedule(t + every - 1) == schedule(t)
    assert schedule(begin - 1) == 0.0


def test_geometric_leaves_the_same_share_each_round():
    schedule = gp.Geometric(0.2, every=5, rounds=3)
    assert [schedule(t) for t in (0, 4, 5, 10, 15, 20, 1000)] == pytest.approx([0, 0, 0.2, 0.36, 0.488, 0.488, 0.488])


ramps = st.tuples(st.floats(0, 1), st.floats(0, 1), st.integers(0, 50), st.integers(0, 50), st.integers(1, 20))


@given(ramp=ramps, kind=st.sampled_from([gp.Linear, gp.Cubic]))
def test_ramps_never_fall_and_end_exactly_at_the_final_sparsity(ramp, kind):
    a, b, begin, length, every = ramp
    schedule = kind(max(a, b), begin, begin + length, every, min(a, b))
    values = [schedule(t) for t in range(begin + length + 5)]
    assert all(x <= y + 1e-12 for x, y in itertools.pairwise(values))
    assert values[-1] == max(a, b)
    assert all(0.0 <= v <= 1.0 + 1e-12 for v in values)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gp.OneShot(1.2), r"sparsity must be in \[0, 1\], got 1\.2"),
        (lambda: gp.OneShot(0.5, at=-1), "at must be at least 0, got -1"),
        (lambda: gp.Linear(0.5, 10, 5), "end must be at least 10, got 5"),
        (lambda: gp.Cubic(0.5, 0, 5, every=0), "every must be at least 1, got 0"),
        (lambda: gp.Cubic(0.5, 0, 5, initial=0.6), r"initial must be at most final, which is 0\.5; got 0\.6"),
        (lambda: gp.Cubic(float("nan"), 0, 5), "final must be in"),
        (lambda: gp.Geometric(-0.1, 1, 1), r"rate must be in \[0, 1\], got -0\.1"),
        (lambda: gp.Geometric(0.1, 1, 0), "rounds must be at least 1, got 0"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused_when_it_is_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()
