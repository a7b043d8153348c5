"""May one say that one method is better than another?"""

import numpy as np
import pytest
from scipy import stats

from gradprune.lab.compare import (
    Difference,
    Noninferiority,
    holm,
    noninferior,
    noninferior_together,
    paired,
)


def test_a_paired_difference_is_what_students_t_says_of_the_gaps():
    these, those = [0.9, 0.8, 0.95, 0.7], [0.85, 0.7, 0.9, 0.72]
    found = paired(these, those)
    gaps = np.subtract(these, those)
    low, high = stats.t.interval(0.95, 3, gaps.mean(), stats.sem(gaps))
    assert (found.mean, found.low, found.high) == pytest.approx((gaps.mean(), low, high))
    assert found.p == pytest.approx(stats.ttest_rel(these, those).pvalue)


@pytest.mark.parametrize(("shift", "outcome"), [(0.5, "better"), (-0.5, "worse"), (0.0, "not shown")])
def test_better_and_worse_are_said_only_where_the_interval_leaves_out_zero(shift, outcome):
    noise = np.array([-0.2, 0.1, 0.15, -0.05])
    found = paired((noise + shift).tolist(), [0.0] * 4)
    assert found.outcome == outcome
    assert (found.low <= 0 <= found.high) == (outcome == "not shown")


def test_gaps_without_spread_are_better_unless_they_are_zero():
    assert paired([0.5, 0.5], [0.25, 0.25]).outcome == "better"
    assert paired([0.5, 0.5], [0.25, 0.25]).p == 0
    assert paired([0.5, 0.5], [0.5, 0.5]).outcome == "not shown"
    assert paired([0.5, 0.5], [0.5, 0.5]).p == 1


def test_a_difference_is_written_with_the_signs_that_it_has_before_rounding():
    assert str(Difference(0.004, -0.001, 0.126, 0.1)) == "+0.00 (-0.00 to +0.13)"
    assert str(Difference(-1e-17, -0.004, 1e-17, 1)) == "+0.00 (-0.00 to +0.00)"
    assert Difference(-0.071, -0.101, -0.041, 0.1).short == "-0.07 ±0.03"


@pytest.mark.parametrize("pairs", [([0.1, 0.2], [0.1]), ([0.1], [0.2])])
def test_pairs_must_be_pairs_and_two_at_least(pairs):
    with pytest.raises(ValueError):
        paired(*pairs)


def holms_textbook(ps, level=0.05):
    """All at least as small as p, adjusted by the largest of (m - rank) p so far, against the level."""
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    adjusted, so_far = [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        so_far = max(so_far, (len(ps) - rank) * ps[i])
        adjusted[i] = so_far
    return [a <= level for a in adjusted]


def test_holm_says_of_many_differences_what_adjusted_p_values_say():
    generator = np.random.default_rng(0)
    for _ in range(200):
        ps = (generator.random(generator.integers(1, 12)) ** 4).tolist()
        found = holm([Difference(1.0, 0.0, 0.0, p) for p in ps])
        assert found == ["better" if shown else "not shown" for shown in holms_textbook(ps)]


def test_holm_keeps_the_side_and_is_stricter_than_each_interval_alone():
    alone = Difference(-0.1, -0.19, -0.01, 0.03)
    assert alone.outcome == "worse"
    assert holm([alone]) == ["worse"]
    assert holm([alone, Difference(0.1, -0.1, 0.3, 0.3)]) == ["not shown", "not shown"]
    assert holm([]) == []


def test_noninferior_holds_fails_or_is_not_shown_by_where_its_interval_lies():
    reference = [0.10, 0.11, 0.09, 0.10, 0.105]
    noise = np.array([0.002, -0.001, 0.001, -0.002, 0.0])

    def outcome(factor, spread=1.0):
        return noninferior((factor * np.array(reference) + spread * noise).tolist(), reference, tolerance=0.2).outcome

    assert outcome(1.0) == outcome(0.8) == "holds"
    assert outcome(1.5) == "fails"
    assert outcome(1.19, spread=10) == outcome(1.21, spread=10) == "not shown"


def test_the_interval_of_a_growth_ends_where_the_paired_gap_is_just_shown():
    generator = np.random.default_rng(1)
    for _ in range(50):
        reference = generator.uniform(0.08, 0.12, 6)
        errors = reference * generator.uniform(0.9, 1.6) + generator.normal(0, 0.004, 6)
        found = noninferior(errors.tolist(), reference.tolist(), tolerance=0.2)
        for end in (found.low, found.high):
            assert paired(errors.tolist(), ((1 + end) * reference).tolist()).p == pytest.approx(0.05)
        gap = paired(errors.tolist(), (1.2 * reference).tolist())
        assert found.outcome == {"worse": "holds", "better": "fails"}.get(gap.outcome, "not shown")


def test_noninferior_without_spread_is_a_point():
    found = noninferior([0.11, 0.11], [0.1, 0.1], tolerance=0.2)
    assert (found.low, found.growth, found.high) == pytest.approx((0.1, 0.1, 0.1))
    assert (found.outcome, found.p) == ("holds", 0.0)
    assert str(found) == "+10 % (+10 % to +10 %)"


def test_outcomes_that_one_sentence_rests_on_are_corrected_together():
    made = [Noninferiority(g, 0.0, 0.0, 0.2, p) for g, p in [(0.1, 0.001), (0.4, 0.002), (0.15, 0.04), (0.15, 0.3)]]
    assert noninferior_together(made) == ["holds", "fails", "not shown", "not shown"]
    assert noninferior_together(made[2:3]) == ["holds"]


@pytest.mark.parametrize(
    ("errors", "reference", "tolerance", "message"),
    [
        ([0.1], [0.1], 0.2, "two pairs at least"),
        ([0.1, 0.2], [0.1], 0.2, "of one length"),
        ([0.1, -0.2], [0.1, 0.1], 0.2, "not negative"),
        ([0.1, float("nan")], [0.1, 0.1], 0.2, "finite"),
        ([0.1, 0.2], [0.1, 0.1], 0.0, "tolerance must be above 0"),
        ([0.1, 0.2], [0.0, 0.2], 0.1, "too few or too far apart"),
    ],
)
def test_noninferior_says_what_it_cannot_judge(errors, reference, tolerance, message):
    with pytest.raises(ValueError, match=message):
        noninferior(errors, reference, tolerance=tolerance)
