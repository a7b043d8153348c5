"""The bounds hold as often as they say, and also where all results are alike."""

import numpy as np
import pytest
from scipy import stats

from gradprune.recovery.bounds import difference_at_least, mean_at_least


def test_of_zeros_and_ones_the_mean_is_bounded_by_wilsons_interval():
    results = np.repeat([1.0, 0.0], [37, 13])
    interval = stats.binomtest(37, 50).proportion_ci(0.9, method="wilson")
    assert mean_at_least(results, 0.95) == pytest.approx(interval.low)


def test_of_other_numbers_the_mean_is_bounded_by_students_t():
    results = np.random.default_rng(0).normal(size=12)
    assert mean_at_least(results, 0.95) == pytest.approx(
        stats.t.interval(0.9, 11, results.mean(), stats.sem(results))[0]
    )
    assert difference_at_least(results + 1.0, results, 0.95) == pytest.approx(1.0)


def test_results_that_do_not_vary_are_refused_where_nothing_says_how_they_could():
    with pytest.raises(ValueError, match="all 3 results are 1, which says nothing about how they vary"):
        mean_at_least(np.ones(3), 0.95, by_example=False)
    with pytest.raises(ValueError, match="all 40 results are 100"):
        mean_at_least(np.full(40, 100.0), 0.95)
    assert mean_at_least(np.ones(3), 0.95) < 0.6


def test_repetitions_that_are_alike_vary_as_much_as_those_beside_them():
    varied = np.array([0.9, 1.0, 1.1])
    wanted = stats.t.interval(0.9, 2, 1.0, stats.sem(varied))[0]
    assert mean_at_least(np.ones(3), 0.95, by_example=False, beside=varied) == pytest.approx(wanted)


@pytest.mark.parametrize(("low", "high"), [(0.0, 100.0), (-1.0, 1.0), (0.0, 1 / 7)])
def test_two_values_of_any_size_are_bounded_as_zeros_and_ones_are(low, high):
    these, those = np.repeat([1.0, 0.0], [37, 13]), np.repeat([1.0, 0.0, 1.0], [36, 12, 2])
    scaled = lambda x: low + (high - low) * x  # noqa: E731
    assert mean_at_least(scaled(these), 0.95) == pytest.approx(scaled(mean_at_least(these, 0.95)))
    wanted = (high - low) * difference_at_least(these, those, 0.95)
    assert difference_at_least(scaled(these), scaled(those), 0.95) == pytest.approx(wanted)
    unchanged = (high - low) * difference_at_least(these, these, 0.95)
    assert unchanged < -0.04 * (high - low)
    assert difference_at_least(scaled(these), scaled(these), 0.95) == pytest.approx(unchanged)
    right = mean_at_least(scaled(np.ones(50)), 0.95, beside=scaled(those))
    assert right == pytest.approx(scaled(mean_at_least(np.ones(50), 0.95)))


def test_that_nothing_changed_on_n_examples_leaves_a_difference_of_z_squared_over_n_plus_z_squared():
    z = stats.norm.ppf(0.95)
    assert difference_at_least(np.ones(100), np.ones(100), 0.95) == pytest.approx(-(z**2) / (100 + z**2))


def test_tangos_bound_is_where_the_score_test_of_its_paper_turns():
    """Its data in table 3: 44 and 43 of 100 pairs alike, 3 lost, 1 gained... the bound solves the score equation."""
    these, those = np.array([1.0] * 91 + [0.0] * 9), np.array([1.0] * 90 + [0.0] * 1 + [1.0] * 3 + [0.0] * 6)
    bound = difference_at_least(these, those, 0.975)
    gained, lost, n = 1, 3, 100
    a, b = 2 * n, -gained - lost + (2 * n - gained + lost) * bound
    worse = (np.sqrt(b * b + 4 * a * lost * bound * (1 - bound)) - b) / (2 * a)
    z = (gained - lost - n * bound) / np.sqrt(n * (2 * worse + bound * (1 - bound)))
    assert z == pytest.approx(stats.norm.ppf(0.975))
    assert bound < -0.02 < 0


@pytest.mark.parametrize(("n", "lost", "gained"), [(500, 0.02, 0.005), (1000, 0.01, 0.01), (100, 0.05, 0.02)])
def test_a_bound_with_95_percent_is_above_the_truth_in_5_percent_of_samples(n, lost, gained):
    rng, runs = np.random.default_rng(0), 1000
    missed = 0
    for _ in range(runs):
        kind = rng.choice(4, size=n, p=[0.5, 0.5 - lost - gained, lost, gained])
        dense, pruned = np.isin(kind, [0, 2]).astype(float), np.isin(kind, [0, 3]).astype(float)
        missed += difference_at_least(pruned, dense, 0.95) > gained - lost
    assert missed / runs < 0.05 + 3 * (0.05 * 0.95 / runs) ** 0.5
