"""Paired differences whose pairs share what they were trained on; the rest is tested where the lab hands it on."""

import sys

import numpy as np
import pytest
from scipy import stats

from gradprune.core.paired import holm, interval, paired, standard_error

THESE, THOSE = [0.9, 0.8, 0.95, 0.7], [0.85, 0.7, 0.9, 0.72]


def test_without_overlap_it_is_the_paired_t_test():
    found = paired(THESE, THOSE)
    assert found.p == pytest.approx(stats.ttest_rel(THESE, THOSE).pvalue)


def test_overlap_widens_the_interval_by_the_root_of_one_plus_n_times_it():
    plain, wide = paired(THESE, THOSE), paired(THESE, THOSE, overlap=1 / 3)
    assert wide.mean == plain.mean
    assert (wide.high - wide.mean) / (plain.high - plain.mean) == pytest.approx((1 + 4 / 3) ** 0.5)
    assert wide.p > plain.p


def test_the_standard_error_is_scipys():
    assert standard_error(THESE) == pytest.approx(stats.sem(THESE))
    mean, low, high = interval(THESE, 0.9)
    assert (low, high) == pytest.approx(stats.t.interval(0.9, 3, np.mean(THESE), stats.sem(THESE)))
    assert mean == pytest.approx(np.mean(THESE))


def test_without_scipy_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match=r"pip install 'gradprune\[search\]'"):
        interval(THESE)


def test_better_and_worse_are_said_only_where_the_interval_leaves_out_zero():
    assert paired([0.5, 0.6, 0.7], [0.1, 0.2, 0.31]).outcome == "better"
    assert paired([0.1, 0.2, 0.31], [0.5, 0.6, 0.7]).outcome == "worse"
    assert paired(THESE, THOSE).outcome == "not shown"
    assert paired([0.2, -0.1], [0.1, 0.1]).outcome == "not shown"


def test_without_spread_a_difference_is_certain_and_none_is_none():
    assert paired([2.0, 3.0], [1.0, 2.0]).p == 0
    assert paired([1.0, 2.0], [1.0, 2.0]).p == 1
    assert holm([paired([2.0, 3.0], [1.0, 2.0]), paired([1.0, 2.0], [1.0, 2.0])]) == ["better", "not shown"]
