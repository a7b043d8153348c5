"""Budgets add up exactly, and ERK and LAMP are their papers' formulas."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradprune.weights import allocate


@st.composite
def budgets(draw):
    high = draw(st.lists(st.integers(0, 300), min_size=1, max_size=8))
    low = [draw(st.integers(0, n)) for n in high]
    shares = [draw(st.floats(1e-3, 1e3)) for _ in high]
    return shares, draw(st.integers(sum(low), sum(high))), low, high


@settings(max_examples=300, deadline=None)
@given(budgets())
def test_shares_add_up_exactly_within_their_bounds(budget):
    shares, total, low, high = budget
    counts = allocate.share_out(shares, total, low=low, high=high)
    assert sum(counts) == total
    assert all(a <= c <= b for a, c, b in zip(low, counts, high, strict=True))


@settings(max_examples=200, deadline=None)
@given(budgets())
def test_shares_between_the_bounds_are_proportional_to_a_weight(budget):
    shares, total, low, high = budget
    counts = allocate.share_out(shares, total, low=low, high=high)
    free = [c / s for s, c, a, b in zip(shares, counts, low, high, strict=True) if a + 1 < c < b - 1]
    widths = [2 / s for s, c, a, b in zip(shares, counts, low, high, strict=True) if a + 1 < c < b - 1]
    if free:
        assert (
            max(f - w for f, w in zip(free, widths, strict=True))
            <= min(f + w for f, w in zip(free, widths, strict=True)) + 1e-9
        )


def test_a_budget_outside_the_bounds_is_an_error():
    with pytest.raises(ValueError, match="cannot share 9 between bounds that add up to 1 and 8"):
        allocate.uniform([4, 4], 9, low=[1, 0], high=[4, 4])


def test_uniform_leaves_the_same_density_everywhere():
    assert allocate.uniform([100, 200, 700], 300, low=[0] * 3, high=[100, 200, 700]) == [30, 60, 210]


def test_erk_densities_are_those_of_the_paper():
    # Evci et al. (2020): density proportional to (in + out + w + h) / (in out w h); dense layers set aside one by one.
    shapes = [(64, 3, 3, 3), (128, 64, 3, 3), (256, 128, 3, 3), (10, 256)]
    sizes = [math.prod(s) for s in shapes]
    keep = round(0.1 * sum(sizes))
    dense = set()
    while True:
        left = keep - sum(sizes[i] for i in dense)
        epsilon = left / sum(sum(s) for i, s in enumerate(shapes) if i not in dense)
        over = {i for i, s in enumerate(shapes) if i not in dense and epsilon * sum(s) > sizes[i]}
        if not over:
            break
        dense |= over
    expected = [sizes[i] if i in dense else epsilon * sum(s) for i, s in enumerate(shapes)]
    counts = allocate.erk(shapes, keep, low=[0] * 4, high=sizes)
    assert dense
    assert all(abs(c - e) <= 1 for c, e in zip(counts, expected, strict=True))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.one_of(st.floats(0, 1e3, width=32), st.sampled_from([0.0, 1.0])), min_size=1, max_size=20))
def test_lamp_is_equation_4_of_its_paper(values):
    scores = torch.tensor(values, dtype=torch.float64)
    ascending = sorted(range(len(values)), key=lambda i: (values[i], i))
    expected = [0.0] * len(values)
    for rank, i in enumerate(ascending):
        outliving = math.fsum(float(scores[j]) ** 2 for j in ascending[rank:])
        expected[i] = float(scores[i]) ** 2 / outliving if values[i] and outliving else 0.0
    found = allocate.lamp({"layer": scores})["layer"]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-30)


def test_lamp_ranks_a_layer_as_its_scores_do_and_its_largest_as_1():
    scores = torch.rand(7, 5, generator=torch.Generator().manual_seed(0))
    found = allocate.lamp({"a": scores, "b": scores * 1e-30, "empty": torch.empty(0)})
    assert torch.equal(found["a"].view(-1).argsort(), scores.view(-1).argsort())
    assert found["a"].max() == 1
    torch.testing.assert_close(found["b"], found["a"])


def test_lamp_names_the_layer_whose_scores_it_cannot_use():
    for bad in (-1.0, math.nan):
        with pytest.raises(ValueError, match="neither negative nor NaN; 'fc' has others"):
            allocate.lamp({"conv": torch.ones(2), "fc": torch.tensor([1.0, bad])})


def test_a_stack_of_matrices_has_the_density_of_one_of_them():
    apart = allocate.erk([(8, 16)] * 5, 100, low=[0] * 5, high=[128] * 5)
    together = allocate.erk([(8, 16), (8, 16)], 100, low=[0, 0], high=[128, 512], stacked=[1, 4])
    assert together == [apart[0], sum(apart[1:])]


def test_shares_add_up_exactly_where_floats_no_longer_tell_numbers_apart():
    total = 3 * 2**60 + 1
    counts = allocate.share_out([1.0, 1.0, 1.0], total, low=[0, 0, 0], high=[2**62] * 3)
    assert sum(counts) == total
    assert all(abs(count - 2**60) <= 2**12 for count in counts)
