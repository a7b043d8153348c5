"""What `evaluate` may return, and what it may not."""

import numpy as np
import pytest
import torch
from torch import nn

from gradprune.recovery.outcome import mean_of, measured

ONE_NUMBER = [0.5, 1, np.float32(0.5), np.int64(2), torch.tensor(0.5), torch.tensor([[2]]), np.array(0.5)]
SEVERAL = [torch.tensor([True, False]), torch.tensor([1.0, 0.0]).bfloat16(), np.array([1, 0]), np.array([True, False])]


@pytest.mark.parametrize("returned", ONE_NUMBER, ids=repr)
def test_one_number_of_any_kind_is_its_own_mean(returned):
    found = measured(lambda m: returned, nn.Linear(1, 1), "here")
    assert found.mean == float(returned)
    assert not found.by_example


@pytest.mark.parametrize("returned", SEVERAL, ids=repr)
def test_results_by_example_are_averaged_in_double_precision(returned):
    found = measured(lambda m: returned, nn.Linear(1, 1), "here")
    assert (found.mean, found.by_example) == (0.5, True)
    assert found.each.dtype == np.float64


def test_a_tensor_that_wants_a_gradient_is_taken_without_it():
    model = nn.Linear(2, 1)
    assert measured(lambda m: m(torch.ones(3, 2))[:, 0], model, "here").by_example


@pytest.mark.parametrize("returned", [None, "x", True, [0.5], torch.ones(2, 2), torch.ones(0), 1j, 10**400])
def test_what_is_no_number_is_a_value_error(returned):
    with pytest.raises(ValueError, match="here"):
        measured(lambda m: returned, nn.Linear(1, 1), "here")


def test_a_nan_is_refused_but_where_it_is_asked_for():
    with pytest.raises(ValueError, match="evaluate returned NaN here"):
        measured(lambda m: torch.tensor([1.0, float("nan")]), nn.Linear(1, 1), "here")
    assert np.isnan(mean_of(float("nan"), "here"))
