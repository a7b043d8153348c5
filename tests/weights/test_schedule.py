"""Each schedule is the formula of its paper, changing only when it says it does."""

import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gradprune as gp
from gradprune.weights.schedule import values_of


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


NO_NUMBERS = [True, "0.5", None, 1j, torch.ones(2), [1]]
MAKE = {
    "sparsity": lambda value: gp.OneShot(value),
    "final": lambda value: gp.Cubic(value, 0, 5),
    "initial": lambda value: gp.Linear(1.0, 0, 5, initial=value),
    "rate": lambda value: gp.Geometric(value, 1, 1),
    "at": lambda value: gp.OneShot(0.5, at=value),
    "begin": lambda value: gp.Linear(0.5, value, 5),
    "end": lambda value: gp.Cubic(0.5, 0, value),
    "every": lambda value: gp.Linear(0.5, 0, 5, every=value),
    "rounds": lambda value: gp.Geometric(0.5, 1, value),
    "step": lambda value: gp.Cubic(0.5, 0, 5)(value),
}
WHOLE = ["at", "begin", "end", "every", "rounds", "step"]


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("value", NO_NUMBERS, ids=str)
def test_what_is_no_number_is_a_type_error_by_name(name, value):
    with pytest.raises(TypeError, match=f"{name} must be a .*number, got"):
        MAKE[name](value)


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("value", [math.nan, math.inf, -1, np.float32(-1), torch.tensor(-1)], ids=str)
def test_what_is_out_of_range_is_a_value_error_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be .*, got"):
        MAKE[name](value)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("value", [1.5, np.float64(2.5), torch.tensor(1.5)], ids=str)
def test_a_number_of_steps_that_is_not_whole_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a whole number, got"):
        MAKE[name](value)


@pytest.mark.parametrize("number", [np.int64, np.int32, float, torch.tensor, np.array])
@pytest.mark.parametrize("share", [np.float64, torch.tensor, np.array, float])
def test_numbers_of_other_libraries_become_plain_ones(number, share):
    made = [
        gp.OneShot(share(0.5), number(2)),
        gp.Linear(share(0.5), number(2), number(8), number(3), share(0.25)),
        gp.Cubic(share(0.5), number(2), number(8), number(3), share(0.25)),
        gp.Geometric(share(0.5), number(2), number(3)),
    ]
    plain = [gp.OneShot(0.5, 2), gp.Linear(0.5, 2, 8, 3, 0.25), gp.Cubic(0.5, 2, 8, 3, 0.25), gp.Geometric(0.5, 2, 3)]
    for ours, wanted in zip(made, plain, strict=True):
        assert ours == wanted
        assert hash(ours) == hash(wanted)
        assert pickle.loads(pickle.dumps(ours)) == wanted
        assert all(type(value) in (int, float) for value in vars(ours).values())
        for step in range(10):
            assert type(ours(number(step))) is float
            assert ours(number(step)) == wanted(step)


@st.composite
def ramp_schedules(draw):
    a, b, begin, length, every = draw(ramps)
    return draw(st.sampled_from([gp.Linear, gp.Cubic]))(max(a, b), begin, begin + length, every, min(a, b))


schedules = st.one_of(
    st.builds(gp.OneShot, st.floats(0, 1), st.integers(0, 30)),
    ramp_schedules(),
    st.builds(gp.Geometric, st.floats(0, 1), st.integers(1, 9), st.integers(1, 9)),
)


@given(schedules)
def test_the_values_of_a_schedule_are_those_it_takes_in_order(schedule):
    taken = [schedule(step) for step in range(120)]
    assert list(values_of(schedule)) == sorted(set(taken))


def test_the_values_of_a_long_schedule_are_made_one_by_one_and_of_another_function_not_at_all():
    values = values_of(gp.Cubic(0.5, 0, 10**12))
    assert next(values) == 0.0
    assert 0 < next(values) < 1e-11
    assert values_of(lambda step: 0.5) is None
    assert list(values_of(gp.OneShot(0.9, at=3))) == [0.0, 0.9]
    assert list(values_of(gp.OneShot(0.9))) == [0.9]
